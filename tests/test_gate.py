"""The gate of `BatchRenormalization`, against its reference."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm._step import gating
from tests import helpers
from tests.reference import (
    GatedReference,
    central_difference,
    from_rows,
    to_rows,
)
from tests.test_corrected_gradient import (
    WRAPPERS,
    examples_of,
    second_derivative,
    stepper,
    upstream_of,
)

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

# What moves where a gradient is computed.
BACKWARD = (
    "gradient_mean",
    "gradient_projection",
    "gradient_agreement",
    "last_mean",
    "last_gradient",
    "gate",
)
STATE = ("moving_mean", "moving_variance", *BACKWARD)
# With the state that `made` begins with, the gate is neither shut nor open.
AGREEMENT = 0.3
GATE = [0.5, 1.0, 4.0, 0.35]
SHAPES = [
    ((5, 4), -1),
    ((1, 4), -1),
    ((3, 6, 4), -1),
    ((3, 4, 6), 1),
    ((3, 4, 5, 4), -1),
    ((4, 7), 0),
    ((2, 3, 2, 3, 4), -1),
    ((32, 30, 30, 4), -1),
    ((3, 4, 5, 6), 1),
]


def constants_of(layer):
    """The numbers of the gate, for the reference."""
    return {
        "worth": gating.HALF_OPEN_WORTH,
        "examples": gating.HALF_OPEN_EXAMPLES,
        "least": gating.LEAST_WORTH,
        "persistence": gating.HALF_SHUT_PERSISTENCE,
        "steepness": gating.STEEPNESS,
        "least_opening": gating.LEAST_OPENING,
        "scatters": gating.SCATTER_MOMENTUM,
        "gradients": gating.AGREEMENT_MOMENTUM,
        "begin": layer.r_max.begin_step,
        "end": layer.r_max.end_step,
    }


def made(shape, rng, step=0, **arguments):
    """A built layer, in the middle of a run, and its reference."""
    layer = BatchRenormalization(**{"momentum": 0.5, **arguments})
    layer.build(shape)
    helpers.randomize(layer, rng)
    channels = layer.moving_mean.shape[0]
    for name, value in (
        ("gradient_mean", rng.normal(size=channels)),
        ("gradient_projection", rng.normal(size=channels)),
        ("gradient_agreement", np.linspace(0.8, 1.2, channels) * AGREEMENT),
        ("last_mean", rng.normal(size=channels)),
        ("last_gradient", rng.normal(size=channels)),
        ("gate", GATE),
        ("step", step),
    ):
        getattr(layer, name).assign(value)
    reference = GatedReference(
        channels,
        layer.gradient_momentum,
        layer.momentum,
        layer.epsilon,
        constants=constants_of(layer),
    )
    reference.current_step = step
    for name in ("gamma", "beta", *STATE):
        weight = getattr(layer, name)
        if weight is not None:
            value = helpers.to_numpy(weight).astype("float64")
            setattr(reference, name, value)
    return layer, reference


def state(layer):
    return {
        name: helpers.to_numpy(getattr(layer, name))
        for name in (*STATE, "step", "gated", "limit_values", "limit_steps")
    }


def backward_state(layer):
    return {name: helpers.to_numpy(getattr(layer, name)) for name in BACKWARD}


def assert_same_state(layer, reference, tolerance):
    for name in STATE:
        helpers.assert_close(
            getattr(layer, name), getattr(reference, name), tolerance
        )
    assert layer.current_step() == reference.current_step
    assert layer.current_correction() == pytest.approx(
        reference.opening(), abs=tolerance
    )


def compare(actual, expected, axis, tolerance):
    """Outputs and gradients; of the layer, those of gamma and beta it has."""
    outputs, d_inputs, *others = map(helpers.to_numpy, actual)
    helpers.assert_close(to_rows(outputs, axis), expected[0], tolerance)
    helpers.assert_close(to_rows(d_inputs, axis), expected[1], tolerance)
    for one, other in zip(others, expected[2:], strict=True):
        helpers.assert_close(one, other, tolerance)


# Float32 knows the gate as well as its averages: a twelfth power is steep.
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 4e-3)]
)
def test_steps_equal_the_reference(shape, axis, wrapper, dtype, tolerance, rng):
    layer, reference = made(shape, rng, axis=axis, dtype=dtype)
    step = stepper(layer, wrapper=wrapper)
    openings = []
    # From closed limits to open ones: 3 n to 5 n.
    for _ in range(16):
        inputs = helpers.inputs_of(rng, shape, axis, dtype)
        upstream = upstream_of(rng, shape, dtype)
        openings.append(reference.opening())
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.gated_step(
            to_rows(inputs, axis).astype("float64"),
            to_rows(upstream, axis).astype("float64"),
            examples_of(shape, axis),
        )
        compare(actual, expected, axis, tolerance)
        assert_same_state(layer, reference, tolerance)
    assert all(0.001 < opening < 1 for opening in openings)
    assert len(set(openings)) == len(openings)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", [(32, 4), (32, 30, 30, 4), (8, 12_500)])
def test_a_gate_that_was_shut_opens_as_the_reference(shape, wrapper, rng):
    layer, reference = made(shape, rng, step=200)
    count, channels = shape[0], shape[-1]
    for name, value in (
        # Of independent examples, whose means scatter by little.
        ("gate", [1e-6, 1.0, count, 0.0]),
        ("gradient_agreement", np.full(channels, 1 / count)),
        ("last_mean", np.zeros(channels)),
    ):
        getattr(layer, name).assign(value)
        setattr(reference, name, np.array(value))
    step = stepper(layer, wrapper=wrapper)
    openings = []
    for index in range(7):
        inputs = helpers.inputs_of(rng, shape)
        upstream = upstream_of(rng, shape)
        # Gradients of examples have little in common; later, nearly all.
        upstream += np.float32(0.01) - upstream.mean(axis=0)
        if index > 1:
            upstream += np.float32(3.0 * (-1) ** index)
        openings.append(reference.opening())
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.gated_step(
            to_rows(inputs, -1).astype("float64"),
            to_rows(upstream, -1).astype("float64"),
            examples_of(shape, -1),
        )
        compare(actual, expected, -1, 4e-3)
        assert_same_state(layer, reference, 4e-3)
    assert openings[0] == openings[1] == 0.0
    assert openings[-1] > 0.0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_batch_of_fewer_examples_says_less(wrapper, rng):
    """The last batch of an epoch: its gradient is the mean of few."""
    layer, reference = made((None, 3, 4), rng, step=12, dtype="float64")
    step = stepper(layer, wrapper=wrapper)
    for count in (4, 4, 1, 4, 2, 9, 4, 1):
        inputs = helpers.inputs_of(rng, (count, 3, 4), dtype="float64")
        upstream = upstream_of(rng, (count, 3, 4), "float64")
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.gated_step(
            to_rows(inputs, -1),
            to_rows(upstream, -1),
            examples_of((count, 3, 4), -1),
        )
        compare(actual, expected, -1, 1e-10)
        assert_same_state(layer, reference, 1e-10)


@pytest.mark.parametrize("arguments", [{"scale": False}, {"center": False}])
def test_without_gamma_or_beta(arguments, rng):
    layer, reference = made((5, 4), rng, step=12, dtype="float64", **arguments)
    assert 0.1 < reference.opening() < 0.9
    for _ in range(6):
        inputs = helpers.inputs_of(rng, (5, 4), dtype="float64")
        upstream = upstream_of(rng, (5, 4), "float64")
        actual = stepper(layer)(tf.constant(inputs), tf.constant(upstream))
        expected = list(reference.gated_step(inputs, upstream))
        del expected[2 if layer.gamma is None else 3]
        compare(actual, expected, -1, 1e-10)
        assert_same_state(layer, reference, 1e-10)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("hidden", [1e6, np.nan])
@pytest.mark.parametrize("masked", ["examples", "parts", "channels"])
def test_what_is_masked_is_not_seen(masked, hidden, axis, wrapper, rng):
    if masked == "channels" and axis == -1:
        pytest.skip("a mask with a channel axis is of channels first")
    shape = (6, 5, 4) if axis == -1 else (6, 4, 5)
    layer, reference = made(shape, rng, step=12, axis=axis, dtype="float64")
    if masked == "channels":
        # Other examples in each channel, and as many.
        mask = np.stack([np.roll([1, 1, 0, 1, 1, 0], c) for c in range(4)], 1)
        mask = mask.astype(bool)
        kept = np.broadcast_to(mask[:, :, None], shape)
    else:
        mask = rng.random((6, 5)) < 0.6
        mask[0], mask[1], mask[2] = True, False, [True, False] * 2 + [True]
        if masked == "examples":
            mask = mask[:, 0]
        kept = mask.reshape(mask.shape + (1,) * (2 - mask.ndim))
        kept = np.broadcast_to(np.expand_dims(kept, axis), shape)
    kept = to_rows(kept, axis)

    def compressed(values):
        values = np.broadcast_to(values.T, kept.T.shape)
        return np.stack(
            [v[k] for v, k in zip(values, kept.T, strict=True)], axis=1
        )

    examples = compressed(examples_of(shape, axis)[:, None])
    step = stepper(layer, tf.constant(mask), wrapper)
    for _ in range(4):
        rows = helpers.inputs_of(rng, kept.shape, dtype="float64")
        upstream = upstream_of(rng, kept.shape, "float64")
        expected = reference.gated_step(
            compressed(rows), compressed(upstream), examples
        )
        rows[~kept] = hidden
        upstream[~kept] = hidden
        actual = step(
            tf.constant(from_rows(rows, shape, axis)),
            tf.constant(from_rows(upstream, shape, axis)),
        )
        outputs, d_inputs, *others = map(helpers.to_numpy, actual)
        assert not to_rows(d_inputs, axis)[~kept].any()
        compare(
            [
                compressed(to_rows(outputs, axis)),
                compressed(to_rows(d_inputs, axis)),
                *others,
            ],
            expected,
            -1,
            1e-10,
        )
        assert_same_state(layer, reference, 1e-10)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["empty", "all masked"])
def test_a_batch_without_elements_leaves_the_gate(kind, wrapper, rng):
    layer, _ = made((None, 4), rng, step=12)
    inputs = helpers.inputs_of(rng, (5, 4))
    mask = tf.zeros(5, "bool") if kind == "all masked" else None
    inputs = inputs[: 0 if kind == "empty" else None]
    before = backward_state(layer)
    outputs, *others = stepper(layer, mask, wrapper)(
        tf.constant(inputs), tf.constant(inputs)
    )
    assert outputs.shape == inputs.shape
    for gradient in others:
        assert np.isfinite(gradient).all()
    for name, value in backward_state(layer).items():
        assert np.array_equal(value, before[name]), name


def test_a_channel_without_elements_leaves_the_gate(rng):
    layer, _ = made((6, 4, 5), rng, step=12, axis=1)
    mask = np.ones((6, 4), bool)
    mask[:, 2] = False
    inputs = tf.constant(helpers.inputs_of(rng, (6, 4, 5), 1))
    before = backward_state(layer)
    stepper(layer, tf.constant(mask))(inputs, inputs)
    after = backward_state(layer)
    assert np.array_equal(after.pop("gate"), before.pop("gate"))
    for name, value in after.items():
        assert value[2] == before[name][2], name
        assert (np.delete(value != before[name], 2)).all(), name


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", [(5, 4), (32, 40, 40, 4)])
@pytest.mark.parametrize("where", ["inputs", "upstream"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_remembered(bad, where, shape, wrapper, rng):
    layer, _ = made(shape, rng, step=12)
    batch = {
        "inputs": helpers.inputs_of(rng, shape),
        "upstream": upstream_of(rng, shape),
    }
    batch[where].reshape(-1, 4)[0, 1] = bad
    before = backward_state(layer)
    _, d_inputs, *_ = stepper(layer, wrapper=wrapper)(
        tf.constant(batch["inputs"]), tf.constant(batch["upstream"])
    )
    # Loss scaling must see it.
    assert not np.isfinite(helpers.to_numpy(d_inputs)[..., 1]).all()
    after = backward_state(layer)
    old, new = before.pop("gate"), after.pop("gate")
    if where == "inputs":
        assert np.array_equal(old, new)
    else:
        # Inputs are known, and so is how they scatter; the gradient is not.
        assert (old[:3] != new[:3]).all()
        assert old[3] == new[3]
    for name, value in after.items():
        assert np.isfinite(value).all(), name
        is_known = name == "last_mean" and where == "upstream"
        assert (value[1] == before[name][1]) != is_known, name
        assert value[0] != before[name][0], name


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_where_no_gradient_arrives_inputs_are_still_seen(wrapper, rng):
    layer, reference = made((5, 4), rng, step=12, dtype="float64")
    step = stepper(layer, wrapper=wrapper)
    for size in (1.0, 0.0, 0.0, 1.0):
        inputs = helpers.inputs_of(rng, (5, 4), dtype="float64")
        upstream = upstream_of(rng, (5, 4), "float64") * size
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.gated_step(inputs, upstream)
        compare(actual, expected, -1, 1e-10)
        assert_same_state(layer, reference, 1e-10)


@pytest.mark.parametrize("size", [1e-25, 1e-17, 1e17, 1e25])
def test_gradients_of_any_size_have_a_direction(size, rng):
    """Squares, or products of them, are 0 or infinite in float32."""
    layer, _ = made((5, 4), rng)
    upstream = upstream_of(rng, (5, 4))
    gradient = np.mean(upstream, axis=0)
    layer.last_gradient.assign(gradient * size)
    inputs = tf.constant(helpers.inputs_of(rng, (5, 4)))
    stepper(layer)(inputs, tf.constant(upstream * size))
    kept = gating.AGREEMENT_MOMENTUM
    expected = kept * GATE[3] + (1 - kept)
    assert float(layer.gate[3]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "frozen", [{"frozen_statistics": True}, {"trainable": False}], ids=str
)
def test_a_frozen_layer_remembers_nothing(frozen, rng):
    layer, _ = made((5, 4), rng, step=12, **frozen)
    before = state(layer)
    inputs = tf.constant(helpers.inputs_of(rng, (5, 4)))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
    assert np.any(tape.gradient(loss, inputs))
    for name, value in state(layer).items():
        assert np.array_equal(value, before[name]), name


def test_inference_remembers_nothing(rng):
    layer, _ = made((5, 4), rng, step=12)
    before = state(layer)
    inputs = tf.constant(helpers.inputs_of(rng, (5, 4)))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs) ** 2)
    tape.gradient(loss, inputs)
    for name, value in state(layer).items():
        assert np.array_equal(value, before[name]), name


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("wanted", ["gamma", "beta"])
def test_the_first_layer_of_a_model_remembers(wanted, wrapper, rng):
    """No gradient of its inputs is asked for."""
    layer, reference = made((5, 4), rng, step=12, dtype="float64")

    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(outputs * upstream)
        return tape.gradient(loss, getattr(layer, wanted).value)

    step = WRAPPERS[wrapper](step)
    for _ in range(3):
        inputs = helpers.inputs_of(rng, (5, 4), dtype="float64")
        upstream = upstream_of(rng, (5, 4), "float64")
        actual = step(tf.constant(inputs), tf.constant(upstream))
        _, _, *expected = reference.gated_step(inputs, upstream)
        helpers.assert_close(actual, expected[wanted == "beta"], 1e-10)
        assert_same_state(layer, reference, 1e-10)


@pytest.mark.parametrize("wrapper", ["eager", "xla"])
def test_a_layer_called_twice_a_step_adds_both_changes(wrapper, rng):
    """But for what was last: that is of the call that comes first."""
    shape = (5, 4)
    # Moving statistics stay: each call begins as the other does.
    layers = [
        made(shape, np.random.default_rng(1), step=12, momentum=1.0)[0]
        for _ in range(3)
    ]
    together, *alone = layers
    before = backward_state(together)
    parts = [tf.constant(helpers.inputs_of(rng, shape)) for _ in range(2)]
    upstream = tf.constant(upstream_of(rng, shape))

    def step(parts):
        with tf.GradientTape() as tape:
            tape.watch(parts)
            loss = sum(
                tf.reduce_sum(together(part, training=True) * upstream)
                for part in parts
            )
        return tape.gradient(loss, parts)

    WRAPPERS[wrapper](step)(parts)
    for layer, part in zip(alone, parts, strict=True):
        stepper(layer)(part, upstream)
    first, second = map(backward_state, alone)
    for name, value in backward_state(together).items():
        expected = first[name]
        if not name.startswith("last"):
            expected = expected + second[name] - before[name]
        helpers.assert_close(value, expected, 1e-4)


def test_each_gradient_of_a_persistent_tape_counts(rng):
    layer, _ = made((5, 4), rng, step=12)
    inputs = tf.constant(helpers.inputs_of(rng, (5, 4)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
    begin = backward_state(layer)
    first = tape.gradient(loss, inputs)
    once = backward_state(layer)
    # What a step goes by was read in the forward pass.
    assert np.array_equal(first, tape.gradient(loss, inputs))
    for name, value in backward_state(layer).items():
        change = once[name] - begin[name]
        times = 1 if name.startswith("last") else 2
        helpers.assert_close(value - begin[name], times * change, 1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("of", ["inputs", "upstream"])
def test_second_derivatives_hold_the_gate(of, wrapper, rng):
    shape = (5, 3)
    layer, reference = made(shape, rng, step=12, dtype="float64", momentum=0.5)
    held = vars(reference).copy()
    inputs = helpers.inputs_of(rng, shape, dtype="float64")
    upstream = upstream_of(rng, shape, "float64")
    along = rng.normal(size=shape)

    def first(upstream):
        vars(reference).update(held)
        return np.sum(reference.gated_step(inputs, upstream)[1] * along)

    second = WRAPPERS[wrapper](second_derivative(layer, along, of))
    actual = second(tf.constant(inputs), tf.constant(upstream))
    if of == "upstream":  # a difference of inputs moves r and d, too
        expected = central_difference(first, upstream)
        helpers.assert_close(actual, expected, 1e-6)
    first(upstream)
    # The second derivative is no gradient that arrives. (Eagerly it is one of
    # zero, after which averages of gradients stay as they are.)
    after = backward_state(layer)
    names = ["gradient_agreement"] if wrapper == "eager" else after
    for name in names:
        helpers.assert_close(after[name], getattr(reference, name), 1e-10)
    assert after["gate"][3] == pytest.approx(reference.gate[3], rel=1e-9)


@pytest.mark.parametrize("wrapper", ["eager", "graph"])
def test_forward_mode_goes_by_the_gate_and_remembers_nothing(wrapper, rng):
    layer, reference = made((5, 4), rng, step=12, dtype="float64")
    inputs, along = (
        helpers.inputs_of(rng, (5, 4), dtype="float64") for _ in range(2)
    )
    upstream = rng.normal(size=(5, 4))

    def forward(inputs, along):
        with tf.autodiff.ForwardAccumulator(inputs, along) as accumulator:
            outputs = layer(inputs, training=True)
        return outputs, accumulator.jvp(outputs)

    before = backward_state(layer)
    outputs, tangents = WRAPPERS[wrapper](forward)(
        tf.constant(inputs), tf.constant(along)
    )
    for name, value in backward_state(layer).items():
        assert np.array_equal(value, before[name]), name
    opening = reference.opening()
    assert 0.1 < opening < 0.9
    r, d = reference.correction(inputs, *reference.limits())
    r, d = r**opening, d * opening
    d_inputs, *_ = reference.gradients(inputs, upstream, r, d)
    helpers.assert_close(outputs, reference.normalize(inputs, r, d), 1e-10)
    assert np.sum(tangents * upstream) == pytest.approx(
        np.sum(along * d_inputs), rel=1e-9
    )


@pytest.mark.parametrize("wrapper", ["eager", "graph"])
def test_recomputed_steps_are_remembered_once(wrapper, rng):
    layer, reference = made((5, 4), rng, step=12)
    recomputed = keras.remat(lambda x: layer(x, training=True))

    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = recomputed(inputs)
        return outputs, tape.gradient(
            outputs, inputs, output_gradients=upstream
        )

    step = WRAPPERS[wrapper](step)
    for _ in range(4):
        inputs = helpers.inputs_of(rng, (5, 4))
        upstream = upstream_of(rng, (5, 4))
        outputs, d_inputs = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.gated_step(
            inputs.astype("float64"), upstream.astype("float64")
        )
        helpers.assert_close(outputs, expected[0], 1e-3)
        helpers.assert_close(d_inputs, expected[1], 1e-3)
        assert_same_state(layer, reference, 1e-3)


def assert_same_step(layer, other, shape, wrapper, rng, tolerance):
    """Outputs and gradients of a step are those of another layer."""
    inputs = tf.constant(helpers.inputs_of(rng, shape))
    upstream = tf.constant(upstream_of(rng, shape))
    for actual, expected in zip(
        *(
            stepper(each, wrapper=wrapper)(inputs, upstream)
            for each in (layer, other)
        ),
        strict=True,
    ):
        helpers.assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", [(5, 4), (32, 30, 30, 4)])
def test_shut_it_is_batch_normalization(shape, wrapper, rng):
    layer, _ = made(shape, rng, step=20)
    layer.gradient_agreement.assign(np.zeros(4))
    # Of 32 examples, as independent as they can be.
    layer.gate.assign([0.01, 1.0, 32.0, 0.0])
    assert layer.current_correction() < 1e-6
    plain = BatchNormalization(momentum=layer.momentum)
    plain.build(shape)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        getattr(plain, name).assign(getattr(layer, name))
    assert_same_step(layer, plain, shape, wrapper, rng, 1e-5)
    for one, other in zip(
        helpers.statistics(layer), helpers.statistics(plain), strict=True
    ):
        helpers.assert_close(one, other, 1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", [(5, 4), (32, 30, 30, 4)])
def test_open_it_is_the_corrected_layer(shape, wrapper, rng):
    layer, _ = made(shape, rng, step=200, gradient_momentum=0.8)
    # A batch of one class.
    layer.gate.assign([1.0, 0.0, 32.0, 0.0])
    assert layer.current_correction() > 1 - 1e-5
    corrected = BatchRenormalization(
        momentum=layer.momentum, r_max=3.0, d_max=5.0, gradient_momentum=0.8
    )
    corrected.build(shape)
    for name in ("gamma", "beta", *STATE):
        getattr(corrected, name).assign(getattr(layer, name))
    assert_same_step(layer, corrected, shape, wrapper, rng, 1e-4)


@pytest.mark.parametrize("gate", [[1.0, 0.0, 32.0, 0.0], [0.01, 1.0, 32.0, 0]])
@pytest.mark.parametrize("wrapper", ["eager", "graph"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)]
)
def test_in_16_bits_a_large_step_is_rounded_once(
    dtype, rounding, wrapper, gate, rng
):
    shape = (32, 60, 30, 4)
    layer, reference = made(shape, rng, step=200, dtype=f"mixed_{dtype}")
    layer.gate.assign(gate)
    reference.gate = np.array(gate)
    step = stepper(layer, wrapper=wrapper)
    for _ in range(2):
        # What is common to all examples is subtracted.
        inputs, upstream = (
            tf.cast(value, dtype)
            for value in (rng.normal(size=shape), 30 + rng.normal(size=shape))
        )
        reference.gradient_mean = np.full(4, 300.0)
        layer.gradient_mean.assign(reference.gradient_mean)
        actual = step(inputs, upstream)
        rows = (
            to_rows(tf.cast(x, "float64").numpy(), 3)
            for x in (inputs, upstream)
        )
        expected = reference.gated_step(*rows, examples_of(shape, 3))
        for mine, value in zip(actual[:2], expected[:2], strict=True):
            mine = to_rows(tf.cast(mine, "float64").numpy(), 3)
            allowed = 1.01 * rounding * abs(value) + 1e-4
            assert np.all(abs(mine - value) <= allowed)
        assert_same_state(layer, reference, 1e-3)


def openness(agreement, between, within, examples, persistence):
    gate = gating.Gate(
        *map(np.float32, (between, within, examples, persistence))
    )
    agreement = np.full(3, agreement, "float32")
    return float(gating.openness(tf.constant(agreement), gate))


NUMBERS = st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.35, 1.0, 7.0, 1e6, 1e30])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    agreements=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    between=NUMBERS,
    within=NUMBERS,
    examples=NUMBERS,
    persistence=st.floats(-1, 1),
)
def test_any_state_opens_the_gate_somewhere_from_0_to_1(
    agreements, between, within, examples, persistence
):
    less, more = (
        openness(agreement, between, within, examples, persistence)
        for agreement in sorted(agreements)
    )
    assert 0 <= less <= more + 1e-6 <= 1 + 2e-6
    # More persistent gradients open it no further.
    steady = openness(max(agreements), between, within, examples, 1.0)
    assert steady <= more + 1e-6


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        # Of one example, which is all there is.
        ((1.0, 1.0, 0.0, 1.0, 0.0), 1.0),
        # Four, and of sixteen, independent ones.
        ((0.25, 0.25, 0.75, 4.0, 0.0), 0.0),
        ((0.0625, 0.0625, 0.9375, 16.0, 0.0), 0.0),
        # Sixteen of one class: by gradients, by means.
        ((0.9, 0.0625, 0.9375, 16.0, 0.0), 1.0),
        ((0.0, 0.9, 0.1, 16.0, 0.0), 1.0),
        # A batch of hundreds that is worth as many as four, or a hundred.
        ((0.25, 0.0, 1.0, 256.0, 0.0), 1.0),
        ((0.01, 0.0, 1.0, 256.0, 0.0), 0.0),
        # Sorted.
        ((1.0, 1.0, 0.0, 16.0, 0.9), 0.0),
        # One or two examples are few in whatever order they come.
        ((0.7, 0.5, 0.5, 2.0, 0.9), 1.0),
        ((1.0, 1.0, 0.0, 1.0, 0.9), 1.0),
        # Opposite gradients are none that persist.
        ((1.0, 1.0, 0.0, 16.0, -0.9), 1.0),
        # Nothing is known, and nothing scatters.
        ((1.0, 0.0, 0.0, 0.0, 0.0), 1.0),
        ((0.0, 0.0, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_where_the_gate_is_open(state, expected):
    assert openness(*state) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("HALF_OPEN_WORTH", lambda half: (half, 0.0, 1.0, 0.01, 0.0)),
        ("HALF_OPEN_WORTH", lambda half: (0.0, half, 1 - half, 0.01, 0.0)),
        ("HALF_OPEN_EXAMPLES", lambda half: (0.1, 0.0, 1.0, half * 10, 0.0)),
        ("LEAST_WORTH", lambda half: (half, 0.0, 1.0, 1000.0, 0.0)),
        ("HALF_SHUT_PERSISTENCE", lambda half: (1.0, 0.0, 1.0, 16.0, half)),
    ],
)
def test_it_is_half_open_at_its_constants(name, state):
    half = getattr(gating, name)
    assert openness(*state(half)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["inputs", "upstream"])
def test_huge_values_leave_a_finite_state(name, rng):
    layer, _ = made((5, 4), rng, step=12)
    step = stepper(layer)
    for size in (1e15, 1e25, 1e30, 1.0):
        batch = {
            "inputs": helpers.inputs_of(rng, (5, 4)),
            "upstream": upstream_of(rng, (5, 4)),
        }
        batch[name] = batch[name] * np.float32(size)
        step(tf.constant(batch["inputs"]), tf.constant(batch["upstream"]))
        for weight, value in state(layer).items():
            assert np.isfinite(value).all(), (weight, size)


def gated_network(policy):
    keras.utils.set_random_seed(3)
    norm = {"momentum": 0.5, "dtype": policy}
    return keras.Sequential(
        [
            keras.Input((4,)),
            BatchRenormalization(**norm),
            keras.layers.Dense(6, dtype=policy),
            BatchRenormalization(**norm),
            keras.layers.Dense(1, dtype=policy),
        ]
    )


def test_the_scale_of_a_float16_loss_is_not_remembered(rng):
    x = rng.normal(size=(64, 4)).astype("float32") + 1
    y = x.sum(axis=1, keepdims=True)
    states = []
    # Small enough that no step overflows: such a step is left out.
    for scale in (1.0, 2.0**4):
        model = gated_network("mixed_float16")
        model.compile(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.05),
                initial_scale=scale,
                dynamic_growth_steps=3,
            ),
            "mse",
        )
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        states.append([state(model.layers[index]) for index in (0, 2)])
    for one, other in zip(*states, strict=True):
        assert one["step"] == 16
        assert np.any(one["last_gradient"])
        for name, value in one.items():
            assert value.dtype != "float16"
            helpers.assert_close(value, other[name], 0.05)


@pytest.mark.parametrize("momentum", [0.9, 1.0])
def test_first_steps_compute_nothing_that_is_not_finite(momentum, rng):
    """Where averages are of nothing, and with limits that never open."""
    # No other graph has this epsilon: those are not checked.
    layer = BatchRenormalization(momentum=momentum, epsilon=0.0457)
    layer.build((5, 4))
    tf.debugging.enable_check_numerics()
    try:
        for size, present in ((0, 5), (1, 5), (1, 0), (1, 3)):
            inputs = tf.constant(helpers.inputs_of(rng, (5, 4)))
            upstream = upstream_of(rng, (5, 4)) * np.float32(size)
            step = stepper(layer, tf.range(5) < present)
            assert np.isfinite(step(inputs, tf.constant(upstream))[0]).all()
            assert 0 <= layer.current_correction() <= 1
    finally:
        tf.debugging.disable_check_numerics()


def test_a_new_layer_equals_the_reference(rng):
    """The first batch comes after none."""
    layer, reference = made((5, 4), rng, dtype="float64")
    layer.gate.assign(np.zeros(4))
    reference.gate = np.zeros(4)
    for _ in range(3):
        inputs = helpers.inputs_of(rng, (5, 4), dtype="float64")
        upstream = upstream_of(rng, (5, 4), "float64")
        stepper(layer)(tf.constant(inputs), tf.constant(upstream))
        reference.gated_step(inputs, upstream)
        assert_same_state(layer, reference, 1e-10)


def test_channels_of_other_examples_count_as_their_mean(rng):
    layer, _ = made((6, 4, 5), rng, axis=1, dtype="float64")
    mask = np.arange(6)[:, None] < [6, 6, 3, 5]
    inputs = tf.constant(helpers.inputs_of(rng, (6, 4, 5), 1, "float64"))
    stepper(layer, tf.constant(mask))(inputs, inputs)
    kept = gating.AGREEMENT_MOMENTUM
    expected = kept * GATE[2] + (1 - kept) * 5
    assert float(layer.gate[2]) == pytest.approx(expected)


@pytest.mark.parametrize("calls", [2, 3])
def test_a_layer_called_each_step_several_times_knows_a_last_batch(calls, rng):
    layer = BatchRenormalization(momentum=0.5)
    layer.build((None, 3))
    for _ in range(20):
        parts = [
            tf.constant(rng.normal(5.0, 1.0, (32, 3)), "float32")
            for _ in range(calls)
        ]
        with tf.GradientTape() as tape:
            tape.watch(parts)
            loss = sum(
                tf.reduce_sum(layer(part, training=True) * part)
                for part in parts
            )
        tape.gradient(loss, parts)
    assert np.abs(helpers.to_numpy(layer.last_mean) - 5).max() < 1
    # Of steps whose means are a sixth of a standard deviation apart.
    assert float(layer.gate[0]) < 0.1


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("is_taken", [True, False])
def test_a_branch_of_a_graph_is_as_without(is_taken, is_inside, rng):
    """As where a network leaves out blocks at random."""
    x = tf.constant(helpers.inputs_of(rng, (8, 4)))
    layers = [BatchRenormalization(momentum=0.5) for _ in range(2)]
    for layer in layers:
        layer.build((None, 4))

    def gradients(layer, branch):
        with tf.GradientTape() as tape:
            tape.watch(x)
            inputs = x if is_inside else 2.0 * x

            def normalized():
                given = 2.0 * x if is_inside else inputs
                return layer(given, training=True)

            loss = tf.reduce_sum(branch(normalized) ** 3)
        weights = [x, layer.gamma.value, layer.beta.value]
        return tape.gradient(loss, weights, unconnected_gradients="zero")

    found = tf.function(gradients, autograph=False)(
        layers[0],
        lambda normalized: tf.cond(
            tf.reduce_sum(x) < (np.inf if is_taken else -np.inf),
            normalized,
            lambda: x,
        ),
    )
    expected = gradients(
        layers[1], lambda normalized: normalized() if is_taken else x
    )
    for one, other in zip(found, expected, strict=True):
        helpers.assert_close(one, helpers.to_numpy(other), 1e-5)
    for one, other in zip(*(each.weights for each in layers), strict=True):
        helpers.assert_close(one, helpers.to_numpy(other), 1e-5)


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_large_inputs_of_rank_2_are_many_examples(way, rng):
    """By the fused operators as by plain operations on images of a pixel."""
    rows = rng.normal(size=(4096, 32)).astype("float32")
    found = []
    for shape in ((4096, 32), (4096, 1, 32)):
        layer = BatchRenormalization(momentum=0.5)

        def step(inputs, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(layer(inputs, training=True) ** 3)
            return tape.gradient(loss, inputs)

        step = tf.function(step) if way == "graph" else step
        for _ in range(2):
            d_x = step(tf.reshape(rows, shape))
        found.append((tf.reshape(d_x, rows.shape), layer.gate))
    (gradient, gate), (expected, expected_gate) = found
    assert gate[2] > 100
    helpers.assert_close(gate, helpers.to_numpy(expected_gate), 1e-5)
    helpers.assert_close(gradient, helpers.to_numpy(expected), 1e-4)
