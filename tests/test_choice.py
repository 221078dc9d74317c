"""The argument `layers`: which layers a function of a model is about."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    freeze_statistics,
    get_statistics,
    recalibrate,
    revert,
    set_statistics,
    unfreeze_statistics,
)
from tests import helpers, networks

KERAS = layers.BatchNormalization


def network(bn, rng=None):
    """A stem, a nested model and a head, and normalization in each."""
    block = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="hidden"),
            bn(name="first"),
            layers.Dense(4),
            bn(name="norm"),
        ],
        name="block",
    )
    inputs = keras.Input((4,))
    x = bn(name="stem_norm")(layers.Dense(4, name="stem")(inputs))
    x = layers.Dense(3, name="head")(block(x))
    model = keras.Model(inputs, bn(name="norm")(x), name="network")
    return networks.randomize(model, rng) if rng is not None else model


def by_prefix(layer):
    return layer.name.startswith("stem")


# What is chosen, by the place in the model: stem, head; first, norm of block.
CHOICES = {
    "None": (lambda model: None, [1, 1, 1, 1]),
    "function": (lambda model: by_prefix, [1, 0, 0, 0]),
    "name": (lambda model: "stem_norm", [1, 0, 0, 0]),
    "name of a model": (lambda model: "block", [0, 0, 1, 1]),
    "layer": (lambda model: model.layers[-1], [0, 1, 0, 0]),
    "layers": (lambda model: model.layers[-3:], [0, 1, 1, 1]),
    "all layers": (lambda model: model.layers, [1, 1, 1, 1]),
    "layers and names": (
        lambda model: ("first", model.get_layer("stem_norm")),
        [1, 0, 1, 0],
    ),
    "the model": (lambda model: model, [1, 1, 1, 1]),
    "iterator": (lambda model: iter(["first", "first"]), [0, 0, 1, 0]),
    # Two layers have it; it is the name of the one that the model itself holds.
    "name of two": (lambda model: "norm", [0, 1, 0, 0]),
    "path": (lambda model: {"block/norm", "block/first"}, [0, 0, 1, 1]),
    "keys": (lambda model: dict.fromkeys(["first"]).keys(), [0, 0, 1, 0]),
    "class of blocks": (lambda model: keras.Sequential, [0, 0, 1, 1]),
    "several kinds": (
        lambda model: [by_prefix, "first", layers.BatchNormalization],
        [1, 1, 1, 1],
    ),
    "class": (lambda model: layers.BatchNormalization, [1, 1, 1, 1]),
}


def in_order(model):
    block = model.get_layer("block").layers
    return [model.get_layer("stem_norm"), model.layers[-1], block[1], block[3]]


choices = pytest.mark.parametrize("choice", CHOICES)


@choices
@pytest.mark.parametrize("in_place", [False, True])
def test_convert_and_revert(choice, in_place, rng):
    choose, chosen = CHOICES[choice]
    model = network(KERAS, rng)
    x = helpers.inputs_of(rng, (8, 4))
    expected = model(x)
    model = convert(model, layers=choose(model), in_place=in_place)
    kinds = [type(each) is BatchRenormalization for each in in_order(model)]
    assert kinds == list(map(bool, chosen))
    helpers.assert_close(model(x), expected, 1e-6)

    model = network(BatchNormalization, rng)
    expected = model(x)
    model = revert(model, layers=choose(model), in_place=in_place)
    kinds = [type(each) is KERAS for each in in_order(model)]
    assert kinds == list(map(bool, chosen))
    helpers.assert_close(model(x), expected, 1e-6)


@choices
def test_freeze_and_unfreeze(choice, rng):
    choose, chosen = CHOICES[choice]
    model = network(BatchNormalization, rng)
    freeze_statistics(model, layers=choose(model))
    flags = [each.frozen_statistics for each in in_order(model)]
    assert flags == list(map(bool, chosen))
    freeze_statistics(model)
    unfreeze_statistics(model, layers=choose(model))
    flags = [each.frozen_statistics for each in in_order(model)]
    assert flags == [not each for each in chosen]


def test_frozen_and_others_together_and_keras_own(rng):
    """A frozen backbone, its last layers not, behind Keras's own."""
    model = network(BatchNormalization, rng)
    revert(model, layers="stem_norm", in_place=True)
    freeze_statistics(model, layers="block")
    unfreeze_statistics(model, layers=model.get_layer("block").layers[-1:])
    x = helpers.inputs_of(rng, (8, 4))
    before = [helpers.statistics(each) for each in in_order(model)]
    model(x, training=True)
    moved = [
        not np.array_equal(old[0], helpers.statistics(each)[0])
        for old, each in zip(before, in_order(model), strict=True)
    ]
    assert moved == [True, True, False, True]
    with pytest.raises(ValueError, match="Keras's own layers stem_norm"):
        freeze_statistics(model)


