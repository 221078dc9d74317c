"""Derivatives in forward mode, and second ones, in every path."""

import functools

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm._step.fused import FusedView
from tests import helpers

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

LARGE = (8, 24, 24, 32)  # for the fused operators
SMALL = (6, 5)


def made(kind, shape, dtype, axis=-1, *, is_open=False, **arguments):
    """A built layer; of two with the same arguments, all weights are equal."""
    if kind is BatchRenormalization:
        arguments.setdefault("r_max", 1.5)
        arguments.setdefault("d_max", 0.5)
    layer = kind(axis=axis, dtype=dtype, **arguments)
    layer.build(shape)
    helpers.randomize(layer, np.random.default_rng(3))
    if is_open:
        channels = shape[axis]
        layer.gradient_agreement.assign(np.linspace(0.2, 0.9, channels))
        layer.gradient_mean.assign(np.linspace(-0.1, 0.1, channels))
        layer.gradient_projection.assign(np.linspace(0.2, -0.2, channels))
    return layer


class Case:
    """A layer, where to differentiate it and along what."""

    def __init__(self, layer, rng, shape, training, axis=-1):
        dtype = layer.compute_dtype
        self.layer, self.training = layer, training
        self.x = tf.constant(helpers.inputs_of(rng, shape, axis), dtype)
        self.along = [
            tf.constant(rng.normal(size=shape), dtype),
            *(
                tf.constant(rng.normal(size=shape[axis]), weight.dtype)
                for weight in layer.trainable_variables
            ),
        ]
        self.upstream = tf.constant(rng.normal(size=shape), dtype)
        self.at = [self.x, *(each.value for each in layer.trainable_variables)]

    def outputs(self, x):
        return self.layer(x, training=self.training)

    def loss(self, call):
        return tf.reduce_sum(self.upstream * tf.sin(call(self.x)))

    def forward(self, call):
        """The derivative of the outputs along `along`."""
        with tf.autodiff.ForwardAccumulator(self.at, self.along) as accumulator:
            outputs = call(self.x)
        return accumulator.jvp(outputs)

    def product(self, call):
        """That of the loss's gradient, forward over reverse."""
        with tf.autodiff.ForwardAccumulator(self.at, self.along) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(self.x)
                loss = self.loss(call)
            gradients = tape.gradient(loss, self.at)
        return [accumulator.jvp(gradient) for gradient in gradients]

    def product_of_forward(self, call):
        """The same, reverse over forward."""
        with tf.GradientTape() as tape:
            tape.watch(self.x)
            with tf.autodiff.ForwardAccumulator(
                self.at, self.along
            ) as accumulator:
                loss = self.loss(call)
            derivative = accumulator.jvp(loss)
        return tape.gradient(derivative, self.at)

    def product_backwards(self, call):
        """The same, reverse over reverse."""
        with tf.GradientTape() as outer:
            outer.watch(self.x)
            with tf.GradientTape() as inner:
                inner.watch(self.x)
                loss = self.loss(call)
            gradients = inner.gradient(loss, self.at)
            total = tf.add_n(
                [
                    tf.reduce_sum(gradient * along)
                    for gradient, along in zip(
                        gradients, self.along, strict=True
                    )
                ]
            )
        return outer.gradient(total, self.at)


def in_place(take, case, place):
    """`take`, with accumulators and tapes around or inside a graph."""
    if place == "eager":
        return take(case.outputs)
    if place == "inside a graph":
        return tf.function(lambda: take(case.outputs), autograph=False)()
    return take(tf.function(case.outputs, autograph=False))


