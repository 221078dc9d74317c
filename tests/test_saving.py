"""Save, load, resume, export."""

import json
import os
import pickle
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization, convert
from keras_renorm.schedules import LinearRamp
from tests import helpers, resumed_run


def network(kind, **arguments):
    return keras.Sequential(
        [
            keras.Input((4,)),
            kind(momentum=0.8, **arguments),
            keras.layers.Dense(6, activation="relu"),
            kind(momentum=0.8, center=False, **arguments),
            keras.layers.Dense(1),
        ]
    )


def renorm_network():
    return network(
        BatchRenormalization,
        r_max=LinearRamp(1.0, 3.0, 10, 40),
        d_max=LinearRamp(0.0, 5.0, 10, 30),
    )


def compiled(model):
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def assert_same_weights(first, second, tolerance=0.0):
    for mine, other in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(
            helpers.to_numpy(mine),
            helpers.to_numpy(other),
            tolerance,
            tolerance,
            err_msg=mine.path,
        )


@pytest.fixture
def trained():
    model = compiled(renorm_network())
    resumed_run.train(model, 0, 2)
    assert model.layers[0].current_limits() != (1.0, 0.0)
    return model


def test_keras_files(trained, tmp_path):
    trained.layers[0].r_max = 2.5
    trained.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_weights(again, trained)
    for mine, other in zip(again.layers, trained.layers, strict=True):
        assert mine.get_config() == other.get_config()
    assert again.layers[0].r_max == 2.5
    x = resumed_run.data()[0]
    assert np.array_equal(
        again.predict(x, verbose=0), trained.predict(x, verbose=0)
    )


def test_weights_files(trained, tmp_path):
    trained.save_weights(tmp_path / "model.weights.h5")
    again = renorm_network()
    again.layers[0].r_max = 1.0
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(again, trained)
    assert again.layers[0].r_max == LinearRamp(1.0, 3.0, 10, 40)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (keras.layers.BatchNormalization, BatchNormalization),
        (BatchNormalization, keras.layers.BatchNormalization),
    ],
)
def test_weights_files_go_between_keras_and_ours(source, target, tmp_path):
    saved = compiled(network(source))
    resumed_run.train(saved, 0, 1)
    saved.save_weights(tmp_path / "model.weights.h5")
    loaded = network(target)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(loaded, saved)
    x = resumed_run.data()[0]
    helpers.assert_close(
        loaded.predict(x, verbose=0), saved.predict(x, verbose=0), 1e-5
    )


def test_weights_of_another_class_name_the_way_that_works(tmp_path):
    saved = compiled(network(keras.layers.BatchNormalization))
    resumed_run.train(saved, 0, 1)
    saved.save_weights(tmp_path / "model.weights.h5")
    target = network(BatchRenormalization)
    layer = target.layers[0]
    with pytest.raises(
        ValueError,
        match="The file must hold the weights of this network. Received: 0 of "
        f"the {len(layer.weights)} weights of layer {layer.name}, of class "
        "BatchRenormalization. Weights of a network with batch normalization "
        "of another class: load them into that network, then "
        "`keras_renorm.convert` it.",
    ):
        target.load_weights(tmp_path / "model.weights.h5")
    names = re.escape(str([weight.name for weight in layer.weights]))
    before = layer.get_weights()
    with pytest.raises(
        ValueError,
        match=f"^`weights` must be {len(before)} arrays, for {names}. "
        "Received: 4 arrays. Weights of a layer of another class: set them "
        "there, then `keras_renorm.convert` the model.$",
    ):
        layer.set_weights(saved.layers[0].get_weights())
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert np.array_equal(old, new)
    # What the errors say.
    loaded = network(keras.layers.BatchNormalization)
    loaded.load_weights(tmp_path / "model.weights.h5")
    x = resumed_run.data()[0]
    helpers.assert_close(
        convert(loaded).predict(x, verbose=0), saved.predict(x, verbose=0), 1e-5
    )


def test_a_layer_that_is_not_built_is_saved():
    store = {}
    BatchRenormalization().save_own_variables(store)
    assert not store


class Trained(keras.Model):
    """A model that data builds, in a loop of the user's."""

    def __init__(self, masks, **arguments):
        super().__init__(**arguments)
        self.masks = masks
        self.norm = BatchRenormalization()

    def call(self, inputs, training=None):
        mask = keras.ops.ones(inputs.shape[:-1]) if self.masks else None
        return self.norm(inputs, training=training, mask=mask)

    def get_config(self):
        return {"masks": self.masks}


@pytest.mark.parametrize("masks", [False, True])
def test_a_model_that_a_training_step_builds_is_saved(masks, rng, tmp_path):
    """Keras asks for shapes by a symbolic call, which trains as the first."""
    model = Trained(masks)
    x = helpers.inputs_of(rng, (8, 4))
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Trained": Trained}
    )
    helpers.assert_close(loaded(x), helpers.to_numpy(model(x)), 1e-6)


