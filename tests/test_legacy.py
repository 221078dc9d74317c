"""Models of tf_keras (Keras 2), which had renormalization first."""

import keras
import numpy as np
import pytest

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    revert,
)
from tests import helpers, networks

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.filterwarnings("ignore"),  # tf_keras's own
]


@pytest.fixture
def tf_keras():
    import tf_keras

    return tf_keras


def renorm(tf_keras, **arguments):
    return tf_keras.layers.BatchNormalization(
        renorm=True,
        renorm_clipping={"rmax": 2.0, "rmin": 0.25, "dmax": 3.0},
        **arguments,
    )


def sequential(tf_keras):
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            tf_keras.Input((6, 6, 2)),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            renorm(tf_keras, momentum=0.9, name="bn"),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(4, activation="tanh", kernel_regularizer="l2"),
        ],
        name="network",
    )


def branches(tf_keras):
    layers = tf_keras.layers
    left, right = tf_keras.Input((4,), name="l"), tf_keras.Input((4,), name="r")
    both = renorm(tf_keras, scale=False, name="shared/bn")
    inner = tf_keras.Sequential([tf_keras.Input((4,)), layers.Dense(4), both])
    x = 2.0 * both(left) - 0.5 + inner(right) * left
    x = tf_keras.activations.relu(x) / 4.0 - right
    return tf_keras.Model([left, right], {"a": x, "b": layers.Dense(2)(x)})


def wrapped(tf_keras):
    layers = tf_keras.layers
    inputs = tf_keras.Input((5, 3))
    x = layers.TimeDistributed(renorm(tf_keras))(inputs)
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.Bidirectional(layers.GRU(2, return_sequences=True))(x)
    frozen = renorm(tf_keras)
    frozen.trainable = False
    x = renorm(tf_keras, axis=1)(frozen(x))
    return tf_keras.Model(inputs, x)


NETWORKS = [sequential, branches, wrapped]


def randomized(model, rng):
    for weight in model.weights:
        value = rng.uniform(0.3, 1.5, tuple(weight.shape))
        weight.assign(value * rng.choice([1, 1, 0.1]))
    return model


@pytest.mark.parametrize(
    "to",
    [
        pytest.param(BatchNormalization, marks=pytest.mark.slow),
        BatchRenormalization,
    ],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_inference_is_the_same(network, to, rng, tf_keras):
    model = randomized(network(tf_keras), rng)
    x = networks.data_of(model, rng)
    expected = networks.outputs_of(model, x)
    for new in (convert(model, to=to), revert(model)):
        assert isinstance(new, keras.Model)
        for output, wanted in zip(
            networks.outputs_of(new, x), expected, strict=True
        ):
            helpers.assert_close(output, wanted, 1e-6)
        assert new.name == model.name
        assert [layer.name for layer in new.layers] == [
            layer.name.replace("/", "_") for layer in model.layers
        ]
        # Keras 3 counts what the renormalization of Keras 2 has in addition.
        assert [weight.shape for weight in new.trainable_weights] == [
            tuple(weight.shape) for weight in model.trainable_weights
        ]


def test_the_layer_is_as_it_was(rng, tf_keras):
    model = randomized(sequential(tf_keras), rng)
    old = model.get_layer("bn")
    new = convert(model).get_layer("bn")
    assert type(new) is BatchRenormalization
    assert new.current_limits() == (2.0, 3.0)
    assert (new.momentum, new.epsilon) == (0.9, old.epsilon)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        assert np.array_equal(
            helpers.to_numpy(getattr(new, name)), getattr(old, name).numpy()
        )
    assert convert(model, r_max=1.5).get_layer("bn").r_max == 1.5


def test_limits_are_open_where_statistics_are_trained(rng, tf_keras):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input((3,)),
            tf_keras.layers.BatchNormalization(name="trained"),
            tf_keras.layers.BatchNormalization(name="new"),
        ]
    )
    model.get_layer("trained").moving_mean.assign([1.0, 2.0, 3.0])
    converted = convert(model)
    assert converted.get_layer("trained").r_max == 3.0
    assert converted.get_layer("trained").d_max == 5.0
    assert converted.get_layer("new").r_max.begin_step == 300


