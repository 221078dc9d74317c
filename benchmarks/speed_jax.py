"""How long a normalization layer takes on Keras's JAX backend: GPU or CPU.

    KERAS_BACKEND=jax python benchmarks/speed_jax.py            # minutes
    KERAS_BACKEND=jax python benchmarks/speed_jax.py --quick    # under one

Steps are chained inside one compiled loop (the weights of one are the next
one's), so a figure is the device's time and holds no launch. Contenders take
turns; figures are medians of ratios to Keras's BatchNormalization, with the
lowest and the highest. `bandwidth` is the share of the copy bandwidth,
measured in the same way, that a training step reaches if it moves nine tensors
(forward: read x for the mean, for the variance and for y, write y; backward:
read x and dy twice, write dx); inference moves two.

Prints a table and writes JSON into `--output`.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import timing
from chains import chain, compiled
from networks_made import layers_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

SHAPES = {
    "conv 256x56x56x64": (256, 56, 56, 64),
    "conv 32x56x56x64": (32, 56, 56, 64),
    "conv 8x112x112x64": (8, 112, 112, 64),
    "conv 128x8x8x512": (128, 8, 8, 512),
    "conv 4x28x28x256": (4, 28, 28, 256),
    "dense 4096x256": (4096, 256),
    "dense 256x1024": (256, 1024),
    "conv 2x7x7x32": (2, 7, 7, 32),
}
BASELINE = "Keras 3 BN"
TENSORS = {"train": 9, "inference": 2}


def chained(layer, what, inputs, upstream, length):
    """A chain of `length` steps of a layer."""
    layer.build(inputs.shape)
    trained = [weight.value for weight in layer.trainable_variables]
    kept = [weight.value for weight in layer.non_trainable_variables]

    def train(carry, given):
        (trained, kept), (inputs, upstream) = carry, given

        def call(trained, inputs):
            return layer.stateless_call(trained, kept, inputs, training=True)

        outputs, pull, kept = jax.vjp(call, trained, inputs, has_aux=True)
        # In a network the gradient arrives after the outputs are there.
        outputs, upstream = jax.lax.optimization_barrier((outputs, upstream))
        gradients, d_inputs = pull(upstream)
        trained = [
            # As Keras's optimizers.
            gradient
            if variable.overwrite_with_gradient
            else weight - 1e-6 * gradient
            for variable, weight, gradient in zip(
                layer.trainable_variables, trained, gradients, strict=True
            )
        ]
        return (trained, kept), [outputs, d_inputs]

    def inference(carry, given):
        outputs, kept = layer.stateless_call(*carry, *given)
        return (carry[0], kept), [outputs]

    if what == "inference":
        return chain(inference, (trained, kept), [inputs], length)
    return chain(train, (trained, kept), (inputs, upstream), length)


def copier(inputs, length):
    """A chain that reads and writes a tensor `length` times."""
    return chain(lambda carry, given: (carry + 1, [-given]), 0, inputs, length)


def run_case(shape, dtype, what, length, seconds):
    keys = jax.random.split(jax.random.key(0))
    inputs, upstream = (jax.random.normal(key, shape, dtype) for key in keys)
    functions = {
        name: chained(layer, what, inputs, upstream, length)
        for name, layer in layers_of(dtype).items()
    }
    functions["copy"] = copier(inputs, length)
    times = timing.interleaved(compiled(functions), seconds)
    times = {name: values / length for name, values in times.items()}
    result = timing.ratios(times, BASELINE)
    shares = timing.ratios(
        {name: times["copy"] / values for name, values in times.items()},
        "copy",
    )
    for name, value in result.items():
        value["bandwidth"] = shares[name]["median"] * TENSORS[what] / 2
    copied = 2 * inputs.size * inputs.dtype.itemsize
    seconds_copy = result.pop("copy")["milliseconds"] / 1e3
    return {
        "ratios": result,
        "copy_gigabytes_per_second": copied / seconds_copy / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--length", type=int, help="steps of a chain")
    parser.add_argument("--output", type=Path, default=Path("output/speed_jax"))
    parser.add_argument("--seconds", type=float, help="of a case")
    options = parser.parse_args()
    device = jax.devices()[0]
    length = options.length or (100 if device.platform == "gpu" else 4)
    labels = list(SHAPES)
    if options.quick:
        labels = ["dense 4096x256", "conv 2x7x7x32"]
    elif device.platform == "cpu":
        labels = labels[1:]
    todo = [
        (what, dtype, label)
        for what in TENSORS
        for dtype in ("float32", "bfloat16")
        for label in labels
    ]
    seconds = options.seconds or (0.2 if options.quick else 2.0)
    console = Console(width=max(Console().width, 120))
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for what, dtype, label in todo:
            name = f"{what}, {dtype}, {label}"
            progress.update(task, description=f"{name:<45}")
            row = {"what": what, "dtype": dtype, "label": label}
            row |= run_case(SHAPES[label], dtype, what, length, seconds)
            rows.append(row)
            progress.advance(task)
    table = Table("case", "Keras 3 BN, ms", "copy, GB/s", title=str(device))
    for name in rows[0]["ratios"]:
        table.add_column(f"{name}\nratio, bandwidth", justify="right")
    for row in rows:
        cells = [
            f"{value['median']:.2f}  {value['bandwidth']:.0%}"
            for value in row["ratios"].values()
        ]
        table.add_row(
            f"{row['what']}, {row['dtype']}, {row['label']}",
            f"{row['ratios'][BASELINE]['milliseconds']:.3f}",
            f"{row['copy_gigabytes_per_second']:.0f}",
            *cells,
        )
    console.print(table)
    path = options.output / f"speed_jax_{device.platform}.json"
    timing.write(
        path,
        {
            "machine": {
                **timing.machine(),
                "device": device.device_kind,
            },
            "chain": length,
            "cases": rows,
        },
    )
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
