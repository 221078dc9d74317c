"""`BatchNormalization` is Keras's, and the float64 reference."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm
from keras_renorm._step.moments import element_count
from tests import helpers
from tests.reference import (
    Reference,
    central_difference,
    from_rows,
    to_rows,
)

SHAPES = [
    ((16, 3), -1),
    ((16, 3), 1),
    ((3, 16), 0),
    ((4, 7, 3), -1),
    ((4, 3, 7), 1),
    ((4, 3, 7), -2),
    ((4, 5, 6, 3), -1),
    ((4, 3, 5, 6), 1),
    ((4, 5, 3, 6), 2),
    ((2, 4, 5, 3, 3), -1),
    ((2, 3, 4, 5, 3), 1),
]


def pair(shape, rng, **arguments):
    """A Keras layer and ours with the same arguments and weights."""
    layers = (
        keras.layers.BatchNormalization(**arguments),
        keras_renorm.BatchNormalization(**arguments),
    )
    for layer in layers:
        layer.build(shape)
    helpers.randomize(layers[0], rng)
    layers[1].set_weights(layers[0].get_weights())
    return layers


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize(
    ("center", "scale"), [(True, True), (True, False), (False, True)]
)
def test_training_step_equals_keras(shape, axis, center, scale, rng):
    theirs, ours = pair(
        shape, rng, axis=axis, center=center, scale=scale, momentum=0.8
    )
    inputs = helpers.inputs_of(rng, shape, axis)
    upstream = rng.normal(size=shape).astype("float32")
    expected = helpers.gradients(theirs, inputs, upstream)
    actual = helpers.gradients(ours, inputs, upstream)
    helpers.assert_close(actual[0], expected[0], 1e-5)
    # Keras's is off by more on PyTorch.
    helpers.assert_close(actual[1], expected[1], 2e-5)
    for ours_gradient, their_gradient in zip(
        actual[2], expected[2], strict=True
    ):
        helpers.assert_close(ours_gradient, their_gradient, 2e-5)
    for ours_weight, their_weight in zip(
        ours.weights, theirs.weights, strict=True
    ):
        assert ours_weight.name == their_weight.name
        helpers.assert_close(
            helpers.to_numpy(ours_weight), helpers.to_numpy(their_weight), 1e-5
        )


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference_equals_keras(shape, axis, rng):
    theirs, ours = pair(shape, rng, axis=axis)
    inputs = helpers.inputs_of(rng, shape, axis)
    helpers.assert_close(ours(inputs), theirs(inputs), 1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"center": False, "scale": False},
        {"momentum": 0.0, "epsilon": 0.1},
        {"momentum": 1.0},
        {
            "beta_initializer": "random_normal",
            "gamma_initializer": keras.initializers.Constant(2.0),
            "moving_mean_initializer": keras.initializers.Constant(1.5),
            "moving_variance_initializer": "random_uniform",
        },
    ],
)
def test_arguments_mean_what_they_mean_in_keras(arguments, rng):
    shape = (8, 4, 3)
    inputs = helpers.inputs_of(rng, shape)
    keras.utils.set_random_seed(1)
    theirs = keras.layers.BatchNormalization(**arguments)
    theirs.build(shape)
    keras.utils.set_random_seed(1)
    ours = keras_renorm.BatchNormalization(**arguments)
    ours.build(shape)
    helpers.assert_close(
        ours(inputs, training=True), theirs(inputs, training=True), 1e-5
    )
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        helpers.assert_close(
            helpers.to_numpy(mine), helpers.to_numpy(other), 1e-5
        )


def test_regularizers_and_constraints_act():
    layer = keras_renorm.BatchNormalization(
        gamma_regularizer=keras.regularizers.L2(0.5),
        beta_regularizer="l1",
        gamma_constraint="non_neg",
        beta_constraint=keras.constraints.MaxNorm(1.0),
    )
    layer.build((None, 2))
    layer.gamma.assign([2.0, 4.0])
    layer.beta.assign([1.0, 0.0])
    penalty = helpers.to_numpy(sum(layer.losses))
    assert penalty == pytest.approx(0.5 * 20 + 0.01)
    model = keras.Sequential([keras.Input((2,)), layer])
    # A step of a size that only the constraints keep in bounds.
    model.compile(keras.optimizers.SGD(100.0), "mse")
    model.train_on_batch(np.eye(2, dtype="float32"), np.full((2, 2), 9.0))
    assert np.all(helpers.to_numpy(layer.gamma) >= 0)
    assert np.linalg.norm(helpers.to_numpy(layer.beta)) <= 1 + 1e-5


def test_hundred_steps_of_fit_stay_with_keras(rng):
    x = helpers.inputs_of(rng, (800, 6, 6, 3))
    y = rng.integers(0, 4, 800)
    runs = []
    for kind in (
        keras.layers.BatchNormalization,
        keras_renorm.BatchNormalization,
    ):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                kind(momentum=0.9),
                keras.layers.Conv2D(4, 3, use_bias=False),
                kind(momentum=0.9),
                keras.layers.ReLU(),
                keras.layers.Flatten(),
                keras.layers.Dense(4),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.02),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        runs.append(model)
    theirs, ours = runs
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        # Absolute: the first beta has no gradient but rounding.
        np.testing.assert_allclose(
            helpers.to_numpy(mine), helpers.to_numpy(other), 1e-4, 1e-4
        )
    helpers.assert_close(
        ours.predict(x, verbose=0), theirs.predict(x, verbose=0), 1e-3
    )


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_float64_equals_the_reference(shape, axis, rng):
    layer = keras_renorm.BatchNormalization(
        axis, momentum=0.8, epsilon=0.01, dtype="float64"
    )
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = reference_of(layer)
    inputs = helpers.inputs_of(rng, shape, axis, "float64")
    rows = to_rows(inputs, axis)
    outputs = helpers.to_numpy(layer(inputs, training=True))
    assert outputs.dtype == np.float64
    helpers.assert_close(to_rows(outputs, axis), reference.train(rows), 1e-12)
    mean, variance = helpers.statistics(layer)
    helpers.assert_close(mean, reference.moving_mean, 1e-12)
    helpers.assert_close(variance, reference.moving_variance, 1e-12)
    helpers.assert_close(
        to_rows(helpers.to_numpy(layer(inputs)), axis),
        reference.infer(rows),
        1e-12,
    )


def reference_of(layer):
    reference = Reference(
        layer.moving_mean.shape[0], layer.momentum, layer.epsilon
    )
    reference.gamma = helpers.to_numpy(layer.gamma)
    reference.beta = helpers.to_numpy(layer.beta)
    reference.moving_mean, reference.moving_variance = helpers.statistics(layer)
    return reference


@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((2, 3, 4), 1)])
def test_gradients_equal_central_differences(shape, axis, rng):
    layer = keras_renorm.BatchNormalization(axis, dtype="float64")
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = reference_of(layer)
    inputs = helpers.inputs_of(rng, shape, axis, "float64")
    upstream = rng.normal(size=shape)
    _, d_inputs, (d_gamma, d_beta) = helpers.gradients(layer, inputs, upstream)

    def loss(rows):
        return np.sum(reference.normalize(rows) * to_rows(upstream, axis))

    rows = to_rows(inputs, axis)
    expected = from_rows(central_difference(loss, rows), shape, axis)
    helpers.assert_close(d_inputs, expected, 1e-7)
    for name, gradient in (("gamma", d_gamma), ("beta", d_beta)):
        before = getattr(reference, name)

        def loss_of_parameter(value, name=name):
            setattr(reference, name, value)
            return loss(rows)

        expected = central_difference(loss_of_parameter, before)
        setattr(reference, name, before)
        helpers.assert_close(gradient, expected, 1e-7)


@pytest.mark.parametrize(
    ("shape", "axis", "mask_shape"),
    [
        ((6, 5, 3), -1, (6, 5)),
        ((6, 5, 3), -1, (6,)),
        ((6, 5, 3), -1, (6, 1)),
        ((6, 5, 3), -1, (1, 5)),
        ((12, 3), -1, (12,)),
        ((6, 3, 5), 1, (6, 5)),
        ((6, 3, 5, 4), 1, (6, 5)),
        ((6, 5, 4, 3), -1, (6, 5, 4)),
        ((6, 5, 4, 3), -1, (6, 5, 1)),
        ((3, 6, 5), 0, (6, 5)),
    ],
)
@pytest.mark.parametrize("hidden", [1e6, np.nan])
def test_mask_is_dropped_rows(shape, axis, mask_shape, hidden, rng):
    layer = keras_renorm.BatchNormalization(axis, dtype="float64")
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = reference_of(layer)
    inputs = helpers.inputs_of(rng, shape, axis, "float64")
    mask = np.arange(np.prod(mask_shape)).reshape(mask_shape) % 3 != 1
    positions = [
        size for at, size in enumerate(shape) if at != axis % len(shape)
    ]
    padded = mask.reshape(
        mask_shape + (1,) * (len(positions) - len(mask_shape))
    )
    keep = np.broadcast_to(padded, positions).reshape(-1)
    rows = to_rows(inputs, axis)
    inputs = from_rows(np.where(keep[:, None], rows, hidden), shape, axis)
    upstream = from_rows(
        np.where(keep[:, None], rng.normal(size=rows.shape), hidden),
        shape,
        axis,
    )
    # What arrives at a masked element is ignored, NaN too; the loss of the
    # helper is NaN then, its gradients must not be.
    outputs, d_inputs, (d_gamma, d_beta) = helpers.gradients(
        layer, inputs, upstream, mask
    )
    kept = rows[keep]
    kept_upstream = to_rows(upstream, axis)[keep]

    def loss(values):
        return np.sum(reference.normalize(values) * kept_upstream)

    d_rows = to_rows(d_inputs, axis)
    helpers.assert_close(d_rows[keep], central_difference(loss, kept), 1e-7)
    assert np.all(d_rows[~keep] == 0)
    x_hat = (reference.normalize(kept) - reference.beta) / reference.gamma
    helpers.assert_close(d_gamma, (kept_upstream * x_hat).sum(0), 1e-10)
    helpers.assert_close(d_beta, kept_upstream.sum(0), 1e-10)
    helpers.assert_close(
        to_rows(outputs, axis)[keep], reference.train(kept), 1e-12
    )
    mean, variance = helpers.statistics(layer)
    helpers.assert_close(mean, reference.moving_mean, 1e-12)
    helpers.assert_close(variance, reference.moving_variance, 1e-12)


def test_mask_equals_keras_where_keras_is_right(rng):
    shape = (6, 5, 3)
    theirs, ours = pair(shape, rng, momentum=0.5)
    inputs = helpers.inputs_of(rng, shape)
    mask = rng.random((6, 5)) < 0.6
    expected = helpers.to_numpy(theirs(inputs, training=True, mask=mask))
    actual = helpers.to_numpy(ours(inputs, training=True, mask=mask))
    helpers.assert_close(actual[mask], expected[mask], 1e-5)
    for mine, other in zip(
        helpers.statistics(ours), helpers.statistics(theirs), strict=True
    ):
        helpers.assert_close(mine, other, 1e-5)


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [((6, 3, 5), (6, 3)), ((6, 3, 5), (1, 3)), ((6, 3, 5, 4), (6, 3, 5))],
)
@pytest.mark.parametrize("hidden", [1e6, np.nan])
@pytest.mark.parametrize("virtual_batch_size", [None, 4])
def test_a_mask_may_choose_channels_of_examples(
    shape, mask_shape, hidden, virtual_batch_size, rng
):
    # As `Masking` makes it in front of a layer with channels first.
    layer = keras_renorm.BatchNormalization(
        1, dtype="float64", virtual_batch_size=virtual_batch_size
    )
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = reference_of(layer)
    inputs = helpers.inputs_of(rng, shape, 1, "float64")
    mask = np.arange(np.prod(mask_shape)).reshape(mask_shape) % 5 != 4
    mask[:, 2] = False  # a channel of which nothing counts
    keep = mask.reshape(mask_shape + (1,) * (len(shape) - len(mask_shape)))
    keep = np.broadcast_to(keep, shape)
    inputs = np.where(keep, inputs, hidden)
    upstream = np.where(keep, rng.normal(size=shape), hidden)
    before = helpers.statistics(layer)
    outputs, d_inputs, (d_gamma, d_beta) = helpers.gradients(
        layer, inputs, upstream, mask
    )
    assert np.all(d_inputs[~keep] == 0)
    mean, variance = helpers.statistics(layer)
    for channel in range(2):
        kept = inputs[:, channel][keep[:, channel]]
        wanted = upstream[:, channel][keep[:, channel]]
        one = Reference(1, layer.momentum, layer.epsilon)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            value = getattr(reference, name)[channel : channel + 1]
            setattr(one, name, value)
        if virtual_batch_size is None:
            expected = one.normalize(kept[:, None])[:, 0]
            actual = outputs[:, channel][keep[:, channel]]
            helpers.assert_close(actual, expected, 1e-12)
            x_hat = (expected - one.beta) / one.gamma
            helpers.assert_close(
                d_gamma[channel], np.sum(wanted * x_hat), 1e-10
            )
        helpers.assert_close(d_beta[channel], wanted.sum(), 1e-10)
        one.train(kept[:, None])
        helpers.assert_close(mean[channel], one.moving_mean[0], 1e-12)
        helpers.assert_close(variance[channel], one.moving_variance[0], 1e-12)
    assert mean[2] == before[0][2]
    assert variance[2] == before[1][2]
    assert d_gamma[2] == d_beta[2] == 0
    inferred = helpers.to_numpy(layer(inputs, mask=mask))
    unmasked = helpers.to_numpy(layer(inputs))
    helpers.assert_close(inferred[keep], unmasked[keep], 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_masking_before_channels_first_is_as_in_keras(training, rng):
    inputs = helpers.inputs_of(rng, (4, 3, 5), 1)
    inputs[0, 1] = inputs[2, 2] = 0  # what `Masking` masks
    results = []
    for module in (keras.layers, keras_renorm):
        layer = module.BatchNormalization(axis=1, momentum=0.5)
        model = keras.Sequential(
            [keras.Input((3, 5)), keras.layers.Masking(), layer]
        )
        outputs = helpers.to_numpy(model(inputs, training=training))
        results.append((outputs, *helpers.statistics(layer)))
    for mine, theirs in zip(results[1], results[0], strict=True):
        helpers.assert_close(mine, theirs, 1e-5)


def test_a_mask_that_fits_both_ways_leaves_the_channels_out(rng):
    inputs = helpers.inputs_of(rng, (4, 3, 3), 1)
    mask = np.ones((4, 3), bool)
    mask[:, 2] = False
    layer = keras_renorm.BatchNormalization(1, momentum=0.0)
    layer(inputs, training=True, mask=mask)
    helpers.assert_close(
        helpers.statistics(layer)[0],
        inputs[:, :, :2].mean(axis=(0, 2)),
        1e-5,
    )


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", ["examples", "ragged"])
def test_a_mask_of_ragged_inputs(kind, rng):
    import tensorflow as tf

    values = helpers.inputs_of(rng, (7, 3))
    kept = np.array([1, 0, 1, 0, 0, 1, 1], bool)
    inputs = tf.RaggedTensor.from_row_lengths(values, [3, 2, 2])
    mask = inputs.with_flat_values(tf.constant(kept))
    if kind == "examples":
        kept[:3] = True
        mask = tf.constant([True, False, True])
    layer = keras_renorm.BatchNormalization(momentum=0.0)
    outputs = layer(inputs, training=True, mask=mask)
    assert isinstance(outputs, tf.RaggedTensor)
    mean, variance = helpers.statistics(layer)
    helpers.assert_close(mean, values[kept].mean(0), 1e-5)
    helpers.assert_close(variance, values[kept].var(0), 1e-5)


def test_mask_of_an_embedding_arrives(rng):
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    layer = keras_renorm.BatchNormalization(momentum=0.0)
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(6, 3, mask_zero=True),
            layer,
        ]
    )
    model(tokens, training=True)
    embedded = helpers.to_numpy(model.layers[0].embeddings)[[1, 2, 3, 4, 5]]
    helpers.assert_close(
        helpers.statistics(layer)[0], embedded.mean(axis=0), 1e-5
    )


@pytest.mark.parametrize("training", [True, False])
def test_mask_keeps_nan_from_gradients_with_frozen_statistics(training, rng):
    layer = keras_renorm.BatchNormalization(frozen_statistics=True)
    inputs = helpers.inputs_of(rng, (4, 3))
    layer.build(inputs.shape)
    inputs[1] = np.nan
    mask = np.array([True, False, True, True])
    _, d_inputs, d_weights = helpers.gradients(
        layer, inputs, np.ones_like(inputs), mask, training
    )
    assert np.all(d_inputs[1] == 0)
    assert np.all(np.isfinite(d_inputs))
    assert all(np.all(np.isfinite(value)) for value in d_weights)
    helpers.assert_close(d_weights[1], np.full(3, 3.0), 1e-6)


@pytest.mark.parametrize(("ratio", "tolerance"), [(1e3, 1e-5), (1e4, 5e-5)])
@pytest.mark.parametrize("shape", [(4096, 8), (32, 28, 28, 8)])
def test_float32_variance_at_large_means(shape, ratio, tolerance, rng):
    inputs = (ratio + rng.normal(size=shape)).astype("float32")
    layer = keras_renorm.BatchNormalization(momentum=0.0)
    layer(inputs, training=True)
    rows = inputs.reshape(-1, 8).astype("float64")
    mean, variance = helpers.statistics(layer)
    np.testing.assert_allclose(variance, rows.var(axis=0), rtol=tolerance)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-7)


@pytest.mark.parametrize("axis", [-1, 1])
def test_one_channel_of_many_elements(axis, rng):
    inputs = rng.normal(size=(1, 1024, 1024)).astype("float32")
    layer = keras_renorm.BatchNormalization(axis=axis, momentum=0.0)
    layer(np.expand_dims(inputs, axis), training=True)
    variance = inputs.astype("float64").var()
    _, actual = helpers.statistics(layer)
    np.testing.assert_allclose(actual, [variance], rtol=1e-5)


@pytest.mark.parametrize("value", [1e4, 10000.7, 1e7, -3.3e5, 0.1])
@pytest.mark.parametrize("shape", [(64, 2), (32, 56, 56, 2)])
def test_constant_channel_gives_beta(value, shape):
    layer = keras_renorm.BatchNormalization(beta_initializer="ones")
    outputs = layer(np.full(shape, value, "float32"), training=True)
    assert np.abs(helpers.to_numpy(outputs) - 1).max() <= 1e-3


@pytest.mark.parametrize(
    ("policy", "statistics", "outputs"),
    [
        ("mixed_float16", "float32", "float16"),
        ("mixed_bfloat16", "float32", "bfloat16"),
        ("float16", "float32", "float16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [keras_renorm.BatchNormalization, keras_renorm.BatchRenormalization],
)
def test_dtypes_of_a_policy(kind, policy, statistics, outputs):
    layer = kind(dtype=policy)
    result = layer(np.ones((4, 3)), training=True)
    assert keras.backend.standardize_dtype(result.dtype) == outputs
    for weight in layer.weights:
        if weight.name not in ("step", "limit_steps"):
            assert weight.dtype == statistics, weight.path


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_bfloat16"])
def test_constant_mean_reads_back_under_16_bits(policy):
    layer = keras_renorm.BatchNormalization(dtype=policy)
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile("sgd", "mse")
    inputs = np.full((16_000, 2), 100.0)
    model.fit(inputs, inputs, batch_size=8, verbose=0)
    mean, variance = helpers.statistics(layer)
    np.testing.assert_allclose(mean, 100.0, rtol=1e-4)
    np.testing.assert_allclose(variance, 0.0, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_sample_leaves_the_statistics_of_its_channel(bad, rng):
    layer = keras_renorm.BatchNormalization(momentum=0.5)
    inputs = helpers.inputs_of(rng, (8, 3))
    layer.build(inputs.shape)
    before = helpers.statistics(layer)
    inputs[3, 1] = bad
    _, d_inputs, _ = helpers.gradients(layer, inputs, np.ones_like(inputs))
    after = helpers.statistics(layer)
    for old, new in zip(before, after, strict=True):
        assert new[1] == old[1]
        assert np.all(new[[0, 2]] != old[[0, 2]])
        assert np.all(np.isfinite(new))
    # Loss scaling must see it.
    assert np.any(np.isnan(d_inputs[:, 1]))
    assert np.all(np.isfinite(d_inputs[:, [0, 2]]))


@pytest.mark.parametrize(
    "kind",
    [keras_renorm.BatchNormalization, keras_renorm.BatchRenormalization],
)
@pytest.mark.parametrize("case", ["empty", "no_width", "masked"])
def test_batch_without_elements_changes_nothing(kind, case, rng):
    layer = kind()
    shape = {"empty": (0, 4, 3), "no_width": (5, 0, 3), "masked": (5, 4, 3)}
    inputs = np.full(shape[case], np.nan, "float32")
    mask = np.zeros((5, 4), bool) if case == "masked" else None
    layer.build((None, None, 3))
    helpers.randomize(layer, rng)
    before = helpers.statistics(layer)
    outputs, d_inputs, d_weights = helpers.gradients(
        layer, inputs, np.ones_like(inputs), mask
    )
    assert outputs.shape == inputs.shape
    assert np.all(d_inputs == 0)
    assert all(np.all(value == 0) for value in d_weights)
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize(
    "kind",
    [keras_renorm.BatchNormalization, keras_renorm.BatchRenormalization],
)
def test_unknown_batch_and_spatial_sizes(kind, rng):
    layer = kind(momentum=0.5)
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    reference = Reference(3, 0.5)
    for shape in [(4, 5, 6, 3), (2, 7, 3, 3), (1, 2, 2, 3)]:
        inputs = helpers.inputs_of(rng, shape)
        model.train_on_batch(inputs, np.zeros_like(inputs))
        reference.train(to_rows(inputs.astype("float64"), -1))
    mean, variance = helpers.statistics(layer)
    helpers.assert_close(mean, reference.moving_mean, 1e-5)
    helpers.assert_close(variance, reference.moving_variance, 1e-5)


@pytest.mark.tensorflow
def test_masks_of_unknown_size(rng):
    import tensorflow as tf

    layer = keras_renorm.BatchNormalization(momentum=0.0)
    layer.build((None, None, 3))

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, 3)),
            tf.TensorSpec((None, None), tf.bool),
        ]
    )
    def step(inputs, mask):
        return layer(inputs, training=True, mask=mask)

    inputs = helpers.inputs_of(rng, (6, 5, 3))
    for mask in (
        rng.random((6, 5)) < 0.6,
        rng.random((6, 1)) < 0.6,
        np.ones((1, 5), bool),
    ):
        step(inputs, mask)
        rows = inputs[np.broadcast_to(mask, (6, 5))]
        helpers.assert_close(helpers.statistics(layer)[0], rows.mean(0), 1e-5)
        helpers.assert_close(helpers.statistics(layer)[1], rows.var(0), 1e-5)


@pytest.mark.tensorflow
@pytest.mark.parametrize("known", ["inputs", "mask"])
def test_a_count_of_partly_known_sizes(known, rng):
    import tensorflow as tf

    sizes = {"inputs": (None, None), "mask": (None, None)}
    sizes[known] = (6, 5)

    @tf.function(
        input_signature=[
            tf.TensorSpec((*sizes["inputs"], 3)),
            tf.TensorSpec((*sizes["mask"], 1), tf.bool),
        ]
    )
    def count(inputs, mask):
        return element_count(inputs, (2,), mask)

    mask = rng.random((6, 5, 1)) < 0.6
    inputs = helpers.inputs_of(rng, (6, 5, 3))
    assert count(inputs, mask).numpy() == mask.sum()
    if known == "inputs":
        column = np.array([True, False, True, True, False, True])
        assert count(inputs, column.reshape(6, 1, 1)).numpy() == 20


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "kind",
    [keras_renorm.BatchNormalization, keras_renorm.BatchRenormalization],
)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 4), -1),
        ((6, 5, 4), -1),
        ((6, 4, 5), 1),
        ((6, 3, 5, 4), -1),
        ((8, 24, 24, 32), -1),  # for the fused operators
    ],
)
def test_a_channel_size_unknown_to_a_graph(
    shape, axis, policy, is_compiled, kind, rng
):
    import tensorflow as tf

    inputs = tf.cast(helpers.inputs_of(rng, shape, axis), policy[-7:])

    def steps(unknown):
        spec = tf.TensorSpec([None] * len(shape) if unknown else shape)
        results = []
        for options in (
            {"training": True},
            {"training": False},
            {"training": True, "frozen_statistics": True},
            {"training": True, "virtual_batch_size": 4},
            {"training": True, "mask": np.arange(shape[0]) % 3 > 0},
        ):
            options = dict(options)
            training = options.pop("training")
            mask = options.pop("mask", None)
            layer = kind(axis, momentum=0.5, dtype=policy, **options)
            layer.build(shape)

            @tf.function(
                input_signature=[tf.TensorSpec(spec.shape, inputs.dtype)],
                jit_compile=is_compiled,
            )
            def step(x, layer=layer, training=training, mask=mask):
                return layer(x, training=training, mask=mask)

            outputs = tf.cast(step(inputs), tf.float32)
            results += [outputs, *helpers.statistics(layer)]
        return results

    for mine, expected in zip(steps(True), steps(False), strict=True):
        tolerance = 1e-5 if policy == "float32" else 2e-3
        helpers.assert_close(mine, expected, tolerance)


@pytest.mark.tensorflow
def test_fit_on_data_of_unknown_channel_size(rng):
    import tensorflow as tf

    x = helpers.inputs_of(rng, (8, 4))
    dataset = tf.data.Dataset.from_generator(
        lambda: ((x[i : i + 4], x[i : i + 4, :1]) for i in (0, 4)),
        output_signature=(
            tf.TensorSpec([None, None]),
            tf.TensorSpec([None, None]),
        ),
    ).apply(tf.data.experimental.assert_cardinality(2))
    layer = keras_renorm.BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(dataset, shuffle=False, verbose=0)
    helpers.assert_close(helpers.statistics(layer)[0], x[4:].mean(0), 1e-5)


@pytest.mark.tensorflow
def test_another_number_of_channels_is_an_error_in_a_graph():
    import tensorflow as tf

    layer = keras_renorm.BatchNormalization()
    layer.build((None, 4))

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def step(x):
        return layer(x, training=True)

    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible"):
        step(tf.zeros((2, 5)))


@pytest.mark.tensorflow
def test_second_derivatives_equal_central_differences(rng):
    import tensorflow as tf

    layer = keras_renorm.BatchRenormalization(
        r_max=1.5, d_max=0.5, dtype="float64", momentum=1.0
    )
    shape = (5, 2)
    layer.build(shape)
    helpers.randomize(layer, rng)
    weights = tf.constant(rng.normal(size=shape))
    inputs = helpers.inputs_of(rng, shape, dtype="float64")

    def gradient(values):
        values = tf.convert_to_tensor(values)
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = layer(values, training=True)
            loss = tf.reduce_sum(weights * tf.sin(outputs))
        return tape.gradient(loss, values)

    point = tf.convert_to_tensor(inputs)
    with tf.GradientTape() as tape:
        tape.watch(point)
        norm = tf.reduce_sum(gradient(point) ** 2)
    actual = tape.gradient(norm, point).numpy()
    # r and d are constants of the first derivative as well: hold them.
    reference = reference_of(layer)
    r, d = reference.correction(inputs, 1.5, 0.5)
    frozen = keras_renorm.BatchNormalization(dtype="float64", momentum=1.0)
    frozen.build(shape)
    frozen.gamma.assign(reference.gamma * r)
    frozen.beta.assign(reference.gamma * d + reference.beta)
    layer = frozen
    expected = central_difference(
        lambda values: float(tf.reduce_sum(gradient(values) ** 2)), inputs
    )
    helpers.assert_close(actual, expected, 1e-6)


@pytest.mark.tensorflow
@pytest.mark.parametrize("shape", [(16, 4), (4, 3, 3, 4)])
def test_a_gradient_penalty_through_two_layers(shape, rng):
    """As in WGAN-GP, where Keras's layer is off by 10 %, or more."""
    import tensorflow as tf

    layers = [
        keras_renorm.BatchNormalization(dtype="float64") for _ in range(2)
    ]
    inputs = tf.constant(rng.normal(size=shape))

    def penalty(offset):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            hidden = (layers[0](inputs, training=True) + offset) ** 3
            outputs = layers[1](hidden, training=True) ** 3
        return tf.reduce_sum(tape.gradient(outputs, inputs) ** 2)

    offset = tf.zeros(4, "float64")
    with tf.GradientTape() as tape:
        tape.watch(offset)
        value = penalty(offset)
    expected = central_difference(
        lambda values: float(penalty(tf.constant(values))), offset.numpy()
    )
    helpers.assert_close(tape.gradient(value, offset), expected, 1e-6)


