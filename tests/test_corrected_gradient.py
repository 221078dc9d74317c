"""`gradient_momentum`: the gradient is corrected as the outputs are."""

import re

import keras
import numpy as np
import pytest

import keras_renorm
from keras_renorm import BatchRenormalization
from keras_renorm.diagnostics import loss_along_gradient
from keras_renorm.schedules import LinearRamp
from tests import helpers
from tests.reference import (
    CorrectedReference,
    central_difference,
    from_rows,
    to_rows,
)

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

ACCUMULATORS = ("gradient_mean", "gradient_projection", "gradient_agreement")
# One small enough for plain operations in a graph, one for the fused ones.
SHAPES = [
    ((16, 5), -1),
    ((1, 5), -1),
    ((3, 4, 5, 6), -1),
    ((3, 4, 5, 6), 1),
    ((2, 3, 2, 3, 4), -1),
    ((4, 7), 0),
    ((32, 30, 30, 4), -1),
]
WRAPPERS = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function),
    "xla": lambda function: tf.function(function, jit_compile=True),
}


def made(shape, rng, **arguments):
    """A built layer and its reference."""
    arguments = {
        "momentum": 0.8,
        "r_max": 2.2,
        "d_max": 1.5,
        "gradient_momentum": 0.9,
        **arguments,
    }
    layer = BatchRenormalization(**arguments)
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = CorrectedReference(
        layer.moving_mean.shape[0], layer.gradient_momentum, layer.momentum
    )
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        weight = getattr(layer, name)
        if weight is not None:
            value = helpers.to_numpy(weight).astype("float64")
            setattr(reference, name, value)
    return layer, reference


def examples_of(shape, axis):
    """The example that each row of `to_rows` belongs to."""
    first = 1 if axis % len(shape) == 0 else 0
    numbers = np.arange(shape[first])
    numbers = np.expand_dims(numbers, list(range(1, len(shape) - first)))
    return to_rows(np.broadcast_to(numbers, shape), axis)[:, 0]


def stepper(layer, mask=None, wrapper="eager"):
    """A function of inputs and upstream: outputs and all gradients."""

    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True, mask=mask)
            loss = tf.reduce_sum(outputs * upstream)
        weights = [weight.value for weight in layer.trainable_variables]
        return outputs, *tape.gradient(loss, [inputs, *weights])

    return WRAPPERS[wrapper](step)


def second_derivative(layer, along, of="upstream"):
    """That of the gradient of the inputs, of inputs or upstream."""

    def second(inputs, upstream):
        wanted = inputs if of == "inputs" else upstream
        with tf.GradientTape() as outer:
            outer.watch(wanted)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=True)
            d_x = tape.gradient(outputs, inputs, output_gradients=upstream)
            total = tf.reduce_sum(d_x * along)
        return outer.gradient(total, wanted)

    return second


def accumulators(layer):
    return [helpers.to_numpy(getattr(layer, name)) for name in ACCUMULATORS]


def upstream_of(rng, shape, dtype="float32"):
    """A gradient whose mean is not zero."""
    return (rng.normal(size=shape) + 0.5).astype(dtype)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-11), ("float32", 3e-5)]
)
def test_steps_equal_the_reference(shape, axis, wrapper, dtype, tolerance, rng):
    layer, reference = made(shape, rng, axis=axis, dtype=dtype)
    step = stepper(layer, wrapper=wrapper)
    for _ in range(5):
        inputs = helpers.inputs_of(rng, shape, axis, dtype)
        upstream = upstream_of(rng, shape, dtype)
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.step(
            to_rows(inputs, axis).astype("float64"),
            to_rows(upstream, axis).astype("float64"),
            2.2,
            1.5,
            examples_of(shape, axis),
        )
        for index, (one, other) in enumerate(
            zip(actual, expected, strict=True)
        ):
            one = helpers.to_numpy(one)
            helpers.assert_close(
                to_rows(one, axis) if index < 2 else one, other, tolerance
            )
        for name in ACCUMULATORS:
            helpers.assert_close(
                getattr(layer, name), getattr(reference, name), tolerance
            )


