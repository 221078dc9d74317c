"""Replicas: statistics that they share, or that are averaged when read.

One strategy a process: two clash. Two replicas here; with `REPLICAS=4` in the
environment these tests run with four, as `test_four_replicas` runs some.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_renorm
from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    revert,
)
from keras_renorm.callbacks import RenormScheduler
from keras_renorm.schedules import LinearRamp
from tests import helpers

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

REPLICAS = int(os.environ.get("REPLICAS", "2"))
CORRECTED = functools.partial(BatchRenormalization, gradient_momentum=0.8)
# Without limits, and not with `make`'s.
GATED = functools.partial(BatchRenormalization, gradient_momentum=0.9)
LAYERS = [
    BatchNormalization,
    BatchRenormalization,
    pytest.param(CORRECTED, id="corrected"),
    pytest.param(GATED, id="gated"),
]
# Examples a replica.
SPLITS = {
    2: {"equal": (3, 3), "unequal": (5, 2), "one empty": (4, 0)},
    4: {
        "equal": (2, 2, 2, 2),
        "unequal": (1, 4, 2, 3),
        "one empty": (3, 0, 2, 1),
    },
}[REPLICAS]


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(REPLICAS)]
    )


def make(kind, shape, **arguments):
    """A built layer with the same values whenever it is made."""
    if kind not in (BatchNormalization, GATED):
        arguments["r_max"] = LinearRamp(1.1, 3.0, 0, 3)
        arguments["d_max"] = LinearRamp(0.1, 2.0, 0, 3)
    layer = kind(momentum=0.7, **arguments)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(7)
    helpers.randomize(layer, rng)
    if kind is GATED:
        # In the middle of a run, and half open.
        channels = layer.moving_mean.shape[0]
        layer.step.assign(30)
        layer.last_mean.assign(rng.normal(size=channels))
        layer.last_gradient.assign(rng.normal(size=channels))
        layer.gradient_agreement.assign(0.3 * np.ones(channels))
        layer.gate.assign([0.5, 1.0, 4.0, 0.3])
        assert 0.1 < layer.current_correction() < 0.9
    return layer


def distribute(strategy, parts):
    parts = iter(parts)
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(next(parts))
    )


def step(strategy, layer, x, upstream, mask, split, is_eager=False):
    """Outputs and gradients of x, gamma and beta: a list of each replica's."""

    def run(part, d_part, part_mask):
        with tf.GradientTape() as tape:
            tape.watch(part)
            outputs = layer(part, training=True, mask=part_mask)
            loss = tf.reduce_sum(outputs * d_part)
        weights = [weight.value for weight in layer.trainable_variables]
        return outputs, *tape.gradient(loss, [part, *weights])

    at = np.cumsum(split)[:-1]
    values = [
        None if array is None else distribute(strategy, np.split(array, at))
        for array in (x, upstream, mask)
    ]
    run_all = lambda *values: strategy.run(run, values)  # noqa: E731
    results = (run_all if is_eager else tf.function(run_all))(*values)
    return [strategy.experimental_local_results(value) for value in results]


