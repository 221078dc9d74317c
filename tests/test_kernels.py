"""Every path of `choice.choose` computes the same numbers."""

import functools
import gc
import itertools
import logging
import math
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm._backend import runtime, tracing
from keras_renorm._step import choice
from tests import helpers
from tests.reference import (
    CorrectedReference,
    Reference,
    from_rows,
    to_rows,
)

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

LARGE = (32, 24, 24, 8)  # beyond SMALL_ELEMENTS
SMALL = (4, 3, 5, 6)
MODES = ["eager", "graph", "xla"]


def in_mode(function, mode, signature=None):
    if mode == "eager":
        return function
    return tf.function(
        function, jit_compile=mode == "xla", input_signature=signature
    )


def step_of(layer):
    """Outputs and gradients of a training step."""

    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
        weights = [weight.value for weight in layer.trainable_variables]
        gradients = tape.gradient(
            outputs, [inputs, *weights], output_gradients=upstream
        )
        return outputs, *gradients

    return step


def built(shape, axis, rng, **arguments):
    layer = BatchRenormalization(
        axis, momentum=0.8, r_max=1.5, d_max=0.5, **arguments
    )
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = Reference(shape[axis], 0.8)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        value = helpers.to_numpy(getattr(layer, name)).astype("float64")
        setattr(reference, name, value)
    return layer, reference


