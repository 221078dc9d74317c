"""What `help()` and an editor show of the layers."""

import inspect

import keras
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization
from tests import networks

KERAS = keras.layers.BatchNormalization
# Each other than the default.
GIVEN = {
    "axis": 1,
    "momentum": 0.9,
    "epsilon": 0.01,
    "center": False,
    "scale": False,
    "beta_initializer": "ones",
    "gamma_initializer": "zeros",
    "moving_mean_initializer": "random_normal",
    "moving_variance_initializer": "random_uniform",
    "beta_regularizer": "l1",
    "gamma_regularizer": "l2",
    "beta_constraint": "non_neg",
    "gamma_constraint": "unit_norm",
    "trainable": False,
    "dtype": "float64",
    "name": "given",
}


def defaults(layer):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_signature_shows_every_argument(layer):
    shown = defaults(layer)
    assert set(layer().get_config()) == set(shown)
    for name, default in defaults(KERAS).items():
        if not name.startswith("renorm"):
            assert shown[name] == default, name


def test_both_layers_have_the_same_defaults():
    more = {"r_max", "d_max", "gradient_momentum"}
    ours, theirs = defaults(BatchRenormalization), defaults(BatchNormalization)
    assert {k: ours[k] for k in ours.keys() - more} == theirs


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_each_argument_is_what_it_is_for_keras(layer):
    plain, expected = KERAS().get_config(), KERAS(**GIVEN).get_config()
    config = layer(**GIVEN).get_config()
    for name in GIVEN:
        assert config[name] == expected[name] != plain[name], name


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_arguments_of_every_layer_are_taken(layer):
    made = layer(activity_regularizer="l2", autocast=False)
    assert made.activity_regularizer.get_config()
    assert not made.autocast
    with pytest.raises((TypeError, ValueError), match="unknown"):
        layer(unknown=1)


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_what_keras_has_by_default_is_taken(layer):
    given = {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.9}
    assert not networks.HAS_RENORM or defaults(KERAS).keys() >= given.keys()
    assert layer(**{**defaults(KERAS), **given}).momentum == 0.99
