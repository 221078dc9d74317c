"""Weights as arrays: means of them, and arrays that are no state."""

import re

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.schedules import LinearRamp
from tests import helpers

INF = float("inf")
# In which numbers users average: `get_weights()` gives several types.
FLOAT32 = np.float32


def network(**limits):
    layer = BatchRenormalization(momentum=0.9, name="bn", **limits)
    model = keras.Sequential(
        [keras.Input((3,)), layer, keras.layers.Dense(1, name="dense")]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def trained(model, weights, rng, steps=4):
    """The weights of a client after so many steps."""
    model.set_weights(weights)
    x = helpers.inputs_of(rng, (4 * steps, 3))
    model.fit(x, x[:, :1], batch_size=4, verbose=0)
    return model.get_weights()


def reptile(start, *clients, share=0.1):
    return [a + share * (b - a) for a, b in zip(start, clients[0], strict=True)]


def server_step(start, *clients):
    """FedAvg, and a server that goes further than the mean."""
    means = [np.mean(arrays, axis=0) for arrays in zip(*clients, strict=True)]
    return reptile(start, means, share=1.5)


def weighted_mean(start, *clients):
    shares = np.array([0.1, 0.2, 0.7])
    return [
        np.average(np.stack(arrays), axis=0, weights=shares)
        for arrays in zip(*clients, strict=True)
    ]


def float32_mean(start, *clients):
    share = FLOAT32(1) / FLOAT32(3)
    return [
        sum((share * FLOAT32(array) for array in arrays), FLOAT32(0))
        for arrays in zip(*clients, strict=True)
    ]


def moving_average(start, *clients):
    average = start
    for client in clients:
        average = [
            FLOAT32(0.999) * a + FLOAT32(0.001) * b
            for a, b in zip(average, client, strict=True)
        ]
    return average


def unlearn(start, *clients):
    return reptile(start, *clients, share=-0.05)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (reptile, 3 * 0.4),
        (server_step, 3 * 6),
        (weighted_mean, 3 * 4),
        (float32_mean, 3 * 4),
        (moving_average, 3 * 4 * (1 - 0.999**3)),
        (unlearn, -3 * 0.2),
    ],
)
@pytest.mark.parametrize(
    "limits",
    [
        {"r_max": INF, "d_max": INF},
        {"r_max": 1.0, "d_max": 0.0},
        {"r_max": LinearRamp(1.0, 3.0, 7, 50_001), "d_max": 1.1},
    ],
)
def test_limits_and_counter_survive_means(rule, count, limits, rng, tmp_path):
    model = network(**limits)
    layer = model.layers[0]
    weights = model.get_weights()
    for _ in range(3):
        clients = [trained(model, weights, rng) for _ in range(3)]
        weights = rule(weights, *clients)
    model.set_weights(weights)
    np.testing.assert_allclose(helpers.to_numpy(layer.step), count, 1e-4)
    assert layer.current_step() == round(count)
    for name, limit in limits.items():
        assert getattr(layer, name) == limit
    # By the layer itself, and from a file.
    before = layer.get_weights()
    layer.set_weights(before)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    for other in (layer, loaded):
        for mine, array in zip(before, other.get_weights(), strict=True):
            np.testing.assert_allclose(mine, array, 1e-6)


def test_the_ramp_of_an_average_opens(rng):
    model = network(
        r_max=LinearRamp(1.0, 3.0, 0, 2), d_max=LinearRamp(0.0, 4.0, 0, 2)
    )
    weights = model.get_weights()
    for _ in range(10):
        weights = reptile(weights, trained(model, weights, rng, steps=1))
    model.set_weights(weights)
    np.testing.assert_allclose(model.layers[0].current_limits(), [2, 2], 1e-5)


def test_infinite_limits_do_not_clip_after_a_mean(rng):
    layer = BatchRenormalization(r_max=INF, d_max=INF, dtype="float64")
    inputs = 1e6 * helpers.inputs_of(rng, (5, 3), dtype="float64")
    layer.build(inputs.shape)
    layer.set_weights(
        [a + 0.3 * (a - b) for a, b in [(w, w) for w in layer.get_weights()]]
    )
    expected = helpers.to_numpy(layer(inputs, training=False))
    helpers.assert_close(layer(inputs, training=True), expected, 1e-12)


def test_a_mean_of_no_limit_and_a_ramp_is_no_limit_from_where_it_begins():
    bounded = network(r_max=LinearRamp(1.0, 3.0, 10, 20), d_max=2.0)
    unbounded = network(r_max=INF, d_max=LinearRamp(0.0, INF, 6, 6))
    bounded.set_weights(
        [
            (a + b) / 2
            for a, b in zip(
                bounded.get_weights(), unbounded.get_weights(), strict=True
            )
        ]
    )
    layer = bounded.layers[0]
    assert layer.r_max == INF
    assert layer.d_max == LinearRamp(1.0, INF, 3, 3)


def test_infinity_of_earlier_versions_is_taken():
    layer = network(r_max=3.0).layers[0]
    weights = layer.get_weights()
    weights[5] = np.full((2, 2), INF)
    layer.set_weights(weights)
    assert layer.r_max == layer.d_max == INF
    assert np.isfinite(layer.get_weights()[5]).all()


