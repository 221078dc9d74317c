"""The gate of `BatchRenormalization`: files, copies, configurations."""

import keras
import numpy as np
import pytest

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.schedules import LinearRamp
from tests import helpers
from tests.test_gate import backward_state, made, state, stepper

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

# What files had before there was a gate: corrected, and not.
OLD_WEIGHTS = (10, 7)
RAMPS = {"r_max": LinearRamp(1, 3, 0, 4), "d_max": LinearRamp(0, 5, 0, 4)}
LAYERS = {
    "auto": {},
    "momentum": {"gradient_momentum": 0.8},
    "limits": {"r_max": 2.0},
    "both": {**RAMPS, "gradient_momentum": 0.9},
    "none": {"gradient_momentum": None},
    "groups": {"virtual_batch_size": 2},
}
GATED = ("auto", "momentum")


def layer_of(kind):
    """A layer that is not built; "+" assigns a limit, as a callback would."""
    name = kind.removesuffix("+")
    layer = BatchRenormalization(momentum=0.5, name="norm", **LAYERS[name])
    if name != kind:
        layer.r_max = 1.7
    return layer


def network(kind):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5),
            layer_of(kind),
            keras.layers.Dense(1),
        ]
    )


def train(model, rng):
    """Past the end of the limits' ramps, to where the gate has taken over."""
    x = rng.normal(size=(64, 4)).astype("float32") + 1
    y = x.sum(axis=1, keepdims=True)
    model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return model


def assert_same_weights(one, other):
    assert [each.name for each in one.weights] == [
        each.name for each in other.weights
    ]
    for mine, its in zip(one.weights, other.weights, strict=True):
        assert np.array_equal(helpers.to_numpy(mine), helpers.to_numpy(its)), (
            mine.path
        )


@pytest.mark.parametrize("kind", [*LAYERS, "auto+", "momentum+"])
def test_a_configuration_makes_the_same_layer(kind):
    layer = layer_of(kind)
    config = layer.get_config()
    again = BatchRenormalization.from_config(config)
    assert again.get_config() == config
    for each in (layer, again):
        each.build((None, 3))
    assert_same_weights(layer, again)
    assert again.get_config() == config
    assert BatchRenormalization.from_config(config).get_config() == config
    if layer.gated is not None:
        assert (float(layer.gated) == 1.0) == (kind in GATED)


@pytest.mark.parametrize("momentum", [0.9, 0.8, None])
@pytest.mark.parametrize("limits", [{}, {"r_max": 2.0}], ids=str)
def test_a_momentum_that_is_assigned_is_as_if_given(limits, momentum):
    layer = BatchRenormalization(name="norm", **limits)
    layer.gradient_momentum = momentum
    given = BatchRenormalization(
        name="norm", gradient_momentum=momentum, **limits
    )
    assert layer.get_config() == given.get_config()
    for each in (layer, given):
        each.build((None, 3))
    assert_same_weights(layer, given)


@pytest.mark.parametrize("kind", GATED)
def test_limits_assigned_later_are_in_the_configuration(kind, rng):
    layer = layer_of(kind)
    layer.build((None, 3))
    config = layer.get_config()
    assert (config["r_max"], config["d_max"]) == ("auto", "auto")
    layer.d_max = 2.0
    assert float(layer.gated) == 0
    config = layer.get_config()
    assert config["d_max"] == 2.0
    assert config["gradient_momentum"] == LAYERS[kind].get(
        "gradient_momentum", "auto"
    )
    again = BatchRenormalization.from_config(config)
    again.build((None, 3))
    assert_same_weights(layer, again)
    assert (again.r_max, again.d_max) == (layer.r_max, layer.d_max)


@pytest.mark.parametrize("kind", [*LAYERS, "auto+", "momentum+"])
@pytest.mark.parametrize("copy", ["file", "clone", "convert"])
def test_a_copy_trains_on_the_same(copy, kind, rng, tmp_path):
    model = train(network(kind), rng)
    norm = model.get_layer("norm")
    if kind in GATED:
        assert 0 < norm.current_correction() < 1
    if copy == "file":
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    elif copy == "clone":
        other = keras.models.clone_model(model)
        other.set_weights(model.get_weights())
    else:
        other = keras_renorm.convert(model)
    copied = other.get_layer("norm")
    assert copied.get_config() == norm.get_config()
    assert copied.current_correction() == norm.current_correction()
    assert_same_weights(model, other)
    data = rng.bit_generator.state
    train(model, rng)
    rng.bit_generator.state = data
    train(other, rng)
    assert_same_weights(model, other)


@pytest.mark.parametrize("kind", GATED)
def test_weights_alone_carry_the_gate(kind, rng, tmp_path):
    model = train(network(kind), rng)
    model.save_weights(tmp_path / "model.weights.h5")
    other = network(kind)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(model, other)


@pytest.mark.parametrize("kind", GATED)
def test_a_layer_that_is_converted_begins_with_a_new_gate(kind, rng):
    model = train(network(kind), rng)
    reverted = keras_renorm.revert(model)
    assert len(reverted.get_layer("norm").weights) == 4
    again = keras_renorm.convert(reverted).get_layer("norm")
    new = BatchRenormalization()
    new.build((None, 5))
    for name, value in backward_state(new).items():
        assert np.array_equal(value, backward_state(again)[name]), name
    assert again.current_correction() == pytest.approx(1.0, abs=1e-4)
    plain = keras_renorm.convert(model, to=BatchNormalization)
    assert len(plain.get_layer("norm").weights) == 4