@pytest.mark.tensorflow
def test_tensorflow_checkpoints(trained, tmp_path):
    import tensorflow as tf

    path = tf.train.Checkpoint(model=trained).save(str(tmp_path / "point"))
    again = renorm_network()
    tf.train.Checkpoint(model=again).restore(path).expect_partial()
    assert_same_weights(again, trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_model", "imports", "is_found"),
    [(True, "keras_renorm, ", True), (True, "", False), (False, "", True)],
)
def test_pickles_in_a_new_process(
    of_model, imports, is_found, trained, tmp_path
):
    """What docs/guides/shipping.md says to import."""
    path = tmp_path / "pickled"
    path.write_bytes(pickle.dumps(trained if of_model else trained.layers[0]))
    code = f"import {imports}pickle; pickle.load(open({str(path)!r}, 'rb'))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert (run.returncode == 0) == is_found, run.stderr
    if not is_found:
        assert "Could not locate class 'BatchRenormalization'" in run.stderr


@pytest.mark.slow
def test_a_run_resumed_in_a_new_process_ends_the_same(trained, tmp_path):
    x, _ = resumed_run.data()
    exports = keras.backend.backend() == "tensorflow"
    trained.save(tmp_path / "half.keras")
    if exports:
        trained.export(tmp_path / "exported", verbose=False)
    predictions = trained.predict(x, verbose=0)
    subprocess.run(
        [sys.executable, "-m", "tests.resumed_run", str(tmp_path)],
        check=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
        timeout=300,
    )
    resumed_run.train(trained, 2, 4)
    resumed = keras.saving.load_model(tmp_path / "resumed.keras")
    assert_same_weights(resumed, trained, 1e-6)
    for mine, other in zip(resumed.layers, trained.layers, strict=True):
        assert mine.get_config() == other.get_config()
    assert resumed.layers[0].current_step() == 48
    assert resumed.layers[0].current_limits() == (3.0, 5.0)
    if exports:
        served = np.load(tmp_path / "served.npy")
        helpers.assert_close(served, predictions, 1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: BatchNormalization(
            1,
            0.9,
            0.01,
            frozen_statistics=True,
            center=False,
            gamma_initializer="zeros",
            gamma_regularizer="l2",
            beta_constraint="non_neg",
            name="norm",
            dtype="mixed_float16",
            trainable=False,
        ),
        lambda: BatchRenormalization(
            r_max=1.3, d_max=LinearRamp(0.1, 0.7, 3, 9), scale=False
        ),
        lambda: BatchRenormalization(r_max=np.inf, d_max=np.inf),
    ],
)
@pytest.mark.parametrize("is_built", [False, True])
def test_configs_make_the_same_layer(layer, is_built):
    layer = layer()
    if is_built:
        layer.build((None, 3, 3))
    config = layer.get_config()
    assert not any(name.startswith("renorm") for name in config)
    again = type(layer).from_config(config)
    assert again.get_config() == config
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"].startswith("keras_renorm>")
    again = keras.saving.deserialize_keras_object(serialized)
    assert again.get_config() == config


def test_a_config_of_keras_makes_our_layer():
    theirs = keras.layers.BatchNormalization(axis=1, momentum=0.5, name="bn")
    for kind in (BatchNormalization, BatchRenormalization):
        ours = kind.from_config(theirs.get_config())
        assert (ours.axis, ours.momentum, ours.name) == (1, 0.5, "bn")


def test_cloned_models_have_the_limits_and_a_counter_at_zero(trained):
    trained.layers[0].r_max = 2.5
    clone = keras.models.clone_model(trained)
    for mine, other in zip(clone.layers, trained.layers, strict=True):
        assert mine.get_config() == other.get_config()
    assert clone.layers[0].current_step() == 0
    clone.set_weights(trained.get_weights())
    assert_same_weights(clone, trained)


def test_a_config_holds_plain_values():
    layer = BatchRenormalization(
        axis=np.array(-1),
        momentum=np.array(0.5),
        epsilon=np.array(0.25),
        virtual_batch_size=np.array(4),
        frozen_statistics=np.array(True),
        center=np.bool_(False),
        scale=np.array(True),
        r_max=np.array(2.0),
        d_max=np.array(3),
    )
    config = layer.get_config()
    plain = {
        name: config[name]
        for name in (
            "axis",
            "momentum",
            "epsilon",
            "virtual_batch_size",
            "frozen_statistics",
            "center",
            "scale",
        )
    }
    assert plain == {
        "axis": -1,
        "momentum": 0.5,
        "epsilon": 0.25,
        "virtual_batch_size": 4,
        "frozen_statistics": True,
        "center": False,
        "scale": True,
    }
    assert {type(value) for value in plain.values()} == {int, float, bool}
    json.dumps(keras.saving.serialize_keras_object(layer))
    assert BatchRenormalization.from_config(config).r_max == 2.0