def assert_parity(
    strategy, layer, single, x, upstream, mask, split, tolerance, is_eager=False
):
    """Two steps on replicas equal two on one device."""
    is_renorm = isinstance(layer, BatchRenormalization)
    begin = single.current_step() if is_renorm else 0
    for scale in (1.0, 0.5):
        x = x * np.asarray(scale, x.dtype)
        expected = helpers.gradients(single, x, upstream, mask)
        outputs, d_x, *d_weights = step(
            strategy, layer, x, upstream, mask, split, is_eager
        )
        kept = np.ones(len(x), bool) if mask is None else mask.any(axis=-1)
        for actual, whole in zip((outputs, d_x), expected[:2], strict=True):
            actual = np.concatenate(actual)
            if mask is not None:
                # What is masked is unspecified.
                actual, whole = actual[kept], whole[kept]
            helpers.assert_close(actual, whole, tolerance)
        for parts, whole in zip(d_weights, expected[2], strict=True):
            helpers.assert_close(np.sum(parts, axis=0), whole, tolerance)
    for one, other in zip(
        layer.non_trainable_variables,
        single.non_trainable_variables,
        strict=True,
    ):
        copies = strategy.experimental_local_results(one.value)
        assert len(copies) == REPLICAS
        for copy in copies[1:]:
            assert np.array_equal(copy.numpy(), copies[0].numpy()), one.path
        helpers.assert_close(one, other, tolerance)
    if is_renorm:
        assert layer.current_step() == single.current_step() == begin + 2
        assert layer.current_limits() == single.current_limits()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("axis", [-1, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_synchronized_replicas_equal_one_device_with_all_examples(
    kind, split, is_masked, axis, dtype, strategy, rng
):
    split = SPLITS[split]
    shape = (sum(split), 3, 2, 4) if axis == -1 else (sum(split), 4, 3, 2)
    x = helpers.inputs_of(rng, shape, axis, dtype)
    # Replicas that differ.
    x *= np.linspace(0.5, 2, len(x), dtype=dtype).reshape(-1, 1, 1, 1)
    upstream = rng.normal(size=shape).astype(dtype)
    mask = None
    if is_masked:
        mask = np.repeat(rng.random((len(x), 1)) < 0.7, 3, axis=1)
        mask[0] = True
        x[~mask[:, 0]] = np.nan
    with strategy.scope():
        layer = make(kind, shape, axis=axis, dtype=dtype, synchronized=True)
    single = make(kind, shape, axis=axis, dtype=dtype)
    assert_parity(
        strategy,
        layer,
        single,
        x,
        upstream,
        mask,
        split,
        1e-12 if dtype == "float64" else 1e-5,
        is_eager=dtype == "float64",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_masks_of_channels_are_synchronized(kind, split, strategy, rng):
    split = SPLITS[split]
    shape = (sum(split), 4, 3, 2)
    x = helpers.inputs_of(rng, shape, 1, "float64")
    x *= np.linspace(0.5, 2, len(x)).reshape(-1, 1, 1, 1)
    mask = rng.random((len(x), 4)) < 0.6
    mask[:, 0] = True
    mask[: split[0], 1] = False  # a channel of which a replica has nothing
    mask[-1] = True
    with strategy.scope():
        layer = make(kind, shape, axis=1, dtype="float64", synchronized=True)
    assert_parity(
        strategy,
        layer,
        make(kind, shape, axis=1, dtype="float64"),
        x,
        rng.normal(size=shape),
        mask,
        split,
        1e-12,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"center": False, "scale": False}, {"axis": 1}], ids=str
)
def test_large_tensors_are_synchronized(
    kind, split, arguments, strategy, rng, monkeypatch
):
    split = SPLITS[split]
    axis = arguments.get("axis", -1)
    shape = (sum(split), 64, 64, 8) if axis == -1 else (sum(split), 8, 64, 64)
    monkeypatch.setattr("keras_renorm._step.choice.SMALL_ELEMENTS", 1_000)
    x = helpers.inputs_of(rng, shape, axis)
    x *= np.linspace(0.5, 2, len(x), dtype="float32").reshape(-1, 1, 1, 1)
    upstream = rng.normal(size=shape).astype("float32")
    with strategy.scope():
        layer = make(kind, shape, synchronized=True, **arguments)
    single = make(kind, shape, **arguments)
    assert_parity(strategy, layer, single, x, upstream, None, split, 1e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_synchronized_16_bit_inputs_are_rounded_once(
    dtype, strategy, rng, monkeypatch
):
    split = SPLITS["unequal"]
    shape = (sum(split), 32, 32, 4)
    monkeypatch.setattr("keras_renorm._step.choice.SMALL_ELEMENTS", 1_000)
    with strategy.scope():
        layer = make(BatchNormalization, shape, synchronized=True, dtype=dtype)
    single = make(BatchNormalization, shape)
    compute = layer.compute_dtype
    x = tf.cast(helpers.inputs_of(rng, shape), compute)
    upstream = tf.cast(rng.normal(size=shape), compute)
    outputs, d_x, *_ = step(
        strategy, layer, x.numpy(), upstream.numpy(), None, split
    )
    expected = helpers.gradients(
        single, tf.cast(x, "float32"), tf.cast(upstream, "float32")
    )
    assert outputs[0].dtype == compute
    # Half of the spacing of values, at most, beside the largest.
    rounding = 1.01 * (2**-11 if compute == "float16" else 2**-8)
    for actual, whole in zip((outputs, d_x), expected[:2], strict=True):
        actual = tf.cast(tf.concat(actual, 0), "float32")
        helpers.assert_close(actual, whole, rounding)
    for one, other in zip(
        *map(helpers.statistics, (layer, single)), strict=True
    ):
        helpers.assert_close(one, other, 1e-5)


@pytest.mark.parametrize("sizes", [(2,), (40, 40, 2)], ids=["small", "fused"])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_the_pooled_variance_of_large_means(sizes, ratio, strategy, rng):
    split = SPLITS["unequal"]
    examples = 128 if sizes == (2,) else 1
    split = tuple(n * examples for n in split)
    stddev = np.array([1.0, 3.0])
    x = stddev * rng.normal(size=(sum(split), *sizes))
    # A distance between the replicas too.
    x += np.repeat(np.arange(REPLICAS), split).reshape(-1, *[1] * len(sizes))
    x = (x + ratio * stddev * [1, -1]).astype("float32")
    with strategy.scope():
        layer = BatchNormalization(momentum=0.0, synchronized=True)
        layer.build((None, *sizes))
    outputs, *_ = step(strategy, layer, x, np.zeros_like(x), None, split)
    rows = x.reshape(-1, 2).astype("float64")
    error = np.abs(helpers.statistics(layer)[1] / rows.var(axis=0) - 1)
    assert np.all(error < (1e-5 if ratio == 1e3 else 5e-5))
    normalized = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-3)
    actual = np.concatenate(outputs).reshape(-1, 2)
    assert np.abs(actual - normalized).max() < ratio * 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3,), (96, 96, 3)], ids=["small", "fused"])
