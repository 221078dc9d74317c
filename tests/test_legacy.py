"""Models of tf_keras (Keras 2), which had renormalization first."""

import re

import keras
import numpy as np
import pytest

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    replacing,
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

    tf_keras.backend.clear_session()  # names count from 0
    return tf_keras


def renorm(tf_keras, **arguments):
    return tf_keras.layers.BatchNormalization(
        renorm=True,
        renorm_clipping={"rmax": 2.0, "rmin": 0.5, "dmax": 3.0},
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
            layer.name.replace("/", "_")
            for layer in model.layers
            if not hasattr(layer, "symbol")  # an operation has no layer there
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
    converted = convert(model, gradient_momentum=None)
    assert converted.get_layer("trained").r_max == 3.0
    assert converted.get_layer("trained").d_max == 5.0
    assert converted.get_layer("new").r_max.begin_step == 300


def test_reverted_it_is_keras_3(rng, tf_keras):
    model = randomized(sequential(tf_keras), rng)
    with replacing():
        new = revert(model)
    assert type(new.get_layer("bn")) is keras.layers.BatchNormalization


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "MobileNetV3Small",
        "ResNet50V2",
        "EfficientNetB0",
        "DenseNet121",
        "RegNetY002",
        "InceptionResNetV2",
    ],
)
def test_networks_of_tf_keras_applications(name, rng, tf_keras):
    size = 96 if name.startswith("Inception") else 64
    model = getattr(tf_keras.applications, name)(
        weights=None, include_top=False, input_shape=(size, size, 3)
    )
    for layer in model.layers:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            for weight in layer.weights:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    x = rng.uniform(-1, 1, (2, size, size, 3)).astype("float32")
    (expected,) = networks.outputs_of(model, x)
    (output,) = networks.outputs_of(convert(model), x)
    assert expected.std() > 0
    helpers.assert_close(output, expected, 1e-5)