@choices
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_recalibrate(choice, layer_by_layer, rng):
    """Where only some are, the others infer, and stay."""
    choose, chosen = CHOICES[choice]
    model = network(KERAS, rng)
    x = helpers.inputs_of(rng, (8, 4))
    before = [helpers.statistics(each) for each in in_order(model)]
    recalibrate(
        model,
        x,
        layers=choose(model),
        layer_by_layer=layer_by_layer,
        verbose=False,
    )
    after = [helpers.statistics(each) for each in in_order(model)]
    for old, new, is_chosen in zip(before, after, chosen, strict=True):
        for one, two in zip(old, new, strict=True):
            assert np.array_equal(one, two) != is_chosen
    if chosen != [0, 1, 1, 1]:
        return
    # Inputs of the first one behind a layer that infers.
    stem, norm = model.get_layer("stem"), model.get_layer("stem_norm")
    seen = model.get_layer("block").layers[0](norm(stem(x), training=False))
    helpers.assert_close(after[2][0], helpers.to_numpy(seen).mean(axis=0), 1e-5)


@choices
def test_fold(choice, rng):
    choose, chosen = CHOICES[choice]
    model = network(KERAS, rng)
    x = helpers.inputs_of(rng, (8, 4))
    folded = fold(model, layers=choose(model))
    assert len(networks.normalizations(folded)) == 4 - sum(chosen)
    helpers.assert_close(folded(x), model(x), 1e-5)


def test_fold_warns_of_what_was_chosen_only(rng):
    model = networks.randomize(networks.sequential(KERAS), rng)
    fold(model, layers="bn")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, KERAS(name="last")(KERAS(name="bn")(inputs)))
    with pytest.warns(UserWarning, match=r"^1 of 1 .*: bn \("):
        fold(model, layers="bn")


@pytest.mark.filterwarnings("ignore:.*are not folded")
def test_fold_of_a_class_of_its_own(rng):
    model = networks.randomize(networks.Backbone(KERAS), rng)
    assert not networks.normalizations(fold(model, layers="stem_bn"))