def test_reverted_it_is_keras_3(rng, tf_keras):
    model = randomized(sequential(tf_keras), rng)
    assert type(revert(model).get_layer("bn")) is (
        keras.layers.BatchNormalization
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small"])
def test_networks_of_tf_keras_applications(name, rng, tf_keras):
    model = getattr(tf_keras.applications, name)(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    x = rng.uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    (expected,) = networks.outputs_of(model, x)
    (output,) = networks.outputs_of(convert(model), x)
    assert expected.std() > 0
    helpers.assert_close(output, expected, 1e-5)


def test_what_has_no_counterpart_is_named(tf_keras):
    import tensorflow as tf

    class Custom(tf_keras.layers.Layer):
        def call(self, x):
            return x

    def model_of(layer):
        inputs = tf_keras.Input((4,))
        return tf_keras.Model(inputs, layer(renorm(tf_keras)(inputs)))

    for layer, what in (
        (Custom(name="mine"), "layer mine of tf_keras, of class Custom"),
        (tf.abs, r"layer tf.math.abs of tf_keras, the operation tf.math.abs"),
        (
            lambda x: x + np.ones(4, "float32"),
            r".*the operation tf.__operators__.add",
        ),
    ):
        with pytest.raises(
            ValueError,
            match="^`model` must hold only what Keras 3 has too. Received: "
            f"{what}.$",
        ):
            convert(model_of(layer))
    plain = tf_keras.Sequential(
        [tf_keras.Input((4,)), tf_keras.layers.Dense(1)], name="mlp"
    )
    with pytest.raises(ValueError, match=r"model=mlp, which has none\.$"):
        convert(plain)

    class Subclassed(tf_keras.Model):
        pass

    for unbuilt in (
        Subclassed(name="own"),
        tf_keras.Sequential([renorm(tf_keras)], name="own"),
    ):
        with pytest.raises(
            ValueError,
            match="^`model` must be a built sequential or functional model. "
            r"Received: model=own, of class \w+ of tf_keras.$",
        ):
            convert(unbuilt)


@pytest.mark.parametrize(
    ("name", "arguments", "data"),
    [
        ("Normalization", {}, np.array([[40.0], [55.0], [61.0]], "float32")),
        ("Discretization", {"num_bins": 3}, np.array([[1.0], [2.0], [30.0]])),
        ("StringLookup", {}, np.array([["a"], ["b"], ["a"]])),
        (
            "StringLookup",
            {"output_mode": "one_hot"},
            np.array([["a"], ["b"], ["a"]]),
        ),
        ("IntegerLookup", {}, np.array([[5], [7], [5]])),
        (
            "TextVectorization",
            {"output_sequence_length": 1},
            np.array([["a"], ["b"], ["a"]]),
        ),
    ],
)
def test_what_a_layer_knows_besides_its_weights(
    name, arguments, data, rng, tf_keras
):
    import tensorflow as tf

    layer = getattr(tf_keras.layers, name)(**arguments)
    layer.adapt(data)
    is_index = name != "Normalization" and "output_mode" not in arguments
    kind = tf.string if data.dtype.kind == "U" else data.dtype.name
    after = [tf_keras.layers.Embedding(9, 2), tf_keras.layers.Flatten()]
    model = tf_keras.Sequential(
        [
            tf_keras.Input((1,), dtype=kind),
            layer,
            *(after if is_index else []),
            tf_keras.layers.Dense(3),
            renorm(tf_keras),
        ]
    )
    x = tf.constant(data)
    expected = np.asarray(model(x))
    assert expected.std(axis=0).min() > 0
    for function in (convert, revert):
        helpers.assert_close(np.asarray(function(model)(x)), expected, 1e-5)


def test_weights_of_a_vocabulary_are_refused(tf_keras):
    layer = tf_keras.layers.StringLookup(output_mode="tf_idf", name="words")
    layer.adapt(np.array([["a"], ["b"]]))
    model = tf_keras.Sequential(
        [tf_keras.Input((1,), dtype="string"), layer, renorm(tf_keras)]
    )
    with pytest.raises(
        ValueError, match=r"layer words of tf_keras, with output_mode=tf_idf\.$"
    ):
        convert(model)
