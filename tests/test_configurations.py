"""What a layer is configured with is handed on, all of it."""

import inspect

import keras
import pytest

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    revert,
)
from keras_renorm.schedules import LinearRamp

KERAS = keras.layers.BatchNormalization
OURS = [BatchNormalization, BatchRenormalization]
# No argument has its default.
OF_KERAS = {
    "axis": 1,
    "momentum": 0.7,
    "epsilon": 0.02,
    "center": False,
    "scale": False,
    "beta_initializer": keras.initializers.Constant(1.0),
    "gamma_initializer": keras.initializers.Constant(2.0),
    "moving_mean_initializer": keras.initializers.Constant(3.0),
    "moving_variance_initializer": keras.initializers.Constant(4.0),
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_regularizer": keras.regularizers.L1(0.2),
    "beta_constraint": keras.constraints.NonNeg(),
    "gamma_constraint": keras.constraints.MaxNorm(3.0),
    "synchronized": True,
    "trainable": False,
    "dtype": "mixed_bfloat16",
    "name": "a_name",
}
# These two exclude each other and what stands above, one way or the other.
GROUPS = {"synchronized": False, "virtual_batch_size": 4}
OF_OURS = {"frozen_statistics": True}
OF_RENORM = {
    "r_max": LinearRamp(1.5, 2.5, 10, 20),
    "d_max": LinearRamp(0.5, 4.0, 30, 40),
}
CORRECTED = {"gradient_momentum": 0.9}
TENSORFLOW = keras.backend.backend() == "tensorflow"


def whole(kind):
    """Configurations of a class, in which together nothing has its default."""
    given = dict(OF_KERAS)
    if kind is KERAS:
        # Elsewhere Keras refuses it.
        return [given if TENSORFLOW else {**given, "synchronized": False}]
    given |= OF_OURS
    if kind is BatchRenormalization:
        given |= OF_RENORM
        last = {**given, **(CORRECTED if TENSORFLOW else {})}
        return [last, {**given, **GROUPS}]
    return [given, {**given, **GROUPS}]


def config_of(layer):
    """The configuration, without Keras's own renormalization."""
    return {
        name: value
        for name, value in layer.get_config().items()
        if not name.startswith("renorm")
    }


@pytest.mark.parametrize("kind", [KERAS, *OURS])
def test_no_argument_is_forgotten_here(kind):
    default = config_of(kind())
    unseen = set(default)
    for given in whole(kind):
        config = config_of(kind(**given))
        unseen -= {name for name in config if config[name] != default[name]}
    if not TENSORFLOW:
        unseen -= {"gradient_momentum", "synchronized"}
    assert not unseen
    # And what the constructor takes is in the configuration.
    for each in kind.__mro__[: kind.__mro__.index(KERAS) + 1]:
        if "__init__" not in vars(each):
            continue
        for name, parameter in inspect.signature(
            each.__init__
        ).parameters.items():
            if parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            ) and not (name == "self" or name.startswith("renorm")):
                assert name in default


def named(kind):
    return "Keras" if kind is KERAS else kind.__name__


CONVERSIONS = [
    pytest.param(
        kind,
        given,
        to,
        id=f"{named(kind)} {case} to {named(to)}",
    )
    for kind in (KERAS, *OURS)
    for case, given in enumerate(whole(kind))
    for to in (KERAS, *OURS)
]


@pytest.mark.parametrize(("kind", "given", "to"), CONVERSIONS)
def test_copies_have_all_that_their_class_takes(kind, given, to):
    model = keras.Sequential([keras.Input((3, 4)), kind(**given)])
    copy = revert(model) if to is KERAS else convert(model, to=to)
    (layer,) = copy.layers
    assert type(layer) is to
    expected, got = config_of(model.layers[0]), config_of(layer)
    if to is KERAS and not TENSORFLOW:
        expected["synchronized"] = False
    assert expected.keys() & got.keys() >= OF_KERAS.keys()
    for name in expected.keys() & got.keys():
        assert got[name] == expected[name], name
    # What the other class has no word for is at its default.
    given = {"momentum": got["momentum"]}
    if to is BatchRenormalization:  # which groups of a batch say more of
        given["virtual_batch_size"] = got["virtual_batch_size"]
    default = config_of(to(**given))
    for name in got.keys() - expected.keys():
        assert got[name] == default[name], name