@pytest.mark.parametrize("value", [1e4, 10000.7, 1e7, -3.3e5])
def test_constant_channels_are_exact(sizes, value, strategy):
    split = SPLITS["unequal"]
    x = np.full((sum(split), *sizes), value, "float32")
    with strategy.scope():
        layer = BatchNormalization(momentum=0.0, synchronized=True)
        layer.build((None, *sizes))
    # A distance from the constant that has no short binary form.
    layer.moving_mean.assign(np.float32([0.1, -1.7, 3.3]))
    outputs, *_ = step(strategy, layer, x, x, None, split)
    assert np.all(np.concatenate(outputs) == 0)
    mean, variance = helpers.statistics(layer)
    assert np.all(mean == np.float32(value))
    assert np.all(variance == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["", "mask"])
def test_gradients_of_constant_channels(dtype, is_masked, strategy, rng):
    split = SPLITS["unequal"]
    shape = (sum(split), 3)
    x = helpers.inputs_of(rng, shape, dtype=dtype)
    x[:, 1] = 2.5
    upstream = rng.normal(size=shape).astype(dtype)
    mask = np.ones(len(x), bool) if is_masked else None
    with strategy.scope():
        layer = make(BatchNormalization, shape, synchronized=True, dtype=dtype)
    single = make(BatchNormalization, shape, dtype=dtype)
    expected = helpers.gradients(single, x, upstream, mask)[1]
    # The channel's mean moves with each of its inputs.
    assert abs(expected[:, 1].sum()) < 1e-4 < np.abs(expected[:, 1]).max()
    d_x = step(strategy, layer, x, upstream, mask, split)[1]
    helpers.assert_close(np.concatenate(d_x), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_second_derivatives(dtype, strategy, rng, monkeypatch):
    # In float32 by the fused operators.
    monkeypatch.setattr("keras_renorm._step.choice.SMALL_ELEMENTS", 1)
    split = SPLITS["unequal"]
    shape = (sum(split), 4)
    x = helpers.inputs_of(rng, shape, dtype=dtype)
    u, v = rng.normal(size=(2, *shape)).astype(dtype)

    def second(layer, x, u, v):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(tf.sin(layer(x, training=True)) * u)
            product = tf.reduce_sum(inner.gradient(loss, x) * v)
        return outer.gradient(product, x)

    with strategy.scope():
        layer = make(BatchNormalization, shape, dtype=dtype, synchronized=True)
    single = make(BatchNormalization, shape, dtype="float64")
    at = np.cumsum(split)[:-1]
    values = [distribute(strategy, np.split(a, at)) for a in (x, u, v)]
    results = tf.function(
        lambda *values: strategy.run(
            lambda *parts: second(layer, *parts), values
        )
    )(*values)
    actual = np.concatenate(strategy.experimental_local_results(results))
    expected = second(
        single, *(tf.constant(value, "float64") for value in (x, u, v))
    )
    tolerance = 1e-11 if dtype == "float64" else 1e-4
    helpers.assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("synchronized", [False, True])
def test_the_gate_is_a_constant_of_second_derivatives(
    synchronized, strategy, rng
):
    split = SPLITS["equal"]
    shape = (sum(split), 4)
    x = helpers.inputs_of(rng, shape, dtype="float64")
    u, v = rng.normal(size=(2, *shape))
    at = np.cumsum(split)[:-1]
    values = [distribute(strategy, np.split(a, at)) for a in (x, u, v)]
    states = []
    for is_second in (False, True):
        with strategy.scope():
            layer = make(
                GATED, shape, dtype="float64", synchronized=synchronized
            )

        def run(x, u, v, layer=layer, is_second=is_second):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(layer(x, training=True) * u)
                d_x = inner.gradient(loss, x)
                product = tf.reduce_sum(d_x * v)
            return outer.gradient(product, x) if is_second else d_x

        tf.function(lambda *values, run=run: strategy.run(run, values))(*values)
        states.append([helpers.to_numpy(each) for each in layer.weights])
    for one, other in zip(*states, strict=True):
        helpers.assert_close(one, other, 1e-12)


@pytest.mark.parametrize("synchronized", [False, True])
def test_forward_mode(synchronized, strategy, rng):
    split = SPLITS["unequal"]
    shape = (sum(split), 4)
    x = helpers.inputs_of(rng, shape)
    along = rng.normal(size=shape).astype("float32")
    with strategy.scope():
        layer = make(BatchNormalization, shape, synchronized=synchronized)

    def forward(layer, x, along):
        with tf.autodiff.ForwardAccumulator(x, along) as accumulator:
            outputs = layer(x, training=True)
        return accumulator.jvp(outputs)

    at = np.cumsum(split)[:-1]
    values = [distribute(strategy, np.split(a, at)) for a in (x, along)]
    run = tf.function(
        lambda *values: strategy.run(
            lambda *parts: forward(layer, *parts), values
        )
    )
    if synchronized:
        # The sums would be taken for constants, without an error.
        with pytest.raises(NotImplementedError, match="forward mode"):
            run(*values)
        return
    actual = strategy.experimental_local_results(run(*values))
    for mine, *part in zip(
        actual, np.split(x, at), np.split(along, at), strict=True
    ):
        single = make(BatchNormalization, shape, dtype="float64")
        part = [tf.constant(value, "float64") for value in part]
        helpers.assert_close(mine, forward(single, *part), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [(4,), (64, 64, 8)], ids=["small", "fused"])
def test_one_all_reduce_each_way(kind, sizes, strategy, rng, monkeypatch):
    monkeypatch.setattr("keras_renorm._step.choice.SMALL_ELEMENTS", 1_000)
    sent = []
    context = tf.distribute.ReplicaContext
    all_reduce = context.all_reduce

    def counting(self, operation, value, *rest):
        sent.append(sum(part.shape[0] for part in tf.nest.flatten(value)))
        return all_reduce(self, operation, value, *rest)

    monkeypatch.setattr(context, "all_reduce", counting)
    x = helpers.inputs_of(rng, (REPLICAS, *sizes))
    channels = sizes[-1]
    with strategy.scope():
        layer = make(kind, x.shape, synchronized=True)
    step(strategy, layer, x, x, None, (1,) * REPLICAS)
    # Back, the corrected gradient also sends how alike gradients are, how means
    # scatter, and the number of examples.
    back = 4 * channels + 1 if kind in (CORRECTED, GATED) else 2 * channels
    expected = [2 * channels + 1] * REPLICAS + [back] * REPLICAS
    assert sorted(sent) == sorted(expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_replicas_nan_leaves_the_channel_of_all(kind, strategy, rng):
    split = SPLITS["equal"]
    x = helpers.inputs_of(rng, (sum(split), 4))
    x[0, 2] = np.nan
    with strategy.scope():
        layer = make(kind, x.shape, synchronized=True)
    before = helpers.statistics(layer)
    outputs, *_ = step(strategy, layer, x, x, None, split)
    assert np.all(np.isnan(np.concatenate(outputs)[:, 2]))
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert new[2] == old[2]
        assert np.all(np.delete(new != old, 2))


@pytest.mark.parametrize("is_synchronized", [False, True])
def test_eager_replicas(is_synchronized, strategy, rng):
    split = SPLITS["equal"]
    x = helpers.inputs_of(rng, (sum(split), 4))
    with strategy.scope():
        layer = make(
            BatchRenormalization, x.shape, synchronized=is_synchronized
        )
    outputs, *_ = step(strategy, layer, x, x, None, split, is_eager=True)
    parts = [x] if is_synchronized else np.split(x, REPLICAS)
    expected = [
        make(BatchRenormalization, x.shape)(part, training=True)
        for part in parts
    ]
    helpers.assert_close(
        np.concatenate(outputs), np.concatenate(expected), 1e-5
    )


def network(kind, sizes=(6, 6, 2), **arguments):
    if kind is BatchRenormalization:
        arguments |= {"r_max": 3.0, "d_max": LinearRamp(0, 5, 0, 10)}
    layers = [
        keras.layers.Dense(4, use_bias=False),
        kind(momentum=0.8, **arguments),
        keras.layers.ReLU(),
    ]
    if len(sizes) > 1:
        layers[0] = keras.layers.Conv2D(4, 3, use_bias=False)
        layers.append(keras.layers.GlobalAveragePooling2D())
    return keras.Sequential(
        [keras.Input(sizes), *layers, keras.layers.Dense(2)]
    )


def data_of(rng, examples):
    x = helpers.inputs_of(rng, (examples, 6, 6, 2))
    return x, rng.normal(size=(examples, 2)).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("left_over", ["fewer", "one"])
def test_fit_on_replicas_equals_fit_on_one_device(
    kind, left_over, strategy, rng
):
    batch = 4 * REPLICAS
    # 5 steps an epoch; in the last batch replicas have fewer examples, or
    # all but one have none (where TensorFlow's convolution fails).
    x, y = data_of(
        rng, 4 * batch + (1 if left_over == "one" else 2 * REPLICAS - 1)
    )
    if left_over == "one":
        x = x[:, 0, 0]

    def compiled(**arguments):
        model = network(kind, sizes=x.shape[1:], **arguments)
        # A sum, since Keras averages over each replica's own examples.
        model.compile(
            keras.optimizers.SGD(1e-3),
            keras.losses.MeanSquaredError(reduction="sum"),
        )
        return model

    single = compiled()
    with strategy.scope():
        model = compiled(synchronized=True)
    model.set_weights(single.get_weights())
    for each in (single, model):
        each.fit(x, y, batch_size=batch, epochs=4, shuffle=False, verbose=0)
    for one, other in zip(model.weights, single.weights, strict=True):
        helpers.assert_close(one, other, 1e-4)
    if kind is BatchRenormalization:
        assert model.layers[1].current_step() == 20
        assert (
            model.layers[1].current_limits()
            == single.layers[1].current_limits()
        )


def test_a_model_that_is_converted_in_place_outside_of_the_scope(strategy, rng):
    x, y = data_of(rng, 8 * REPLICAS)

    def compiled():
        model = network(keras.layers.BatchNormalization)
        model.compile(
            keras.optimizers.SGD(1e-3),
            keras.losses.MeanSquaredError(reduction="sum"),
        )
        return model

    single = compiled()
    with strategy.scope():
        model = compiled()
    model.set_weights(single.get_weights())
    for each, arguments in ((single, {}), (model, {"synchronized": True})):
        keras_renorm.convert(each, in_place=True, r_max=3.0, **arguments)
        each.fit(
            x,
            y,
            batch_size=4 * REPLICAS,
            epochs=2,
            shuffle=False,
            verbose=0,
        )
    assert model.layers[1].current_step() == 4
    for one, other in zip(model.weights, single.weights, strict=True):
        helpers.assert_close(one, other, 1e-4)
    keras_renorm.revert(model, in_place=True)
    model.fit(x, y, batch_size=4 * REPLICAS, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("is_synchronized", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [(4,), (48, 48, 8)], ids=["small", "fused"])
def test_fit_and_a_last_batch_that_leaves_replicas_empty(
    kind, sizes, is_synchronized, strategy, rng
):
    with strategy.scope():
        layer = kind(momentum=0.5, synchronized=is_synchronized)
        model = keras.Sequential(
            [keras.Input(sizes), layer, keras.layers.Dense(2)]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
    x = helpers.inputs_of(rng, (33, *sizes))
    y = np.zeros((33, *sizes[:-1], 2))
    callbacks = [RenormScheduler()] if kind is BatchRenormalization else []
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    for weight in model.weights:
        assert np.all(np.isfinite(helpers.to_numpy(weight))), weight.path
    assert np.all(helpers.statistics(layer)[0] != 0)
    if callbacks:
        assert layer.current_step() == 10
        assert layer.current_limits() == (3.0, 5.0)
    outputs = model.predict(x, verbose=0)
    assert np.all(np.isfinite(outputs))


@pytest.mark.parametrize("sizes", [(4,), (64, 64, 8)], ids=["small", "fused"])
def test_unsynchronized_replicas_normalize_their_own_examples(
    sizes, strategy, rng
):
    split = (4,) * REPLICAS
    x = helpers.inputs_of(rng, (sum(split), *sizes))
    with strategy.scope():
        layer = BatchNormalization(momentum=0.0)
        layer.build((None, *sizes))
    outputs, *_ = step(strategy, layer, x, x, None, split)
    singles = []
    for part, result in zip(np.split(x, REPLICAS), outputs, strict=True):
        singles.append(BatchNormalization(momentum=0.0))
        helpers.assert_close(result, singles[-1](part, training=True), 1e-5)
    # Read from outside: the mean of the replicas'.
    for actual, *parts in zip(
        *map(helpers.statistics, [layer, *singles]), strict=True
    ):
        helpers.assert_close(actual, np.mean(parts, axis=0), 1e-5)


def train_apart(strategy, kind, rng):
    """A model whose replicas' statistics have drifted apart."""
    batch = 4 * REPLICAS
    x, y = data_of(rng, 3 * batch)
    # The data of the last replica is something else.
    x = x.reshape(3, REPLICAS, 4, 6, 6, 2)
    x[:, -1] = 3 * x[:, -1] + 5
    x = x.reshape(3 * batch, 6, 6, 2)
    with strategy.scope():
        model = network(kind)
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
    copies = strategy.experimental_local_results(
        model.layers[1].moving_mean.value
    )
    assert np.all(np.abs(copies[0].numpy() - copies[-1].numpy()) > 0.1)
    return model, x


@pytest.mark.parametrize("kind", LAYERS)
def test_predictions_do_not_depend_on_the_replica(kind, strategy, rng):
    model, x = train_apart(strategy, kind, rng)
    same = np.concatenate([x[:4]] * REPLICAS)
    outputs = model.predict(same, batch_size=len(same), verbose=0)
    copy = network(kind)
    copy.set_weights(model.get_weights())
    expected = copy.predict(x[:4], verbose=0)
    for part in np.split(outputs, REPLICAS):
        helpers.assert_close(part, expected, 1e-5)
    # Frozen statistics are the averaged ones in training as well.
    layer = model.layers[1]
    layer.frozen_statistics = True
    inputs = helpers.inputs_of(rng, (REPLICAS, 2, 2, 4))
    results, *_ = step(strategy, layer, inputs, inputs, None, (1,) * REPLICAS)
    helpers.assert_close(np.concatenate(results), copy.layers[1](inputs), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("is_synchronized", [False, True])
def test_saved_and_loaded_with_and_without_a_strategy(
    kind, is_synchronized, strategy, rng, tmp_path
):
    if is_synchronized:
        x, y = data_of(rng, 4 * REPLICAS)
        with strategy.scope():
            model = network(kind, synchronized=True)
            model.compile(keras.optimizers.SGD(1e-3), "mse")
        model.fit(x, y, batch_size=2 * REPLICAS, verbose=0)
    else:
        model, x = train_apart(strategy, kind, rng)
    expected = model.predict(x, verbose=0)
    with strategy.scope():
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    helpers.assert_close(served.serve(x), expected, 1e-5)
    # Loaded without a strategy, saved again, loaded with one.
    single = keras.saving.load_model(tmp_path / "model.keras")
    assert single.layers[1].synchronized is is_synchronized
    helpers.assert_close(single.predict(x, verbose=0), expected, 1e-5)
    single.save(tmp_path / "single.keras")
    with strategy.scope():
        again = keras.saving.load_model(tmp_path / "single.keras")
        other = network(kind, synchronized=is_synchronized)
        other.load_weights(tmp_path / "model.weights.h5")
    for each in (again, other):
        outputs = each.predict(x, verbose=0)
        helpers.assert_close(outputs, expected, 1e-5)
        layer = each.layers[1]
        for one, whole in zip(
            layer.weights, model.layers[1].weights, strict=True
        ):
            for copy in strategy.experimental_local_results(one.value):
                assert np.array_equal(copy.numpy(), helpers.to_numpy(whole))
    # And training goes on from there.
    again.fit(x, np.zeros((len(x), 2)), batch_size=2 * REPLICAS, verbose=0)
    assert np.all(np.isfinite(helpers.statistics(again.layers[1])))


def test_a_checkpoint_goes_from_replicas_to_one_device(strategy, rng, tmp_path):
    model, x = train_apart(strategy, BatchRenormalization, rng)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    single = network(BatchRenormalization)
    tf.train.Checkpoint(model=single).restore(path).expect_partial()
    helpers.assert_close(
        single.predict(x, verbose=0), model.predict(x, verbose=0), 1e-5
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_strategy_synchronized_changes_nothing(kind, rng):
    x = helpers.inputs_of(rng, (6, 4))
    layers = [make(kind, x.shape, synchronized=flag) for flag in (False, True)]
    one, other = (helpers.gradients(layer, x, x) for layer in layers)
    for first, second in zip(
        (*one[:2], *one[2]), (*other[:2], *other[2]), strict=True
    ):
        assert np.array_equal(first, second)
    for first, second in zip(*(layer.weights for layer in layers), strict=True):
        assert np.array_equal(helpers.to_numpy(first), helpers.to_numpy(second))


def check_split(strategy, kind, dtype, split, rest, axis, mask_rank, seed):
    """One step, however the examples are split, is one device's."""
    rng = np.random.default_rng(seed)
    axis = axis % len(rest) + 1
    shape = (sum(split), *rest)
    x = helpers.inputs_of(rng, shape, axis, dtype)
    upstream = rng.normal(size=shape).astype(dtype)
    spread, mask = (1,) * len(rest), None
    x *= np.linspace(0.5, 2, len(x), dtype=dtype).reshape(-1, *spread)
    kept = np.ones(shape, bool)
    if mask_rank:
        sizes = [size for at, size in enumerate(shape) if at != axis]
        mask = rng.random(sizes[:mask_rank]) < 0.6
        whole = mask.reshape(mask.shape + (1,) * (len(sizes) - mask.ndim))
        kept = np.broadcast_to(np.expand_dims(whole, axis), shape)
        x[~kept] = np.nan
    arguments = {"axis": axis, "dtype": dtype}
    with strategy.scope():
        layer = make(kind, shape, synchronized=True, **arguments)
    single = make(kind, shape, **arguments)
    expected = helpers.gradients(single, x, upstream, mask)
    outputs, d_x, *d_weights = step(
        strategy, layer, x, upstream, mask, split, is_eager=True
    )
    statistics = zip(*map(helpers.statistics, (layer, single)), strict=True)
    for actual, whole in (
        (np.concatenate(outputs)[kept], expected[0][kept]),
        (np.concatenate(d_x), expected[1]),
        *(
            (np.sum(parts, axis=0), total)
            for parts, total in zip(d_weights, expected[2], strict=True)
        ),
        *statistics,
    ):
        # Gradients may cancel to zero; what cancels is no smaller than 1.
        scale = 1 + np.abs(whole).max(initial=0.0)
        tolerance = 1e-11 if dtype == "float64" else 1e-4
        assert np.abs(actual - whole).max(initial=0.0) <= tolerance * scale


SPLIT = {
    "kind": st.sampled_from(
        [BatchNormalization, BatchRenormalization, CORRECTED]
    ),
    "dtype": st.sampled_from(["float64", "float32"]),
    "split": st.lists(
        st.integers(0, 5), min_size=REPLICAS, max_size=REPLICAS
    ).filter(any),
    "rest": st.lists(st.integers(1, 3), min_size=1, max_size=4),
    "axis": st.integers(0, 3),
    "mask_rank": st.integers(0, 4),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.slow
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(**SPLIT)
def test_any_split_is_one_device(strategy, **case):
    check_split(strategy, **case)


@pytest.mark.exhaustive
@settings(max_examples=500, deadline=None, database=None)
@given(**SPLIT)
def test_many_splits_are_one_device(strategy, **case):
    check_split(strategy, **case)


@pytest.mark.slow
@pytest.mark.skipif(REPLICAS != 2, reason="this is the other process")
def test_four_replicas():
    command = [sys.executable, "-m", "pytest", "-qx", "-pno:cacheprovider"]
    tests = "equal_one_device or any_split or fit_on or constant or predictions"
    result = subprocess.run(
        [*command, __file__, "-k", tests],
        env={**os.environ, "REPLICAS": "4"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("in_place", [False, True])
def test_converted_models_have_the_replicas_of_the_model(
    in_place, strategy, rng
):
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.BatchNormalization()]
        )
        model.compile("sgd", "mse")
    converted = convert(
        model,
        BatchNormalization,
        synchronized=True,
        momentum=0.0,
        in_place=in_place,
    )
    assert converted.distribute_strategy is strategy
    x = helpers.inputs_of(rng, (16, 3))
    converted.fit(x, x, batch_size=16, verbose=0)
    helpers.assert_close(
        helpers.statistics(converted.layers[0])[1], x.var(axis=0), 1e-5
    )
    assert revert(converted).distribute_strategy is strategy


class Branch(keras.layers.Layer):
    """Calls a layer in a branch, where replicas cannot meet."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.layer.build(shape)

    def call(self, inputs, training=None):
        return tf.cond(
            tf.reduce_sum(inputs) < np.inf,
            lambda: self.layer(inputs, training=training),
            lambda: inputs,
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_in_a_branch_each_replica_has_its_own(kind, strategy, rng):
    x = rng.normal(3.0, 2.0, (16, 4)).astype("float32")
    with strategy.scope():
        layer = kind(momentum=0.5)
        model = keras.Sequential([keras.Input((4,)), Branch(layer)])
        model.compile("sgd", "mse")
    model.fit(x, x, batch_size=8, verbose=0, shuffle=False)
    assert np.isfinite(model.evaluate(x, x, batch_size=8, verbose=0))
    assert model.predict(x, batch_size=8, verbose=0).shape == x.shape
    mean = helpers.to_numpy(layer.moving_mean)
    expected = 0.25 * x[:8].mean(0) + 0.5 * x[8:].mean(0)
    helpers.assert_close(mean, expected, 1e-5)
    if isinstance(layer, BatchRenormalization):
        assert layer.current_step() == 2