def test_some_of_what_a_wrapper_holds(rng):
    model = networks.randomize(networks.wrapped(KERAS), rng)
    x = networks.data_of(model, rng)
    part = convert(model, layers="in_frame")
    assert {
        each.name: type(each) for each in networks.normalizations(part)
    } == {
        "in_wrapper": KERAS,
        "in_frame": BatchRenormalization,
    }
    assert np.array_equal(
        get_statistics(model)["in_wrapper/moving_mean"],
        get_statistics(part)["in_wrapper/moving_mean"],
    )
    helpers.assert_close(part(x), model(x), 1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_two_of_one_name_in_a_wrapper(in_place):
    frame = keras.Sequential([keras.Input((3,)), KERAS(name="bn")])
    pair = keras.Sequential([keras.Input((3,)), frame, KERAS(name="bn")])
    model = keras.Sequential(
        [keras.Input((5, 3)), layers.TimeDistributed(pair)]
    )
    chosen = pair.layers[-1]
    converted = convert(model, layers=chosen, in_place=in_place)
    pair = converted.layers[-1].layer
    assert type(pair.layers[-1]) is BatchRenormalization
    assert type(pair.layers[0].layers[0]) is KERAS


def test_a_class_of_ours_is_not_keras_own(rng):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            KERAS(),
            BatchNormalization(),
            BatchRenormalization(),
        ]
    )
    keras_own, *ours = networks.randomize(model, rng).layers
    freeze_statistics(model, layers=BatchRenormalization)
    assert [each.frozen_statistics for each in ours] == [False, True]
    freeze_statistics(model, layers=(BatchRenormalization, BatchNormalization))
    assert [each.frozen_statistics for each in ours] == [True, True]
    assert not hasattr(keras_own, "frozen_statistics")


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            *[BatchNormalization(name=f"stage_{at}") for at in range(13)],
        ],
        name="deep",
    )
    with helpers.raises(
        ValueError,
        "`layers` must be layers of the model. Received: ['stage7', "
        "'stage_77'], which are not in model=deep. It has 13 layers of batch "
        "normalization; nearest: stage_7, stage_9, stage_8, stage_6.",
    ):
        get_statistics(model, layers=["stage7", "stage_77"])


def test_a_name_of_several_is_answered_with_their_paths(rng):
    def block(name):
        return keras.Sequential(
            [keras.Input((4,)), BatchNormalization(name="norm")], name=name
        )

    model = keras.Sequential(
        [keras.Input((4,)), block("encoder"), block("decoder")], name="network"
    )
    with helpers.raises(
        ValueError,
        "`layers` must say which: several layers have the name. Received: "
        "'norm', in model=network the name of encoder/norm, decoder/norm.",
    ):
        freeze_statistics(model, layers="norm")
    networks.randomize(model, rng)
    freeze_statistics(model, layers="decoder/norm")
    assert [part.layers[0].frozen_statistics for part in model.layers] == [
        False,
        True,
    ]


FUNCTIONS = {
    "convert": convert,
    "convert in place": lambda model, layers: convert(
        model, layers=layers, in_place=True
    ),
    "revert": revert,
    "fold": fold,
    "freeze_statistics": freeze_statistics,
    "unfreeze_statistics": unfreeze_statistics,
    "get_statistics": get_statistics,
    "set_statistics": lambda model, layers: set_statistics(
        model, {}, layers=layers
    ),
    "recalibrate": lambda model, layers: recalibrate(
        model, np.ones((4, 4)), layers=layers, verbose=False
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors(function):
    model = network(BatchNormalization)
    other = BatchNormalization(name="other")
    for choice, kind, message in (
        (
            ["stem_norm", "stam", other],
            ValueError,
            "`layers` must be layers of the model. Received: ['stam', "
            "<BatchNormalization name=other, built=False>], which "
            "are not in model=network. Its batch normalization: stem_norm, "
            "block/norm, first, norm.",
        ),
        (
            "stem",
            ValueError,
            "`layers` must choose batch normalization. Received: "
            "layers='stem', which chooses none of the 4 layers of "
            "model=network.",
        ),
        (
            [],
            ValueError,
            "`layers` must choose batch normalization. Received: layers=[], "
            "which chooses none of the 4 layers of model=network.",
        ),
        (
            3,
            TypeError,
            "`layers` must be a function of a layer, a class of layers, a "
            "layer, a name, or a list of such. Received: layers=3.",
        ),
        (
            re.compile("stem.*"),
            TypeError,
            "`layers` must be a function of a layer, a class of layers, a "
            "layer, a name, or a list of such. Received: "
            "layers=re.compile('stem.*').",
        ),
        (
            [3],
            TypeError,
            "`layers` must be a function of a layer, a class of layers, a "
            "layer, a name, or a list of such. Received: layers=[3].",
        ),
    ):
        with helpers.raises(kind, message):
            FUNCTIONS[function](model, layers=choice)
    assert not any(each.frozen_statistics for each in in_order(model))
    assert {type(each) for each in in_order(model)} == {BatchNormalization}