def check(actual, layer, reference, inputs, upstream, axis, tolerance):
    """Against the formulas of the paper, float64, gradients included."""
    rows = to_rows(inputs, axis).astype("float64")
    d_rows = to_rows(upstream, axis).astype("float64")
    r, d = reference.correction(rows, 1.5, 0.5)
    gradients = reference.gradients(rows, d_rows, r, d)
    outputs = reference.train(rows, 1.5, 0.5)
    for mine, expected in zip(
        actual,
        (
            from_rows(outputs, inputs.shape, axis),
            from_rows(gradients[0], inputs.shape, axis),
            *gradients[1:],
        ),
        strict=True,
    ):
        mine = helpers.to_numpy(tf.cast(mine, tf.float64))
        helpers.assert_close(mine, expected, tolerance)
    mean, variance = helpers.statistics(layer)
    tolerance = min(tolerance, 1e-4)
    helpers.assert_close(mean, reference.moving_mean, tolerance)
    helpers.assert_close(variance, reference.moving_variance, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("axis", [3, 1, 2])
def test_float32_steps_equal_the_reference(mode, shape, axis, rng):
    layer, reference = built(shape, axis, rng)
    step = in_mode(step_of(layer), mode)
    for _ in range(2):
        inputs = helpers.inputs_of(rng, shape, axis)
        upstream = rng.normal(size=shape).astype("float32")
        actual = step(tf.constant(inputs), tf.constant(upstream))
        check(actual, layer, reference, inputs, upstream, axis, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 2e-2)]
)
def test_16_bit_steps_equal_the_reference(mode, shape, dtype, tolerance, rng):
    layer, reference = built(shape, 3, rng, dtype=f"mixed_{dtype}")
    # What the layer sees, so that only its own rounding counts.
    inputs = tf.cast(helpers.inputs_of(rng, shape), dtype)
    upstream = tf.cast(rng.normal(size=shape), dtype)
    actual = in_mode(step_of(layer), mode)(inputs, upstream)
    assert actual[0].dtype == actual[1].dtype == dtype
    inputs, upstream = (
        tf.cast(tensor, tf.float64).numpy() for tensor in (inputs, upstream)
    )
    check(actual, layer, reference, inputs, upstream, 3, tolerance)


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("axis", [3, 1])
def test_unknown_sizes(mode, axis, rng):
    unknown = [None] * 4
    unknown[axis] = 8
    spec = tf.TensorSpec(unknown)
    layer, reference = built(unknown, axis, rng)
    signature = None if mode == "xla" else [spec, spec]
    step = in_mode(step_of(layer), mode, signature)
    for size in (32, 5):
        shape = [size] * 4
        shape[axis] = 8
        inputs = helpers.inputs_of(rng, shape, axis)
        upstream = rng.normal(size=shape).astype("float32")
        actual = step(tf.constant(inputs), tf.constant(upstream))
        check(actual, layer, reference, inputs, upstream, axis, 2e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_batches_that_turn_out_empty(mode, rng):
    layer, _ = built((None, 24, 24, 8), 3, rng)
    spec = tf.TensorSpec((None, 24, 24, 8))
    signature = None if mode == "eager" else [spec, spec]
    step = in_mode(step_of(layer), mode, signature)
    before = helpers.statistics(layer)
    empty = tf.zeros((0, 24, 24, 8))
    outputs, d_inputs, d_gamma, d_beta = step(empty, empty)
    assert outputs.shape == d_inputs.shape == empty.shape
    assert np.all(d_gamma.numpy() == 0)
    assert np.all(d_beta.numpy() == 0)
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert np.array_equal(old, new)


UNCORRECTED = {"gradient_momentum": None}


NUMBERS = itertools.count(1)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
def test_one_element_a_channel_has_no_variance_on_any_device(
    kind, mean, is_known, monkeypatch
):
    # On CUDA the operator's variance is NaN here: 0 / (count - 1).
    operator = tf.raw_ops.FusedBatchNormV3
    seen = []

    def on_cuda(**arguments):
        outputs = operator(**arguments)
        if arguments["is_training"]:
            seen.append(arguments["x"].shape)
            nan = tf.fill(tf.shape(outputs.batch_variance), np.nan)
            outputs = outputs._replace(batch_variance=nan)
        return outputs

    monkeypatch.setattr("tensorflow.raw_ops.FusedBatchNormV3", on_cuda)
    monkeypatch.setattr(choice, "SMALL_ELEMENTS", 1)
    # A corrected gradient is not zero.
    arguments = {} if kind is BatchNormalization else UNCORRECTED
    # An epsilon that no other test has, or will find, a graph of.
    epsilon = 0.001 + next(NUMBERS) * 1e-7
    layer = kind(momentum=0.5, epsilon=epsilon, **arguments)
    layer.build((None, 3))
    layer.moving_variance.assign(np.full(3, 2.0))
    spec = tf.TensorSpec((1 if is_known else None, 3))
    step = in_mode(step_of(layer), "graph", [spec, spec])
    inputs = tf.fill((1, 3), mean)
    outputs, d_inputs, *_ = step(inputs, tf.ones((1, 3)))
    assert seen
    assert np.all(np.isfinite(outputs))
    assert np.all(d_inputs.numpy() == 0)
    moving_mean, moving_variance = helpers.statistics(layer)
    assert np.all(moving_mean == 0.5 * mean)
    assert np.all(moving_variance == 1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_a_nan_stays_in_its_channel(mode, shape, rng):
    layer, _ = built(shape, 3, rng)
    before = helpers.statistics(layer)
    inputs = helpers.inputs_of(rng, shape)
    inputs[1, 1, 1, 2] = np.nan
    upstream = np.ones(shape, "float32")
    outputs, d_inputs, d_gamma, _ = (
        value.numpy()
        for value in in_mode(step_of(layer), mode)(
            tf.constant(inputs), tf.constant(upstream)
        )
    )
    others = np.arange(shape[-1]) != 2
    for value in (outputs, d_inputs, d_gamma):
        assert np.all(np.isfinite(value[..., others]))
        assert np.any(np.isnan(value[..., 2]))
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert old[2] == new[2]
        assert np.all(old[others] != new[others])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
@pytest.mark.parametrize(
    ("mean", "stddev", "tolerance"),
    [(100.0, 0.1, 1e-5), (1e3, 1.0, 1e-5), (1e4, 1.0, 5e-5)],
)
def test_variance_at_large_means(mode, kind, mean, stddev, tolerance, rng):
    shape = (32, 28, 28, 8)
    inputs = (mean + stddev * rng.normal(size=shape)).astype("float32")
    layer = kind(momentum=0.0)
    layer.build(shape)
    outputs, *_ = in_mode(step_of(layer), mode)(
        tf.constant(inputs), tf.zeros(shape)
    )
    rows = inputs.reshape(-1, 8).astype("float64")
    variance = helpers.statistics(layer)[1]
    np.testing.assert_allclose(variance, rows.var(axis=0), rtol=tolerance)
    if kind is BatchNormalization:
        expected = Reference(8).train(rows)
        error = np.abs(outputs.numpy().reshape(-1, 8) - expected).max()
        # A float32 of the size of the mean has no more digits.
        assert error <= 4 * np.spacing(np.float32(mean)) / stddev + 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [1e4, 10000.7, 1e7, -3.3e5, 0.0])
def test_constant_channels_give_beta(mode, value, rng):
    shape = (32, 56, 56, 2)
    inputs = helpers.inputs_of(rng, shape)
    inputs[..., 0] = value
    layer = BatchNormalization()
    layer.build(shape)
    outputs, *_ = in_mode(step_of(layer), mode)(
        tf.constant(inputs), tf.zeros(shape)
    )
    assert np.abs(outputs.numpy()[..., 0]).max() <= 1e-3


HELD = {  # statistics, by the arguments of a layer
    "inference": {},
    "frozen": {"frozen_statistics": True},
    "untrainable": {"trainable": False},
}


MATRIX = {  # layers, by their limits
    "normalization": (BatchNormalization, {}, (1.0, 0.0)),
    "renormalization": (
        BatchRenormalization,
        {"r_max": 1.5, "d_max": 0.5},
        (1.5, 0.5),
    ),
    "corrected": (
        BatchRenormalization,
        {"r_max": 3.0, "d_max": 5.0, "gradient_momentum": 0.8},
        (3.0, 5.0),
    ),
}
TOLERANCES = {
    "float16": 5e-3,
    "bfloat16": 4e-2,
    "float32": 5e-5,
    "float64": 1e-10,
}


def expected_step(reference, rows, d_rows, limits, examples, is_held):
    """Outputs, and gradients of inputs, gamma and beta."""
    if is_held:
        sigma = np.sqrt(reference.moving_variance + reference.epsilon)
        normalized = (rows - reference.moving_mean) / sigma
        return (
            reference.infer(rows),
            d_rows * reference.gamma / sigma,
            (d_rows * normalized).sum(axis=0),
            d_rows.sum(axis=0),
        )
    if isinstance(reference, CorrectedReference):
        return reference.step(rows, d_rows, *limits, examples)
    r, d = reference.correction(rows, *limits)
    gradients = reference.gradients(rows, d_rows, r, d)
    return reference.train(rows, *limits), *gradients


@pytest.mark.parametrize("held", [None, *HELD])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("place", [*MODES, "unknown sizes", "small in a graph"])
def test_each_step_equals_the_reference(place, dtype, held, rng, monkeypatch):
    """On every axis, with every layer."""
    if place != "small in a graph":
        monkeypatch.setattr(choice, "SMALL_ELEMENTS", 1)
    shape = (4, 6, 5, 8)
    # XLA takes seconds to compile each.
    axes = (3, 1) if place == "xla" else range(4)
    for axis, (kind, arguments, limits) in itertools.product(
        axes, MATRIX.values()
    ):
        layer = kind(axis, dtype=dtype, **arguments, **HELD.get(held, {}))
        layer.build(shape)
        helpers.randomize(layer, rng)
        reference = Reference(shape[axis])
        if "gradient_momentum" in arguments:
            reference = CorrectedReference(shape[axis], 0.8)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            value = helpers.to_numpy(getattr(layer, name))
            setattr(reference, name, value.astype("float64"))
        inputs = tf.cast(helpers.inputs_of(rng, shape, axis), dtype)
        upstream = tf.cast(rng.normal(size=shape), dtype)

        def step(inputs, upstream, layer=layer):
            at = [inputs, layer.gamma.value, layer.beta.value]
            with tf.GradientTape() as tape:
                # The weights of a layer that does not train are not watched.
                tape.watch(at)
                outputs = layer(inputs, training=held != "inference")
            return outputs, *tape.gradient(
                outputs, at, output_gradients=upstream
            )

        signature = None
        if place == "unknown sizes":
            sizes = [None] * 4
            sizes[axis] = shape[axis]
            signature = [tf.TensorSpec(sizes, dtype)] * 2
        actual = in_mode(step, place, signature)(inputs, upstream)
        rows, d_rows = (
            to_rows(tf.cast(each, tf.float64).numpy(), axis)
            for each in (inputs, upstream)
        )
        example = 1 if axis == 0 else 0
        examples = np.indices(shape)[example]
        outputs, d_inputs, *others = expected_step(
            reference,
            rows,
            d_rows,
            limits,
            to_rows(examples, axis)[:, 0],
            held is not None,
        )
        expected = (
            from_rows(outputs, shape, axis),
            from_rows(d_inputs, shape, axis),
            *others,
        )
        for mine, value in zip(actual, expected, strict=True):
            mine = tf.cast(mine, tf.float64)
            helpers.assert_close(mine, value, TOLERANCES[dtype])
        for mine, value in zip(
            helpers.statistics(layer),
            (reference.moving_mean, reference.moving_variance),
            strict=True,
        ):
            helpers.assert_close(mine, value, min(1e-5, TOLERANCES[dtype]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_second_derivatives_equal_those_of_the_plain_path(mode, shape, rng):
    inputs = helpers.inputs_of(rng, shape)
    weights = rng.normal(size=shape)

    def norm_gradient(layer, dtype):
        factor = tf.constant(weights, dtype)

        def compute(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    outputs = layer(x, training=True)
                    loss = tf.reduce_sum(factor * tf.sin(outputs))
                norm = tf.reduce_sum(tape.gradient(loss, x) ** 2)
            return outer.gradient(norm, x)

        return in_mode(compute, mode)(tf.constant(inputs, dtype)).numpy()

    state = np.random.default_rng(3)
    fast = built(shape, 3, state)[0]
    plain = BatchRenormalization(
        3, momentum=0.8, r_max=1.5, d_max=0.5, dtype="float64"
    )
    plain.build(shape)
    plain.set_weights([helpers.to_numpy(weight) for weight in fast.weights])
    expected = norm_gradient(plain, "float64")
    helpers.assert_close(norm_gradient(fast, "float32"), expected, 1e-4)


def test_what_is_chosen(rng):
    chosen = {}

    def record(shape, axis=None, dtype="float32", **options):
        spec = tf.TensorSpec(shape, dtype)
        axis = len(shape) - 1 if axis is None else axis

        @tf.function(input_signature=[spec], **options)
        def traced(inputs):
            chosen["path"] = choice.choose(inputs, axis, None)
            return inputs

        traced.get_concrete_function()
        return chosen["path"]

    assert record(LARGE) == "fused"
    assert record(LARGE, 1) == "fused"
    assert record(LARGE, dtype="bfloat16") == "fused"
    assert record(LARGE, dtype="float64") == "plain"
    assert record((32, 14, 14, 16)) == "fused"
    assert record((16, 14, 14, 16)) == "matrix"
    assert record(SMALL) == "matrix"
    assert record(SMALL, 1) == "plain"
    assert record(LARGE, jit_compile=True) == "matrix"
    assert record(LARGE, 1, jit_compile=True) == "plain"
    # Keras's default batch size stands in for an unknown one.
    assert record((None, 24, 24, 8)) == "fused"
    assert record((None, 64)) == "matrix"
    inputs, mask = tf.zeros(LARGE), tf.ones((32, 1, 1, 1), tf.bool)
    assert choice.choose(inputs, 3, None) == "fused"
    assert choice.choose(inputs, 3, mask) == "plain"


def test_what_is_chosen_with_moving_statistics():
    """By the operation that made the inputs; see `choice.choose`."""
    chosen = {}

    def record(before, shape=(4, 6, 6, 3), dtype="float32", axis=3, **options):
        @tf.function(input_signature=[tf.TensorSpec(shape, dtype)], **options)
        def traced(inputs):
            chosen["path"] = choice.choose(
                before(inputs), axis, None, is_moving=True
            )
            return inputs

        traced.get_concrete_function()
        return chosen["path"]

    def convolved(inputs):
        filters = tf.zeros((1, 1, 3, 3), inputs.dtype)
        return tf.nn.conv2d(inputs, filters, 1, "VALID")

    for batch in (4, 400, None):
        shape = (batch, 6, 6, 3)
        assert record(tf.identity, shape) == "affine"
        assert record(convolved, shape) == "fused"
        assert record(lambda x: x, shape) == "fused"
        assert record(tf.identity, shape, "bfloat16") == "fused"
        assert record(tf.identity, shape, "float64") == "plain"
    assert record(tf.identity, jit_compile=True) == "matrix"
    assert record(tf.identity, axis=1) == "plain"
    assert record(tf.identity, (400, 6, 6, 30), axis=1) == "fused"


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("before", ["convolution", "another", "argument"])
@pytest.mark.parametrize(
    ("sizes", "scale", "center"),
    [
        ((4, 5, 5), True, True),
        ((4, 5, 5), False, True),
        ((4, 5), True, False),
        ((4,), True, True),
        ((4, 2, 3, 2), False, False),
    ],
)
def test_inference_after_any_operation(before, held, sizes, scale, center, rng):
    shape = (*sizes, 6)
    layer = BatchRenormalization(scale=scale, center=center, **HELD[held])
    layer.build(shape)
    helpers.randomize(layer, rng)
    inputs = helpers.inputs_of(rng, shape)
    upstream = rng.normal(size=shape).astype("float32")

    def infer(inputs, upstream):
        weights = [
            weight.value
            for weight in (layer.gamma, layer.beta)
            if weight is not None
        ]
        with tf.GradientTape() as tape:
            tape.watch([inputs, *weights])
            x = inputs
            if before == "convolution":
                if len(shape) != 4:
                    x = tf.reshape(x, (-1, 1, 1, 6))
                x = tf.nn.conv2d(x, tf.eye(6)[None, None], 1, "VALID")
                x = x if len(shape) == 4 else tf.reshape(x, shape)
            elif before == "another":
                x = tf.identity(x)
            outputs = layer(x, training=held != "inference")
        return outputs, *tape.gradient(
            outputs, [inputs, *weights], output_gradients=upstream
        )

    actual = tf.function(infer)(tf.constant(inputs), tf.constant(upstream))
    rows = inputs.reshape(-1, 6).astype("float64")
    d_rows = upstream.reshape(-1, 6).astype("float64")
    mean, variance = (
        value.astype("float64") for value in helpers.statistics(layer)
    )
    sigma = np.sqrt(variance + layer.epsilon)
    gamma = helpers.to_numpy(layer.gamma) if scale else np.ones(6)
    beta = helpers.to_numpy(layer.beta) if center else np.zeros(6)
    normalized = (rows - mean) / sigma
    expected = [
        (normalized * gamma + beta).reshape(shape),
        (d_rows * gamma / sigma).reshape(shape),
    ]
    if scale:
        expected.append((d_rows * normalized).sum(axis=0))
    if center:
        expected.append(d_rows.sum(axis=0))
    for mine, value in zip(actual, expected, strict=True):
        helpers.assert_close(mine, value, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "rounding", "smallest"),
    [("bfloat16", 2**-8, 2**-126), ("float16", 2**-11, 2**-14)],
)
@pytest.mark.parametrize("axis", [3, 1])
def test_a_16_bit_gradient_through_an_untrainable_layer(
    dtype, rounding, smallest, axis, rng
):
    """It is rounded once."""
    layer, reference = built(LARGE, axis, rng, dtype=dtype, trainable=False)
    inputs = tf.cast(helpers.inputs_of(rng, LARGE, axis), dtype)
    upstream = tf.cast(rng.normal(size=LARGE), dtype)

    @tf.function
    def gradient(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
        return tape.gradient(outputs, inputs, output_gradients=upstream)

    sigma = np.sqrt(reference.moving_variance + layer.epsilon)
    d_rows = to_rows(tf.cast(upstream, "float64").numpy(), axis)
    expected = from_rows(d_rows * reference.gamma / sigma, LARGE, axis)
    actual = tf.cast(gradient(inputs, upstream), "float64").numpy()
    tolerance = 1.01 * rounding * np.maximum(abs(expected), smallest)
    assert np.all(np.abs(actual - expected) <= tolerance)


def ancestors(tensor):
    """The operations that a graph needs for a tensor."""
    found, waiting = set(), [tensor.op]
    while waiting:
        operation = waiting.pop()
        if operation not in found:
            found.add(operation)
            waiting += [each.op for each in operation.inputs]
    return found


@pytest.mark.parametrize("is_convolved", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_gradient_through_an_untrainable_layer_needs_no_inputs(
    trainable, is_convolved
):
    """TensorFlow then joins what makes them to the layer, in training also."""
    layer = BatchNormalization(trainable=trainable, frozen_statistics=True)
    layer.build((None, 6, 6, 3))

    @tf.function(input_signature=[tf.TensorSpec((4, 6, 6, 3))])
    def traced(inputs):
        x = tf.identity(inputs)
        if is_convolved:
            x = tf.nn.conv2d(inputs, tf.eye(3)[None, None], 1, "VALID")
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
        upstream = tf.ones_like(inputs)
        return x, tape.gradient(outputs, x, output_gradients=upstream)

    x, gradient = traced.get_concrete_function().outputs
    needed = ancestors(gradient)
    makes = x.op.inputs[0].op  # a graph returns identities
    assert ({"FusedBatchNormGradV3"} <= {each.type for each in needed}) == (
        trainable
    )
    assert (makes in needed) == trainable


@pytest.mark.parametrize("is_convolved", [True, False])
@pytest.mark.parametrize(("mean", "stddev"), [(100.0, 0.1), (1e4, 1.0)])
def test_inference_at_large_means(mean, stddev, is_convolved, rng):
    shape = (32, 6, 6, 4)
    inputs = (mean + stddev * rng.normal(size=shape)).astype("float32")
    layer = BatchNormalization(epsilon=1e-12)
    layer.build(shape)
    layer.moving_mean.assign(np.full(4, mean))
    layer.moving_variance.assign(np.full(4, stddev**2))

    @tf.function
    def infer(x):
        if is_convolved:
            x = tf.nn.conv2d(x, tf.eye(4)[None, None], 1, "VALID")
        else:
            x = tf.identity(x)
        return layer(x)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            outputs = infer(x)
        return tape.gradient(outputs, layer.gamma.value)

    moving_mean, variance = helpers.statistics(layer)
    expected = (inputs.astype("float64") - moving_mean) / np.sqrt(variance)
    error = np.abs(infer(tf.constant(inputs)).numpy() - expected).max()
    # A float32 of the size of the mean has no more digits.
    assert error <= 2 * np.spacing(np.float32(mean)) / stddev
    # The gradient has them all: its sum is of what is left of the mean.
    helpers.assert_close(
        gradient(tf.constant(inputs)), expected.sum(axis=(0, 1, 2)), 1e-4
    )


def operations(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    nodes = [*graph.node]
    for inner in graph.library.function:
        nodes += inner.node_def
    names = {node.op for node in nodes}
    if any(
        node.op == "FusedBatchNormGradV3" and not node.attr["is_training"].b
        for node in nodes
    ):
        names.add("FusedBatchNormGradV3, by statistics")
    return names


def test_calls_share_graphs_and_no_kernels():
    # Kernels of oneDNN that two layers ran at once corrupted memory.
    layers = [BatchRenormalization() for _ in range(2)]
    for layer in layers:
        layer.build(LARGE)

    @tf.function
    def step(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layers[1](layers[0](inputs, training=True), training=True)
        return tape.gradient(outputs, inputs)

    graph = step.get_concrete_function(tf.zeros(LARGE)).graph
    functions = [
        operation.get_attr("f")
        for operation in graph.get_operations()
        if operation.type == "PartitionedCall"
    ]
    assert len(functions) == 4
    assert len({each.name for each in functions}) == 2
    assert len({each.SerializeToString() for each in functions}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("gradient_momentum", [None, 0.9])
def test_layers_in_branches_do_not_disturb_each_other(gradient_momentum, rng):
    # If they do, it may be by an abort.
    inputs = keras.Input((28, 28, 8))
    branches = []
    for width in (8, 64, 16, 128, 24, 96, 40, 72):
        x = keras.layers.Conv2D(width, 1)(inputs)
        x = BatchRenormalization(gradient_momentum=gradient_momentum)(x)
        branches.append(keras.layers.GlobalAveragePooling2D()(x * x))
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(branches))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    images = rng.normal(size=(32, 28, 28, 8)).astype("float32")
    initial, results = model.get_weights(), []
    for _ in range(20):
        model.set_weights(initial)
        for _ in range(5):
            model.train_on_batch(images, images[:, 0, 0, :1])
        results.append(model.get_weights())
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_xla_is_recognized_wherever_it_comes_from():
    # If this fails, TensorFlow has changed how it marks what it compiles:
    # see `choice._is_compiled_by_xla`. The fused training operator computes
    # E[x^2] - E[x]^2 there.
    layer = BatchNormalization()
    layer.build(LARGE)
    inputs = tf.zeros(LARGE)

    def step(inputs):
        return layer(inputs, training=True)

    def branch(inputs):
        return tf.cond(
            tf.reduce_sum(inputs) > 0, lambda: step(inputs), lambda: inputs
        )

    inner = tf.function(step)
    assert "FusedBatchNormV3" in operations(inner, inputs)
    for function in (step, branch, tf.function(step), tf.function(branch)):
        compiled = tf.function(
            lambda inputs, function=function: function(inputs),
            jit_compile=True,
        )
        assert "FusedBatchNormV3" not in operations(compiled, inputs)


def test_a_function_traced_without_xla_is_right_inside_one_with(rng):
    # TensorFlow does not trace it again, so it holds the fused operator.
    inputs = (100 + 0.1 * rng.normal(size=LARGE)).astype("float32")
    layer = BatchNormalization(momentum=0.0)
    layer.build(LARGE)
    inner = tf.function(lambda inputs: layer(inputs, training=True))
    inner(tf.constant(inputs))
    outer = tf.function(lambda inputs: inner(inputs), jit_compile=True)
    assert "FusedBatchNormV3" in operations(outer, tf.constant(inputs))
    layer.moving_variance.assign(np.ones(8))
    outer(tf.constant(inputs))
    expected = inputs.astype("float64").var(axis=(0, 1, 2))
    helpers.assert_close(helpers.statistics(layer)[1], expected, 1e-3)


def test_fit_that_xla_compiles_stays_right_at_small_spreads(rng):
    # The fused training operator under XLA gives NaN here.
    x = (100 + 0.1 * rng.normal(size=(64, 16, 16, 8))).astype("float32")
    layer = BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=True)
    model.fit(x, x, batch_size=64, shuffle=False, verbose=0)
    expected = x.astype("float64").var(axis=(0, 1, 2))
    helpers.assert_close(helpers.statistics(layer)[1], expected, 1e-5)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_saved_functions_keep_their_gradients(shape, rng, tmp_path):
    layer, reference = built(shape, 3, rng)
    module = tf.Module()
    module.layer_weights = [weight.value for weight in layer.weights]
    module.step = tf.function(
        lambda inputs: layer(inputs, training=True),
        input_signature=[tf.TensorSpec(shape)],
    )
    tf.saved_model.save(
        module,
        str(tmp_path),
        options=tf.saved_model.SaveOptions(experimental_custom_gradients=True),
    )
    del module
    keras.utils.clear_session()
    gc.collect()
    loaded = tf.saved_model.load(str(tmp_path))
    inputs = helpers.inputs_of(rng, shape)
    upstream = rng.normal(size=shape).astype("float32")
    with tf.GradientTape() as tape:
        x = tf.constant(inputs)
        tape.watch(x)
        outputs = loaded.step(x)
    actual = tape.gradient(outputs, x, output_gradients=tf.constant(upstream))
    rows, d_rows = to_rows(inputs, 3), to_rows(upstream, 3)
    r, d = reference.correction(rows, 1.5, 0.5)
    expected = reference.gradients(rows, d_rows, r, d)[0]
    helpers.assert_close(to_rows(actual.numpy(), 3), expected, 2e-5)


def test_a_gradient_that_was_not_saved_is_an_error(tmp_path):
    layer = BatchNormalization()
    layer.build(SMALL)
    module = tf.Module()
    module.layer_weights = [weight.value for weight in layer.weights]
    module.step = tf.function(
        lambda inputs: layer(inputs, training=True),
        input_signature=[tf.TensorSpec(SMALL)],
    )
    tf.saved_model.save(
        module,
        str(tmp_path),
        options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
    )
    del module
    keras.utils.clear_session()
    gc.collect()
    loaded = tf.saved_model.load(str(tmp_path))
    inputs = tf.zeros(SMALL)
    loaded.step(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        with pytest.raises(LookupError, match="must be saved with it"):
            loaded.step(inputs)


def test_an_eager_layer_takes_a_new_momentum(rng):
    layer = BatchNormalization(momentum=1.0)
    inputs = helpers.inputs_of(rng, (8, 3))
    layer(inputs, training=True)
    assert np.all(helpers.statistics(layer)[0] == 0)
    layer.momentum = 0.0
    layer(inputs, training=True)
    helpers.assert_close(helpers.statistics(layer)[0], inputs.mean(0), 1e-5)


def test_an_eager_layer_takes_inputs_of_any_size(rng):
    layer, reference = built((None, None, None, 8), 3, rng)
    for sizes in [(4, 5, 6), (3, 5, 6), (2, 9, 4), (1, 40, 40), (7, 2, 2)]:
        inputs = helpers.inputs_of(rng, (*sizes, 8))
        upstream = rng.normal(size=inputs.shape).astype("float32")
        actual = step_of(layer)(tf.constant(inputs), tf.constant(upstream))
        check(actual, layer, reference, inputs, upstream, 3, 2e-5)


def test_eager_layers_can_be_freed(rng):
    layer = BatchNormalization()
    layer(helpers.inputs_of(rng, (8, 3)), training=True)
    reference = weakref.ref(layer)
    del layer
    keras.utils.clear_session()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("held", [None, *HELD])
@pytest.mark.parametrize("layer", MATRIX)
def test_a_graph_is_freed_with_its_function(layer, held, shape):
    kind, arguments, _ = MATRIX[layer]
    graphs = []
    for _ in range(3):
        layer = kind(**arguments, **HELD.get(held, {}))
        layer.build(shape)

        @tf.function
        def step(inputs, layer=layer):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(inputs)
                outputs = layer(
                    tf.identity(inputs), training=held != "inference"
                )
                first = tape.gradient(outputs**2, inputs)
            return tape.gradient(first**2, inputs)

        spec = tf.TensorSpec(shape)
        graphs.append(weakref.ref(step.get_concrete_function(spec).graph))
        del layer, step
    keras.utils.clear_session()
    gc.collect()
    assert [graph() for graph in graphs] == [None] * 3


def graphs_that_outlive_a_model(layer, rng):
    graphs = []

    class Seen(keras.layers.Layer):
        def call(self, inputs):
            if tf.inside_function():
                graphs.append(weakref.ref(inputs.graph))
            return inputs

    x = helpers.inputs_of(rng, (8, 5))
    model = keras.Sequential([keras.Input((5,)), Seen(), layer])
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    model.evaluate(x, x, verbose=0)
    model.predict(x, verbose=0)
    del model, layer
    keras.utils.clear_session()
    gc.collect()
    assert len(graphs) >= 3
    return sum(graph() is not None for graph in graphs)


@pytest.mark.parametrize("layer", MATRIX)
def test_the_graphs_of_a_model_are_freed_with_it(layer, rng):
    kind, arguments, _ = MATRIX[layer]
    # TensorFlow keeps some of any model for a while.
    expected = graphs_that_outlive_a_model(
        keras.layers.BatchNormalization(), rng
    )
    assert graphs_that_outlive_a_model(kind(**arguments), rng) <= expected


@pytest.fixture
def checked_numerics():
    """Stops at infinities and NaN; of graphs with an epsilon of their own."""
    tf.debugging.enable_check_numerics()
    try:
        yield 0.0456
    finally:
        tf.debugging.disable_check_numerics()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("layer", MATRIX)
def test_nothing_infinite_is_computed(layer, mode, checked_numerics, rng):
    kind, arguments, _ = MATRIX[layer]
    shape = (8, 6, 4)
    inputs = tf.constant(helpers.inputs_of(rng, shape))
    masks = [
        None,
        tf.constant(rng.random((8, 6)) > 0.5),
        tf.zeros((8, 6), tf.bool),
    ]
    limits = [arguments]
    if "r_max" in arguments:  # which clip nothing
        limits.append({**arguments, "r_max": np.inf, "d_max": np.inf})
    if "gradient_momentum" not in arguments:
        limits.append({**arguments, "virtual_batch_size": 3})
    for mask, given, training in itertools.product(
        masks, limits, (True, False)
    ):
        layer = kind(epsilon=checked_numerics, **given)
        layer.build(shape)

        def step(inputs, layer=layer, mask=mask, training=training):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=training, mask=mask)
                # No gradient arrives at the first channel.
                loss = tf.reduce_sum(tf.sin(outputs[..., 1:]))
            return tape.gradient(loss, inputs)

        assert np.all(np.isfinite(in_mode(step, mode)(inputs)))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("layer", ["corrected", "frozen"])
def test_a_deterministic_gpu_gets_no_operator_that_is_not(
    layer, is_deterministic, a_gpu, monkeypatch, rng
):
    # That of the gradient by given statistics.
    assert not runtime.is_op_determinism_enabled()
    monkeypatch.setattr(
        runtime, "is_op_determinism_enabled", lambda: is_deterministic
    )
    if layer == "corrected":
        layer = MATRIX[layer][0](**MATRIX[layer][1])
    else:
        layer = BatchNormalization(frozen_statistics=True)
    layer.build(LARGE)
    helpers.randomize(layer, rng)
    step = tf.function(step_of(layer))
    inputs = tf.constant(helpers.inputs_of(rng, LARGE))
    found = "FusedBatchNormGradV3, by statistics" in operations(
        step, inputs, inputs
    )
    assert found != is_deterministic


def test_a_gpu_gets_no_more_examples_than_cudnn_takes(a_gpu, monkeypatch):
    def chosen(shape, axis):
        inputs = tf.zeros(shape)
        return [
            choice.choose(inputs, axis, None, is_moving=is_moving)
            for is_moving in (True, False)
        ]

    assert chosen((65_535, 2, 2), 2) == ["fused", "fused"]
    assert chosen((65_536, 2, 2), 2) == ["matrix", "matrix"]
    assert chosen((65_536, 2, 2), 1) == ["plain", "plain"]
    # Rows, not examples.
    assert chosen((65_536, 2), 1) == ["fused", "fused"]
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    assert chosen((65_536, 2, 2), 2) == ["fused", "fused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        BatchNormalization,
        BatchRenormalization,
        functools.partial(BatchRenormalization, gradient_momentum=0.9),
    ],
)
def test_no_warning_of_retracing(kind, rng):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = tf.get_logger()
    logger.addHandler(handler)
    try:
        layers = [kind() for _ in range(10)]
        for training in (True, False):
            for size in (3, 4, 5, 6, 7):
                inputs = tf.constant(helpers.inputs_of(rng, (size, 5, 4)))
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    outputs = inputs
                    for layer in layers:
                        outputs = layer(outputs, training=training)
                tape.gradient(outputs, inputs)
    finally:
        logger.removeHandler(handler)
    assert not [message for message in messages if "retrac" in message]


def test_layers_share_a_graph_and_nothing_else(rng):
    calls = []

    @tracing.traced_when_eager
    def scaled(inputs, factor, axis):
        calls.append(axis)
        return ops.sum(inputs, axis=axis) * factor

    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    for factor in (2.0, 3.0):
        for axis in (0, 1):
            for _ in range(2):
                helpers.assert_close(
                    scaled(inputs, tf.constant(factor), axis),
                    np.sum(inputs, axis=axis) * factor,
                    1e-6,
                )
    assert sorted(calls) == [0, 1]


def test_a_graph_is_for_all_sizes(rng):
    seen = []

    @tracing.traced_when_eager
    def total(inputs, vector):
        seen.append(tuple(inputs.shape))
        return ops.sum(inputs, axis=0) * vector

    for rows, columns in [(2, 3), (3, 3), (4, 5), (1, 3), (1, 7)]:
        inputs = helpers.inputs_of(rng, (rows, columns))
        helpers.assert_close(
            total(tf.constant(inputs), tf.ones(columns)),
            inputs.sum(axis=0),
            1e-5,
        )
    # One that is 1 may be broadcast, and is known.
    assert seen == [(None, None), (1, None)]


@pytest.fixture
def made(monkeypatch):
    """The functions that become graphs, as they do."""
    functions = []
    trace = tf.function

    def counted(function, **options):
        functions.append(function)
        return trace(function, **options)

    monkeypatch.setattr("tensorflow.function", counted)
    return functions


@pytest.mark.parametrize(
    "kind",
    [
        BatchNormalization,
        BatchRenormalization,
        functools.partial(BatchRenormalization, gradient_momentum=0.9),
    ],
)
def test_layers_of_a_network_share_their_graph(kind, made, rng):
    # A kind of layer, an epsilon, that no other test has left a graph of.
    counts = []
    for channels in (3, 5, 8):
        inputs = tf.constant(helpers.inputs_of(rng, (4, 6, 6, channels)))
        kind(epsilon=0.0123)(inputs, training=True)
        counts.append(len(made))
    # The graph of the step, and those that it calls.
    assert 1 <= counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    "kind",
    [
        BatchNormalization,
        BatchRenormalization,
        functools.partial(BatchRenormalization, gradient_momentum=0.9),
    ],
)
@pytest.mark.parametrize("shape", [(64, 12, 12, 16), (4, 6, 6, 16)])
def test_a_graph_of_many_layers_holds_calls_of_shared_graphs(
    kind, shape, made, rng
):
    # An epsilon that no other test has left a graph of.
    layers = [kind(epsilon=0.0345) for _ in range(3)]
    inputs = tf.constant(helpers.inputs_of(rng, shape))
    is_large = math.prod(shape) >= choice.SMALL_ELEMENTS
    for layer in layers:
        layer.build(inputs.shape)

    def network(x):
        counts = []
        for layer in layers:
            x = layer(x, training=True)
            counts.append(len(made) - 1)  # less this
        # What calls the first layer makes, the others call.
        assert 1 <= counts[0] == counts[1] == counts[2]
        return x

    operations = (
        tf.function(network, autograph=False)
        .get_concrete_function(inputs)
        .graph.get_operations()
    )
    nodes = [each for each in operations if each.type == "PartitionedCall"]
    assert len(nodes) == 3
    # Nor are large ones put in the place of the calls; none is optimized at
    # each.
    library = {
        each.signature.name: "_noinline" in each.attr
        for each in operations[0].graph.as_graph_def().library.function
    }
    for node in nodes:
        assert library[node.get_attr("f").name] == is_large
    assert all(node.get_attr("config_proto") for node in nodes)


def test_layers_of_other_momentum_infer_by_the_same_graph(made, rng):
    inputs = tf.constant(helpers.inputs_of(rng, (4, 6, 6, 3)))
    for momentum in (0.5, 0.9):
        BatchNormalization(momentum=momentum, epsilon=0.0124)(inputs)
    assert len(made) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_channel_with_a_large_mean_costs_the_others_nothing(dtype, rng):
    x = rng.normal(size=(32, 60, 30, 4))
    x[0, 0, 0, 1] = 100.0  # far from the others, where it is the shift
    small = tf.cast(x, dtype)
    x[..., 0] = 50.0
    large = tf.cast(x, dtype)
    found = []
    for inputs in (small, large):
        layer = BatchNormalization(momentum=0.0, dtype=f"mixed_{dtype}")
        outputs = layer(inputs, training=True)
        found.append((outputs[..., 1:], layer.moving_variance[1:]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
