"""How long whole networks take, beside the same ones with Keras's layer.

    python benchmarks/networks.py            # about 45 minutes on two cores
    python benchmarks/networks.py --quick    # a minute or two

Networks of `keras.applications` with other normalization in the place of
Keras's BatchNormalization. Each network is measured in processes of its own,
three of them (`--processes`), in which all contenders take turns; a figure is
the median of the ratios to Keras's BatchNormalization, with the lowest and the
highest. Time is the processor's, of all threads: what else runs on a machine
changes it less than what a clock on the wall shows. "no normalization" is the
floor: nothing in its place. "share" is what normalization itself adds to that
floor in a training step, Keras's = 1.

- inference: in a graph (`tf.function`), 224 x 224 images, and in bfloat16
  (`mixed_bfloat16`); predict: by `predict`. Our layers do the same there;
- training step: `train_on_batch` with SGD, images as in the table. The layer
  that measures its minibatches ("corrected") corrects in the first tens of
  steps; "gate shut" is the same one when it has found them good;
- frozen: the same with all normalization held by `trainable = False`; and with
  frozen statistics alone, gamma and beta trained: Keras's layer is called with
  `training=False` for that, ours is told by `freeze_statistics`;
- first train_on_batch: the first training step, which traces and compiles it;
- first eager call: `model(images, training=True)`, the first of its process.

Prints a table; writes JSON and a picture into `--output`.
`networks_report.py` has how they look.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import networks_report
import numpy as np
import tensorflow as tf
import timing
from networks_made import application, contenders, replaced, shut_gates
from networks_report import BASELINE, FLOOR, FOLDED, NETWORKS, RIVAL, SHUT
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import keras_renorm

# Each network is a function of its own here, of which TensorFlow warns.
tf.get_logger().setLevel("ERROR")

CLOCK = time.process_time
QUICK = (BASELINE, "our renorm", FLOOR)


def seconds_of(function):
    start = CLOCK()
    function()
    return CLOCK() - start


def first_and_later_steps(name, order, seconds, is_quick):
    """Seconds of the first steps, and of those after."""
    batch_size, size = NETWORKS[name]
    networks = contenders(name, size, QUICK if is_quick else None)
    images = tf.random.normal((batch_size, size, size, 3))
    labels = np.arange(batch_size) % 10
    # What TensorFlow itself does once a process.
    warm = keras.Sequential([keras.layers.Conv2D(8, 3), keras.layers.ReLU()])
    warm(images, training=True)
    names = list(np.random.default_rng(order).permutation(list(networks)))
    result = {
        "first eager call": {
            each: [
                seconds_of(lambda m=networks[each]: m(images, training=True))
            ]
            for each in names
        }
    }
    steps = _steps_of({each: networks[each] for each in names}, images, labels)
    result["first train_on_batch"] = {
        each: [seconds_of(steps[each])] for each in names
    }
    shut = keras_renorm.convert(application(name, size))
    steps |= _steps_of({SHUT: shut}, images, labels)
    result["training step"] = timing.interleaved(
        steps, seconds, 1, CLOCK, {SHUT: lambda: shut_gates(shut.layers)}
    )
    return result


class Inferring(keras.layers.BatchNormalization):
    """Keras's, which uses its moving statistics in training also."""

    def call(self, inputs, training=None, mask=None):
        """As in inference; gamma and beta train."""
        return super().call(inputs, training=False, mask=mask)


def untrainable_steps(name, seconds):
    """Seconds of a training step, all normalization held by `trainable`."""
    model = application(name, NETWORKS[name][1])
    converted = keras_renorm.convert(model, gradient_momentum=None)
    for network in (model, converted):
        for layer in network.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
    return _steps({BASELINE: model, "our renorm": converted}, name, seconds)


def frozen_steps(name, seconds):
    """The same with frozen statistics, while gamma and beta train."""
    model = application(name, NETWORKS[name][1])
    converted = keras_renorm.convert(model, gradient_momentum=None)
    with warnings.catch_warnings():
        # That they were never trained is no matter here.
        warnings.simplefilter("ignore", UserWarning)
        keras_renorm.freeze_statistics(converted)
    inferring = replaced(
        model, lambda layer: Inferring.from_config(layer.get_config())
    )
    networks = {BASELINE: inferring, "our renorm": converted}
    return _steps(networks, name, seconds)


def _steps(networks, name, seconds):
    batch_size, size = NETWORKS[name]
    images = tf.random.normal((batch_size, size, size, 3))
    labels = np.arange(batch_size) % 10
    steps = _steps_of(networks, images, labels)
    return timing.interleaved(steps, seconds, 2, CLOCK)


