"""The networks of the benchmarks, with any normalization; on any backend."""

import inspect

import keras
import numpy as np
from networks_report import BASELINE, FLOOR, RIVAL

import keras_renorm

GROUPS = 8  # divides the channels of all layers
# Since Keras 3.14.
HAS_RIVAL = (
    "renorm"
    in inspect.signature(keras.layers.BatchNormalization.__init__).parameters
)
CLIPPING = {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}


class Nothing(keras.layers.Layer):
    """In the place of normalization."""

    def call(self, inputs, mask=None):
        """The inputs, with the arguments of batch normalization."""
        return inputs


class GroupNormalization(keras.layers.GroupNormalization):
    """Keras's."""

    def call(self, inputs, mask=None):
        """With the arguments of batch normalization."""
        return super().call(inputs)


def layers_of(dtype):
    """Name to layer alone, each with its own state."""
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    kinds = {
        "Keras 3 BN": (keras.layers.BatchNormalization, {}),
        "Keras 3 renorm": (
            keras.layers.BatchNormalization,
            {"renorm": True, "renorm_clipping": CLIPPING},
        ),
        "our BN": (keras_renorm.BatchNormalization, {}),
        "our renorm": (
            keras_renorm.BatchRenormalization,
            {"gradient_momentum": None},
        ),
        "our renorm, corrected": (keras_renorm.BatchRenormalization, {}),
    }
    if not HAS_RIVAL:
        del kinds["Keras 3 renorm"]
    return {
        name: kind(dtype=policy, **arguments)
        for name, (kind, arguments) in kinds.items()
    }


def shut_gates(layers):
    """As after many minibatches of 16 independent examples."""
    for layer in layers:
        if isinstance(layer, keras_renorm.BatchRenormalization):
            agreement = layer.gradient_agreement
            agreement.assign(np.full(agreement.shape, 1 / 64))
            layer.gate.assign([0.0, 1.0, 16.0, 0.0])


def application(name, size):
    """A network of `keras.applications`, untrained."""
    return getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10
    )


def replaced(model, replacement):
    """A copy with other layers in the place of batch normalization."""

    def layer_of(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return replacement(layer)
        return type(layer).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=layer_of)


def contenders(name, size, chosen=None):
    """Name to network, of all or of the chosen ones; all untrained."""
    model = application(name, size)

    def rival(layer):
        return keras.layers.BatchNormalization(
            axis=layer.axis,
            momentum=layer.momentum,
            epsilon=layer.epsilon,
            name=layer.name,
            renorm=True,
            renorm_clipping=CLIPPING,
        )

    makers = {
        BASELINE: lambda: model,
        RIVAL: lambda: replaced(model, rival),
        "our BN": lambda: keras_renorm.convert(
            model, keras_renorm.BatchNormalization
        ),
        "our renorm": lambda: keras_renorm.convert(
            model, gradient_momentum=None
        ),
        "our renorm, corrected": lambda: keras_renorm.convert(
            model, gradient_momentum=0.9
        ),
        "group norm.": lambda: replaced(
            model, lambda layer: GroupNormalization(GROUPS, name=layer.name)
        ),
        FLOOR: lambda: replaced(model, lambda layer: Nothing(name=layer.name)),
    }
    if not HAS_RIVAL:
        del makers[RIVAL]
    return {
        each: make()
        for each, make in makers.items()
        if chosen is None or each in chosen
    }
