"""What holds on each of Keras's backends, and without TensorFlow."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keras_renorm import BatchNormalization
from keras_renorm._backend import runtime
from tests import helpers

# Everything that the package has a file for, but what needs the backend
# TensorFlow; `fit` too, whose data Keras adapts.
WITHOUT_TENSORFLOW = """
import sys

sys.modules["tensorflow"] = None  # who imports it gets an ImportError

import keras
import numpy as np

import keras_renorm

assert keras.backend.backend() == sys.argv[1]
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
model = keras.Sequential(
    [
        keras.Input((4,)),
        keras_renorm.BatchRenormalization(momentum=0.5),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(4),
    ]
)
model = keras_renorm.convert(model, keras_renorm.BatchNormalization)
model.compile("sgd", "mse")
model.fit(x, x, batch_size=16, verbose=0)
mean = np.array(model.layers[0].moving_mean.value)
assert np.all(np.abs(mean - 3) < 1), mean
keras_renorm.recalibrate(model, x)
keras_renorm.diagnostics.discrepancy(model, x)
keras_renorm.diagnostics.loss_along_gradient(model, "mse", (x, x), 0.1)
keras_renorm.fold(model).predict(x, verbose=0)
model.save(sys.argv[2])
keras.saving.load_model(sys.argv[2])
assert sys.modules["tensorflow"] is None
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_everything_runs_where_tensorflow_is_not_installed(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    done = subprocess.run(
        [
            *(sys.executable, "-c", WITHOUT_TENSORFLOW),
            *(backend, str(tmp_path / "model.keras")),
        ],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.torch
@pytest.mark.parametrize("is_synchronized", [True, False])
def test_synchronized_processes_of_torch_are_an_error(
    is_synchronized, rng, monkeypatch
):
    layer = BatchNormalization(synchronized=is_synchronized)
    x = helpers.inputs_of(rng, (8, 3))
    layer(x, training=True)
    before = helpers.statistics(layer)
    monkeypatch.setattr(runtime.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.distributed, "get_world_size", lambda: 2)
    layer(x)  # what is served has statistics already
    if not is_synchronized:
        layer(x, training=True)
        return
    message = (
        "`synchronized` must be False where several processes of PyTorch "
        "train: each would normalize its own examples. Received: "
        "synchronized=True, 2 processes."
    )
    # Keras adds lines around it.
    with pytest.raises(RuntimeError, match=re.escape(message)):
        layer(x, training=True)
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert (old == new).all()
