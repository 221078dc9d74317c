"""A run that stops half-way; the second half in a process of its own.

`python -m tests.resumed_run FOLDER` finishes the run that `first_half` has
saved in FOLDER, saves it, and calls the exported model of FOLDER without
keras_renorm where the backend is TensorFlow.
"""

import sys
from pathlib import Path

import keras
import numpy as np

EXAMPLES = 48


def data():
    rng = np.random.default_rng(11)
    x = rng.normal(3.0, 2.0, (EXAMPLES, 4)).astype("float32")
    return x, (x[:, :1] > 3).astype("float32")


def train(model, first_epoch, last_epoch, *callbacks):
    x, y = data()
    model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        verbose=0,
        initial_epoch=first_epoch,
        epochs=last_epoch,
        callbacks=list(callbacks),
    )


def serve(folder):
    """Calls the SavedModel in `folder` as a server would."""
    import tensorflow as tf

    assert "keras_renorm" not in sys.modules
    served = tf.saved_model.load(str(folder / "exported"))
    np.save(folder / "served.npy", served.serve(data()[0]).numpy())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if (folder / "exported").exists():
        serve(folder)

    import keras_renorm  # registers the layers

    model = keras.saving.load_model(folder / "half.keras")
    assert isinstance(model.layers[0], keras_renorm.BatchRenormalization)
    train(model, 2, 4)
    model.save(folder / "resumed.keras")
