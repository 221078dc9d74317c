"""What sharing statistics costs: a training step on two replicas.

    python benchmarks/replicas.py            # about 3 minutes on two cores
    python benchmarks/replicas.py --quick    # half a minute

Two logical CPU devices under `MirroredStrategy`. Keras's layer and ours, each
with and without `synchronized=True`, take turns in one process; figures are
medians of ratios to Keras's unsynchronized layer, with the lowest and the
highest. Shapes are those of both replicas together.

Prints a table and writes JSON into `--output`.
"""

import argparse
import functools
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
import timing
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_renorm

SHAPES = {
    "conv 32x56x56x64": (32, 56, 56, 64),
    "conv 128x8x8x512": (128, 8, 8, 512),
    "dense 4096x256": (4096, 256),
    "conv 4x7x7x32": (4, 7, 7, 32),
}
KINDS = {
    "Keras BN": keras.layers.BatchNormalization,
    "our BN": keras_renorm.BatchNormalization,
    "our renorm": functools.partial(
        keras_renorm.BatchRenormalization, gradient_momentum=None
    ),
}
BASELINE = "Keras BN"


def step_of(strategy, kind, inputs, upstream, **arguments):
    """A function that runs one training step on all replicas."""
    with strategy.scope():
        layer = kind(**arguments)
        layer.build((None, *inputs.shape[1:]))
    parts = [
        tf.split(tensor, strategy.num_replicas_in_sync)
        for tensor in (inputs, upstream)
    ]
    values = [
        strategy.experimental_distribute_values_from_function(
            lambda context, part=part: part[context.replica_id_in_sync_group]
        )
        for part in parts
    ]

    def train(x, d_y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
        weights = [weight.value for weight in layer.trainable_variables]
        return tape.gradient(outputs, [x, *weights], output_gradients=d_y)[0]

    run = tf.function(lambda *values: strategy.run(train, values))

    def step():
        run(*values)
        tf.test.experimental.sync_devices()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/speed"))
    options = parser.parse_args()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    console = Console()
    names = list(SHAPES)[:: 3 if options.quick else 1]
    results = {}
    for name in track(names, "Two replicas", console=console):
        inputs, upstream = tf.random.normal((2, *SHAPES[name]))
        functions = {}
        for label, kind in KINDS.items():
            functions[label] = step_of(strategy, kind, inputs, upstream)
            functions[f"{label}, synchronized"] = step_of(
                strategy, kind, inputs, upstream, synchronized=True
            )
        times = timing.interleaved(functions, 1 if options.quick else 30)
        results[name] = timing.ratios(times, BASELINE)
    table = Table("shape", "Keras BN, ms", title="A step on two replicas")
    for label in list(results[names[0]])[1:]:
        table.add_column(label, justify="right")
    for name, ratios in results.items():
        cells = [
            f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"
            for value in ratios.values()
        ]
        milliseconds = f"{ratios[BASELINE]['milliseconds']:.2f}"
        table.add_row(name, milliseconds, *cells[1:])
    console.print(table)
    path = options.output / "replicas_cpu.json"
    timing.write(path, {"machine": timing.machine(), "cases": results})
    console.print(f"Written: {path}")


if __name__ == "__main__":
    main()
