"""Trains on two TensorFlow replicas with shared statistics, and saves.

KERAS_BACKEND=tensorflow python -m tests.saved_by_replicas FOLDER
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_renorm


def main(folder):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4, 3)),
                keras_renorm.BatchNormalization(synchronized=True),
                keras_renorm.BatchRenormalization(
                    momentum=0.5, synchronized=True, r_max=3.0, d_max=5.0
                ),
                keras.layers.Dense(2),
            ]
        )
        model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (24, 4, 3)).astype("float32")
    model.fit(x, x[..., :2], batch_size=8, verbose=0)
    model.save(folder / "model.keras")
    np.savez(folder / "data.npz", x=x, outputs=model.predict(x, verbose=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
