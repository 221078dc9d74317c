"""Networks with batch normalization in every place, with random values."""

import keras
import numpy as np
from keras import layers

from tests import helpers


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A custom layer whose configuration holds its normalization."""

    def __init__(self, normalization, **arguments):
        super().__init__(**arguments)
        self.normalization = normalization

    def call(self, inputs, training=None):
        return inputs + self.normalization(inputs, training=training)

    def get_config(self):
        return {
            **super().get_config(),
            "normalization": keras.saving.serialize_keras_object(
                self.normalization
            ),
        }

    @classmethod
    def from_config(cls, config):
        config["normalization"] = keras.saving.deserialize_keras_object(
            config["normalization"]
        )
        return cls(**config)


@keras.saving.register_keras_serializable(package="tests")
class Sealed(layers.Layer):
    """A custom layer that makes its normalization itself."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.normalization = layers.BatchNormalization(name="sealed_bn")

    def call(self, inputs, training=None):
        return self.normalization(inputs, training=training)


def sequential(bn):
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, name="conv"),
            bn(name="bn"),
            layers.ReLU(),
            layers.Dropout(0.5, seed=1),
            layers.Flatten(),
            layers.Dense(4),
            bn(name="last", center=False, momentum=0.8),
        ],
        name="network",
    )


def residual(bn):
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(2, 3, padding="same")(inputs)
    x = bn(axis=-1, epsilon=1e-2)(x)
    x = keras.ops.relu(x + inputs)
    x = layers.Permute((3, 1, 2))(x)
    x = bn(axis=1, scale=False)(x)
    return keras.Model(inputs, {"a": x, "b": layers.Flatten()(x)})


def nested(bn):
    inner = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3), bn()], name="inner"
    )
    middle_inputs = keras.Input((6, 6, 2))
    middle = keras.Model(
        middle_inputs, bn()(inner(middle_inputs)), name="middle"
    )
    inputs = keras.Input((6, 6, 2))
    # The inner model is in two models, and called twice.
    x = middle(inputs) + inner(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def shared(bn):
    layer = bn(name="shared_bn")
    first, second = keras.Input((4,)), keras.Input((4,))
    return keras.Model(
        [first, second], layers.Dense(2)(layer(first) * layer(second))
    )


def wrapped(bn):
    inputs = keras.Input((5, 3))
    x = layers.TimeDistributed(bn(name="in_wrapper"))(inputs)
    frame = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4), bn(name="in_frame")]
    )
    x = layers.TimeDistributed(frame)(x)
    return keras.Model(inputs, layers.Bidirectional(layers.LSTM(2))(x))


def custom(bn):
    return keras.Sequential(
        [keras.Input((4,)), Block(bn(name="in_block")), layers.Dense(2)]
    )


def partly_frozen(bn):
    model = nested(bn)
    for layer in model.layers:
        if layer.name == "middle":
            layer.trainable = False
            layer.layers[-1].trainable = True
    return model


@keras.saving.register_keras_serializable(package="tests")
class Backbone(keras.Model):
    """A functional model of a class of its own, as keras-hub makes them."""

    def __init__(self, bn, width=3, **arguments):
        inputs = keras.Input((6, 6, 2), name="image")
        x = layers.Conv2D(width, 3, name="stem")(inputs)
        x = layers.ReLU()(bn(name="stem_bn")(x))
        super().__init__(inputs=inputs, outputs=x, **arguments)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}


def backbone(bn):
    inputs = keras.Input((6, 6, 2))
    x = layers.GlobalAveragePooling2D()(Backbone(bn, name="backbone")(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))


HAS_RENORM = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 14)

ALL = (
    sequential,
    residual,
    nested,
    shared,
    wrapped,
    custom,
    partly_frozen,
    backbone,
)


def normalizations(model):
    """The batch normalization of a model, each once."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, layers.BatchNormalization)
    ]


def randomize(model, rng):
    """Random values for all normalization: no two layers alike."""
    for layer in normalizations(model):
        helpers.randomize(layer, rng)
    return model


def randomize_mildly(model, rng):
    """As `randomize`, for deep networks: lest activations overflow.

    Leaves out layers that are not built: some networks have layers that they
    never call.
    """
    for layer in filter(lambda layer: layer.built, normalizations(model)):
        channels = layer.moving_mean.shape[0]
        layer.moving_mean.assign(rng.normal(0.0, 0.1, channels))
        layer.moving_variance.assign(rng.uniform(0.5, 2.0, channels))
        if layer.beta is not None:
            layer.beta.assign(rng.normal(0.0, 0.1, channels))
    return model


def data_of(model, rng, examples=4):
    """Random inputs for a model."""
    values = [
        rng.normal(size=(examples, *tensor.shape[1:])).astype("float32")
        for tensor in model.inputs
    ]
    return values if len(values) > 1 else values[0]


def outputs_of(model, x):
    """Predictions, as a list of arrays."""
    outputs = model.predict(x, verbose=0)
    return [np.asarray(each) for each in keras.tree.flatten(outputs)]