INVALID = [
    (
        "moving_variance",
        [1.0, -0.25, 2.0],
        "`moving_variance` of layer bn must be at least 0. Received: -0.25 in "
        "a channel.",
    ),
    ("step", INF, "`step` of layer bn must be finite. Received: step=inf."),
    (
        "gradient_agreement",
        [0.5, np.nan, 0.2],
        "`gradient_agreement` of layer bn must be finite. Received: "
        "gradient_agreement=nan.",
    ),
    (
        "gate",
        [0.1, 0.1, INF, 0.0],
        "`gate` of layer bn must be finite. Received: gate=inf.",
    ),
    (
        "limit_values",
        [[0.5, 3.0], [0.0, 5.0]],
        "`r_max` must be at least 1, from a step of at least 0 to a later "
        "one. Received: 0.5 at step 30 to 3.0 at step 200, as weights of "
        "layer bn. `layer.r_max = ...` sets them anew.",
    ),
    (
        "limit_values",
        [[1.0, 3.0], [0.0, np.nan]],
        "`d_max` must be at least 0, from a step of at least 0 to a later "
        "one. Received: 0.0 at step 30 to nan at step 200, as weights of "
        "layer bn. `layer.d_max = ...` sets them anew.",
    ),
    (
        "limit_steps",
        [[30.0, 25.0], [30.0, 100.0]],
        "`r_max` must be at least 1, from a step of at least 0 to a later "
        "one. Received: 1.0 at step 30 to 3.0 at step 25, as weights of "
        "layer bn. `layer.r_max = ...` sets them anew.",
    ),
    (
        "limit_steps",
        [[30.0, 100.0], [-4.0, np.nan]],
        "`d_max` must be at least 0, from a step of at least 0 to a later "
        "one. Received: 0.0 at step -4 to 5.0 at step nan, as weights of "
        "layer bn. `layer.d_max = ...` sets them anew.",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), INVALID)
def test_weights_that_are_no_state(name, value, message, tmp_path):
    model = network()
    layer = model.layers[0]
    names = [weight.name for weight in layer.weights]
    weights = model.get_weights()
    # All others are valid, and other than those that are there.
    invalid = [np.array(array) for array in weights]
    invalid[0] += 1.0
    invalid[names.index(name)] = np.array(value)
    refused = pytest.raises(ValueError, match=f"^{re.escape(message)}$")
    with refused:
        layer.set_weights(invalid[: len(names)])
    store = {str(i): array for i, array in enumerate(invalid[: len(names)])}
    with refused:
        layer.load_own_variables(store)
    for old, new in zip(weights, model.get_weights(), strict=True):
        assert np.array_equal(old, new)
    # Keras's `Model.set_weights` asks no layer. No file is lost of it.
    model.save_weights(tmp_path / "model.weights.h5")
    model.set_weights(invalid)
    with refused:
        model.save_weights(tmp_path / "again.weights.h5")
    layer.r_max, layer.d_max = 3.0, LinearRamp(0.0, 2.0, 5, 9)
    assert layer.r_max == 3.0
    assert layer.d_max == LinearRamp(0.0, 2.0, 5, 9)
    model.load_weights(tmp_path / "model.weights.h5")
    for old, new in zip(weights, model.get_weights(), strict=True):
        assert np.array_equal(old, new)


def test_weights_of_another_shape_change_nothing():
    layer = BatchNormalization(name="bn")
    layer.build((None, 3))
    before = layer.get_weights()
    with helpers.raises(
        ValueError,
        "`moving_mean` of layer bn must have shape (3,). Received: shape=(2,).",
    ):
        layer.set_weights([np.ones(3), np.ones(3), np.ones(2), np.ones(3)])
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert np.array_equal(old, new)


def test_limits_below_their_minima_count_as_the_minima(rng):
    """Where `Model.set_weights` put them: as plain batch normalization."""
    inputs = helpers.inputs_of(rng, (6, 3))
    plain = BatchNormalization()
    layer = BatchRenormalization(r_max=1.0, d_max=0.0)
    layer.build(inputs.shape)
    layer.limit_values.assign(np.array([[0.5, 0.5], [-2.0, -2.0]]))
    helpers.assert_close(
        layer(inputs, training=True), plain(inputs, training=True), 1e-6
    )


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_optimizer_finds_the_weights_of_a_subclass(
    layer, is_first, rng, tmp_path
):
    class Mixed(layer):
        def build(self, input_shape):
            if not is_first:
                super().build(input_shape)
            self.mix = self.add_weight(name="mix", shape=(3,))
            if is_first:
                super().build(input_shape)

        def call(self, inputs, training=None, mask=None):
            return self.mix * super().call(inputs, training=training)

    model = keras.Sequential([keras.Input((3,)), Mixed(name="bn")])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = helpers.inputs_of(rng, (8, 3))
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Mixed": Mixed}
    )
    slots = [
        {
            each.path.partition("bn")[2]: helpers.to_numpy(each)
            for each in one.optimizer.variables
        }
        for one in (model, loaded)
    ]
    assert slots[0].keys() == slots[1].keys()
    for path, value in slots[0].items():
        np.testing.assert_array_equal(value, slots[1][path])