def test_all_that_has_no_counterpart_is_named(tf_keras):
    import tensorflow as tf

    layers = tf_keras.layers

    class Custom(layers.Layer):
        def call(self, x):
            return x

    class OwnNorm(layers.BatchNormalization):
        pass

    inputs = tf_keras.Input((4, 4))
    x = Custom(name="one")(renorm(tf_keras)(inputs))
    inner = tf_keras.Sequential(
        [
            tf_keras.Input((4, 4)),
            layers.LocallyConnected1D(4, 1, name="local"),
            Custom(name="two"),
            OwnNorm(name="norm"),
        ],
        name="inner",
    )
    x = layers.LSTM(4, time_major=True, return_sequences=True, name="rnn")(
        inner(x)
    )
    x = tf.math.real(tf.signal.fft(tf.cast(x, "complex64")))
    x = tf.cumsum(x, 1, exclusive=True) * tf.cast(tf.shape(x)[0], "float32")
    x = layers.UpSampling2D(interpolation="gaussian", name="up")(x[..., None])
    x = layers.Dense(3, name="fine")(x)
    message = (
        "`model` must hold only what Keras 3 has too, or what `convert` is "
        "given `custom_objects` for. Received: a model of tf_keras with "
        "layers one, two, of class Custom; "
        "layer local, of class LocallyConnected1D; "
        "layer norm, of class OwnNorm; "
        "layer rnn, with time_major=True; "
        "layer tf.signal.fft, the operation tf.signal.fft; "
        "layer tf.math.real, the operation tf.math.real; "
        "layer tf.math.cumsum, the operation tf.math.cumsum with these "
        "arguments; "
        "layer tf.cast_1, the operation tf.cast of a size that is not known; "
        "layer up, with interpolation=gaussian."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert(tf_keras.Model(inputs, x))


def test_what_is_no_graph_or_does_not_normalize_is_refused(tf_keras):
    plain = tf_keras.Sequential(
        [tf_keras.Input((4,)), tf_keras.layers.Dense(1)], name="mlp"
    )
    with pytest.raises(ValueError, match=r"model=mlp, which has none\.$"):
        convert(plain)

    class Subclassed(tf_keras.Model):
        pass

    class Doubled(tf_keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    inputs = tf_keras.Input((4,))
    for unbuilt in (
        Subclassed(name="own"),
        tf_keras.Sequential([renorm(tf_keras)], name="own"),
        Doubled(inputs, renorm(tf_keras)(inputs), name="own"),
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


def test_bins_of_numbers_that_are_no_integers(rng, tf_keras):
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            tf_keras.Input((4,)),
            layers.Discretization([-1.5, -0.5, 0.0, 0.7]),
            layers.Embedding(5, 2),
            layers.Flatten(),
            layers.BatchNormalization(),
        ]
    )
    x = rng.normal(size=(32, 4)).astype("float32")
    expected, output = (
        each.predict(x, verbose=0) for each in (model, convert(model))
    )
    helpers.assert_close(output, expected, 1e-5)


def test_weights_of_a_vocabulary_are_refused(tf_keras):
    layer = tf_keras.layers.StringLookup(output_mode="tf_idf", name="words")
    layer.adapt(np.array([["a"], ["b"]]))
    model = tf_keras.Sequential(
        [tf_keras.Input((1,), dtype="string"), layer, renorm(tf_keras)]
    )
    with pytest.raises(
        ValueError, match=r"with layer words, with output_mode=tf_idf\.$"
    ):
        convert(model)


def check_layer(tf_keras, rng, function, *shapes):
    """Converts a model of one layer, or function, and compares outputs."""
    inputs = [tf_keras.Input(shape) for shape in shapes]
    outputs = function(*inputs)
    model = tf_keras.Model(
        inputs, [*keras.tree.flatten(outputs), renorm(tf_keras)(inputs[0])]
    )
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) ** 2 * rng.choice([0.3, 1]))
    data = networks.data_of(model, rng)
    if not isinstance(data, list):
        data = [data]
    for each in data:
        each[0, 2:] = 0  # for masks
    expected = networks.outputs_of(model, data)
    new = convert(model)
    for output, wanted in zip(
        networks.outputs_of(new, data), expected, strict=True
    ):
        assert output.dtype == wanted.dtype
        helpers.assert_close(output, wanted, 1e-5)
    return new


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LeakyReLU", {"alpha": 0.0}),
        ("LeakyReLU", {"alpha": 0.05}),
        ("LeakyReLU", {"alpha": 1.0}),
        ("ThresholdedReLU", {"theta": 0.4}),
        ("ReLU", {"max_value": 0.8, "negative_slope": 0.5, "threshold": 0.3}),
        ("Activation", {"activation": "hard_sigmoid"}),
        ("Conv1D", {"filters": 2, "kernel_size": 2, "dilation_rate": 2}),
        ("LSTM", {"units": 2, "recurrent_activation": "hard_sigmoid"}),
        ("GRU", {"units": 2, "reset_after": False, "go_backwards": True}),
        ("SimpleRNN", {"units": 2, "return_state": True}),
        ("RandomFlip", {}),
        ("RandomRotation", {"factor": 0.1}),
        ("LayerNormalization", {"scale": False, "epsilon": 0.1}),
        ("EinsumDense", {"equation": "abc,cd->abd", "output_shape": (None, 5)}),
        ("SpatialDropout1D", {"rate": 0.5}),
        ("Layer", {}),
    ],
)
def test_a_layer_has_the_arguments_it_had(name, arguments, rng, tf_keras):
    layer = getattr(tf_keras.layers, name)(**arguments)
    check_layer(tf_keras, rng, layer, (6, 4))


def layers_in_layers(layers):
    return {
        "cells": layers.RNN(
            [
                layers.LSTMCell(3),
                layers.GRUCell(2, recurrent_activation="hard_sigmoid"),
            ],
            return_state=True,
        ),
        "two ways": layers.Bidirectional(
            layers.LSTM(3, go_backwards=True),
            backward_layer=layers.GRU(3, activation="hard_sigmoid"),
        ),
        "mask": lambda x: layers.Bidirectional(
            layers.GRU(3, return_sequences=True, return_state=True), "sum"
        )(layers.Masking(0.0)(x)),
        "states": lambda x: layers.LSTM(3)(
            x, initial_state=layers.LSTM(3, return_state=True)(x)[1:]
        ),
        "states and mask": lambda x: layers.GRU(4, return_sequences=True)(
            layers.Masking(0.0)(x), initial_state=x[:, 0]
        ),
        "activation": layers.Dense(3, activation=layers.LeakyReLU(0.1)),
        "attention": lambda x: layers.MultiHeadAttention(2, 3)(
            x, x, use_causal_mask=True
        ),
        "lambda": layers.Lambda(lambda x, by: x * by, arguments={"by": 3.0}),
        "time": layers.TimeDistributed(layers.LeakyReLU(0.1)),
    }


