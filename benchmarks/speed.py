"""How long a normalization layer takes, beside Keras 3 and Keras 2.

    python benchmarks/speed.py            # about 12 minutes on two cores
    python benchmarks/speed.py --quick    # under two minutes

All contenders of a case take turns in one process; a figure is the median of
the ratios to Keras's BatchNormalization in the same mode, with the lowest and
the highest. `floor` is what moving the bytes takes: eight input tensors for a
training step (forward: read x twice, write y; backward: read x and dy twice,
write dx), two for inference, at the speed at which this process copies a
tensor of that size. The Keras 2 columns need tf_keras, and are left out
without it.

Prints tables; writes JSON into `--output`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import timing
from networks_made import CLIPPING, layers_of, shut_gates
from networks_report import SHUT
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import keras_renorm

try:
    import tf_keras
except ImportError:
    tf_keras = None

SHAPES = {
    "conv 32x56x56x64": (32, 56, 56, 64),
    "conv 8x112x112x64": (8, 112, 112, 64),
    "conv 128x8x8x512": (128, 8, 8, 512),
    "conv 4x28x28x256": (4, 28, 28, 256),
    "dense 4096x256": (4096, 256),
    "dense 256x1024": (256, 1024),
    "conv 2x7x7x32": (2, 7, 7, 32),
}
LARGE = list(SHAPES)[:3]
BASELINE = "Keras 3 BN"
OURS = ("our BN", "our renorm", "our renorm, corrected")


def contenders(dtype):
    """Name to layer; each with its own state."""
    layers = layers_of(dtype)
    if tf_keras is not None:
        policy = layers[BASELINE].dtype_policy.name
        layers["Keras 2 BN"] = tf_keras.layers.BatchNormalization(dtype=policy)
        layers["Keras 2 renorm"] = tf_keras.layers.BatchNormalization(
            renorm=True, renorm_clipping=CLIPPING, dtype=policy
        )
    return layers


def operation(layer, what):
    """A function of inputs and upstream gradient."""

    def train(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
        weights = [
            getattr(weight, "value", weight)
            if isinstance(layer, keras.Layer)
            else weight
            for weight in layer.trainable_variables
        ]
        # All of it, for a graph computes what is asked for and nothing else.
        return outputs, tape.gradient(
            outputs, [inputs, *weights], output_gradients=upstream
        )

    def forward(inputs, upstream):
        return layer(inputs, training=True)

    def inference(inputs, upstream):
        return layer(inputs, training=False)

    return {"train": train, "forward": forward, "inference": inference}[what]


def run_case(mode, dtype, shape, what, seconds):
    """Ratios of one case, the floor among them."""
    inputs = tf.cast(tf.random.normal(shape), dtype)
    upstream = tf.cast(tf.random.normal(shape), dtype)
    functions, layers = {}, contenders(dtype)
    if what == "train" and mode == "graph":
        layers[SHUT] = layers_of(dtype)[OURS[-1]]
    for name, layer in layers.items():
        layer(inputs)
        function = operation(layer, what)
        if mode != "eager":
            function = tf.function(function, jit_compile=mode == "xla")
        functions[name] = lambda function=function: _wait(
            function(inputs, upstream)
        )
    functions["copy"] = timing.copier(inputs.numpy())
    times = timing.interleaved(
        functions,
        seconds,
        prepare={SHUT: lambda: shut_gates([layers[SHUT]])},
    )
    result = timing.ratios(times, BASELINE)
    tensors = {"train": 8, "forward": 3, "inference": 2}[what]
    copy = result.pop("copy")
    result["floor"] = {key: value * tensors / 2 for key, value in copy.items()}
    return result


def _wait(_):
    tf.test.experimental.sync_devices()


def cases(is_quick):
    """`(group, mode, dtype, label, shape, what)`, in the order to run."""
    if is_quick:
        for label in (LARGE[0], "dense 4096x256", "conv 2x7x7x32"):
            shape = SHAPES[label]
            yield "training step", "graph", "float32", label, shape, "train"
        yield (
            "inference",
            "graph",
            "float32",
            LARGE[0],
            SHAPES[LARGE[0]],
            ("inference"),
        )
        return
    for mode in ("graph", "eager", "xla"):
        for group, what in (
            ("training step", "train"),
            ("forward", "forward"),
            ("inference", "inference"),
        ):
            if what == "forward" and mode != "graph":
                continue
            for label, shape in SHAPES.items():
                yield group, mode, "float32", label, shape, what
    for dtype in ("bfloat16", "float16"):
        for label in LARGE:
            yield "training step", "graph", dtype, label, SHAPES[label], "train"
    for batch in (1, 4, 16, 64):
        shape = (batch, 28, 28, 64)
        yield "growth: batch", "graph", "float32", str(batch), shape, "train"
    for channels in (16, 64, 256, 1024):
        shape = (32, 14, 14, channels)
        yield (
            "growth: channels",
            "graph",
            "float32",
            str(channels),
            shape,
            ("train"),
        )


def resnet20(normalization):
    """ResNet-20 for 32 x 32 images (He et al. 2016, section 4.2)."""

    def block(x, filters, stride):
        y = keras.layers.Conv2D(
            filters, 3, stride, padding="same", use_bias=False
        )(x)
        y = keras.layers.ReLU()(normalization()(y))
        y = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
        y = normalization()(y)
        if stride != 1:
            x = keras.layers.Conv2D(filters, 1, stride, use_bias=False)(x)
            x = normalization()(x)
        return keras.layers.ReLU()(x + y)

    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    x = keras.layers.ReLU()(normalization()(x))
    for filters in (16, 32, 64):
        for at in range(3):
            x = block(x, filters, 2 if filters > 16 and at == 0 else 1)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def run_fit(model, callbacks, batch_size, steps):
    """A function that trains so many steps through `fit`."""
    x = np.random.default_rng(0).normal(size=(batch_size * steps, 32, 32, 3))
    y = np.random.default_rng(1).integers(0, 10, len(x))
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x = x.astype("float32")
    return lambda: model.fit(
        x, y, batch_size=batch_size, verbose=0, callbacks=list(callbacks)
    )


def _uncorrected():
    return keras_renorm.BatchRenormalization(gradient_momentum=None)


def run_resnet(seconds):
    """Ratios of ten steps of ResNet-20 through `fit`, batch 32."""
    kinds = {
        BASELINE: keras.layers.BatchNormalization,
        "our BN": keras_renorm.BatchNormalization,
        "our renorm": _uncorrected,
        "our renorm, corrected": keras_renorm.BatchRenormalization,
    }
    functions = {
        name: run_fit(resnet20(kind), [], 32, 10)
        for name, kind in kinds.items()
    }
    return timing.ratios(timing.interleaved(functions, seconds, 1), BASELINE)


def run_callbacks(seconds):
    """What `RenormScheduler` takes of a step, and once a run.

    ResNet-20, batch 8, 50 steps through `fit`; the time inside the callback's
    own methods, over the time of a step.
    """
    result = {}
    for name, limits in (
        ("RenormScheduler()", ()),
        ("RenormScheduler(function)", (lambda step: 1 + step / 1e4, 1.0)),
    ):
        scheduler = keras_renorm.callbacks.RenormScheduler(*limits)
        spent = {"step": [], "run": []}
        for method in (
            "on_train_begin",
            "on_epoch_begin",
            "on_train_batch_begin",
            "on_train_batch_end",
            "on_epoch_end",
        ):
            kind = spent["step" if "batch" in method else "run"]
            setattr(scheduler, method, _timed(getattr(scheduler, method), kind))
        train = run_fit(resnet20(_uncorrected), [scheduler], 8, 50)
        train()
        for times in spent.values():
            times.clear()
        start = time.perf_counter()
        train()
        whole = time.perf_counter() - start
        result[name] = {
            # The first batch measures how often layers are called.
            "share_of_a_step": sum(spent["step"][2:]) / 49 / (whole / 50),
            "milliseconds_a_run": 1e3
            * (sum(spent["run"]) + sum(spent["step"][:2])),
        }
    return result


def _timed(method, times):
    def timed(*arguments, **named):
        start = time.perf_counter()
        method(*arguments, **named)
        times.append(time.perf_counter() - start)

    return timed


def memory_of(name, mode, depths=(8, 24)):
    """Input tensors kept per layer on a deep stack, in a fresh process.

    Peak resident memory of a training step of 24 layers, less that of a step
    of 8, over the bytes of 16 tensors.
    """
    peaks = []
    for layers in depths:
        command = [sys.executable, __file__, "--memory", name, mode]
        output = subprocess.run(
            [*command, str(layers)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        peaks.append(int(output.split()[-1]))
    tensor = 4 * np.prod(SHAPES[LARGE[0]])
    return (peaks[1] - peaks[0]) / (tensor * (depths[1] - depths[0]))


def print_peak_memory(name, mode, depth):
    """Runs one training step of a stack and prints its peak in bytes."""
    shape = SHAPES[LARGE[0]]
    layers = [contenders("float32")[name] for _ in range(depth)]
    for layer in layers:
        layer.build(shape)
    inputs = tf.random.normal(shape)

    def step(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = inputs
            for layer in layers:
                outputs = layer(outputs, training=True)
        return tape.gradient(outputs, inputs)

    if mode == "graph":
        step = tf.function(step)
    step(inputs)
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            print(int(line.split()[1]) * 1024)


def print_tables(console, results):
    """A table for each group and mode."""
    groups = {}
    for row in results["cases"]:
        key = (row["group"], row["mode"], row["dtype"])
        groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        names = list(rows[0]["ratios"])
        table = Table("shape", "Keras 3 BN, ms", title=", ".join(key))
        for name in names[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            cells = [
                f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"
                for value in row["ratios"].values()
            ]
            first = row["ratios"][BASELINE]["milliseconds"]
            table.add_row(row["label"], f"{first:.2f}", *cells[1:])
        console.print(table)
    table = Table("ResNet-20, batch 32, ten steps", "ratio", "ms")
    for name, value in results.get("resnet20", {}).items():
        ratio = f"{value['median']:.2f} ({value['min']:.2f}–{value['max']:.2f})"
        table.add_row(name, ratio, f"{value['milliseconds']:.0f}")
    if table.row_count:
        console.print(table)
    table = Table("callback", "share of a step", "ms a run")
    for name, value in results.get("callbacks", {}).items():
        table.add_row(
            name,
            f"{value['share_of_a_step']:.2%}",
            f"{value['milliseconds_a_run']:.0f}",
        )
    if table.row_count:
        console.print(table)
    table = Table("memory kept for the backward pass", "mode", "tensors/layer")
    for row in results.get("memory", []):
        table.add_row(row["layer"], row["mode"], f"{row['tensors']:.2f}")
    if table.row_count:
        console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/speed"))
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        name, mode, depth = options.memory
        print_peak_memory(name, mode, int(depth))
        return
    console = Console(width=max(Console().width, 150))
    todo = list(cases(options.quick))
    memory = [
        (name, mode)
        for mode in ("graph", "eager")
        for name in (BASELINE, *OURS)
        if not options.quick
    ]
    results = {
        "machine": timing.machine(),
        "cases": [],
        "memory": [],
    }
    extra = 0 if options.quick else 2
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(todo) + len(memory) + extra)
        for group, mode, dtype, label, shape, what in todo:
            name = f"{group}, {mode}, {dtype}, {label}"
            progress.update(task, description=f"{name:<60}")
            row = {
                "group": group,
                "mode": mode,
                "dtype": dtype,
                "label": label,
                "shape": shape,
                "ratios": run_case(
                    mode, dtype, shape, what, 0.3 if options.quick else 2
                ),
            }
            results["cases"].append(row)
            keras.utils.clear_session()
            progress.advance(task)
        if not options.quick:
            for name, run in (
                ("resnet20", run_resnet),
                ("callbacks", run_callbacks),
            ):
                progress.update(task, description=f"{name:<60}")
                results[name] = run(40)
                progress.advance(task)
        for name, mode in memory:
            progress.update(task, description=f"memory, {name}, {mode:<30}")
            results["memory"].append(
                {"layer": name, "mode": mode, "tensors": memory_of(name, mode)}
            )
            progress.advance(task)
    print_tables(console, results)
    timing.write(options.output / "speed.json", results)
    console.print(f"wrote {options.output}/speed.json")


if __name__ == "__main__":
    main()
