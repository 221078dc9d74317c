"""A scope in which Keras's batch normalization is made as ours."""

import threading

import keras
import numpy as np
import pytest
from keras import layers
from keras.layers import BatchNormalization as ImportedByName

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    replacing,
    revert,
)
from tests import helpers, networks

KERAS = layers.BatchNormalization
OURS = [BatchNormalization, BatchRenormalization]


def assert_restored():
    assert "__new__" not in vars(KERAS)
    assert type(KERAS()) is KERAS
    assert type(BatchNormalization()) is BatchNormalization


@pytest.mark.parametrize("to", OURS)
def test_every_way_to_make_one(to):
    serialized = keras.layers.serialize(KERAS())
    config = KERAS(momentum=0.8).get_config()
    model = keras.Sequential([keras.Input((2,)), KERAS()])
    network = model.get_config()
    with replacing(to):
        made = [
            keras.layers.BatchNormalization(),
            ImportedByName(),
            keras.layers.deserialize(serialized),
            KERAS.from_config(config),
            keras.Sequential.from_config(network).layers[0],
            keras.models.clone_model(model).layers[0],
        ]
    assert {type(layer) for layer in made} == {to}
    assert made[3].momentum == 0.8
    assert_restored()


def test_arguments_are_those_of_keras_layer_and_of_the_scope():
    with replacing(momentum=0.95, r_max=2.0):
        # Keras takes by position what ours takes by name.
        layer = KERAS(1, 0.9, 0.01, False, name="norm", dtype="float64")
    assert (
        layer.get_config()
        == BatchRenormalization(
            1,
            0.95,
            0.01,
            center=False,
            name="norm",
            dtype="float64",
            r_max=2.0,
        ).get_config()
    )
    layer.build((None, 3, 4))
    assert [weight.name for weight in layer.weights] == [
        "gamma",
        "moving_mean",
        "moving_variance",
        "step",
        "limit_values",
        "limit_steps",
    ]
    with pytest.raises(ValueError, match="cannot add new elements"):
        layer.another = keras.Variable(0.0)


def test_names_are_those_that_keras_gives():
    keras.utils.clear_session()
    names = [KERAS().name, KERAS().name]
    keras.utils.clear_session()
    with replacing(BatchNormalization):
        assert [KERAS().name, KERAS().name] == names


@pytest.mark.skipif(
    not networks.HAS_RENORM, reason="Keras has no renorm before 3.14"
)
def test_keras_renorm_hands_on_its_limits():
    with replacing():
        layer = KERAS(renorm=True, renorm_clipping={"rmax": 2.0, "dmax": 3.0})
        assert KERAS(renorm=False).r_max == BatchRenormalization().r_max
    assert layer.current_limits() == (2.0, 3.0)


def test_what_is_not_replaced():
    class Special(KERAS):
        pass

    old = KERAS()
    with replacing():
        assert type(Special()) is Special
        assert type(BatchNormalization()) is BatchNormalization
        assert type(layers.LayerNormalization()) is layers.LayerNormalization
        assert type(old) is KERAS


def test_scopes_end_whatever_happens():
    found = []

    def fail():
        with replacing(BatchNormalization):
            found.append(type(KERAS()))
            raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        fail()
    assert_restored()
    with replacing():
        with pytest.raises(OSError, match="mine"):
            fail()
        found.append(type(KERAS()))
    assert found == [BatchNormalization] * 2 + [BatchRenormalization]
    assert_restored()


def test_a_scope_is_that_of_its_thread():
    begun, made = threading.Event(), threading.Event()
    found = {}

    def other():
        found["other"] = type(KERAS())
        with replacing(BatchNormalization):
            begun.set()
            assert made.wait(60)
            found["inside"] = type(KERAS())

    with replacing():
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(60)
        found["this"] = type(KERAS())
    # Ended while the other scope goes on.
    found["after"] = type(KERAS())
    made.set()
    thread.join()
    assert found == {
        "other": KERAS,
        "this": BatchRenormalization,
        "after": KERAS,
        "inside": BatchNormalization,
    }
    assert_restored()


@pytest.mark.filterwarnings("ignore:.*are not folded")
def test_functions_of_models_do_the_same_inside(rng):
    model = networks.randomize(networks.wrapped(KERAS), rng)
    with replacing():
        part = convert(model, BatchNormalization, layers="in_wrapper")
        back = revert(part)
        folded = fold(model)
        ours = convert(networks.sequential(lambda **a: BatchNormalization(**a)))
        assert type(revert(ours, in_place=True).layers[1]) is KERAS
    kinds = [
        {type(each) for each in networks.normalizations(each)}
        for each in (part, back, folded)
    ]
    assert kinds == [{KERAS, BatchNormalization}, {KERAS}, {KERAS}]


def test_weights_of_keras_network_go_into_ours(rng, tmp_path):
    model = networks.randomize(networks.sequential(KERAS), rng)
    x = networks.data_of(model, rng)
    model.save_weights(tmp_path / "model.weights.h5")
    with replacing(BatchNormalization, momentum=0.9):
        other = networks.sequential(KERAS)
    other.load_weights(tmp_path / "model.weights.h5")
    assert {type(each) for each in networks.normalizations(other)} == {
        BatchNormalization
    }
    helpers.assert_close(
        other.predict(x, verbose=0), model.predict(x, verbose=0), 1e-6
    )


def test_errors():
    for function in (replacing, lambda *a, **k: replacing(*a, **k)):
        scope = function(momentum=2.0)
        with (
            helpers.raises(
                ValueError,
                "`momentum` must be in [0, 1]. Received: momentum=2.0.",
            ),
            scope,
        ):
            pass
    with (
        helpers.raises(
            TypeError,
            "`to` must be keras_renorm.BatchNormalization or "
            f"keras_renorm.BatchRenormalization. Received: to={KERAS!r}.",
        ),
        replacing(KERAS),
    ):
        pass
    with (
        helpers.raises(
            TypeError,
            "`name` must not be given: layers keep theirs. Received: name='a'.",
        ),
        replacing(name="a"),
    ):
        pass
    assert_restored()
    with replacing():
        with pytest.raises((TypeError, ValueError), match="momentun"):
            KERAS(momentun=0.9)
        with pytest.raises(TypeError, match="positional"):
            KERAS(*range(40))
    assert np.all(helpers.to_numpy(KERAS()(np.zeros((2, 3)))) == 0)