@pytest.mark.parametrize(
    "case",
    [
        "cells",
        "two ways",
        "mask",
        "states",
        "states and mask",
        "activation",
        "attention",
        "lambda",
        "time",
    ],
)
def test_layers_in_layers(case, rng, tf_keras):
    layer = layers_in_layers(tf_keras.layers)[case]
    check_layer(tf_keras, rng, layer, (6, 4))


def test_a_layer_of_images(rng, tf_keras):
    layers = tf_keras.layers
    check_layer(
        tf_keras,
        rng,
        lambda x: layers.ConvLSTM2D(2, 2, strides=2)(
            layers.Reshape((2, 8, 8, 2))(x)
        ),
        (16, 8, 2),
    )


def test_functions_are_handed_on(rng, tf_keras):
    import tensorflow as tf

    @tf_keras.saving.register_keras_serializable("legacy")
    def sine(x):
        return tf.sin(x)

    def norm(weight):
        return tf.reduce_sum(weight)

    # Early versions of Keras take no functions there.
    regularizer = norm if networks.HAS_RENORM else None
    layers = tf_keras.layers
    new = check_layer(
        tf_keras,
        rng,
        lambda x: [
            layers.Dense(
                3, activation=sine, kernel_regularizer=regularizer, name="d"
            )(x),
            layers.Bidirectional(layers.GRU(2, activation=sine))(x),
            *(
                layers.Activation(function)(x)
                for function in (
                    tf.nn.leaky_relu,
                    tf.nn.relu6,
                    tf.nn.gelu,
                    tf.nn.log_softmax,
                    tf.exp,
                    lambda x: x * 2,
                )
            ),
        ],
        (6, 4),
    )
    dense = new.get_layer("d")
    assert dense.activation == sine
    assert dense.kernel_regularizer == regularizer
    assert new.get_layer("activation").activation == (
        keras.activations.leaky_relu
    )


def test_integers_become_vectors(rng, tf_keras):
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Embedding(9, 3, input_length=5, mask_zero=True),
            layers.LSTM(2),
            renorm(tf_keras),
        ]
    )
    x = rng.integers(0, 9, (4, 5))
    (expected,) = networks.outputs_of(model, x)
    (output,) = networks.outputs_of(convert(model), x)
    helpers.assert_close(output, expected, 1e-6)


def arithmetic(tf, k, x):
    one, many = tf.constant(1.5), np.array([1.0, -2.0, 0.5, 3.0])
    y = (1.0 - x) / 2.0 + 3 * x**2 - (x + one) * np.float32(2) - x // 0.5
    y = y * many + tf.Variable(2.0) * -x
    y = tf.where((x > 0) & ~(x >= 1.0) | (x != x), y, 0.1 * x)
    z = tf.cast(tf.round(tf.abs(x)), "int32")
    return [
        y,
        x * tf.nn.relu6(x + 3) / 6,
        tf.clip_by_value(x, -1, 1),
        tf.clip_by_value(x, -1, tf.constant([0.5, 1.0, 1.5, 2.0])),
        k.clip(x, -1, 1),
        tf.sqrt(tf.square(x) + 0.1),
        tf.maximum(tf.minimum(x, 0.5), -0.3),
        tf.math.squared_difference(x, 1.0),
        tf.add_n([x, x, y]),
        tf.nn.leaky_relu(features=x, alpha=0.05),
        tf.nn.leaky_relu(x),
        tf.nn.gelu(x),
        tf.nn.softmax(x, axis=1),
        k.hard_sigmoid(x),
        tf.cast(tf.argmax(x, -1), "float32") + tf.cast(z[..., 0], "float32"),
        tf.one_hot(z[..., 0], 3),
        tf.nn.bias_add(x, [1.0, 2.0, 3.0, 4.0]),
        x / tf.sqrt(tf.cast(tf.shape(x)[-1], "float32")),
    ]