@pytest.mark.jax
@pytest.mark.parametrize("case", ["all", "mask", "groups"])
def test_second_derivatives_in_both_directions(case, rng):
    """Of the paper's formula, written with nothing but operations of JAX."""
    import jax
    from jax import numpy as jnp

    size = 2 if case == "groups" else None
    layer = keras_renorm.BatchNormalization(
        virtual_batch_size=size, dtype="float64", epsilon=0.01
    )
    inputs = jnp.asarray(rng.normal(size=(4, 3)) + 5.0)
    weights = jnp.asarray(rng.normal(size=(4, 3)))
    mask = jnp.array([True, False, True, True]) if case == "mask" else None
    layer.build(inputs.shape)
    rows = {"all": [[0, 1, 2, 3]], "mask": [[0, 2, 3]]}.get(
        case, [[0, 1], [2, 3]]
    )

    def loss(x):
        y = layer.stateless_call(
            [weight.value for weight in layer.trainable_variables],
            [weight.value for weight in layer.non_trainable_variables],
            x,
            training=True,
            mask=mask,
        )[0]
        kept = y if mask is None else jnp.where(mask[:, None], y, 0.0)
        return jnp.sum(weights * jnp.sin(kept))

    def expected_loss(x):
        total = 0.0
        for group in map(jnp.array, rows):
            y = (x[group] - x[group].mean(0)) / jnp.sqrt(x[group].var(0) + 0.01)
            total += jnp.sum(weights[group] * jnp.sin(y))
        return total

    expected = jax.hessian(expected_loss)(inputs)
    for derivative in (
        jax.hessian(loss),
        jax.jacrev(jax.grad(loss)),
        jax.jacfwd(jax.jacfwd(loss)),
    ):
        helpers.assert_close(derivative(inputs), expected, 1e-9)


def test_is_a_keras_batch_normalization():
    for kind in (
        keras_renorm.BatchNormalization,
        keras_renorm.BatchRenormalization,
    ):
        assert isinstance(kind(), keras.layers.BatchNormalization)


def test_integer_inputs_are_normalized():
    layer = keras_renorm.BatchNormalization()
    outputs = layer(ops.convert_to_tensor([[1, 2], [3, 6]]), training=True)
    assert np.allclose(helpers.to_numpy(outputs).mean(axis=0), 0, atol=1e-6)
