"""From the models of tf_keras (Keras 2) to Keras 3."""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from keras_renorm.models.finding import no_normalization
from keras_renorm.models.state import copy_assets, reload

# Layers for the operations that tf_keras has no layer for: on two tensors, on
# a tensor and a number, on one tensor.
_OF_TENSORS = {
    "__operators__.add": layers.Add,
    "math.add": layers.Add,
    "math.subtract": layers.Subtract,
    "math.multiply": layers.Multiply,
}
_OF_NUMBER = {
    "__operators__.add": lambda y: {"scale": 1.0, "offset": y},
    "math.add": lambda y: {"scale": 1.0, "offset": y},
    "math.subtract": lambda y: {"scale": 1.0, "offset": -y},
    "math.multiply": lambda y: {"scale": y},
    "math.truediv": lambda y: {"scale": 1 / y},
}
_COMMUTATIVE = {"__operators__.add", "math.add", "math.multiply"}
_OF_ONE = {
    "nn.relu": "relu",
    "nn.silu": "silu",
    "nn.relu6": "relu6",
    "math.sigmoid": "sigmoid",
    "math.tanh": "tanh",
}
_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
# How Keras 2 computes, not what; Keras 3 has no such choice. A vocabulary,
# whose size this is, is copied.
_WITHOUT_MEANING = {
    "batch_input_shape",
    "implementation",
    "fused",
    "vocabulary_size",
}


def is_tf_keras(model: Any) -> bool:
    """Whether this is a model of tf_keras, which need not be installed."""
    tf_keras = sys.modules.get("tf_keras")
    return tf_keras is not None and isinstance(model, tf_keras.Model)


def translate(
    model: Any, normalization: Callable[[dict[str, Any]], layers.Layer]
) -> keras.Model:
    """A Keras 3 model that infers what a tf_keras model infers.

    Sequential and functional models, nested and with shared layers, of the
    layers that Keras 3 has too, and of simple operations on tensors. Weights,
    names (a slash becomes an underscore) and `trainable` flags are the
    model's; it is not compiled.

    Args:
        model: A built sequential or functional model of tf_keras.
        normalization: From the configuration of a batch normalization layer
            to the layer in its place.

    Returns:
        A new model.

    Raises:
        ValueError: If the model has no graph, has no batch normalization, or
            holds what has no counterpart.
    """
    return _Translation(normalization).run(model)


