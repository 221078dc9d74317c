"""Data parallelism on Keras's JAX backend."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization
from tests import helpers

pytestmark = pytest.mark.jax


@pytest.fixture
def two_devices():
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
    )
    yield
    keras.distribution.set_distribution(None)


def trained(kind, x, y, weights=None, **arguments):
    """Weights before training, and the model after it."""
    layer = kind(momentum=0.5, **arguments)
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Dense(4, use_bias=False),
            layer,
            keras.layers.Dense(2),
        ]
    )
    if weights is not None:
        model.set_weights(weights)
    weights = model.get_weights()
    model.compile(keras.optimizers.SGD(1e-2), "mse")
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return weights, model


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        (BatchNormalization, {}),
        (BatchRenormalization, {"r_max": 3.0, "d_max": 5.0}),
    ],
)
@pytest.mark.parametrize("is_synchronized", [False, True])
def test_a_batch_over_two_devices_is_one_batch(
    kind, limits, is_synchronized, rng, request
):
    x = helpers.inputs_of(rng, (32, 3))
    # Devices that differ: the second half of each batch is something else.
    x = x.reshape(4, 2, 4, 3)
    x[:, 1] = 3 * x[:, 1] + 5
    x = x.reshape(32, 3)
    y = rng.normal(size=(32, 2)).astype("float32")
    weights, single = trained(kind, x, y, **limits)
    request.getfixturevalue("two_devices")
    _, model = trained(
        kind, x, y, weights, synchronized=is_synchronized, **limits
    )
    value = model.layers[1].moving_mean.value
    assert len(value.sharding.device_set) == 2
    for one, other in zip(model.weights, single.weights, strict=True):
        helpers.assert_close(one, other, 1e-4)


def test_a_synchronized_model_of_tensorflow_loads(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "tests.saved_by_replicas", str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
    )
    data = np.load(tmp_path / "data.npz")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert all(layer.synchronized for layer in model.layers[:2])
    assert model.layers[1].current_step() == 3
    outputs = model.predict(data["x"], verbose=0)
    helpers.assert_close(outputs, data["outputs"], 1e-5)
    model.fit(data["x"], data["x"][..., :2], batch_size=8, verbose=0)
    assert model.layers[1].current_step() == 6