PLACES = ["eager", "inside a graph", "around a graph"]
KINDS = [BatchNormalization, BatchRenormalization]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, training, shape, place):
    results = []
    for dtype in ("float32", "float64"):
        layer = made(kind, shape, dtype)
        case = Case(layer, np.random.default_rng(5), shape, training)
        results.append(in_place(case.forward, case, place))
    helpers.assert_close(*results, 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_equals_differences(training):
    layer = made(BatchNormalization, SMALL, "float64")
    case = Case(layer, np.random.default_rng(5), SMALL, training)
    kept = layer.get_weights()
    actual = case.forward(case.outputs)

    def moved(step):
        layer.set_weights(kept)
        inputs, *weights = case.along
        for value, along in zip(case.at[1:], weights, strict=True):
            value.assign_add(step * along)
        return case.outputs(case.x + step * inputs)

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    helpers.assert_close(actual, expected, 1e-8)


@pytest.mark.parametrize("arguments", [{"axis": 1}, {"scale": False}])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_of_other_layers(training, arguments):
    shape = LARGE
    axis = arguments.get("axis", -1)
    results = []
    for dtype in ("float32", "float64"):
        layer = made(BatchRenormalization, shape, dtype, **arguments)
        case = Case(layer, np.random.default_rng(5), shape, training, axis)
        results.append(case.forward(tf.function(case.outputs)))
    helpers.assert_close(*results, 2e-5)


# Around a graph TensorFlow itself takes none, not of a product.
@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_hessian_vector_products(kind, training, shape, place):
    case, reference = (
        Case(
            made(kind, shape, dtype),
            np.random.default_rng(5),
            shape,
            training,
        )
        for dtype in ("float32", "float64")
    )
    expected = reference.product_backwards(reference.outputs)
    kept = case.layer.get_weights()
    for take in (
        case.product,
        case.product_of_forward,
        case.product_backwards,
    ):
        case.layer.set_weights(kept)
        actual = in_place(take, case, place)
        for mine, value in zip(actual, expected, strict=True):
            helpers.assert_close(mine, value, 2e-4)


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("dtype", ["mixed_float16", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_forward_mode_correct_nothing(training, dtype, place):
    # In forward mode they are of Algorithm 1.
    arguments = {"is_open": True, "gradient_momentum": 0.9}
    case, reference = (
        Case(
            made(BatchRenormalization, SMALL, kind, **given),
            np.random.default_rng(5),
            SMALL,
            training,
        )
        for kind, given in ((dtype, arguments), ("float64", {}))
    )
    tolerance = 1e-10
    if dtype == "mixed_float16":
        reference.x = reference.at[0] = tf.cast(case.x, "float64")
        tolerance = 2e-2
    expected = reference.product_backwards(reference.outputs)
    for take in (case.product_of_forward, case.product):
        kept = case.layer.get_weights()
        actual = in_place(take, case, place)
        case.layer.set_weights(kept)
        for mine, value in zip(actual, expected, strict=True):
            mine = tf.cast(mine, "float64")
            helpers.assert_close(mine, value, tolerance)


VARIABLES = {
    "normalization": BatchNormalization,
    "renormalization": BatchRenormalization,
    "corrected": functools.partial(BatchRenormalization, gradient_momentum=0.9),
}
BEFORE = {
    "nothing": None,
    "an activation": lambda: keras.layers.Activation("linear"),
    "an identity": keras.layers.Identity,
    "a dropout": lambda: keras.layers.Dropout(0.0),
}


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", VARIABLES)
def test_a_variable_is_an_input(layer, training, before, place, rng):
    values = helpers.inputs_of(rng, SMALL)

    def gradient(inputs, watched):
        call = VARIABLES[layer]()
        call.build(SMALL)
        if BEFORE[before] is not None:
            call = keras.Sequential([BEFORE[before](), call])
            call.build(SMALL)

        def taken():
            with tf.GradientTape() as tape:
                tape.watch(watched)
                outputs = call(inputs, training=training)
                loss = tf.reduce_sum(outputs**3)
            return tape.gradient(loss, watched)

        return tf.function(taken)() if place != "eager" else taken()

    tensor = tf.constant(values)
    expected = gradient(tensor, tensor)
    variable = tf.Variable(values)
    helpers.assert_close(gradient(variable, variable), expected, 1e-6)
    variable = keras.Variable(values)
    actual = gradient(variable, variable.value)
    helpers.assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("layer", VARIABLES)
def test_forward_mode_takes_a_variable(layer, rng):
    values = helpers.inputs_of(rng, SMALL)
    along = tf.constant(rng.normal(size=SMALL), "float32")

    def derivative(inputs):
        call = VARIABLES[layer]()
        call.build(SMALL)
        with tf.autodiff.ForwardAccumulator(inputs, along) as accumulator:
            outputs = call(inputs, training=True)
        return accumulator.jvp(outputs)

    expected = derivative(tf.constant(values))
    helpers.assert_close(derivative(tf.Variable(values)), expected, 1e-6)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_second_derivatives_of_the_corrected_gradient(graph):
    # The statistics that its two means are taken with depend on the inputs.
    results = []
    for dtype in ("float32", "float64"):
        layer = made(
            BatchRenormalization,
            LARGE,
            dtype,
            r_max=3.0,
            d_max=5.0,
            gradient_momentum=0.9,
            is_open=True,
        )
        case = Case(layer, np.random.default_rng(5), LARGE, True)
        place = "inside a graph" if graph else "eager"
        results.append(in_place(case.product_backwards, case, place))
    for mine, value in zip(*results, strict=True):
        helpers.assert_close(mine, value, 2e-4)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_third_derivatives(momentum, rng, monkeypatch):
    # What could be missing is of the size of 1 / elements a channel.
    monkeypatch.setattr("keras_renorm._step.choice.SMALL_ELEMENTS", 1)
    shape = (4, 3, 3, 8)
    along = rng.normal(size=(2, *shape))

    def third(case):
        value = case.x
        factors = tf.constant(along, value.dtype)
        with tf.GradientTape() as outer:
            outer.watch(value)
            with tf.GradientTape() as middle:
                middle.watch(value)
                with tf.GradientTape() as inner:
                    inner.watch(value)
                    loss = case.loss(case.outputs)
                first = inner.gradient(loss, value)
                total = tf.reduce_sum(tf.sin(first) * factors[0])
            second = middle.gradient(total, value)
            total = tf.reduce_sum(tf.sin(second) * factors[1])
        return outer.gradient(total, value)

    case, reference = (
        Case(
            made(
                BatchRenormalization,
                shape,
                dtype,
                r_max=3.0,
                d_max=5.0,
                gradient_momentum=momentum,
                is_open=momentum is not None,
            ),
            np.random.default_rng(5),
            shape,
            True,
        )
        for dtype in ("float32", "float64")
    )
    actual = tf.function(lambda: third(case), autograph=False)()
    helpers.assert_close(actual, third(reference), 2e-5)


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("layer", VARIABLES)
def test_a_tangent_may_arrive_behind_a_layer(layer, shape, place, rng):
    layer = VARIABLES[layer]()
    layer.build(shape)
    inputs = tf.constant(helpers.inputs_of(rng, shape))
    factor = tf.Variable(2.0)

    def derivatives():
        one = tf.constant(1.0)
        with tf.autodiff.ForwardAccumulator(factor, one) as forward:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=True)
                loss = factor * tf.reduce_sum(outputs**3)
            gradient = tape.gradient(loss, inputs)
        return gradient, forward.jvp(gradient)

    if place != "eager":
        derivatives = tf.function(derivatives, autograph=False)
    gradient, tangent = derivatives()
    helpers.assert_close(tangent, gradient / 2, 1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_forward_mode_moves_no_accumulator(place):
    layer = made(
        BatchRenormalization,
        SMALL,
        "float32",
        gradient_momentum=0.9,
        is_open=True,
    )
    case = Case(layer, np.random.default_rng(5), SMALL, True)
    weights = (
        layer.gradient_mean,
        layer.gradient_projection,
        layer.gradient_agreement,
    )
    before = [helpers.to_numpy(weight) for weight in weights]
    in_place(case.forward, case, place)
    for weight, value in zip(weights, before, strict=True):
        np.testing.assert_array_equal(helpers.to_numpy(weight), value)


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_takes_inputs_from_outside(kind, training, compiled):
    layer, other = (made(kind, SMALL, "float32") for _ in range(2))
    inputs = tf.constant(helpers.inputs_of(np.random.default_rng(5), SMALL))
    run = tf.function(
        lambda: layer(inputs, training=training), jit_compile=compiled
    )
    expected = other(inputs, training=training)
    helpers.assert_close(run(), expected, 1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_operator_by_statistics_differentiates_as_plain_operations(
    axis, rng
):
    shape = (4, 3, 5, 6)
    vector = [1, -1, 1, 1] if axis == 1 else [-1]
    epsilon = 0.01

    def plain(x, mean, variance, scale, offset):
        mean, variance, scale, offset = (
            tf.reshape(each, vector) for each in (mean, variance, scale, offset)
        )
        return (x - mean) * tf.math.rsqrt(variance + epsilon) * scale + offset

    def fused(x, *vectors):
        view = FusedView(x, axis % len(shape))
        outputs = view.normalize_by(view.inputs, *vectors, epsilon)
        return view.restore(outputs)

    low = [None, -1.0, 0.5, 0.5, -1.0]
    values = [rng.normal(size=shape)]
    values += [rng.uniform(a, a + 2.0, shape[axis]) for a in low[1:]]
    along = [rng.normal(size=value.shape) for value in values]

    def derivatives(call, dtype):
        at = [tf.constant(value, dtype) for value in values]
        with tf.GradientTape() as outer:
            outer.watch(at)
            with tf.GradientTape() as inner:
                inner.watch(at)
                loss = tf.reduce_sum(tf.sin(call(*at)))
            first = inner.gradient(loss, at)
            total = tf.add_n(
                [
                    tf.reduce_sum(tf.sin(gradient) * tf.constant(each, dtype))
                    for gradient, each in zip(first, along, strict=True)
                ]
            )
        return [*first, *outer.gradient(total, at)]

    actual = tf.function(lambda: derivatives(fused, "float32"))()
    expected = derivatives(plain, "float64")
    for mine, value in zip(actual, expected, strict=True):
        helpers.assert_close(mine, value, 1e-4)
