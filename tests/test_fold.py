"""Normalization that becomes part of the layer before it."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    revert,
)
from tests import helpers, networks

LAYERS = {
    "Dense": ((5,), lambda **a: layers.Dense(4, **a)),
    "Dense of sequences": ((6, 5), lambda **a: layers.Dense(4, **a)),
    "Conv1D": ((8, 3), lambda **a: layers.Conv1D(4, 3, **a)),
    "Conv2D": ((8, 8, 4), lambda **a: layers.Conv2D(6, 3, groups=2, **a)),
    "Conv3D": ((5, 5, 5, 2), lambda **a: layers.Conv3D(4, 2, **a)),
    "Conv1DTranspose": (
        (8, 3),
        lambda **a: layers.Conv1DTranspose(4, 3, strides=2, **a),
    ),
    "Conv2DTranspose": (
        (6, 6, 3),
        lambda **a: layers.Conv2DTranspose(4, 3, strides=2, **a),
    ),
    "Conv3DTranspose": (
        (4, 4, 4, 3),
        lambda **a: layers.Conv3DTranspose(2, 2, **a),
    ),
    "DepthwiseConv1D": (
        (8, 3),
        lambda **a: layers.DepthwiseConv1D(3, depth_multiplier=2, **a),
    ),
    "DepthwiseConv2D": (
        (8, 8, 3),
        lambda **a: layers.DepthwiseConv2D(3, depth_multiplier=2, **a),
    ),
    "SeparableConv1D": (
        (8, 3),
        lambda **a: layers.SeparableConv1D(4, 3, depth_multiplier=2, **a),
    ),
    "SeparableConv2D": (
        (8, 8, 3),
        lambda **a: layers.SeparableConv2D(4, 3, depth_multiplier=2, **a),
    ),
}


def randomize(model, rng):
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(rng.normal(size=weight.shape))
    return networks.randomize(model, rng)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(layers.BatchNormalization, marks=pytest.mark.slow),
        BatchRenormalization,
    ],
)
@pytest.mark.parametrize(
    "is_functional", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_outputs_are_the_same(name, use_bias, kind, is_functional, rng):
    sizes, layer = LAYERS[name]
    stack = [
        layer(use_bias=use_bias, name="before"),
        kind(epsilon=0.1, name="bn", scale=use_bias),
        layers.LeakyReLU(name="after"),
    ]
    if is_functional:
        inputs = x = keras.Input(sizes)
        for each in stack:
            x = each(x)
        model = keras.Model(inputs, x)
    else:
        model = keras.Sequential([keras.Input(sizes), *stack])
    randomize(model, rng)
    x = networks.data_of(model, rng)
    expected = model.predict(x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold(model)
    assert not networks.normalizations(folded)
    assert [each.name for each in folded.layers][-2:] == ["before", "after"]
    assert expected.std() > 0.01
    helpers.assert_close(folded.predict(x, verbose=0), expected, 1e-5)
    # The model is as it was.
    assert np.array_equal(model.predict(x, verbose=0), expected)


def test_channels_first_and_other_axes(rng):
    inputs = keras.Input((4, 6, 5))
    x = layers.Dense(3, name="dense")(inputs)
    x = BatchNormalization(axis=1, name="other_axis")(x)
    model = randomize(keras.Model(inputs, x), rng)
    with pytest.warns(
        UserWarning,
        match=r"^1 of 1 batch normalization layers are not folded: other_axis "
        r"\(it normalizes axis 1\)\.$",
    ):
        folded = fold(model)
    data = networks.data_of(model, rng)
    helpers.assert_close(
        folded.predict(data, verbose=0), model.predict(data, verbose=0), 1e-6
    )


def reasons(caught):
    """What `fold` warned of; Keras warns of NumPy 2 besides."""
    messages = [str(each.message) for each in caught]
    return [each for each in messages if "not folded" in each]


def test_what_cannot_be_folded_is_named_and_kept(rng):
    inputs = keras.Input((6, 6, 3))
    first = BatchNormalization(name="first")(inputs)
    x = layers.Conv2D(4, 3, activation="relu", name="active")(first)
    x = BatchNormalization(name="after_relu")(x)
    y = layers.Conv2D(4, 1, name="branch")(x)
    y = BatchNormalization(name="of_branch")(y) + y
    z = layers.Conv2D(4, 1, name="returned")(y)
    y = BatchNormalization(name="of_returned")(z)
    conv, bn = layers.Conv2D(4, 1, name="twice"), BatchNormalization(name="two")
    y = bn(conv(y)) + bn(conv(x))
    y = layers.MaxPooling2D(name="pool")(y)
    y = BatchNormalization(name="after_pool")(y)
    y = layers.Conv2D(4, 1, name="good")(y)
    y = BatchNormalization(name="folds")(y)
    model = randomize(keras.Model(inputs, [y, z]), rng)
    with pytest.warns(UserWarning, match="not folded") as caught:
        folded = fold(model)
    (message,) = reasons(caught)
    assert message.startswith("6 of 7 batch normalization layers are not")
    for part in (
        "first (it follows",
        "after_relu (active has an activation)",
        "of_branch (branch has other readers)",
        "of_returned (returned has other readers)",
        "two (it is shared)",
        "after_pool (it follows pool, a MaxPooling2D)",
    ):
        assert part in message, message
    assert len(networks.normalizations(folded)) == 6
    x = networks.data_of(model, rng)
    for one, other in zip(
        model.predict(x, verbose=0), folded.predict(x, verbose=0), strict=True
    ):
        helpers.assert_close(other, one, 1e-5)


def test_a_layer_with_lora_weights_is_named_and_kept():
    before = layers.Dense(4, name="adapted")
    model = keras.Sequential(
        [keras.Input((3,)), before, BatchNormalization(name="bn")]
    )
    before.enable_lora(1)
    with pytest.warns(
        UserWarning,
        match=r"^1 of 1 batch normalization layers are not folded: "
        r"bn \(adapted is quantized or has LoRA weights\).$",
    ):
        folded = fold(model)
    assert len(networks.normalizations(folded)) == 1


@pytest.mark.filterwarnings("ignore:.*are not folded")
@pytest.mark.parametrize("network", networks.ALL)
def test_networks_of_all_kinds(network, rng):
    model = randomize(network(BatchNormalization), rng)
    x = networks.data_of(model, rng)
    folded = fold(model)
    for one, other in zip(
        networks.outputs_of(model, x),
        networks.outputs_of(folded, x),
        strict=True,
    ):
        helpers.assert_close(other, one, 1e-5)


def test_an_error_names_the_layer_that_has_no_configuration():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3),
            layers.BatchNormalization(),
            layers.Dense(2, "softmax", name="top"),
        ]
    )
    functional = keras.Model(model.inputs, model.outputs)
    model.layers[-1].activation = None  # logits, as for a class activation map
    for each in (model, functional):
        with pytest.raises(ValueError, match="layer top of class Dense"):
            fold(each)


def test_a_nested_sequential_model_folds(rng):
    model = randomize(networks.sequential(BatchNormalization), rng)
    inputs = keras.Input((6, 6, 2))
    outer = keras.Model(inputs, model(inputs) * 2)
    folded = fold(outer)
    assert not networks.normalizations(folded)
    x = networks.data_of(outer, rng)
    helpers.assert_close(
        folded.predict(x, verbose=0), outer.predict(x, verbose=0), 1e-5
    )
    with pytest.raises(ValueError, match="which has none"):
        fold(folded)


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:.*are not folded")
@pytest.mark.parametrize(
    ("name", "left"), [("ResNet50", 0), ("MobileNetV2", 0), ("ResNet50V2", 17)]
)
def test_keras_applications(name, left, rng):
    model = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    for layer in networks.normalizations(model):
        channels = layer.moving_mean.shape[0]
        layer.moving_mean.assign(rng.normal(0.0, 0.1, channels))
        layer.moving_variance.assign(rng.uniform(0.5, 2.0, channels))
    x = rng.uniform(0, 1, (2, 64, 64, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    folded = fold(model)
    assert len(networks.normalizations(folded)) == left
    helpers.assert_close(folded.predict(x, verbose=0), expected, 1e-5)


def always_trains(rng):
    """Normalization that a graph calls with `training=True`, and others."""
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4),
            BatchNormalization(name="in_part"),
        ],
        name="part",
    )
    outer = keras.Sequential([keras.Input((4,)), inner], name="outer")
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="first")(inputs)
    x = BatchNormalization(name="trains")(x, training=True)
    x = layers.Dense(4, name="second")(x)
    x = BatchNormalization(name="infers")(x, training=False)
    x = outer(x, training=True)
    return randomize(keras.Model(inputs, x), rng)


def test_what_always_trains_is_named_and_kept(rng):
    model = always_trains(rng)
    x = networks.data_of(model, rng, 16)
    with pytest.warns(UserWarning, match="not folded") as caught:
        folded = fold(model)
    assert reasons(caught) == [
        "2 of 3 batch normalization layers are not folded: trains (it is "
        "called with training=True); in_part (part is called with "
        "training=True)."
    ]
    expected = helpers.to_numpy(model(x))
    helpers.assert_close(folded(x), expected, 1e-5)
    for function in (convert, revert):
        model = always_trains(np.random.default_rng(5))
        copy = function(model)
        for layer in networks.normalizations(copy):
            if isinstance(layer, BatchRenormalization):
                layer.r_max, layer.d_max = 1.0, 0.0
        helpers.assert_close(copy(x), helpers.to_numpy(model(x)), 1e-5)


def test_outputs_keep_their_names(rng, tmp_path):
    inputs = keras.Input((4,))
    outputs = [
        BatchNormalization(name=name)(layers.Dense(2)(inputs))
        for name in ("age", "weight")
    ]
    model = randomize(keras.Model(inputs, outputs), rng)
    model.compile(
        "sgd",
        {"age": "mse", "weight": "mae"},
        metrics={"age": ["mae"], "weight": ["mse"]},
    )
    x = networks.data_of(model, rng)
    y = {"age": np.ones((4, 2)), "weight": np.zeros((4, 2))}
    folded = fold(model)
    assert folded.output_names == ["age", "weight"]
    assert not networks.normalizations(folded)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    got = folded.evaluate(x, y, verbose=0, return_dict=True)
    assert got == pytest.approx(expected, rel=1e-5)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    assert loaded.output_names == ["age", "weight"]


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_weights_that_overflow_are_not_folded(dtype, rng):
    """A channel that is nearly constant, and far from 0."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, dtype=dtype, name="dense"),
            BatchNormalization(dtype=dtype, name="bn", epsilon=1e-6),
        ]
    )
    dense, bn = model.layers
    dense.kernel.assign(np.full((4, 3), [0.25, 32.0, 0.25]))
    bn.moving_mean.assign([1.0, 128.0, 1.0])
    bn.moving_variance.assign([1.0, 1e-5, 1.0])
    x = np.ones((2, 4), "float16")
    with pytest.warns(
        UserWarning,
        match=r"^1 of 1 batch normalization layers are not folded: bn "
        r"\(float16 does not hold what dense would get\)\.$",
    ):
        folded = fold(model)
    assert np.array_equal(helpers.to_numpy(folded(x)), np.zeros((2, 3)))
    bn.moving_variance.assign([1.0, 1.0, 1.0])
    assert not networks.normalizations(fold(model))


