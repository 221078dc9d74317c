"""Writes what this version saves, for the versions after it to load.

    python -m tests.saved.write

makes the folder `<version>-keras-<version of Keras>` beside this file, once:
what a version wrote stays as it was. Commit the folder, one for the oldest
and one for the newest Keras, when the version moves on.
"""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.schedules import LinearRamp

HERE = Path(__file__).parent
EXAMPLES = 6
SIZES = (4, 4, 2)
# Not Keras's default, nor a Dense layer: what 3.15 writes of them, 3.12 cannot
# read.
KERNEL = "random_uniform"


def network():
    """Each layer with arguments of its own; a name that two models share."""
    part = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            BatchRenormalization(
                axis=1,
                momentum=0.9,
                r_max=LinearRamp(1.0, 3.0, 1, 5),
                d_max=LinearRamp(0.0, 2.0, 1, 4),
                name="norm",
            ),
            layers.Activation("relu"),
        ],
        name="part",
    )
    inputs = keras.Input(SIZES, name="images")
    x = layers.Conv2D(
        3, 3, padding="same", kernel_initializer=KERNEL, name="conv"
    )(inputs)
    x = BatchNormalization(
        momentum=0.8, epsilon=1e-2, virtual_batch_size=4, name="norm"
    )(x)
    x = part(x)
    x = BatchNormalization(center=False, frozen_statistics=True, name="frozen")(
        x
    )
    x = layers.Conv2D(2, 1, kernel_initializer=KERNEL, name="head")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = BatchRenormalization(
        scale=False, r_max=2.0, d_max=0.5, synchronized=True, name="last"
    )(x)
    return keras.Model(inputs, x, name="saved")


def main():
    """Trains the network a little and writes all that can be made of it."""
    folder = HERE / f"{keras_renorm.__version__}-keras-{keras.__version__}"
    if folder.exists():
        raise SystemExit(f"{folder.name} exists, and is not written again.")
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = (2 + 3 * rng.normal(size=(EXAMPLES, *SIZES))).astype("float32")
    y = rng.normal(size=(EXAMPLES, 2)).astype("float32")
    model = network()
    for variable in model.variables:
        if variable.dtype == "float32" and "limit" not in variable.name:
            shape = tuple(variable.shape)
            variable.assign(rng.uniform(0.3, 2.0, shape))
    # Without state of its own, so that a step is the same whoever takes it.
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=EXAMPLES, epochs=3, shuffle=False, verbose=0)
    folder.mkdir()
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    np.savez(folder / "statistics.npz", **keras_renorm.get_statistics(model))
    model.export(folder / "exported", format="tf_saved_model", verbose=False)
    predictions = model.predict(x, verbose=0)
    model.train_on_batch(x, y)
    np.savez(
        folder / "data.npz",
        x=x,
        y=y,
        predictions=predictions,
        predictions_after_a_step=model.predict(x, verbose=0),
    )
    print(folder)


if __name__ == "__main__":
    main()
