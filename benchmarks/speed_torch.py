"""How long normalization takes on Keras's PyTorch backend, on a CPU.

    KERAS_BACKEND=torch python benchmarks/speed_torch.py            # 8 minutes
    KERAS_BACKEND=torch python benchmarks/speed_torch.py --quick    # under one

Layers alone, and whole networks of `keras.applications`. Contenders take turns
in one process; figures are medians of ratios of wall time to Keras's
BatchNormalization, with the lowest and the highest. `torch` is PyTorch's own
`BatchNorm2d` on a view with channels last, without a layer of Keras around it.

Prints tables and writes JSON into `--output`.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import timing
import torch
from networks_made import contenders, layers_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

SHAPES = {
    "conv 32x56x56x64": (32, 56, 56, 64),
    "conv 128x8x8x512": (128, 8, 8, 512),
    "dense 4096x256": (4096, 256),
    "dense 256x1024": (256, 1024),
    "dense 256x256": (256, 256),
    "dense 32x64": (32, 64),
    "conv 2x7x7x32": (2, 7, 7, 32),
}
NETWORKS = {"ResNet50": 64, "MobileNetV2": 96}
BASELINE = "Keras 3 BN"
# By their names in networks.py.
NETWORK_CONTENDERS = (
    "Keras BN",
    "Keras renorm",
    "our BN",
    "our renorm",
    "our renorm, corrected",
)


class OwnOfTorch(torch.nn.Module):
    """PyTorch's layer on a view that it reads at the speed of memory."""

    def __init__(self, channels):
        super().__init__()
        self.layer = torch.nn.BatchNorm2d(channels)

    def forward(self, inputs, training=False):
        """As a layer of Keras is called."""
        self.layer.train(training)
        rows = inputs.reshape(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        return self.layer(rows).permute(0, 2, 3, 1).reshape(inputs.shape)


def step_of(layer, what, inputs, upstream):
    def train():
        given = inputs.detach().requires_grad_()
        layer(given, training=True).backward(upstream)
        for weight in layer.parameters():
            weight.grad = None

    def infer():
        with torch.no_grad():
            layer(inputs, training=False)

    return train if what == "train" else infer


def run_case(shape, dtype, what, seconds):
    generator = torch.Generator().manual_seed(0)
    inputs, upstream = (
        torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for _ in range(2)
    )
    layers = {**layers_of(dtype), "torch": OwnOfTorch(shape[-1])}
    functions = {
        name: step_of(layer, what, inputs, upstream)
        for name, layer in layers.items()
    }
    times = timing.interleaved(functions, seconds)
    return timing.ratios(times, BASELINE)


def run_network(name, what, seconds):
    size = NETWORKS[name]
    images = np.random.default_rng(0).normal(size=(16, size, size, 3))
    images = images.astype("float32")
    labels = np.arange(16) % 10
    networks = contenders(name, size, NETWORK_CONTENDERS)
    functions = {}
    for contender, model in networks.items():
        model.compile("sgd", "sparse_categorical_crossentropy")
        functions[contender.replace("Keras", "Keras 3")] = (
            (lambda model=model: model.train_on_batch(images, labels))
            if what == "train"
            else (lambda model=model: model.predict_on_batch(images))
        )
    return timing.ratios(timing.interleaved(functions, seconds), BASELINE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("output/speed_torch")
    )
    parser.add_argument("--seconds", type=float, help="of a case")
    options = parser.parse_args()
    seconds = options.seconds or (0.2 if options.quick else 4.0)
    shapes = list(SHAPES)[-2:] if options.quick else list(SHAPES)
    todo = [
        (what, dtype, label)
        for what in ("train", "inference")
        for dtype in ("float32", "bfloat16")
        for label in shapes
    ]
    if not options.quick:
        todo += [
            (what, "float32", name)
            for name in NETWORKS
            for what in ("train", "inference")
        ]
    rows = []
    console = Console(width=max(Console().width, 120))
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for what, dtype, label in todo:
            name = f"{what}, {dtype}, {label}"
            progress.update(task, description=f"{name:<45}")
            ratios = (
                run_case(SHAPES[label], dtype, what, seconds)
                if label in SHAPES
                else run_network(label, what, 10 * seconds)
            )
            rows.append(
                {"what": what, "dtype": dtype, "label": label, "ratios": ratios}
            )
            progress.advance(task)
    columns = list(rows[0]["ratios"])
    table = Table("case", f"{BASELINE}, ms", *columns[1:])
    for row in rows:
        table.add_row(
            f"{row['what']}, {row['dtype']}, {row['label']}",
            f"{row['ratios'][BASELINE]['milliseconds']:.3f}",
            *(
                f"{row['ratios'][name]['median']:.2f}"
                if name in row["ratios"]
                else ""
                for name in columns[1:]
            ),
        )
    console.print(table)
    path = options.output / "speed_torch_cpu.json"
    timing.write(
        path,
        {
            "machine": {**timing.machine(), "backend": "torch"},
            "cases": rows,
        },
    )
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