def save_as_before(model, path, count, monkeypatch):
    """Without the weights of the gate."""

    def save_own_variables(layer, store):
        for index, weight in enumerate(layer.weights[:count]):
            store[f"{index}"] = helpers.to_numpy(weight)

    with monkeypatch.context() as patch:
        patch.setattr(
            BatchRenormalization, "save_own_variables", save_own_variables
        )
        if path.name.endswith(".keras"):
            model.save(path)
        else:
            model.save_weights(path)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("kind", ["both", *GATED])
@pytest.mark.parametrize("count", OLD_WEIGHTS)
def test_files_from_before_the_gate_load(
    count, kind, name, rng, tmp_path, monkeypatch
):
    model = train(network(kind), rng)
    path = tmp_path / name
    save_as_before(model, path, count, monkeypatch)
    if name.endswith(".keras"):
        loaded = keras.models.load_model(path)
    else:
        # Of one that has trained on other data, nothing is left.
        loaded = train(network(kind), np.random.default_rng(1))
        loaded.load_weights(path)
    norm, new = loaded.get_layer("norm"), model.get_layer("norm")
    assert new.weights[9] is new.gradient_agreement
    for one, other in zip(
        norm.weights[:count], new.weights[:count], strict=True
    ):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    if count == min(OLD_WEIGHTS):
        assert not np.any(helpers.to_numpy(norm.gradient_mean))
        assert np.all(helpers.to_numpy(norm.gradient_agreement) == 1)
    for value in (norm.last_mean, norm.last_gradient, norm.gate):
        assert not np.any(helpers.to_numpy(value))
    assert float(norm.gated) == (kind in GATED)
    if kind == "both" and count == max(
        OLD_WEIGHTS
    ):  # no gate rules it: it trains on as it did
        state = rng.bit_generator.state
        train(model, rng)
        rng.bit_generator.state = state
        train(loaded, rng)
        for one, other in zip(
            norm.weights[:count], new.weights[:count], strict=True
        ):
            helpers.assert_close(one, other, 1e-6)


def test_other_numbers_of_weights_do_not_load(rng):
    layer, _ = made((None, 4), rng)
    store = {str(i): each for i, each in enumerate(layer.get_weights())}
    before = state(layer)
    for count in (6, 9, 11, 13):
        fewer = {str(index): store[str(index)] + 1 for index in range(count)}
        with helpers.raises(
            ValueError,
            "The file must hold the weights of this network. Received: "
            f"{count} of the 14 weights of layer {layer.name}, of class "
            "BatchRenormalization. Weights of a network with batch "
            "normalization of another class: load them into that network, "
            "then `keras_renorm.convert` it.",
        ):
            layer.load_own_variables(fewer)
    for name, value in state(layer).items():
        assert np.array_equal(value, before[name]), name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("limits", 1.0), ("both", 1.0), ("none", 1.0), ("groups", 1.0)],
)
def test_where_limits_rule_all_is_corrected(kind, expected, rng):
    layer = layer_of(kind)
    assert layer.current_correction() == expected
    layer.build((None, 4))
    layer.step.assign(100)
    if layer.gate is not None:
        layer.gate.assign([0.0, 1.0, 4.0, 1.0])
    assert layer.current_correction() == expected


def test_current_correction_is_of_the_next_step(rng):
    assert BatchRenormalization().current_correction() == 1.0
    layer, reference = made((4, 3), rng)
    end = layer.r_max.end_step
    for step in (0, end, end + 1, end + 2, 10 * end):
        layer.step.assign(step)
        reference.current_step = step
        assert layer.current_correction() == pytest.approx(
            reference.opening(), abs=1e-4
        )
    assert layer.current_correction() < 0.9
    layer.r_max = 3.0
    assert layer.current_correction() == 1.0


@pytest.mark.parametrize("kind", GATED)
def test_assigned_limits_act_at_once_in_a_graph(kind, rng):
    layer, _ = made((4, 3), rng, step=20, **LAYERS[kind])
    step = stepper(layer, wrapper="graph")
    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    upstream = tf.constant(rng.normal(size=(4, 3)).astype("float32") + 1)
    step(inputs, upstream)
    layer.r_max = 1.8
    layer.d_max = 0.7
    expected = BatchRenormalization(
        momentum=layer.momentum,
        r_max=1.8,
        d_max=0.7,
        # Without a number, only the outputs are corrected then.
        gradient_momentum=LAYERS[kind].get("gradient_momentum"),
    )
    expected.build((4, 3))
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        getattr(expected, name).assign(getattr(layer, name))
    if kind == "momentum":
        for name in backward_state(layer):
            getattr(expected, name).assign(getattr(layer, name))
    for one, other in zip(
        step(inputs, upstream), stepper(expected)(inputs, upstream), strict=True
    ):
        helpers.assert_close(one, other, 1e-5)
