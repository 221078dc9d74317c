"""Models with what no configuration says, and all that can be seen of a model.

Each as people make them who fine-tune, freeze, prune, quantize and distil.
"""

import types

import keras
import numpy as np
from keras import layers

from tests import helpers, networks

KERAS = layers.BatchNormalization


def small(**arguments):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="dense"),
            KERAS(name="bn", **arguments),
            layers.Dense(3, name="head"),
        ],
        name="small",
    )


def images(**arguments):
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(4, 3, name="conv"),
            KERAS(name="bn", **arguments),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ],
        name="images",
    )


def flags_of_single_variables():
    model = small()
    model.layers[0].kernel.trainable = False
    model.layers[1].gamma.trainable = False
    model.layers[2].trainable = False
    model.layers[2].bias.trainable = True
    return model


def flags_inside_a_custom_block():
    block = networks.Block(KERAS(name="in_block"), name="block")
    model = keras.Sequential(
        [keras.Input((4,)), Residual(name="residual"), block, layers.Dense(2)]
    )
    model.layers[0].hidden[0].trainable = False
    model.layers[0].hidden[1].beta.trainable = False
    model.layers[2].trainable = False
    return model


@keras.saving.register_keras_serializable(package="tests")
class Residual(layers.Layer):
    """A custom layer that makes its layers itself, without names."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.hidden = [layers.Dense(4), KERAS()]

    def build(self, input_shape):
        for layer in self.hidden:
            layer.build(input_shape)

    def call(self, inputs, training=None):
        dense, bn = self.hidden
        return inputs + bn(dense(inputs), training=training)


def penalties():
    model = small(activity_regularizer="l2", gamma_regularizer="l1")
    dense, bn, head = model.layers
    # After building: on variables alone, on the layer alone, neither.
    dense.kernel.regularizer = keras.regularizers.L2(0.1)
    dense.bias.constraint = keras.constraints.NonNeg()
    head.kernel_regularizer = keras.regularizers.L1(0.3)
    head.activity_regularizer = keras.regularizers.L2(0.2)
    bn.beta.regularizer = None
    return model


def adapted():
    model = keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Conv1D(4, 1, name="conv"),
            KERAS(name="bn"),
            layers.EinsumDense("abc,cd->abd", (None, 4), name="einsum"),
            layers.Dense(4, name="head", kernel_regularizer="l2"),
        ]
    )
    for name in ("conv", "einsum", "head"):
        model.get_layer(name).enable_lora(2)
    model.get_layer("head").lora_kernel_b.assign(np.ones((2, 4)))
    return model


def adapted_inside_a_custom_block():
    block = Residual(name="residual")
    model = keras.Sequential(
        [keras.Input((4,)), block, Residual(name="other"), layers.Dense(2)]
    )
    block.hidden[0].enable_lora(2)
    model.layers[1].hidden[0].quantize("int8")
    model.layers[1].hidden[0].enable_lora(1, lora_alpha=0.5)
    return model


def adapted_words():
    words = layers.Embedding(9, 4, name="words")
    model = keras.Sequential(
        [keras.Input((3,)), words, KERAS(), layers.Flatten(), layers.Dense(2)]
    )
    words.enable_lora(2)
    return model


def recomputed():
    with keras.RematScope("full"):
        inputs = keras.Input((4,))
        x = KERAS(name="bn")(layers.Dense(4, name="dense")(inputs))
    with keras.RematScope("list_of_layers", layer_names=["head"]):
        outputs = layers.Dense(3, name="head")(x + inputs)
    return keras.Model(inputs, outputs, name="recomputed")


def precisions():
    inputs = keras.Input((4,))
    x = layers.Dense(4, dtype="mixed_bfloat16", name="half")(inputs)
    x = KERAS(dtype="mixed_bfloat16", autocast=False, name="bn")(x)
    x = layers.Dense(3, dtype="float32", name="full")(x)
    return keras.Model(inputs, x, name="precisions")


def attributes():
    model = small()
    dense, bn, head = model.layers
    model.notes = {"trained on": ["a", "b"], "rate": np.float32(0.5)}
    model.classes = np.arange(3)
    dense.name = "renamed"
    dense.supports_masking = False
    bn.momentum = 0.6
    head.pruned = True
    head.score = scores
    head.activation = keras.activations.tanh
    return model


def scores(x):
    return x**2


def compiled():
    inputs = keras.Input((4,))
    x = KERAS(name="bn")(layers.Dense(4)(inputs))
    model = keras.Model(
        inputs,
        {"a": layers.Dense(2, name="a")(x), "b": layers.Dense(1, name="b")(x)},
        name="heads",
    )
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.1, 100),
            clipnorm=1.0,
            use_ema=True,
            gradient_accumulation_steps=2,
        ),
        {"a": "mse", "b": keras.losses.Huber(0.5)},
        loss_weights={"a": 0.3, "b": 0.7},
        metrics={"a": ["mae"], "b": [keras.metrics.RootMeanSquaredError()]},
        weighted_metrics={"a": [], "b": ["mae"]},
        steps_per_execution=3,
        auto_scale_loss=False,
    )
    model.jit_compile = False
    return model


class Own(keras.Model):
    """As in Keras's guide on `train_step`, with what such classes keep."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.tracker = keras.metrics.Mean(name="mean")
        self.seeds = keras.random.SeedGenerator(5)
        self.rate = 0.5
        self.features = self.layers[1]

    @property
    def metrics(self):
        return [self.tracker]

    def compile(self, first_optimizer, second_optimizer, loss):
        super().compile()
        self.first_optimizer = first_optimizer
        self.second_optimizer = second_optimizer
        self.squares = loss

    def compute_loss(self, x=None, y=None, y_pred=None, *others, **named):
        return self.rate * keras.ops.mean(self.squares(y, y_pred))

    def test_step(self, *arguments):
        self.tracker.update_state(7.0)
        return {"mean": self.tracker.result()}


