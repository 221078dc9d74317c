"""Measures what `RenormMonitor(every=100)` adds to a training step.

    python benchmarks/monitor.py

Its own time: what its methods take, waiting for the weights included, over the
time of the steps. Beside it the difference between runs of `fit` with it and
without it, which take turns, median and 10 to 90 %: on a busy machine that is
noise, on a quiet one it would show a cost that its methods do not. Takes about
three minutes.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import timing
from keras import layers
from rich.console import Console
from rich.table import Table

import keras_renorm
from keras_renorm.callbacks import RenormMonitor

EVERY = 100


def small():
    """Four normalized convolutions on small images: a step of few ms."""
    stack = [keras.Input((16, 16, 3))]
    for filters in (16, 16, 32, 32):
        stack += [
            layers.Conv2D(filters, 3, use_bias=False),
            keras_renorm.BatchRenormalization(r_max=3.0, d_max=5.0),
            layers.ReLU(),
        ]
    return keras.Sequential(
        [*stack, layers.GlobalAveragePooling2D(), layers.Dense(10)]
    )


def resnet20():
    """He et al. 2016 for CIFAR: 19 normalizations."""
    inputs = keras.Input((32, 32, 3))

    def normalized(x, filters, stride=1):
        x = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x)
        return keras_renorm.BatchRenormalization(r_max=3.0, d_max=5.0)(x)

    x = layers.ReLU()(normalized(inputs, 16))
    for filters in (16, 32, 64):
        for block in range(3):
            stride = 2 if filters > 16 and block == 0 else 1
            shortcut = x
            if stride == 2:
                shortcut = layers.AveragePooling2D(2)(x)
                shortcut = layers.Concatenate()([shortcut, shortcut])
            y = layers.ReLU()(normalized(x, filters, stride))
            x = layers.ReLU()(normalized(y, filters) + shortcut)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


class TimedMonitor(RenormMonitor):
    """Adds up the time that its own methods take."""

    seconds = 0.0


def _timed(name):
    def method(self, *arguments, **options):
        start = time.perf_counter()
        getattr(RenormMonitor, name)(self, *arguments, **options)
        self.seconds += time.perf_counter() - start

    return method


for _name in ("on_train_batch_begin", "on_train_batch_end", "on_epoch_end"):
    setattr(TimedMonitor, _name, _timed(_name))


def run(model, shape, steps, rounds):
    """Seconds a step without the callback; shares of it that it adds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, *shape)).astype("float32")
    y = rng.integers(0, 10, 32)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    data = tf.data.Dataset.from_tensors((x, y)).repeat(steps)
    monitor = TimedMonitor(every=EVERY)

    def fit(callbacks):
        model.fit(data, shuffle=False, verbose=0, callbacks=callbacks)

    times = {"without": [], "with": [], "own": []}
    fit([])
    for _ in range(rounds):
        for name, callbacks in (("without", []), ("with", [monitor])):
            monitor.seconds = 0.0
            start = time.perf_counter()
            fit(callbacks)
            times[name].append((time.perf_counter() - start) / steps)
        times["own"].append(monitor.seconds / steps)
    without, whole, own = (np.array(values) for values in times.values())
    return {
        "milliseconds_a_step": float(np.median(without) * 1e3),
        "share_by_difference": float(np.median((whole - without) / without)),
        "spread_of_difference": [
            float(value)
            for value in np.quantile((whole - without) / without, [0.1, 0.9])
        ],
        "share_of_its_own_time": float(np.median(own / without)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("output/monitor"))
    options = parser.parse_args()
    steps, rounds = options.steps, options.rounds
    if options.quick:
        steps, rounds = EVERY, 2
    results = {
        "machine": timing.machine(),
        "every": EVERY,
        "steps": steps,
        "networks": {},
    }
    table = Table("network", "ms a step", "by difference", "its own time")
    for name, build, shape, part in (
        ("small, 4 layers", small, (16, 16, 3), 1),
        ("ResNet-20, 19 layers", resnet20, (32, 32, 3), 2),
    ):
        found = run(build(), shape, steps, max(2, rounds // part))
        results["networks"][name] = found
        low, high = found["spread_of_difference"]
        table.add_row(
            name,
            f"{found['milliseconds_a_step']:.1f}",
            f"{found['share_by_difference']:.2%} ({low:.1%} to {high:.1%})",
            f"{found['share_of_its_own_time']:.2%}",
        )
    Console().print(table)
    timing.write(options.output / "monitor_cpu.json", results)


if __name__ == "__main__":
    main()
