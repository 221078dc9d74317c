"""Every backbone of keras-hub that normalizes by batch, and tasks with them.

Small networks with random weights: nothing is downloaded.
"""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    freeze_statistics,
    recalibrate,
    replacing,
    revert,
)
from tests import helpers, networks

pytest.importorskip("keras_hub")

from tests import hub

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # keras-hub's own
]
DOCUMENT = Path(__file__).parents[1] / "docs" / "guides" / "shipping.md"


def inputs_of(model, rng, examples=2):
    """Random images, a structure as the model's inputs are."""

    def values(tensor):
        shape = [size or 32 for size in tensor.shape[1:]]
        return rng.uniform(0, 1, (examples, *shape)).astype("float32")

    return keras.tree.map_structure(values, model.input)


def outputs_of(model, x, training=False):
    return [
        each
        for each in keras.tree.flatten(model(x, training=training))
        if "float" in keras.backend.standardize_dtype(each.dtype)
    ]


def assert_outputs(model, x, expected, tolerance):
    got = outputs_of(model, x)
    assert len(got) == len(expected)
    for one, two in zip(got, expected, strict=True):
        if tolerance:
            helpers.assert_close(one, two, tolerance)
        else:
            assert np.array_equal(helpers.to_numpy(one), two)


def train_a_step(model, x):
    """One step of gradient descent on the squared outputs."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = sum(
            ops.mean(ops.square(each))
            for each in outputs_of(model, x, training=True)
        )
    variables = [each.value for each in model.trainable_variables]
    gradients = tape.gradient(loss, variables)
    assert any(each is not None for each in gradients)
    for variable, gradient in zip(variables, gradients, strict=True):
        if gradient is not None:
            variable.assign_sub(1e-3 * gradient)


def is_built(layer):
    return layer.built


def assert_life(name, make, rng, tmp_path):
    """Convert, train, freeze, recalibrate, save, load, revert."""
    model = networks.randomize_mildly(make(), rng)
    olds = list(filter(is_built, networks.normalizations(model)))
    assert olds
    unbuilt = len(networks.normalizations(model)) - len(olds)
    assert bool(unbuilt) == (name in hub.UNBUILT)
    choice = is_built if unbuilt else None
    x = inputs_of(model, rng)
    expected = [helpers.to_numpy(each) for each in outputs_of(model, x)]
    assert all(np.all(np.isfinite(each)) for each in expected)
    assert any(each.std() > 0 for each in expected)

    convert(model, in_place=True, layers=choice)
    assert revert(model, in_place=True, layers=choice) is model
    assert_outputs(model, x, expected, 0)
    continuous = hub.before_choices(model)
    expected = [helpers.to_numpy(each) for each in outputs_of(continuous, x)]
    convert(model, in_place=True, layers=choice, momentum=0.9)
    assert {type(each) for each in olds} == {BatchRenormalization}
    assert_outputs(continuous, x, expected, 2e-5)

    def moved(layer, mean):
        return not np.array_equal(mean, helpers.statistics(layer)[0])

    before = [helpers.statistics(each)[0] for each in olds]
    train_a_step(model, x)
    called = [each for each in olds if each.current_step()]
    uncalled = [each.name for each in olds if each not in called]
    assert uncalled == hub.UNCALLED.get(name, [])
    for mean, layer in zip(before, olds, strict=True):
        assert moved(layer, mean) == (layer in called)

    freeze_statistics(model, layers=choice)
    before = [helpers.statistics(each)[0] for each in olds]
    train_a_step(model, x)
    for mean, layer in zip(before, olds, strict=True):
        assert not moved(layer, mean)

    recalibrate(model, x, steps=1, layers=called, verbose=False)
    for mean, layer in zip(before, olds, strict=True):
        assert moved(layer, mean) == (layer in called)

    expected = [helpers.to_numpy(each) for each in outputs_of(model, x)]
    model.save_weights(tmp_path / "model.weights.h5")
    with replacing(momentum=0.9, frozen_statistics=True):
        other = make()
    other.load_weights(tmp_path / "model.weights.h5")
    assert_outputs(other, x, expected, 0)
    news = filter(is_built, networks.normalizations(other))
    for old, new in zip(olds, news, strict=True):
        assert new.get_config() == {**old.get_config(), "name": new.name}

    # Keras's network to the bit, whoever made it.
    revert(model, in_place=True, layers=choice)
    model.save_weights(tmp_path / "plain.weights.h5")
    plain = make()
    plain.load_weights(tmp_path / "plain.weights.h5")
    expected = [helpers.to_numpy(each) for each in outputs_of(plain, x)]
    assert_outputs(model, x, expected, 0)
    return model


@pytest.mark.parametrize("name", hub.BACKBONES)
def test_the_life_of_a_backbone(name, rng, tmp_path):
    model = assert_life(name, hub.BACKBONES[name], rng, tmp_path)
    assert type(model).__name__ == hub.class_of(name)


@pytest.mark.parametrize("name", hub.TASKS)
def test_the_life_of_a_task(name, rng, tmp_path):
    assert_life(name, hub.TASKS[name], rng, tmp_path)


def test_every_backbone_with_batch_normalization_is_here():
    """Or it is named in the documentation, with its reason."""
    text = DOCUMENT.read_text()
    here = {hub.class_of(name) for name in hub.BACKBONES}
    there = hub.backbones_with_batch_normalization()
    assert "ResNetBackbone" in there
    assert "BertBackbone" not in there
    missing = there - here
    assert all(f"`{name}`" in text for name in missing), missing
    assert here <= there


@pytest.mark.parametrize("to", [BatchNormalization, BatchRenormalization])
def test_a_file_of_a_backbone_is_loaded_in_the_scope(to, rng, tmp_path):
    model = networks.randomize_mildly(hub.BACKBONES["MobileNet"](), rng)
    x = inputs_of(model, rng)
    convert(model, to, in_place=True)
    expected = [helpers.to_numpy(each) for each in outputs_of(model, x)]
    model.save(tmp_path / "model.keras")
    with replacing(to):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {type(each) for each in networks.normalizations(loaded)} == {to}
    assert_outputs(loaded, x, expected, 0)
