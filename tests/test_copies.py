"""Copies of models are what the models are, in all that can be seen."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import convert, revert
from tests import helpers, networks, zoo

KERAS = layers.BatchNormalization
pytestmark = pytest.mark.filterwarnings("ignore:.* have a `quantize` method")


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
    if kind is zoo.recomputed and keras.backend.backend() != "torch":
        pytest.skip("Keras's `fit` fails there")
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
