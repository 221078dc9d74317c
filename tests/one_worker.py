"""One of the workers of `test_multi_worker.py`: two steps of three layers.

    TF_CONFIG=... python -m tests.one_worker FOLDER

Takes `data.npz` from FOLDER, in it `x_0`, `upstream_0` and so on for each
worker, and leaves `worker_0.npz`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

import keras_renorm
from tests import helpers

RAMP = keras_renorm.schedules.LinearRamp(1.0, 3.0, 0, 3)
KINDS = {
    "bn": (keras_renorm.BatchNormalization, {"synchronized": True}),
    "renorm": (
        keras_renorm.BatchRenormalization,
        {"synchronized": True, "r_max": RAMP, "d_max": 1.0},
    ),
    "apart": (keras_renorm.BatchNormalization, {}),
}


def make(name, channels, **replaced):
    """A layer with the same values in each process."""
    kind, arguments = KINDS[name]
    layer = kind(momentum=0.7, dtype="float64", **{**arguments, **replaced})
    layer.build((None, channels))
    helpers.randomize(layer, np.random.default_rng(7))
    return layer


def main(folder):
    task = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    data = np.load(folder / "data.npz")
    x, upstream = (tf.constant(data[f"{name}_{task}"]) for name in ("x", "dy"))
    results = {}
    for name in KINDS:
        with strategy.scope():
            layer = make(name, x.shape[-1])

        @tf.function
        def step(layer=layer):
            def run():
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    outputs = layer(x, training=True)
                    loss = tf.reduce_sum(outputs * upstream)
                return outputs, tape.gradient(loss, x)

            return strategy.run(run)

        step()
        outputs, d_x = step()
        inferred = tf.function(
            lambda layer=layer: strategy.run(lambda: layer(x, training=False))
        )()
        results |= {
            f"{name}_outputs": outputs,
            f"{name}_d_x": d_x,
            f"{name}_inferred": inferred,
            f"{name}_mean": helpers.statistics(layer)[0],
            f"{name}_variance": helpers.statistics(layer)[1],
        }
    np.savez(folder / f"worker_{task}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
