"""Groups of consecutive examples that training normalizes by themselves."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm import BatchNormalization, BatchRenormalization
from tests import helpers
from tests.reference import Reference, from_rows, to_rows

LAYERS = [BatchNormalization, BatchRenormalization]
LIMITS = {"r_max": 1.5, "d_max": 0.7}


def make(kind, shape, rng, **arguments):
    if kind is BatchRenormalization:
        arguments = {**LIMITS, **arguments}
    layer = kind(momentum=0.8, **arguments)
    layer.build(shape)
    helpers.randomize(layer, rng)
    return layer


def reference_of(layer):
    reference = Reference(len(helpers.statistics(layer)[0]), momentum=0.8)
    reference.gamma = helpers.to_numpy(layer.gamma)
    reference.beta = helpers.to_numpy(layer.beta)
    reference.moving_mean, reference.moving_variance = helpers.statistics(layer)
    return reference


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((10, 3), -1), ((12, 5, 3), -1), ((10, 4, 2, 3), -1), ((9, 3, 4, 2), 1)],
)
def test_each_group_is_a_batch_and_the_statistics_are_those_of_all(
    kind, shape, axis, rng
):
    layer = make(
        kind, shape, rng, axis=axis, virtual_batch_size=4, dtype="float64"
    )
    reference = reference_of(layer)
    # Groups that differ, as the replicas of a run may.
    x = helpers.inputs_of(rng, shape, axis, "float64")
    x = x * np.linspace(1, 3, len(x)).reshape(-1, *[1] * (len(shape) - 1))
    upstream = rng.normal(size=shape)
    result = helpers.gradients(layer, x, upstream)
    outputs, d_inputs = np.empty(shape), np.empty(shape)
    d_gamma = d_beta = 0.0
    for begin in range(0, len(x), 4):
        part = slice(begin, begin + 4)
        rows, d_rows = to_rows(x[part], axis), to_rows(upstream[part], axis)
        limits = (1.5, 0.7) if kind is BatchRenormalization else (1.0, 0.0)
        r, d = reference.correction(rows, *limits)
        if kind is BatchRenormalization:
            assert np.any(r != 1)
        outputs[part] = from_rows(
            reference.normalize(rows, r, d), x[part].shape, axis
        )
        gradients = reference.gradients(rows, d_rows, r, d)
        d_inputs[part] = from_rows(gradients[0], x[part].shape, axis)
        d_gamma, d_beta = d_gamma + gradients[1], d_beta + gradients[2]
    for actual, expected in zip(
        (*result[:2], *result[2]),
        (outputs, d_inputs, d_gamma, d_beta),
        strict=True,
    ):
        helpers.assert_close(actual, expected, 1e-12)
    reference.train(to_rows(x, axis))
    helpers.assert_close(layer.moving_mean, reference.moving_mean, 1e-12)
    helpers.assert_close(
        layer.moving_variance, reference.moving_variance, 1e-12
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("size", [8, 100])
def test_one_group_that_covers_the_batch_is_the_plain_layer(kind, size, rng):
    x = helpers.inputs_of(rng, (8, 5, 5, 3))
    upstream = rng.normal(size=x.shape).astype("float32")
    seed = 3
    plain = make(kind, x.shape, np.random.default_rng(seed))
    grouped = make(
        kind, x.shape, np.random.default_rng(seed), virtual_batch_size=size
    )
    expected = helpers.gradients(plain, x, upstream)
    actual = helpers.gradients(grouped, x, upstream)
    for one, other in zip(
        (*actual[:2], *actual[2], *helpers.statistics(grouped)),
        (*expected[:2], *expected[2], *helpers.statistics(plain)),
        strict=True,
    ):
        helpers.assert_close(one, other, 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("per_example", [False, True])
def test_a_mask_is_dropped_rows_of_each_group(kind, per_example, rng):
    x = helpers.inputs_of(rng, (10, 6, 3), dtype="float64")
    mask = rng.random((10, 1 if per_example else 6)) < 0.6
    mask[4:8] = False  # a whole group
    mask[0] = mask[9] = True
    kept = np.broadcast_to(mask, (10, 6))
    x[~kept] = np.nan
    layer = make(kind, x.shape, rng, virtual_batch_size=4, dtype="float64")
    reference = reference_of(layer)
    limits = (1.5, 0.7) if kind is BatchRenormalization else (1.0, 0.0)
    upstream = rng.normal(size=x.shape)
    outputs, d_inputs, d_weights = helpers.gradients(
        layer, x, upstream, mask=mask
    )
    for begin in (0, 8):
        part = slice(begin, begin + 4)
        rows = x[part][kept[part]]
        r, d = reference.correction(rows, *limits)
        helpers.assert_close(
            outputs[part][kept[part]], reference.normalize(rows, r, d), 1e-12
        )
        helpers.assert_close(
            d_inputs[part][kept[part]],
            reference.gradients(rows, upstream[part][kept[part]], r, d)[0],
            1e-11,
        )
    assert np.all(d_inputs[~kept] == 0)
    assert all(np.all(np.isfinite(value)) for value in d_weights)
    reference.train(x[kept])
    helpers.assert_close(layer.moving_mean, reference.moving_mean, 1e-12)
    helpers.assert_close(
        layer.moving_variance, reference.moving_variance, 1e-12
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_knows_no_groups(kind, rng):
    x = helpers.inputs_of(rng, (10, 3))
    layer = make(kind, x.shape, rng, virtual_batch_size=4)
    expected = reference_of(layer).infer(x)
    helpers.assert_close(layer(x), expected, 1e-5)
    layer.frozen_statistics = True
    helpers.assert_close(layer(x, training=True), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_unknown_batch_sizes_in_fit(kind, rng):
    x = helpers.inputs_of(rng, (18, 4, 4, 3))
    inputs = keras.Input((4, 4, 3))
    layers = [
        make(kind, x.shape, np.random.default_rng(1), virtual_batch_size=4)
        for _ in range(2)
    ]
    model = keras.Model(inputs, layers[0](inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    # Batches of 10 (groups of 4, 4, 2) and 8; in a graph.
    model.fit(x, x, batch_size=10, shuffle=False, verbose=0)
    for part in (x[:10], x[10:]):
        layers[1](part, training=True)
    for one, other in zip(*map(helpers.statistics, layers), strict=True):
        helpers.assert_close(one, other, 1e-6)


def test_large_means(rng):
    stddev = np.array([1.0, 3.0])
    mean = np.array([1e4, -3e4])
    x = (mean + stddev * rng.normal(size=(64, 20, 2))).astype("float32")
    layer = BatchNormalization(momentum=0.0, virtual_batch_size=24)
    layer(x, training=True)
    rows = x.reshape(-1, 2).astype("float64")
    moved = helpers.statistics(layer)[1]
    assert np.all(np.abs(moved / rows.var(axis=0) - 1) < 5e-5)
    constant = np.full((64, 3), 10000.7, "float32")
    layer = BatchNormalization(momentum=0.0, virtual_batch_size=24)
    assert np.all(helpers.to_numpy(layer(constant, training=True)) == 0)
    assert np.all(helpers.statistics(layer)[1] == 0)


@pytest.mark.parametrize("kind", LAYERS)
def test_bad_batches_leave_statistics_alone(kind, rng):
    x = helpers.inputs_of(rng, (10, 3))
    x[2, 1] = np.nan
    layer = make(kind, x.shape, rng, virtual_batch_size=4)
    before = helpers.statistics(layer)
    outputs = helpers.to_numpy(layer(x, training=True))
    # One channel of one group.
    bad = np.zeros(x.shape, bool)
    bad[:4, 1] = True
    assert np.array_equal(np.isnan(outputs), bad)
    after = helpers.statistics(layer)
    for old, new in zip(before, after, strict=True):
        assert new[1] == old[1]
        assert np.all(new[[0, 2]] != old[[0, 2]])
    layer(ops.zeros((0, 3)), training=True)
    layer(x, training=True, mask=np.zeros(10, bool))
    for old, new in zip(after, helpers.statistics(layer), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize("kind", LAYERS)
def test_config(kind):
    layer = kind(virtual_batch_size=np.int64(4))
    assert layer.get_config()["virtual_batch_size"] == 4
    copy = kind.from_config(layer.get_config())
    assert copy.virtual_batch_size == 4
    assert copy.get_config() == layer.get_config()
    assert kind().virtual_batch_size is None
