"""Moments of the noise against those of its definition."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm.diagnostics import ActivationNoise
from tests import helpers

LIMIT, SCALE, SPREAD, DEVIATION = 0.7, 1.6, 0.2, 0.15
STEPS, EXAMPLES, UNITS = 60, 400, 50


def noise(**arguments):
    return ActivationNoise(
        **{
            "mean_limit": LIMIT,
            "scale_limit": SCALE,
            "mean_spread": SPREAD,
            "scale_spread": DEVIATION,
            "seed": 3,
            **arguments,
        }
    )


def draws(layer, value, steps=STEPS):
    """Outputs for a constant input, `(steps, examples, units)`."""
    x = np.full((EXAMPLES, UNITS), value, "float32")
    return np.array(
        [helpers.to_numpy(layer(x, training=True)) for _ in range(steps)],
        "float64",
    )


@pytest.fixture(scope="module")
def shifts():
    """m, which is all that there is of an input of zero."""
    return draws(noise(), 0.0)


@pytest.fixture(scope="module")
def factors():
    """s: the same seed gives the same m."""
    return draws(noise(), 1.0) - draws(noise(), 0.0)


def close(actual, expected, deviation):
    """Within five standard deviations of the estimate."""
    assert abs(actual - expected) < 5 * deviation, (actual, expected)


def test_shifts_of_examples_are_uniform_around_their_unit(shifts):
    centered = shifts - shifts.mean(axis=1, keepdims=True)
    variance = SPREAD**2 / 3
    # The variance of a square of U(-a, a) is 4 a⁴ / 45.
    deviation = np.sqrt(4 / 45 * SPREAD**4 / centered.size)
    close(centered.var() * EXAMPLES / (EXAMPLES - 1), variance, deviation)
    # Uniform: the width is reached, and never passed.
    widths = np.ptp(shifts, axis=1)
    assert widths.max() <= 2 * SPREAD + 1e-6
    assert widths.min() > 1.9 * SPREAD


def test_means_of_units_are_uniform_and_change_each_step(shifts):
    means = shifts.mean(axis=1)  # (steps, units)
    variance = LIMIT**2 / 3 + SPREAD**2 / 3 / EXAMPLES
    close(means.mean(), 0.0, np.sqrt(variance / means.size))
    close(means.var(), variance, np.sqrt(4 / 45 * LIMIT**4 / means.size))
    assert 0.97 * LIMIT < np.abs(means).max() < LIMIT + 0.05
    # No relation from step to step, or from unit to unit.
    for one, other in ((means[1:], means[:-1]), (means[:, 1:], means[:, :-1])):
        close(np.mean(one * other) / variance, 0.0, 1 / np.sqrt(one.size))


def test_factors_of_examples_are_normal_around_their_unit(factors):
    centered = factors - factors.mean(axis=1, keepdims=True)
    count = centered.size
    close(
        centered.var() * EXAMPLES / (EXAMPLES - 1),
        DEVIATION**2,
        DEVIATION**2 * np.sqrt(2 / count),
    )
    kurtosis = np.mean(centered**4) / centered.var() ** 2
    close(kurtosis, 3 - 6 / EXAMPLES, np.sqrt(96 / count))


def test_mean_factors_of_units_are_uniform(factors):
    means = factors.mean(axis=1)
    width = SCALE - 1
    variance = width**2 / 12 + DEVIATION**2 / EXAMPLES
    close(means.mean(), (1 + SCALE) / 2, np.sqrt(variance / means.size))
    close(means.var(), variance, width**2 * np.sqrt(1 / 180 / means.size))
    assert 1 - 0.05 < means.min() < means.max() < SCALE + 0.05


def test_shifts_and_factors_are_apart(shifts, factors):
    m, s = shifts[:1], factors[:1]
    for axis in (1, 2):
        m, s = m - m.mean(axis, keepdims=True), s - s.mean(axis, keepdims=True)
    correlation = np.mean(m * s) / (m.std() * s.std())
    close(correlation, 0.0, 1 / np.sqrt(m.size))


def test_every_pixel_and_channel_is_a_unit():
    layer = noise(mean_spread=0.0, scale_spread=0.0)
    x = np.zeros((5, 3, 4, 2), "float32")
    outputs = helpers.to_numpy(layer(x, training=True))
    assert np.all(outputs == outputs[:1])
    assert len(np.unique(outputs[0])) == 24


def test_defaults_are_the_papers():
    layer = ActivationNoise()
    assert layer.mean_limit == 0.5
    assert layer.scale_limit == 1.25
    assert layer.mean_spread == 0.1
    assert layer.scale_spread == 0.1


def test_without_noise_it_is_the_identity(rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    layer = ActivationNoise(0.0, 1.0, 0.0, 0.0)
    np.testing.assert_array_equal(helpers.to_numpy(layer(x, training=True)), x)


def test_inference_is_the_identity_and_draws_nothing(rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    layer = noise()
    before = helpers.to_numpy(layer.seed_generator.state)
    for outputs in (layer(x), layer(x, training=False)):
        np.testing.assert_array_equal(helpers.to_numpy(outputs), x)
    after = helpers.to_numpy(layer.seed_generator.state)
    np.testing.assert_array_equal(before, after)


def test_gradient_is_the_factor(rng):
    """By differences: outputs are linear in the inputs, noise held."""
    layer = noise(dtype="float64")
    x = rng.normal(size=(4, 3))
    state = helpers.to_numpy(layer.seed_generator.state)

    def outputs(x):
        layer.seed_generator.state.assign(state)
        return helpers.to_numpy(layer(x, training=True))

    factor = outputs(x + 1) - outputs(x)
    upstream = rng.normal(size=(4, 3))
    layer.seed_generator.state.assign(state)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variable = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(variable)
            total = tf.reduce_sum(layer(variable, training=True) * upstream)
        gradient = tape.gradient(total, variable)
    elif keras.backend.backend() == "torch":
        import torch

        variable = torch.tensor(x, requires_grad=True)
        total = (layer(variable, training=True) * torch.tensor(upstream)).sum()
        (gradient,) = torch.autograd.grad(total, variable)
    else:
        import jax

        gradient = jax.grad(
            lambda x: (
                layer.stateless_call(
                    [], [layer.seed_generator.state.value], x, training=True
                )[0]
                * upstream
            ).sum()
        )(x)
    helpers.assert_close(gradient, upstream * factor, 1e-12)
    assert np.ptp(factor) > 0.05


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("mixed_float16", "float16"),
        ("mixed_bfloat16", "bfloat16"),
        ("float64", "float64"),
    ],
)
def test_policies(policy, dtype):
    layer = noise(dtype=policy)
    x = np.zeros((EXAMPLES, UNITS))
    outputs = layer(x, training=True)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    means = helpers.to_numpy(outputs).astype("float64").mean(axis=0)
    assert 0.5 * LIMIT < np.abs(means).max() < LIMIT + 0.05


def test_float64_noise_is_drawn_in_float64():
    x = np.zeros((2, 3))
    outputs = helpers.to_numpy(noise(dtype="float64")(x, training=True))
    assert np.all(outputs != outputs.astype("float32"))


def test_saves_loads_and_trains(tmp_path, rng):
    model = keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.Masking(),
            noise(name="noise"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    x = rng.normal(size=(10, 4, 3)).astype("float32")
    model.compile("sgd", "mse")
    # The last batch is a smaller one.
    model.fit(x, np.zeros(10), batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    layer, copy = model.get_layer("noise"), loaded.get_layer("noise")
    assert type(copy) is ActivationNoise
    assert copy.get_config() == layer.get_config()
    # Keras does not save the generator's state: it begins anew.
    np.testing.assert_array_equal(
        helpers.to_numpy(copy(x, training=True)),
        helpers.to_numpy(noise()(x, training=True)),
    )


def test_config():
    config = noise().get_config()
    assert {name: config[name] for name in ("mean_limit", "scale_limit")} == {
        "mean_limit": LIMIT,
        "scale_limit": SCALE,
    }
    assert config["mean_spread"] == SPREAD
    assert config["scale_spread"] == DEVIATION
    assert config["seed"] == 3
    assert keras.saving.get_registered_name(ActivationNoise) == (
        "keras_renorm>ActivationNoise"
    )


@pytest.mark.parametrize("seed", [np.int64(3), np.array(3)])
def test_a_seed_of_numpy_is_that_seed(seed, rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    outputs = [ActivationNoise(seed=s)(x, training=True) for s in (seed, 3)]
    np.testing.assert_array_equal(*map(helpers.to_numpy, outputs))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"mean_limit": -1},
            ValueError,
            "`mean_limit` must be finite and at least 0. Received: "
            "mean_limit=-1.",
        ),
        (
            {"scale_limit": 0.5},
            ValueError,
            "`scale_limit` must be finite and at least 1. Received: "
            "scale_limit=0.5.",
        ),
        (
            {"mean_spread": float("inf")},
            ValueError,
            "`mean_spread` must be finite and at least 0. Received: "
            "mean_spread=inf.",
        ),
        (
            {"scale_spread": float("nan")},
            ValueError,
            "`scale_spread` must not be NaN. Received: scale_spread=nan.",
        ),
        (
            {"mean_limit": "1"},
            TypeError,
            "`mean_limit` must be a number. Received: mean_limit='1'.",
        ),
        (
            {"seed": 0.5},
            TypeError,
            "`seed` must be an integer. Received: seed=0.5.",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ActivationNoise(**arguments)