def test_an_output_has_the_type_that_it_had(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((4,))
        x = layers.Dense(3, dtype="float32")(inputs)
        model = keras.Model(inputs, BatchNormalization(dtype="float32")(x))
        randomize(model, rng)
        x = networks.data_of(model, rng)
        expected, got = (
            each.predict(x, verbose=0) for each in (model, fold(model))
        )
    finally:
        keras.config.set_dtype_policy("float32")
    assert got.dtype == expected.dtype == np.float32
    helpers.assert_close(got, expected, 1e-5)


def test_a_call_of_ones_own_is_left(rng):
    class Activated(layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            outputs = super().call(inputs, training=training, mask=mask)
            return keras.ops.leaky_relu(outputs)

    class Fast(layers.BatchNormalization):
        def __init__(self, momentum=0.9, **arguments):
            super().__init__(momentum=momentum, **arguments)

    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), Fast(), layers.Dense(3)]
    )
    model.add(Activated(name="own"))
    networks.randomize(model, rng)
    x = networks.data_of(model, rng)
    with pytest.warns(UserWarning, match="1 of 2.* own .*call of its own"):
        folded = fold(model)
    helpers.assert_close(
        folded.predict(x, verbose=0), model.predict(x, verbose=0), 1e-5
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("is_sequential", [True, False])
def test_what_follows_has_the_type_that_it_had(is_sequential, policy, rng):
    """Normalization in float32, so that a sum of squares does not overflow."""

    class Squares(layers.Layer):
        def call(self, x):
            return keras.ops.sum(keras.ops.square(100 * x), -1)

    parts = [
        keras.Input((4,)),
        layers.Dense(8, dtype=policy),
        BatchNormalization(dtype="float32", name="bn"),
        Squares(dtype="float32", autocast=False),
    ]
    if is_sequential:
        model = keras.Sequential(parts)
    else:
        outputs = inputs = parts[0]
        for layer in parts[1:]:
            outputs = layer(outputs)
        model = keras.Model(inputs, outputs)
    randomize(model, rng)
    x = networks.data_of(model, rng)
    folded = fold(model)
    assert not networks.normalizations(folded)
    assert type(folded.get_layer("bn")) is layers.Identity
    expected, got = (each.predict(x, verbose=0) for each in (model, folded))
    assert got.dtype == expected.dtype == np.float32
    helpers.assert_close(got, expected, 0.1)


def test_sequences_with_masks(rng):
    """Where a sequential model calls each layer with a mask."""
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.Masking(),
            layers.Dense(4),
            BatchNormalization(),
            layers.GlobalAveragePooling1D(),
        ]
    )
    randomize(model, rng)
    x = networks.data_of(model, rng)
    x[:, 3:] = 0.0
    inputs = keras.Input((5, 3))
    nested = keras.Model(inputs, layers.Dense(2)(model(inputs)))
    for whole in (model, nested):
        folded = fold(whole)
        assert not networks.normalizations(folded)
        helpers.assert_close(folded(x), helpers.to_numpy(whole(x)), 1e-5)


def test_layers_that_another_graph_called_first(rng, tmp_path):
    """With inputs of another rank, and not as an output."""
    dense, named = layers.Dense(4), BatchNormalization(name="named")
    layers.Dense(2)(named(dense(keras.Input((3, 8)))))
    inputs = keras.Input((3, 8))
    model = randomize(keras.Model(inputs, named(dense(inputs))), rng)
    folded = fold(model)
    assert not networks.normalizations(folded)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    assert loaded.output_names == ["named"]
    dense = layers.Dense(4, name="dense")
    dense(keras.Input((8,)))
    inputs = keras.Input((4, 8))
    outputs = BatchNormalization(axis=1, name="bn")(dense(inputs))
    model = randomize(keras.Model(inputs, outputs), rng)
    x = networks.data_of(model, rng)
    with pytest.warns(UserWarning, match=r"not folded: bn \(it normalizes"):
        folded = fold(model)
    helpers.assert_close(folded(x), helpers.to_numpy(model(x)), 1e-5)