def reductions(tf, k, x):
    mean = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    return [
        mean,
        tf.reduce_max(x, 1),
        tf.reduce_min(x, tf.range(1, 3)),
        tf.reduce_sum(x, -1),
        k.std(x, 1),
        tf.math.reduce_variance(x, axis=-1),
        tf.reduce_logsumexp(x, axis=2),
        tf.cast(tf.reduce_any(x > 1, -1), "float32"),
        tf.cumsum(x, axis=1),
        tf.nn.l2_normalize(x, -1),
        k.l2_normalize(x, 1),
        tf.norm(x, axis=-1),
        tf.matmul(x, x, transpose_b=True),
        x @ tf.transpose(x, [0, 1, 3, 2]),
        k.batch_dot(x[:, 0], x[:, 1], (2, 2)),
        k.dot(x, tf.ones((4, 2))),
        tf.einsum("abcd,abed->abce", x, x),
        tf.nn.max_pool2d(x, [1, 3, 3, 1], [1, 2, 2, 1], "SAME"),
        tf.nn.avg_pool2d(x, 3, 1, "VALID"),
    ]


def shapes(tf, k, x):
    batch, height, width = (tf.shape(x)[axis] for axis in range(3))
    return [
        x[:, 1:, ::2, 0],
        x[..., None, ::-1],
        x[:, : height // 2],
        x[:, tf.constant(2)],
        tf.strided_slice(x, [0, 1], [0, 3], begin_mask=1, end_mask=1),
        tf.slice(x, [0, 1, 0, 0], [-1, 3, -1, 2]),
        tf.concat([x, 2 * x], -1),
        k.concatenate([x, x], axis=1),
        tf.stack([x, x], 1),
        *tf.split(x, [1, -1], axis=-1),
        *tf.split(x, 2, 1),
        tf.unstack(x, axis=1)[2],
        tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], constant_values=3.0),
        tf.pad(x, tf.constant([[0, 0], [1, 2], [0, 1], [0, 0]]), "REFLECT"),
        tf.transpose(x, [0, 3, 1, 2]),
        k.permute_dimensions(x, (0, 2, 1, 3)),
        tf.squeeze(x[:, :1], [1]),
        tf.expand_dims(x, 1),
        tf.tile(x, [1, 2, 1, 1]),
        tf.tile(x, tf.stack([1, 1, 2, 1])),
        tf.transpose(x, tf.concat([[0, 3], tf.range(1, 3)], 0)),
        k.repeat_elements(x, 2, 1),
        tf.gather(x, [3, 0], axis=1),
        tf.reverse(x, [2]),
        tf.reshape(x, (-1, height * width, 4)),
        tf.reshape(x, tf.stack([batch, 16, 16])),
        tf.reshape(x, (batch, -1)),
        tf.reshape(x, (batch, 2, -1, 4)),
        k.batch_flatten(x),
        *(
            getattr(tf.nn, name)(x, 2)
            for name in ("depth_to_space", "space_to_depth")
            if hasattr(keras.ops, name)  # not in early versions
        ),
        tf.image.resize(x, (5, 11)),
        tf.image.resize(x, tf.shape(x)[1:3] * 2, method="nearest"),
        k.resize_images(x, 2, 2, "channels_last", "bilinear"),
    ]


@pytest.mark.parametrize("functions", [arithmetic, reductions, shapes])
def test_functions_of_tensorflow(functions, rng, tf_keras, tmp_path):
    import tensorflow as tf

    new = check_layer(
        tf_keras,
        rng,
        lambda x: functions(tf, tf_keras.backend, x),
        (8, 8, 4),
    )
    new.save(tmp_path / "new.keras")
    loaded = keras.saving.load_model(tmp_path / "new.keras")
    x = networks.data_of(new, rng)
    for output, wanted in zip(
        networks.outputs_of(loaded, x),
        networks.outputs_of(revert(new), x),
        strict=True,
    ):
        helpers.assert_close(output, wanted, 1e-6)