@pytest.mark.parametrize("gradient_momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.2), (10.0, 20.0), (np.inf, np.inf)]
)
@pytest.mark.parametrize("arguments", [{}, {"scale": False}], ids=str)
def test_any_momentum_and_limits(
    gradient_momentum, r_max, d_max, arguments, rng
):
    layer, reference = made(
        (4, 3),
        rng,
        r_max=r_max,
        d_max=d_max,
        gradient_momentum=gradient_momentum,
        dtype="float64",
        **arguments,
    )
    step = stepper(layer)
    for _ in range(6):
        inputs = helpers.inputs_of(rng, (4, 3), dtype="float64")
        upstream = upstream_of(rng, (4, 3), "float64")
        actual = step(tf.constant(inputs), tf.constant(upstream))
        expected = reference.step(inputs, upstream, r_max, d_max)
        helpers.assert_close(actual[1], expected[1], 1e-11)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_momentum": None},
        {"r_max": 2.0},
        {"d_max": LinearRamp(0, 5, 0, 10)},
        {"virtual_batch_size": 4},
    ],
    ids=str,
)
def test_algorithm_1_has_no_accumulators(arguments):
    layer = BatchRenormalization(**arguments)
    layer.build((None, 3))
    assert [weight.name for weight in layer.weights] == [
        *("gamma", "beta", "moving_mean", "moving_variance"),
        *("step", "limit_values", "limit_steps"),
    ]
    assert layer.get_config()["gradient_momentum"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gradient_momentum": 1.0},
            '`gradient_momentum` must be at least 0 and below 1, "auto" or '
            "None. Received: gradient_momentum=1.0.",
        ),
        (
            {"gradient_momentum": -0.1},
            '`gradient_momentum` must be at least 0 and below 1, "auto" or '
            "None. Received: gradient_momentum=-0.1.",
        ),
        (
            {"gradient_momentum": float("nan")},
            "`gradient_momentum` must not be NaN. Received: "
            "gradient_momentum=nan.",
        ),
        (
            {"gradient_momentum": 0.9, "virtual_batch_size": 4},
            "`gradient_momentum` must be None where virtual_batch_size is "
            "given: groups of one batch share their moving statistics, and "
            "none of them comes after another. Received: "
            "gradient_momentum=0.9, virtual_batch_size=4.",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BatchRenormalization(**arguments)


def test_a_kind_that_is_no_number():
    message = (
        '`gradient_momentum` must be at least 0 and below 1, "auto" or None. '
        "Received: gradient_momentum='0.9'."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        BatchRenormalization(gradient_momentum="0.9")


def test_closed_limits_give_the_gradient_of_algorithm_1(rng):
    corrected, _ = made((8, 3), rng, r_max=1.0, d_max=2.0)
    plain = BatchRenormalization(momentum=0.8, r_max=1.0, d_max=2.0)
    plain.build((8, 3))
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        getattr(plain, name).assign(getattr(corrected, name))
    for _ in range(3):
        inputs = tf.constant(helpers.inputs_of(rng, (8, 3)))
        upstream = tf.constant(upstream_of(rng, (8, 3)))
        for one, other in zip(
            stepper(corrected)(inputs, upstream),
            stepper(plain)(inputs, upstream),
            strict=True,
        ):
            helpers.assert_close(one, other, 1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("hidden", [1e6, np.nan])
def test_masked_elements_are_dropped(wrapper, axis, hidden, rng):
    shape = (6, 4, 3) if axis == -1 else (6, 3, 4)
    layer, reference = made(shape, rng, axis=axis, dtype="float64")
    mask = rng.random((6, 4)) < 0.6
    mask[0] = True
    mask[1] = False
    kept = mask.reshape(-1)
    examples = examples_of(shape, axis)[kept]
    step = stepper(layer, tf.constant(mask), wrapper)
    for _ in range(4):
        rows = helpers.inputs_of(rng, (24, 3), dtype="float64")
        upstream = upstream_of(rng, (24, 3), "float64")
        rows[~kept] = hidden
        upstream[~kept] = hidden
        actual = step(
            tf.constant(from_rows(rows, shape, axis)),
            tf.constant(from_rows(upstream, shape, axis)),
        )
        expected = reference.step(
            rows[kept], upstream[kept], 2.2, 1.5, examples
        )
        for one, other in zip(actual[:2], expected[:2], strict=True):
            one = to_rows(helpers.to_numpy(one), axis)
            helpers.assert_close(one[kept], other, 1e-11)
        assert not to_rows(helpers.to_numpy(actual[1]), axis)[~kept].any()
        helpers.assert_close(actual[3], expected[3], 1e-11)
    for name in ACCUMULATORS:
        helpers.assert_close(
            getattr(layer, name), getattr(reference, name), 1e-11
        )


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", [(4, 3), (32, 40, 40, 3)])
@pytest.mark.parametrize("where", ["inputs", "upstream"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_moves_no_accumulator(
    wrapper, shape, where, bad, rng
):
    layer, _ = made(shape, rng)
    step = stepper(layer, wrapper=wrapper)
    batch = {
        "inputs": helpers.inputs_of(rng, shape),
        "upstream": upstream_of(rng, shape),
    }
    step(tf.constant(batch["inputs"]), tf.constant(batch["upstream"]))
    before = accumulators(layer)
    batch[where][..., 1].flat[0] = bad
    bad_channel = (slice(None),) * (len(shape) - 1) + (1,)
    batch[where][bad_channel] = np.where(
        np.arange(batch[where][bad_channel].size).reshape(shape[:-1]) == 0,
        bad,
        batch[where][bad_channel],
    )
    _, d_inputs, *_ = step(
        tf.constant(batch["inputs"]), tf.constant(batch["upstream"])
    )
    after = accumulators(layer)
    for name, old, new in zip(ACCUMULATORS, before, after, strict=True):
        assert np.isfinite(new).all(), name
        assert new[1] == old[1], name
        assert new[0] != old[0], name
    # Loss scaling must see it.
    assert not np.isfinite(helpers.to_numpy(d_inputs)[..., 1]).all()


@pytest.mark.parametrize("wrapper", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["empty", "all masked"])
def test_a_batch_without_elements_moves_no_accumulator(wrapper, kind, rng):
    layer, _ = made((None, 3), rng)
    inputs = helpers.inputs_of(rng, (4, 3))
    stepper(layer)(tf.constant(inputs), tf.constant(inputs))
    before = accumulators(layer)
    mask = None
    if kind == "empty":
        inputs = inputs[:0]
    else:
        mask = tf.zeros(4, "bool")
    results = stepper(layer, mask, wrapper)(
        tf.constant(inputs), tf.constant(inputs)
    )
    for old, new in zip(before, accumulators(layer), strict=True):
        assert np.array_equal(old, new)
    for gradient in results[1:]:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("wrapper", ["eager", "graph"])
def test_where_no_gradient_arrives_nothing_is_learned_of_it(wrapper, rng):
    layer, _ = made((4, 3), rng)
    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    upstream = upstream_of(rng, (4, 3))
    step = stepper(layer, wrapper=wrapper)
    step(inputs, tf.constant(upstream))
    *_, before = accumulators(layer)
    upstream[:, 1] = 0.0
    step(inputs, tf.constant(upstream))
    for values in accumulators(layer):
        assert np.isfinite(values).all()
    *_, after = accumulators(layer)
    assert after[1] == before[1]
    assert after[0] != before[0]


@pytest.mark.parametrize(
    "frozen", [{"frozen_statistics": True}, {"trainable": False}], ids=str
)
def test_a_frozen_layer_moves_no_accumulator(frozen, rng):
    layer, _ = made((4, 3), rng, **frozen)
    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
    assert np.any(tape.gradient(loss, inputs))
    for value, expected in zip(accumulators(layer), (0, 0, 1), strict=True):
        assert (value == expected).all()


def network(**policy):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, **policy),
            BatchRenormalization(
                momentum=0.9,
                r_max=LinearRamp(1, 3, 0, 4),
                d_max=LinearRamp(0, 5, 0, 4),
                gradient_momentum=0.9,
                **policy,
            ),
            keras.layers.Dense(1, **policy),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def data(rng, count=48):
    x = rng.normal(size=(count, 4)).astype("float32") + 1
    return x, x.sum(axis=1, keepdims=True)


def fitted(rng, **options):
    model = network()
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    x, y = data(rng)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, epochs=2)
    return model


def by_tape(rng, wrapper):
    model = network()
    optimizer = keras.optimizers.SGD(0.05)
    x, y = data(rng)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        weights = model.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(loss, weights), weights, strict=True)
        )

    step = wrapper(step)
    for begin in list(range(0, len(x), 4)) * 2:
        step(tf.constant(x[begin : begin + 4]), tf.constant(y[begin:][:4]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        lambda rng: fitted(rng, run_eagerly=True),
        lambda rng: fitted(rng, steps_per_execution=3),
        lambda rng: fitted(rng, jit_compile=True),
        lambda rng: by_tape(rng, lambda step: step),
        lambda rng: by_tape(rng, tf.function),
    ],
    ids=["eager", "steps_per_execution", "xla", "tape", "tape in a graph"],
)
def test_every_way_to_train_gives_the_same(train):
    expected = fitted(np.random.default_rng(5))
    assert np.any(expected.layers[1].gradient_mean)
    actual = train(np.random.default_rng(5))
    for one, other in zip(actual.weights, expected.weights, strict=True):
        helpers.assert_close(one, other, 2e-4)


def test_each_gradient_of_a_persistent_tape_counts(rng):
    layer, _ = made((4, 3), rng)
    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
    begin = accumulators(layer)
    first = tape.gradient(loss, inputs)
    once = accumulators(layer)
    # What a gradient is corrected by was read in the forward pass.
    assert np.array_equal(first, tape.gradient(loss, inputs))
    for none, one, two in zip(begin, once, accumulators(layer), strict=True):
        helpers.assert_close(two - none, 2 * (one - none), 1e-6)


def test_a_tape_around_a_graph_moves_the_accumulators(rng):
    layer, reference = made((4, 3), rng)
    inputs = helpers.inputs_of(rng, (4, 3))
    upstream = upstream_of(rng, (4, 3))
    called = tf.function(lambda x: layer(x, training=True))
    x = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = called(x)
    d_x = tape.gradient(outputs, x, output_gradients=tf.constant(upstream))
    expected = reference.step(
        inputs.astype("float64"), upstream.astype("float64"), 2.2, 1.5
    )
    helpers.assert_close(d_x, expected[1], 1e-5)
    for name in ACCUMULATORS:
        helpers.assert_close(
            getattr(layer, name), getattr(reference, name), 1e-5
        )


def test_a_layer_called_twice_a_step_adds_both(rng):
    layer, _ = made((4, 3), rng, r_max=1.0, d_max=0.0, momentum=1.0)
    parts = [tf.constant(helpers.inputs_of(rng, (4, 3))) for _ in range(2)]
    upstream = tf.constant(upstream_of(rng, (4, 3)))
    with tf.GradientTape() as tape:
        tape.watch(parts)
        loss = sum(
            tf.reduce_sum(layer(part, training=True) * upstream)
            for part in parts
        )
    tape.gradient(loss, parts)
    # Both were read as zero: the sums of two first steps.
    helpers.assert_close(
        layer.gradient_mean, 2 * np.mean(upstream, axis=0), 1e-5
    )


def test_recomputed_activations_count_once(rng):
    layer, _ = made((4, 3), rng, momentum=1.0)
    other, _ = made((4, 3), rng, momentum=1.0)
    for variable, value in zip(layer.weights, other.weights, strict=True):
        variable.assign(value)
    inputs = tf.constant(helpers.inputs_of(rng, (4, 3)))
    upstream = tf.constant(upstream_of(rng, (4, 3)))
    stepper(other)(inputs, upstream)
    recomputed = tf.recompute_grad(lambda x: layer(x, training=True))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(recomputed(inputs) * upstream)
    tape.gradient(loss, inputs)
    for name in ACCUMULATORS:
        helpers.assert_close(getattr(layer, name), getattr(other, name), 1e-5)


@pytest.mark.parametrize("wrapper", ["eager", "graph"])
def test_second_derivatives_hold_the_accumulators(wrapper, rng):
    shape = (5, 3)
    layer, reference = made(shape, rng, dtype="float64", momentum=1.0)
    inputs = helpers.inputs_of(rng, shape, dtype="float64")
    upstream = upstream_of(rng, shape, "float64")
    stepper(layer)(tf.constant(inputs), tf.constant(upstream))
    reference.step(inputs, upstream, 2.2, 1.5)
    state = {name: np.copy(getattr(reference, name)) for name in ACCUMULATORS}
    along = rng.normal(size=shape)

    def first(upstream):
        for name, value in state.items():
            setattr(reference, name, value)
        return np.sum(reference.step(inputs, upstream, 2.2, 1.5)[1] * along)

    actual = WRAPPERS[wrapper](second_derivative(layer, along))(
        tf.constant(inputs), tf.constant(upstream)
    )
    helpers.assert_close(actual, central_difference(first, upstream), 1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_16_bit_policies_keep_float32_accumulators(policy, rng):
    layer, reference = made((64, 3), rng, dtype=policy)
    compute = layer.compute_dtype
    for _ in range(3):
        inputs = helpers.inputs_of(rng, (64, 3))
        upstream = upstream_of(rng, (64, 3))
        inputs, upstream = (
            tf.cast(value, compute) for value in (inputs, upstream)
        )
        stepper(layer)(inputs, upstream)
        reference.step(
            *(
                np.float64(tf.cast(value, "float32"))
                for value in (inputs, upstream)
            ),
            2.2,
            1.5,
        )
    for name in ACCUMULATORS:
        assert getattr(layer, name).dtype == "float32"
        helpers.assert_close(
            getattr(layer, name), getattr(reference, name), 0.02
        )


@pytest.mark.parametrize("is_graph", [False, True])
def test_the_scale_of_the_loss_does_not_matter(is_graph, rng):
    models = [network(dtype="mixed_float16") for _ in range(2)]
    # Large, so that float16 rounds the same, and of two sizes.
    scales = [[2.0**10] * 6, [2.0**5, 2.0**6, 2.0**7, 2.0**8, 2.0**6, 2.0**9]]
    x, y = data(rng)

    for model, factors in zip(models, scales, strict=True):

        def step(x, y, factor, model=model):
            with tf.GradientTape() as tape:
                outputs = tf.cast(model(x, training=True), "float32")
                loss = tf.reduce_mean((outputs - y) ** 2)
                loss = (loss + tf.add_n(model.losses)) * factor
            weights = model.trainable_variables
            return [
                gradient / factor
                for gradient in tape.gradient(
                    loss, [weight.value for weight in weights]
                )
            ]

        step = tf.function(step) if is_graph else step
        for index, factor in enumerate(factors):
            part = slice(4 * index, 4 * index + 4)
            found = step(
                tf.constant(x[part]), tf.constant(y[part]), tf.constant(factor)
            )
            assert np.isfinite(found[0]).all()
    for one, other in zip(*(each.weights for each in models), strict=True):
        helpers.assert_close(one, other, 0.02)


def test_fit_with_loss_scaling_corrects_as_without(rng):
    x, y = data(rng)
    values = []
    for scale in (2.0**4, 2.0**8):
        model = network(dtype="mixed_float16")
        model.compile(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.05),
                initial_scale=scale,
                dynamic_growth_steps=3,
            ),
            "mse",
        )
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        values.append(accumulators(model.layers[1]))
    for one, other in zip(*values, strict=True):
        helpers.assert_close(one, other, 0.02)


