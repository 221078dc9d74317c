"""How long whole networks take on Keras's JAX backend: GPU or CPU.

    KERAS_BACKEND=jax python benchmarks/networks_jax.py            # minutes
    KERAS_BACKEND=jax python benchmarks/networks_jax.py --quick    # a few

`networks.py` for a device: steps are chained inside one compiled loop (the
weights of one are the next one's), so a figure is the device's time and holds
no launch and no Python. Contenders are compiled side by side, then take turns;
figures are medians of ratios to the network with Keras's BatchNormalization,
with the lowest and the highest. "share" is what normalization adds to a
training step of the same network without any, Keras's = 1.

Prints a table and writes JSON into `--output`, after each network.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import networks_report
import timing
from chains import chain, compiled
from jax import numpy as jnp
from networks_made import contenders
from networks_report import BASELINE, FLOOR, FOLDED, NETWORKS, RIVAL
from rich.console import Console
from rich.table import Table

import keras_renorm

TRAINED = (BASELINE, RIVAL, "our BN", "our renorm", "group norm.", FLOOR)
RATE = 1e-3


def training(model, images, labels, length):
    """A compiled chain of steps of SGD."""
    loss_of = keras.losses.SparseCategoricalCrossentropy()

    def loss(trained, kept, images):
        outputs, kept = model.stateless_call(
            trained, kept, images, training=True
        )
        return loss_of(labels, outputs), kept

    def step(carry, images):
        trained, kept = carry
        gradients, kept = jax.grad(loss, has_aux=True)(trained, kept, images)
        trained = [
            weight - RATE * gradient
            for weight, gradient in zip(trained, gradients, strict=True)
        ]
        return (trained, kept), []

    return chain(step, weights(model), images, length)


def inference(model, images, length):
    """A compiled chain of inferences."""

    def step(carry, images):
        outputs, _ = model.stateless_call(*carry, images, training=False)
        return carry, [outputs]

    return chain(step, weights(model), images, length)


def weights(model):
    """Values of what is trained, and of what is not."""
    return (
        [weight.value for weight in model.trainable_variables],
        [weight.value for weight in model.non_trainable_variables],
    )


def measure(name, dtype, batch_size, size, options):
    """Rows of a network: name to ratios."""
    keras.config.set_dtype_policy(
        dtype if dtype == "float32" else f"mixed_{dtype}"
    )
    rows = {}
    images = jax.random.normal(jax.random.key(0), (batch_size, size, size, 3))
    labels = jnp.arange(batch_size) % 10
    networks = contenders(name, size, {BASELINE, FLOOR, *options.contenders})
    times = timing.interleaved(
        compiled(
            {
                each: training(network, images, labels, options.length)
                for each, network in networks.items()
            }
        ),
        options.seconds,
        1,
    )
    times = {each: values / options.length for each, values in times.items()}
    rows[f"training step, {dtype}"] = timing.ratios(times, BASELINE)
    rows[f"share, {dtype}"] = timing.ratios(
        {
            each: values - times[FLOOR]
            for each, values in times.items()
            if each != FLOOR
        },
        BASELINE,
    )
    inferring = {
        each: networks[each]
        for each in (BASELINE, "our renorm")
        if each in networks
    }
    inferring[FOLDED] = keras_renorm.fold(networks[BASELINE])
    times = timing.interleaved(
        compiled(
            {
                each: inference(network, images, options.length)
                for each, network in inferring.items()
            }
        ),
        options.seconds,
        1,
    )
    rows[f"inference, {dtype}"] = timing.ratios(
        {each: values / options.length for each, values in times.items()},
        BASELINE,
    )
    keras.utils.clear_session()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch-size", type=int, help="128 on a GPU, else 16")
    parser.add_argument("--length", type=int, help="steps of a chain")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument(
        "--contenders", nargs="+", default=list(TRAINED), choices=TRAINED
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--output", type=Path, default=Path("output/networks_jax")
    )
    options = parser.parse_args()
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    options.length = options.length or (5 if is_gpu else 1)
    batch_size = options.batch_size or (128 if is_gpu else 16)
    size = 224 if is_gpu else 64
    if options.quick:
        options.networks, options.dtypes = ["MobileNetV2"], ["float32"]
        options.seconds, size = 1.0, 32
    console = Console(width=max(Console().width, 150))
    path = options.output / f"networks_jax_{device.platform}.json"
    networks = {
        name: {"batch_size": batch_size, "size": size, "rows": {}}
        for name in options.networks
    }
    for dtype, name in itertools.product(options.dtypes, options.networks):
        start = time.perf_counter()
        rows = measure(name, dtype, batch_size, size, options)
        networks[name]["rows"] |= rows
        console.print(f"{name}, {dtype}: {time.perf_counter() - start:.0f} s")
        timing.write(
            path,
            {
                "machine": {
                    **timing.machine(),
                    "device": device.device_kind,
                },
                "chain": options.length,
                "networks": {
                    name: network
                    for name, network in networks.items()
                    if network["rows"]
                },
            },
        )
    head, *body = networks_report.device_rows(networks)
    table = Table(*head, title=device.device_kind)
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
