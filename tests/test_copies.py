"""Copies of models are what the models are, in all that can be seen."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import BatchRenormalization, convert, fold, revert
from tests import helpers, networks, zoo

KERAS = layers.BatchNormalization
pytestmark = pytest.mark.filterwarnings("ignore:.* have a `quantize` method")


# What Keras cannot train, or not twice the same.
CANNOT_TRAIN = {
    "tensorflow": [zoo.recomputed],  # gradients with keywords
    "jax": [zoo.recomputed],
    # `steps_per_execution` warns of few batches; dropout without a seed.
    "torch": [zoo.compiled, zoo.recurrent],
}


def there_and_back(model):
    return revert(convert(model))


def changed_in_place(model):
    model = revert(model)  # a copy
    return revert(convert(model, in_place=True), in_place=True)


def assert_same(one, other):
    """Of two models, all that `zoo.seen` sees."""
    differences = {
        key: (one.get(key, "absent"), other.get(key, "absent"))
        for key in one.keys() | other.keys()
        if str(one.get(key)) != str(other.get(key))
    }
    assert not differences


def in_any_order(seen):
    return {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in seen.items()
    }


@pytest.mark.parametrize("way", [revert, there_and_back, changed_in_place])
@pytest.mark.parametrize("kind", zoo.ALL)
def test_everything_is_as_it_was(kind, way, rng):
    model = networks.randomize(zoo.make(kind), rng)
    before = zoo.seen(model)
    copy = way(model)
    after = zoo.seen(copy)
    if kind.__name__ in zoo.ANY_ORDER:
        before, after = map(in_any_order, (before, after))
    assert_same(before, after)
    x = networks.data_of(model, rng)
    for one, two in zip(
        keras.tree.flatten(model(x)), keras.tree.flatten(copy(x)), strict=True
    ):
        helpers.assert_close(two, helpers.to_numpy(one), 1e-6)


@pytest.mark.parametrize("kind", zoo.ALL)
def test_copies_train_as_the_models_do(kind, rng):
    if kind in CANNOT_TRAIN.get(keras.backend.backend(), []):
        pytest.skip("see there")
    model = networks.randomize(zoo.make(kind), rng)
    copy = there_and_back(model)
    x = networks.data_of(model, rng)
    y = keras.tree.map_structure(
        lambda values: np.ones(values.shape, "float32"), model(x)
    )
    copy(x)  # stateful, as the model is
    for each in (model, copy):
        if not each.compiled:
            each.compile("sgd", "mse")
        each.fit(x, y, epochs=2, verbose=0, shuffle=False)
    ones, others = (
        [
            (variable.path, helpers.to_numpy(variable))
            for variable in each.trainable_variables
        ]
        for each in (model, copy)
    )
    if kind.__name__ in zoo.ANY_ORDER:
        ones, others = (sorted(each, key=str) for each in (ones, others))
    for (path, value), (other_path, other) in zip(ones, others, strict=True):
        assert path == other_path
        helpers.assert_close(other, value, 1e-5)
    for one, other in zip(
        model.non_trainable_variables,
        copy.non_trainable_variables,
        strict=True,
    ):
        helpers.assert_close(other, helpers.to_numpy(one), 1e-5)


def test_a_discriminator_trains_on_in_the_copy(rng):
    """In turns: alone, and fixed in the whole."""
    whole = convert(zoo.generative())
    discriminator = whole.layers[-1]
    discriminator.trainable = True
    x, y = helpers.inputs_of(rng, (4, 4)), np.ones((4, 3), "float32")
    before = helpers.to_numpy(discriminator.layers[0].kernel)
    discriminator.train_on_batch(x, y)
    discriminator.trainable = False
    whole.train_on_batch(np.ones((4, 2), "float32"), y)
    after = helpers.to_numpy(discriminator.layers[0].kernel)
    assert not np.array_equal(before, after)


@pytest.mark.tensorflow
@pytest.mark.torch
def test_steps_of_a_class_of_its_own_are_the_copys(rng):
    model = zoo.own_class()
    for function in (revert, convert, fold):
        copy = function(model)
        assert type(copy) is zoo.Own
        x = networks.data_of(model, rng)
        results = copy.evaluate(x, np.ones((4, 3)), return_dict=True, verbose=0)
        assert results == {"mean": 7.0}
        assert copy.features is copy.layers[1]
        assert copy.tracker is not model.tracker
        assert copy.first_optimizer is not model.first_optimizer
        assert float(copy.second_optimizer.learning_rate) == pytest.approx(0.2)


def test_a_class_that_takes_no_graph_becomes_a_plain_model():
    plain = type(networks.shared(KERAS))
    assert type(convert(networks.Backbone(KERAS))) is plain


def test_layers_that_a_custom_layer_makes_are_reached(rng):
    model = keras.Sequential(
        [keras.Input((4,)), networks.Sealed(), zoo.Residual()]
    )
    networks.randomize(model, rng)
    copy = convert(model, r_max=2.0)
    again = convert(copy, momentum=0.5)
    for each in (copy, again):
        for layer in networks.normalizations(each):
            assert type(layer) is BatchRenormalization
            assert layer.r_max == 2.0
    x = networks.data_of(model, rng)
    for each in (copy, again, revert(again)):
        helpers.assert_close(each(x), helpers.to_numpy(model(x)), 1e-6)
    assert {type(each) for each in networks.normalizations(model)} == {KERAS}


def unbuilt(*parts):
    return keras.Sequential([layers.Dense(3), *parts])


def test_models_that_are_not_built(rng):
    model = unbuilt(KERAS(name="bn", momentum=0.7))
    copy = convert(model, r_max=2.0)
    x = helpers.inputs_of(rng, (8, 4))
    copy(x, training=True)
    layer = copy.get_layer("bn")
    assert (layer.momentum, layer.r_max, layer.current_step()) == (0.7, 2.0, 1)
    reverted = revert(unbuilt(BatchRenormalization(name="bn")))
    reverted(x, training=True)
    assert len(reverted.get_layer("bn").weights) == 4
    with pytest.raises(ValueError, match="with the layers sealed_bn not built"):
        convert(unbuilt(networks.Sealed()))


def test_normalization_that_a_plain_copy_does_not_have():
    model = networks.Backbone(KERAS, name="backbone")
    model.spare = KERAS(name="spare")
    model.spare.build((None, 3))
    if len(networks.normalizations(model)) == 1:
        pytest.skip("Keras did not see such an attribute in early versions")
    message = (
        "`model` must call all batch normalization that it has: a copy of a "
        "Backbone is its graph, without the rest. Leave it out with `layers`, "
        "or use in_place=True. Received: model=backbone, which does not call "
        "spare."
    )
    with helpers.raises(ValueError, message):
        convert(model)
    (layer,) = networks.normalizations(convert(model, layers="stem_bn"))
    assert type(layer) is BatchRenormalization


class Attached(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def patched():
    model = zoo.small()
    head = model.layers[2]
    head.call = lambda inputs: 2.0 * inputs @ head.kernel
    return model


def with_a_tensor_of_the_graph():
    inputs = keras.Input((4,))
    x = KERAS()(inputs)
    model = Attached(inputs, layers.Dense(2)(x))
    model.feature = x
    return model


def in_two_places():
    inputs = keras.Input((5, 4))
    dense = layers.Dense(4)
    x = KERAS()(dense(inputs))
    return keras.Model(inputs, layers.TimeDistributed(dense)(x))


class NoConfig(layers.Layer):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def call(self, inputs):
        return self.part(inputs)


def without_configuration():
    return keras.Sequential(
        [keras.Input((4,)), NoConfig(layers.Dense(4)), KERAS()]
    )


NOT_MADE_ANEW = (
    "`model` must have layers that their configuration makes anew, with the "
    "same weights, and what they hold must be in one place "
    "(`keras_renorm.convert` and `keras_renorm.revert` change any model with "
    "in_place=True). Received: layer {name} of class {kind}."
)
NOT_HANDED_ON = (
    "`model` must have no layers with attributes that a copy cannot have "
    "(`keras_renorm.convert` and `keras_renorm.revert` change any model with "
    "in_place=True). Received: layer {name} of class {kind}, with {attribute}."
)


@pytest.mark.parametrize(
    ("make", "message", "at", "attribute"),
    [
        (patched, NOT_HANDED_ON, -1, "call"),
        (with_a_tensor_of_the_graph, NOT_HANDED_ON, None, "feature"),
        (in_two_places, NOT_MADE_ANEW, -1, None),
        (without_configuration, NOT_MADE_ANEW, 0, None),
    ],
)
def test_what_a_copy_cannot_have_is_an_error(make, message, at, attribute, rng):
    model = make()
    layer = model if at is None else model.layers[at]
    message = message.format(
        name=layer.name,
        kind=type(layer).__name__,
        attribute=attribute and f"{attribute}={getattr(layer, attribute)!r}",
    )
    for function in (convert, revert, fold):
        with helpers.raises(ValueError, message):
            function(model)
    x = networks.data_of(model, rng)
    expected = helpers.to_numpy(model(x))
    convert(model, in_place=True)
    helpers.assert_close(model(x), expected, 1e-5)