def own_class():
    inputs = keras.Input((4,))
    x = KERAS(name="bn")(layers.Dense(4, name="dense")(inputs))
    model = Own(inputs, layers.Dense(3, name="head")(x), name="own")
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.optimizers.Adam(0.2),
        keras.losses.MeanSquaredError(),
    )
    model.rate = 0.25
    model.tracker.update_state(3.0)
    return model


class Scaling(keras.Sequential):
    """Its own preprocessing, as `predict` does it."""

    def __init__(self, *arguments, factor=3.0, **named):
        super().__init__(*arguments, **named)
        self.factor = factor

    def call(self, inputs, training=None):
        return super().call(self.factor * inputs, training=training)


def own_sequential():
    return Scaling([keras.Input((4,)), layers.Dense(4), KERAS()], name="own")


def generative():
    """A discriminator that trains alone, and stands still in the whole."""
    discriminator = small()
    discriminator.compile("adam", "mse")
    discriminator.train_on_batch(np.ones((4, 4)), np.ones((4, 3)))
    discriminator.trainable = False
    noise = keras.Input((2,))
    generator = keras.Sequential(
        [keras.Input((2,)), layers.Dense(4), KERAS()], name="generator"
    )
    whole = keras.Model(noise, discriminator(generator(noise)), name="gan")
    whole.compile("adam", "mse")
    return whole


def recurrent():
    return keras.Sequential(
        [
            keras.Input(batch_shape=(4, 3, 4)),
            layers.Masking(),
            layers.LSTM(3, stateful=True, return_sequences=True),
            layers.TimeDistributed(KERAS(name="bn")),
            layers.Bidirectional(layers.GRU(2, dropout=0.3)),
            layers.GaussianNoise(0.1),
        ]
    )


def quantized(mode):
    def make():
        model = small()
        model.quantize(mode)
        return model

    make.__name__ = f"quantized_to_{mode}"
    return make


def quantized_and_adapted():
    model = small()
    model.quantize("int8")
    model.layers[2].enable_lora(2)
    return model


ALL = (
    *(
        getattr(networks, name)
        for name in ("residual", "nested", "shared", "wrapped")
    ),
    flags_of_single_variables,
    flags_inside_a_custom_block,
    penalties,
    adapted,
    adapted_inside_a_custom_block,
    adapted_words,
    recomputed,
    precisions,
    attributes,
    compiled,
    own_class,
    own_sequential,
    generative,
    recurrent,
    quantized("int8"),
    quantized("int4"),
    quantized("float8"),
    quantized_and_adapted,
)


def make(kind):
    """A model of a kind."""
    return kind(KERAS) if kind.__module__ == networks.__name__ else kind()


# What a copy has of its own, and why.
DIFFERENT = {
    "_auto_config": "where no layer has a `get_config`, which this has",
    "_self_setattr_tracking": "TensorFlow sets it as it looks",
    "_tracked": "TensorFlow's list of what it has looked at",
    "build": "Keras binds it to the class that a layer was made of",
    "history": "of a run, and no copy has run",
    "is_awq_calibrated": "set as weights are loaded",
    "is_gptq_calibrated": "set as weights are loaded",
    "metrics_variables": "metrics begin anew, as the optimizer does",
    "predict_function": "traced, with the layers of before in it",
    "test_function": "the same",
    "train_function": "the same",
}
# Where Keras makes variables in another order of a configuration.
ANY_ORDER = {"quantized_to_float8"}


def seen(model):
    """All that can be seen of a model, its layers and their variables."""
    found = {}
    for at, layer in enumerate(model._flatten_layers()):
        for owner in (layer, *layer.variables):
            key = f"{at} {layer.name}", getattr(owner, "path", "")
            # Properties first: some are settled by the first look.
            for name in sorted(dir(owner), key=lambda name: name[0] == "_"):
                if name in DIFFERENT:
                    continue
                try:
                    value = getattr(owner, name)
                except Exception as error:  # a property without a value
                    value = type(error).__name__
                if name[0] != "_":
                    found[*key, name] = _described(value)
                elif name in vars(owner) and _is_plain(value):
                    found[*key, name] = value
    return found


def _is_plain(value):
    """Whether it is data, as flags are that Keras keeps for itself."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _described(value, depth=0):
    """A value as data that can be compared across two models."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, keras.layers.Layer):
        return type(value), value.name
    if isinstance(value, keras.Variable):
        return value.path, value.trainable, _described(value.value)
    if isinstance(value, keras.KerasTensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return {
            str(_described(key)): _described(each, depth + 1)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_described(each, depth + 1) for each in value]
    if isinstance(value, set):
        return len(value)
    if isinstance(value, type | types.FunctionType):
        return value.__module__, value.__qualname__
    if hasattr(value, "get_config"):
        try:
            config = value.get_config()
        except NotImplementedError:
            return type(value)
        return type(value), {
            key: each for key, each in config.items() if key != "name"
        }
    if keras.ops.is_tensor(value) or isinstance(value, np.ndarray | np.generic):
        try:
            array = helpers.to_numpy(value)
        except Exception:  # a handle
            return type(value)
        return array.dtype.name, array.tolist()
    return type(value)
