"""What earlier versions saved loads, predicts and trains as it did then.

`tests/saved/write.py` makes the files. They are never written again: where a
test here fails, the library has broken a promise, not the file.
"""

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_renorm import get_statistics, set_statistics
from keras_renorm.schedules import LinearRamp
from tests import helpers

FOLDERS = sorted(Path(__file__).parent.glob("saved/*-keras-*"))
TOLERANCE = 1e-5


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture
def data(folder):
    with np.load(folder / "data.npz") as arrays:
        return dict(arrays)


def predictions_of(model, x):
    return helpers.to_numpy(model(x, training=False))


def test_there_are_files_of_the_oldest_and_of_the_newest_keras():
    names = [folder.name for folder in FOLDERS]
    assert {"0.1.0-keras-3.12.4", "0.1.0-keras-3.15.1"} <= set(names)


def test_a_model_predicts_and_trains_as_it_did(folder, data):
    model = keras.models.load_model(folder / "model.keras")
    part = model.get_layer("part").get_layer("norm")
    assert part.r_max == LinearRamp(1.0, 3.0, 1, 5)
    assert part.current_step() == 3
    assert model.get_layer("frozen").frozen_statistics
    x, y = data["x"], data["y"]
    helpers.assert_close(
        predictions_of(model, x), data["predictions"], TOLERANCE
    )
    model.train_on_batch(x, y)
    assert part.current_step() == 4
    helpers.assert_close(
        predictions_of(model, x), data["predictions_after_a_step"], TOLERANCE
    )


def test_weights_go_into_a_new_model(folder, data):
    saved = keras.models.load_model(folder / "model.keras")
    model = keras.models.clone_model(saved)
    x = data["x"]
    assert not np.allclose(predictions_of(model, x), data["predictions"])
    model.load_weights(folder / "model.weights.h5")
    helpers.assert_close(
        predictions_of(model, x), data["predictions"], TOLERANCE
    )
    for mine, other in zip(model.weights, saved.weights, strict=True):
        assert np.array_equal(helpers.to_numpy(mine), helpers.to_numpy(other))


def test_a_bank_of_statistics_goes_into_a_model(folder, data):
    model = keras.models.load_model(folder / "model.keras")
    x = data["x"]
    set_statistics(
        model,
        {key: value + 1 for key, value in get_statistics(model).items()},
    )
    assert not np.allclose(predictions_of(model, x), data["predictions"])
    # Paths of layers that share a name are younger than this version.
    with pytest.warns(UserWarning, match=": norm_1 -> part/norm. "):
        set_statistics(model, folder / "statistics.npz")
    helpers.assert_close(
        predictions_of(model, x), data["predictions"], TOLERANCE
    )


@pytest.mark.tensorflow
def test_an_exported_model_predicts_as_it_did(folder, data):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "exported"))
    outputs = loaded.serve(tf.constant(data["x"]))
    helpers.assert_close(outputs, data["predictions"], TOLERANCE)