def test_a_segmentation_network(rng, tf_keras):
    import tensorflow as tf

    layers = tf_keras.layers

    def block(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = tf.nn.leaky_relu(layers.BatchNormalization()(x), alpha=0.1)
        squeezed = tf.reduce_mean(x, [1, 2], keepdims=True)
        gate = layers.Dense(filters, activation="hard_sigmoid")(squeezed)
        return x * gate

    def network(x):
        first = block(x, 4)
        second = block(layers.MaxPooling2D()(first), 6)
        up = tf.image.resize(second, tf.shape(first)[1:3])
        return layers.Conv2D(2, 1)(block(tf.concat([up, first], -1), 4))

    check_layer(tf_keras, rng, network, (8, 8, 3))


def test_a_shape_that_only_data_tell_is_an_error(tf_keras):
    import tensorflow as tf

    layers = tf_keras.layers
    inputs = tf_keras.Input((None, 4))
    rows = tf.reshape(inputs, (-1, 4))
    # -1 of the rows is the length, not what is left of a row.
    again = tf.reshape(
        layers.BatchNormalization()(rows), (tf.shape(inputs)[0], -1, 4)
    )
    with pytest.raises(
        ValueError,
        match=r"with layer tf.reshape_1, the operation tf.reshape to a shape "
        r"that is not known\.$",
    ):
        convert(tf_keras.Model(inputs, again))


def test_a_slice_that_only_data_tell_is_an_error(tf_keras):
    import tensorflow as tf

    inputs = tf_keras.Input((None, 4))
    x = tf_keras.layers.BatchNormalization()(inputs)
    with pytest.raises(
        ValueError,
        match=r"the operation tf.__operators__.getitem of a size that is not "
        r"known\.$",
    ):
        convert(tf_keras.Model(inputs, x[:, : tf.shape(x)[1] - 1]))


def test_places_of_what_is_true_are_an_error(tf_keras):
    import tensorflow as tf

    inputs = tf_keras.Input((4,))
    x = tf_keras.layers.BatchNormalization()(inputs)
    with pytest.raises(
        ValueError, match=r"the operation tf.where with these arguments\.$"
    ):
        convert(tf_keras.Model(inputs, tf.where(x > 0)))


def test_a_shape_with_the_size_of_another_tensor(rng, tf_keras):
    import tensorflow as tf

    def heads(x):
        y = tf_keras.layers.Conv1D(6, 3)(x)
        rows = tf.reshape(x, (-1, 4))
        return [
            tf.reshape(y, (tf.shape(x)[0], -1, 2)),
            tf.reshape(rows, (tf.shape(x)[0], -1, 4)),
            tf.reshape(rows, (-1, tf.shape(x)[1] * 2, 2)),
        ]

    new = check_layer(tf_keras, rng, heads, (6, 4))
    assert [output.shape for output in new.outputs[:3]] == [
        (None, 12, 2),
        (None, 6, 4),
        (None, 12, 2),
    ]


def test_another_mask_is_an_error(tf_keras):
    layers = tf_keras.layers
    for layer, what in (
        (layers.Rescaling(2.0, name="mine"), "which hands on another mask"),
        (
            lambda x: layers.MultiHeadAttention(2, 2, name="mine")(x, x),
            "with a mask",
        ),
    ):
        inputs = tf_keras.Input((5, 3))
        x = layer(layers.Masking(0.0)(inputs))
        with pytest.raises(ValueError, match=f"with layer mine, {what}"):
            convert(tf_keras.Model(inputs, renorm(tf_keras)(x)))


@pytest.mark.parametrize("to", [BatchNormalization, BatchRenormalization])
def test_which_examples_share_statistics(to, rng, tf_keras):
    layers = tf_keras.layers
    inputs = tf_keras.Input((5, 3))
    old = [
        layers.BatchNormalization(synchronized=True),
        layers.experimental.SyncBatchNormalization(momentum=0.8),
        layers.BatchNormalization(virtual_batch_size=2, axis=1),
    ]
    model = randomized(
        tf_keras.Model(inputs, [layer(inputs) for layer in old]), rng
    )
    x = networks.data_of(model, rng)
    expected = networks.outputs_of(model, x)
    new = convert(model, to=to)
    first, second, third = new.layers[1:]
    assert (first.synchronized, second.synchronized) == (True, True)
    assert second.momentum == 0.8
    assert (third.virtual_batch_size, third.axis) == (2, 1)
    for each in (new, revert(model)):
        for output, wanted in zip(
            networks.outputs_of(each, x), expected, strict=True
        ):
            helpers.assert_close(output, wanted, 1e-6)


def test_a_layer_of_version_1(rng, tf_keras):
    from tf_keras.api._v1.keras import layers as old

    model = tf_keras.Sequential(
        [tf_keras.Input((5, 3)), old.BatchNormalization(axis=1, name="bn")]
    )
    randomized(model, rng)
    x = networks.data_of(model, rng)
    (expected,) = networks.outputs_of(model, x)
    new = convert(model)
    (output,) = networks.outputs_of(new, x)
    helpers.assert_close(output, expected, 1e-6)
    assert new.get_layer("bn").axis == 1


def test_an_adjustment_is_an_error(tf_keras):
    model = tf_keras.Sequential(
        [
            tf_keras.Input((3,)),
            tf_keras.layers.BatchNormalization(
                adjustment=lambda shape: (1.0, 0.0), name="mine"
            ),
        ]
    )
    with pytest.raises(ValueError, match=r"layer mine, with an adjustment\.$"):
        convert(model)


def test_a_layer_that_always_trains_is_an_error(tf_keras):
    """Called with `training=True`, which `predict` of Keras 3 overrides."""
    inputs = tf_keras.Input((3,))
    outputs = tf_keras.layers.BatchNormalization(name="bn")(inputs)
    outputs = tf_keras.layers.Dropout(0.5, name="drop")(outputs, training=True)
    with pytest.raises(ValueError, match="layer drop, called with training="):
        convert(tf_keras.Model(inputs, outputs))


def test_states_and_flags_of_inner_layers_are_the_models(rng, tf_keras):
    layers = tf_keras.layers
    inputs = tf_keras.Input((4, 3), batch_size=2)
    both = layers.Bidirectional(layers.LSTM(2, return_sequences=True))
    last = layers.GRU(2, stateful=True, return_sequences=True)
    model = tf_keras.Model(inputs, renorm(tf_keras)(last(both(inputs))))
    both.forward_layer.trainable = False
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    model.predict(x, verbose=0)
    new = convert(model)
    expected, output = (each.predict(x, verbose=0) for each in (model, new))
    helpers.assert_close(output, expected, 1e-6)
    assert [weight.shape for weight in new.trainable_weights] == [
        tuple(weight.shape) for weight in model.trainable_weights
    ]
    assert not new.get_layer(both.name).forward_layer.trainable


def test_nothing_trains_in_what_does_not(rng, tf_keras):
    """Whatever the flags of layers inside: that is different in Keras 3."""
    layers = tf_keras.layers
    shared = layers.Dense(4, name="shared")
    base = tf_keras.Sequential(
        [
            tf_keras.Input((4,)),
            layers.Dense(4),
            layers.BatchNormalization(name="bn"),
            shared,
        ],
        name="base",
    )
    base.trainable = False
    shared.trainable = base.get_layer("bn").trainable = True
    inputs = tf_keras.Input((4,))
    model = tf_keras.Model(inputs, shared(layers.Dense(4)(base(inputs))))
    new = convert(model)
    assert len(model.trainable_weights) == len(new.trainable_weights) == 4
    assert new.get_layer("shared").trainable  # it is outside, too
    new.get_layer("base").trainable = True
    assert len(new.trainable_weights) == 8


def test_losses_of_activities_are_the_models(rng, tf_keras):
    def made_by(keras):
        layers, l2 = keras.layers, keras.regularizers.L2(0.1)
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Lambda(lambda x: 2 * x, activity_regularizer=l2),
                layers.BatchNormalization(activity_regularizer=l2),
                layers.Activation("relu", activity_regularizer=l2),
            ]
        )

    model = made_by(tf_keras)
    new = convert(model)
    x = networks.data_of(model, rng)
    # Keras 3.12 does not divide them by the size of the batch.
    expected = made_by(keras)
    for each in (new, expected):
        each(x)
    assert len(new.losses) == 3
    helpers.assert_close(sum(new.losses), sum(expected.losses), 1e-5)