def test_the_landscape_moves_no_accumulator(rng):
    model = network()
    x, y = data(rng)
    model.fit(x, y, batch_size=4, verbose=0)
    before = accumulators(model.layers[1])
    loss_along_gradient(model, "mse", (x[:8], y[:8]), [0.01, 0.02])
    for old, new in zip(before, accumulators(model.layers[1]), strict=True):
        assert np.array_equal(old, new)


def test_saved_and_loaded_training_goes_on_the_same(rng, tmp_path):
    x, y = data(rng)
    model = network()
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].gradient_momentum == 0.9
    for each in (model, loaded):
        each.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))


def test_convert_keeps_the_accumulators_and_revert_drops_them(rng):
    model = network()
    x, y = data(rng)
    model.fit(x, y, batch_size=4, verbose=0)
    converted = keras_renorm.convert(model)
    assert converted.layers[1].gradient_momentum == 0.9
    for old, new in zip(
        accumulators(model.layers[1]),
        accumulators(converted.layers[1]),
        strict=True,
    ):
        assert np.array_equal(old, new)
    reverted = keras_renorm.revert(converted)
    assert len(reverted.layers[1].weights) == 4
    again = keras_renorm.convert(reverted, gradient_momentum=0.9)
    for value, expected in zip(
        accumulators(again.layers[1]), (0, 0, 1), strict=True
    ):
        assert (value == expected).all()
    without = keras_renorm.convert(model, gradient_momentum=None)
    assert without.layers[1].gradient_mean is None
    assert np.array_equal(
        without.predict(x, verbose=0), model.predict(x, verbose=0)
    )