def _steps_of(networks, images, labels):
    """Training steps, by name."""
    steps = {}
    for each, network in networks.items():
        network.compile(
            keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy"
        )
        steps[each] = lambda network=network: network.train_on_batch(
            images, labels
        )
    return steps


def inference(name, batch_size, seconds, is_quick):
    """Seconds of inference in a graph, folded too."""
    networks = contenders(name, 224, QUICK if is_quick else None)
    for same in (RIVAL, "our BN", "our renorm, corrected"):
        networks.pop(same, None)
    networks[FOLDED] = keras_renorm.fold(networks[BASELINE])
    return _inference(networks, batch_size, seconds)


def in_bfloat16(name, batch_size, seconds):
    """The same of 16-bit networks, Keras's and ours."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = application(name, 224)
        networks = {
            BASELINE: model,
            "our renorm": keras_renorm.convert(model, gradient_momentum=None),
        }
        return _inference(networks, batch_size, seconds)
    finally:
        keras.config.set_dtype_policy(policy)


def _inference(networks, batch_size, seconds):
    images = tf.random.normal((batch_size, 224, 224, 3))

    def of(network):
        run = tf.function(lambda x: network(x, training=False), autograph=False)
        return lambda: run(images).numpy()

    return timing.interleaved(
        {each: of(network) for each, network in networks.items()},
        seconds,
        2,
        CLOCK,
    )


def predictions(name, batch_size, seconds):
    """Seconds of `predict`, Keras's and ours, folded too."""
    model = application(name, 224)
    images = np.random.default_rng(0).normal(size=(batch_size, 224, 224, 3))
    images = images.astype("float32")
    networks = {
        BASELINE: model,
        "our renorm": keras_renorm.convert(model, gradient_momentum=None),
        FOLDED: keras_renorm.fold(model),
    }
    return timing.interleaved(
        {
            each: lambda network=network: network.predict(
                images, batch_size, verbose=0
            )
            for each, network in networks.items()
        },
        seconds,
        2,
        CLOCK,
    )


def measure(name, order, is_quick):
    """All rows of a network, once: row to contender to seconds."""
    seconds = 3 if is_quick else 15
    rows = first_and_later_steps(name, order, seconds, is_quick)
    keras.utils.clear_session()
    for batch_size in (1,) if is_quick else (1, 16):
        rows[f"inference, batch {batch_size}"] = inference(
            name, batch_size, seconds, is_quick
        )
    rows["inference, predict, batch 1"] = predictions(name, 1, seconds)
    if not is_quick:
        rows["inference, predict, batch 16"] = predictions(name, 16, seconds)
        rows["inference, bfloat16, batch 8"] = in_bfloat16(name, 8, seconds)
    rows["training step, frozen"] = untrainable_steps(name, seconds)
    rows["training step, frozen statistics"] = frozen_steps(name, seconds)
    return {
        row: {each: list(values) for each, values in times.items()}
        for row, times in rows.items()
    }


def in_a_process(name, order, is_quick):
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, str(order)]
    if is_quick:
        command.append("--quick")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(output.stdout.splitlines()[-1])


def pooled(runs):
    """Ratios of each row, from the seconds of several processes."""
    result = {}
    for row in runs[0]:
        times = {
            name: np.concatenate([run[row][name] for run in runs])
            for name in runs[0][row]
        }
        result[row] = timing.ratios(times, BASELINE)
        if row == "training step":
            added = {
                name: values - times[FLOOR]
                for name, values in times.items()
                if name != FLOOR
            }
            result["share"] = timing.ratios(added, BASELINE)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/networks"))
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, order = options.measure
        print(json.dumps(measure(name, int(order), options.quick)))
        return
    names = ["MobileNetV2"] if options.quick else list(NETWORKS)
    processes = 1 if options.quick else options.processes
    console = Console(width=max(Console().width, 170))
    runs = {name: [] for name in names}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(names) * processes)
        for order in range(processes):
            for name in names:
                progress.update(task, description=f"{name:<16}")
                runs[name].append(in_a_process(name, order, options.quick))
                progress.advance(task)
    networks = {name: pooled(of_one) for name, of_one in runs.items()}
    head, *body = networks_report.table_rows(networks)
    table = Table(*head)
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    machine = timing.machine()
    timing.write(
        options.output / "networks.json",
        {"machine": machine, "networks": networks},
    )
    networks_report.draw(networks, options.output / "networks.png")
    console.print(f"wrote networks.json and networks.png to {options.output}")


if __name__ == "__main__":
    main()