def test_a_loss_that_was_added_is_an_error(tf_keras):
    import tensorflow as tf

    layer = tf_keras.layers.Dense(2, kernel_regularizer="l2", name="mine")
    model = tf_keras.Sequential(
        [tf_keras.Input((4,)), layer, tf_keras.layers.BatchNormalization()]
    )
    layer.add_loss(lambda: tf.reduce_sum(layer.kernel**2))
    with pytest.raises(
        ValueError, match=r"with layer mine, with a loss given to `add_loss`\.$"
    ):
        convert(model)


def blocks(framework):
    """The same custom block for Keras 2 and 3; weights in an odd order."""
    layers = framework.layers

    class Block(layers.Layer):
        def __init__(self, units, **arguments):
            super().__init__(**arguments)
            self.units = units
            self.steps = [layers.Dense(units), layers.Dense(units)]
            self.norm = layers.BatchNormalization()

        def build(self, shape):
            size = (self.units,)
            self.offset = self.add_weight(
                name="offset", shape=size, trainable=False
            )
            self.scale = self.add_weight(name="scale", shape=size)
            for layer in (*self.steps, self.norm):
                layer.build(shape)
            self.built = True

        def call(self, x):
            for layer in (*self.steps, self.norm):
                x = layer(x)
            return x * self.scale + self.offset

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    class Outer(layers.Layer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.inner = [Block(3), Block(3)]

        def build(self, shape):
            for layer in self.inner:
                layer.build(shape)
            self.built = True

        def call(self, x):
            return self.inner[1](self.inner[0](x))

    return Block, Outer


@pytest.mark.parametrize("kind", [0, 1])
def test_a_layer_of_ones_own_takes_its_place(kind, rng, tf_keras):
    old, new = blocks(tf_keras)[kind], blocks(keras)[kind]
    layer = old() if kind else old(3)
    inputs = tf_keras.Input((3,))
    model = randomized(tf_keras.Model(inputs, layer(inputs)), rng)
    block = layer.inner[1] if kind else layer
    block.steps[0].trainable = False
    x = networks.data_of(model, rng)
    (expected,) = networks.outputs_of(model, x)
    converted = convert(model, custom_objects={old.__name__: new}, momentum=0.7)
    (output,) = networks.outputs_of(converted, x)
    helpers.assert_close(output, expected, 1e-5)
    copy = converted.layers[1].inner[1] if kind else converted.layers[1]
    assert type(copy.norm) is BatchRenormalization
    assert copy.norm.momentum == 0.7
    assert [each.trainable for each in copy.steps] == [False, True]


def test_functions_make_what_takes_its_place(rng, tf_keras):
    import tensorflow as tf

    class Columns(tf_keras.layers.Layer):
        def call(self, x):
            return tf.reshape(x, (-1, x.shape[1] * x.shape[2]))

    def fourth(x):
        return tf.raw_ops.Pow(x=x, y=4.0)

    def power(x):
        return x**4

    layers = tf_keras.layers
    inputs = tf_keras.Input((4, 3))
    local = layers.LocallyConnected1D(2, 4, name="local")
    x = layers.Lambda(fourth, name="power")(renorm(tf_keras)(inputs))
    x = tf.math.cumsum(x, 1, reverse=True)
    x = layers.Dense(3, activation=fourth)(local(x))
    x = Columns(name="columns")(x)
    model = randomized(tf_keras.Model(inputs, layers.Dense(2)(x)), rng)
    x = networks.data_of(model, rng)
    (expected,) = networks.outputs_of(model, x)

    def dense(layer):
        kernel, bias = layer.get_weights()
        new = keras.Sequential(
            [
                keras.Input((4, 3)),
                keras.layers.Reshape((1, 12)),
                keras.layers.Dense(2),
            ],
            name=layer.name,
        )
        new.set_weights([kernel[0], bias[0]])
        return new

    def cumsum(x, axis, reverse):
        assert reverse
        return keras.ops.flip(
            keras.ops.cumsum(keras.ops.flip(x, axis), axis), axis
        )

    new = convert(
        model,
        custom_objects={
            "Columns": lambda layer: keras.layers.Flatten(name=layer.name),
            "LocallyConnected1D": dense,
            "tf.math.cumsum": cumsum,
            "fourth": power,
        },
    )
    (output,) = networks.outputs_of(new, x)
    helpers.assert_close(output, expected, 1e-5)
    assert new.get_layer("columns").output.shape == (None, 3)
    assert new.get_layer("power").function is power


def test_weights_that_do_not_fit_are_an_error(tf_keras):
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            tf_keras.Input((4, 3)),
            layers.LocallyConnected1D(2, 4, name="local"),
            renorm(tf_keras, name="norm"),
        ]
    )
    for given, what in (
        (keras.layers.Conv1D(2, 4), "whose weights are others there"),
        (3, "for which `custom_objects` gives 3"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"a model of tf_keras with layer local, {what}\.$",
        ):
            convert(
                model,
                custom_objects={"LocallyConnected1D": lambda _, it=given: it},
            )