class _Translation:
    def __init__(
        self,
        normalization: Callable[[dict[str, Any]], layers.Layer],
    ) -> None:
        self._tf_keras = sys.modules["tf_keras"]
        self._normalization = normalization
        self._new: dict[int, Any] = {}
        # Old and new, of layers that hold no other; copied when all is built.
        self._leaves: list[tuple[Any, Any]] = []
        self._normalizations: list[tuple[Any, Any]] = []

    def run(self, model: Any) -> keras.Model:
        new = self._new_of(model)
        if not self._normalizations:
            raise no_normalization(model)
        for old, layer in self._normalizations:
            for name in _WEIGHTS:
                if getattr(old, name) is not None:
                    getattr(layer, name).assign(getattr(old, name).numpy())
        for old, layer in self._leaves:
            values = old.get_weights()
            shapes = [np.shape(value) for value in values]
            if shapes != [tuple(weight.shape) for weight in layer.weights]:
                raise _no_counterpart(old, "whose weights are others there")
            layer.set_weights(values)
            reload(layer)
        for old in model._flatten_layers():
            if id(old) in self._new:
                self._new[id(old)].trainable = old.trainable
        return new

    def _new_of(self, layer: Any) -> Any:
        if id(layer) not in self._new:
            self._new[id(layer)] = self._make(layer)
        return self._new[id(layer)]

    def _make(self, layer: Any) -> Any:
        kinds = self._tf_keras.layers
        if isinstance(layer, self._tf_keras.Model):
            return self._graph(layer)
        if isinstance(layer, kinds.BatchNormalization):
            config = _plain(layer.get_config())
            if isinstance(config["axis"], list):
                if len(config["axis"]) > 1:
                    raise _no_counterpart(layer, "of several axes")
                config["axis"] = config["axis"][0]
            config["dtype"] = layer.dtype_policy.name
            config["name"] = _name_of(layer)
            new = self._normalization(config)
            self._normalizations.append((layer, new))
            return new
        if isinstance(layer, kinds.Discretization):
            # Its boundaries are no weights in Keras 3.
            arguments = dict(self._arguments(layer, layers.Discretization))
            boundaries = [float(each) for each in layer.bin_boundaries]
            return layers.Discretization.from_config(
                {**arguments, "bin_boundaries": boundaries}
            )
        if isinstance(layer, kinds.Wrapper) and not isinstance(
            layer, kinds.Bidirectional
        ):
            return self._same_kind(layer, self._new_of(layer.layer))
        if isinstance(layer, kinds.Bidirectional):
            # Its weights come as a whole: it makes the second layer itself.
            new = self._same_kind(layer, self._same_kind(layer.forward_layer))
        else:
            new = self._same_kind(layer)
        if hasattr(layer, "save_assets"):
            # A vocabulary: shapes follow from its size. Its table counts as a
            # weight in Keras 2 only.
            if layer.get_config()["output_mode"] == "tf_idf":
                raise _no_counterpart(layer, "with output_mode=tf_idf")
            copy_assets(layer, new)
            return new
        self._leaves.append((layer, new))
        return new

    def _same_kind(self, layer: Any, wrapped: Any = None) -> Any:
        """A layer of Keras 3 of the same name and arguments."""
        kind = getattr(layers, type(layer).__name__, None)
        if kind is None or not type(layer).__module__.startswith("tf_keras."):
            raise _no_counterpart(layer, f"of class {type(layer).__name__}")
        arguments = dict(self._arguments(layer, kind))
        if wrapped is None:
            return kind.from_config(arguments)
        return kind(**{**arguments, "layer": wrapped})

    def _arguments(self, layer: Any, kind: type) -> Iterator[tuple[str, Any]]:
        """The configuration of a layer, as far as Keras 3's takes it."""
        taken = set(inspect.signature(kind).parameters) | {
            "name",
            "dtype",
            "activity_regularizer",
        }
        for name, value in _plain(layer.get_config()).items():
            if name == "dtype":
                yield name, layer.dtype_policy.name
            elif name == "name":
                yield name, _name_of(layer)
            elif name in taken:
                yield name, value
            elif (
                value  # nothing is asked for
                and value != 1  # of groups
                and name not in _WITHOUT_MEANING
                and name != "trainable"  # set later
                and not name.endswith("_initializer")  # the weights are there
            ):
                raise _no_counterpart(layer, f"with {name}={value}")

    def _graph(self, model: Any) -> keras.Model:
        if not hasattr(model, "_nodes_by_depth") or not model.built:
            raise ValueError(
                "`model` must be a built sequential or functional model. "
                f"Received: model={model.name}, of class "
                f"{type(model).__name__} of tf_keras."
            )
        tensors = {
            id(tensor): keras.Input(
                batch_shape=tuple(tensor.shape),
                dtype=tensor.dtype.name,
                name=name,
            )
            for tensor, name in zip(
                model.inputs, model.input_names, strict=True
            )
        }
        if isinstance(model, self._tf_keras.Sequential):
            return keras.Sequential(
                [*tensors.values(), *map(self._new_of, model.layers)],
                name=model.name,
            )

        def new_tensors(structure: Any) -> Any:
            return tree.map_structure(
                lambda leaf: tensors.get(id(leaf), leaf), structure
            )

        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                named = {
                    name: new_tensors(_plain(value))
                    for name, value in node.call_kwargs.items()
                    if value is not None
                }
                outputs = self._callable_of(node.layer)(
                    *new_tensors(_plain(node.call_args)), **named
                )
                for old, new in zip(
                    tree.flatten(_plain(node.outputs)),
                    tree.flatten(outputs),
                    strict=True,
                ):
                    tensors[id(old)] = new
        return keras.Model(
            new_tensors(_plain(model.input)),
            new_tensors(_plain(model.output)),
            name=model.name,
        )

    def _callable_of(self, layer: Any) -> Callable[..., Any]:
        if type(layer).__name__ != "TFOpLambda":
            return self._new_of(layer)

        return lambda *given, **named: _operate(
            layer, [*given, *named.values()]
        )


def _operate(layer: Any, operands: list[Any]) -> Any:
    """What an operation without a layer gives, by a layer of Keras 3."""
    operation, name = layer.get_config()["function"], _name_of(layer)
    is_tensor = [isinstance(each, keras.KerasTensor) for each in operands]
    if is_tensor == [True, True] and operation in _OF_TENSORS:
        return _OF_TENSORS[operation](name=name)(operands)
    if is_tensor == [True] and operation in _OF_ONE:
        return layers.Activation(_OF_ONE[operation], name=name)(operands[0])
    if is_tensor == [False, True] and operation in _COMMUTATIVE:
        operands, is_tensor = operands[::-1], is_tensor[::-1]
    if (
        is_tensor == [True, False]
        and operation in _OF_NUMBER
        and np.ndim(operands[1]) == 0
    ):
        arguments = _OF_NUMBER[operation](float(operands[1]))
        return layers.Rescaling(**arguments, name=name)(operands[0])
    raise _no_counterpart(layer, f"the operation tf.{operation}")


def _plain(structure: Any) -> Any:
    """TensorFlow's wrapped lists and dictionaries as Python's own."""
    if isinstance(structure, dict):
        return {key: _plain(value) for key, value in structure.items()}
    if isinstance(structure, tuple):
        return tuple(map(_plain, structure))
    if isinstance(structure, list):
        return list(map(_plain, structure))
    return structure


def _name_of(layer: Any) -> str:
    # Keras 3 refuses slashes; its own networks write underscores.
    return str(layer.name).replace("/", "_")


def _no_counterpart(layer: Any, what: str) -> ValueError:
    return ValueError(
        "`model` must hold only what Keras 3 has too. Received: layer "
        f"{layer.name} of tf_keras, {what}."
    )
