"""Layers of tf_keras (Keras 2) as layers of Keras 3."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
from keras import layers

from keras_renorm.models._layers.finding import inside
from keras_renorm.models._layers.state import copy_assets
from keras_renorm.models._surgery import tf_functions

_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
# Layers of another name, and the names of their arguments.
_RENAMED = {
    "Layer": ("Identity", {}),
    "LeakyReLU": ("LeakyReLU", {"alpha": "negative_slope"}),
    "ThresholdedReLU": ("ReLU", {"theta": "threshold"}),
}
# How Keras 2 computes, or facts from before a call: they change no result.
# A vocabulary, whose size this is, is copied.
_WITHOUT_MEANING = {
    "batch_input_shape",
    "implementation",
    "input_length",
    "key_shape",
    "query_shape",
    "rng_type",
    "value_shape",
    "vocabulary_size",
}
# Attributes that have the name of an argument, and another meaning.
_NO_ARGUMENTS = {"backward_layer", "input_shape", "weights"}
# Layers that do something else in Keras 3: an image is not cropped in
# inference.
_OTHERS = {"RandomCrop"}


class NoCounterpartError(Exception):
    """What of a layer Keras 3 lacks."""


class NotedError(Exception):
    """Something inside has no counterpart, and that is noted."""


class Layers:
    """Layers of Keras 3, made from those of a model of tf_keras."""

    def __init__(
        self,
        normalization: Callable[[dict[str, Any]], layers.Layer],
        custom_objects: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._tf_keras = sys.modules["tf_keras"]
        self._normalization = normalization
        self._custom_objects = custom_objects
        # By the `id` of the old layer; `None` where there is none.
        self._new: dict[int, Any] = {}
        # Functions and classes by name, for layers that copy others.
        self._known: dict[str, Any] = {}
        # Old and new, whose weights are copied when all is built.
        self._pairs: list[tuple[Any, Any]] = []
        # Of each layer that has no counterpart, why.
        self._obstacles: dict[int, tuple[Any, str]] = {}

    def _attempt(
        self, layer: Any, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a function returns; `None` if it cannot, and why is noted."""
        try:
            return function(*arguments)
        except NotedError:
            return None
        except NoCounterpartError as error:
            why = str(error)
        except Exception as error:  # whatever a layer of Keras 3 raises
            why = f"which is refused there: {reason_of(error)}"
        self._obstacles.setdefault(id(layer), (layer, why))
        return None

    def _new_of(self, layer: Any) -> Any:
        if id(layer) not in self._new:
            self._new[id(layer)] = self._attempt(layer, self._make, layer)
        return self._new[id(layer)]

    def _make(self, layer: Any) -> Any:
        kinds = self._tf_keras.layers
        custom = self._custom_objects.get(type(layer).__name__)
        if custom is not None:
            return self._custom(layer, custom)
        if any(map(_is_added, layer._callable_losses)):
            raise NoCounterpartError("with a loss given to `add_loss`")
        if isinstance(layer, self._tf_keras.Model):
            return self._graph(layer)
        if not is_of_tf_keras(type(layer)):
            raise NoCounterpartError(f"of class {type(layer).__name__}")
        if type(layer).__name__ == "CustomScaleLayer":  # of InceptionResNetV2
            return lambda inputs: inputs[0] + inputs[1] * layer.scale
        # Of version 1 of Keras 2, and `SyncBatchNormalization`, too.
        if isinstance(layer, kinds.BatchNormalization.__base__):
            new = self._normalization(self._normalization_config(layer))
        elif isinstance(layer, kinds.Bidirectional):
            return self._bidirectional(layer)
        elif isinstance(layer, kinds.Lambda):
            new = self._lambda(layer)
        else:
            new = self._same_kind(layer)
        if hasattr(layer, "save_assets"):
            # A vocabulary: shapes follow from its size. Its table counts as a
            # weight in Keras 2 only.
            if layer.get_config()["output_mode"] == "tf_idf":
                raise NoCounterpartError("with output_mode=tf_idf")
            copy_assets(layer, new)
        elif not isinstance(layer, kinds.Discretization):
            self._pairs.append((layer, new))
        return new

    def _custom(self, layer: Any, custom: Callable[..., Any]) -> Any:
        """What `custom_objects` has for a layer."""
        if not isinstance(custom, type):
            new = custom(layer)
        else:
            config = plain(layer.get_config())
            for name in ("batch_input_shape", "trainable"):
                config.pop(name, None)
            config["name"] = name_of(layer)
            config["dtype"] = layer.dtype_policy.name
            new = custom.from_config(config)  # type: ignore[attr-defined]
            self._known[custom.__name__] = custom
        if not callable(new):
            raise NoCounterpartError(
                f"for which `custom_objects` gives {new!r}"
            )
        if isinstance(new, layers.Layer) and not new.built:
            self._pairs.append((layer, new))
        return new

    def _normalization_config(self, layer: Any) -> dict[str, Any]:
        if layer.adjustment is not None:
            raise NoCounterpartError("with an adjustment")
        axes = layer.axis if isinstance(layer.axis, int) else list(layer.axis)
        if isinstance(axes, list):
            if len(axes) > 1:
                raise NoCounterpartError("of several axes")
            # With virtual batches it is that of a tensor with one axis more.
            axes = axes[0] - (layer.virtual_batch_size is not None)
        config = dict(self._members(layer))
        if config.get("renorm_clipping"):
            config["renorm_clipping"] = {
                name: float(value)
                for name, value in config["renorm_clipping"].items()
            }
        # That of a SyncBatchNormalization is no argument.
        return {**config, "axis": axes, "synchronized": layer.synchronized}

    def _bidirectional(self, layer: Any) -> Any:
        # It makes its first layer anew; the one from here is its pattern.
        new, pairs = dict(self._new), list(self._pairs)
        given = {
            **dict(self._arguments(layer, layers.Bidirectional)),
            "layer": self._inner(layer.forward_layer),
            "backward_layer": self._inner(layer.backward_layer),
        }
        self._new, self._pairs = new, pairs
        with keras.saving.custom_object_scope(self._known):
            made = layers.Bidirectional(**given)
        for name in ("forward_layer", "backward_layer"):
            old = getattr(layer, name)
            self._new[id(old)] = getattr(made, name)
            self._pairs.append((old, self._new[id(old)]))
        return made

    def _lambda(self, layer: Any) -> Any:
        given = dict(self._members(layer))
        kept = given.keys() & {"name", "dtype", "activity_regularizer"}
        return layers.Lambda(
            self._function(layer.function),
            None,  # the shape of the output is found by calling it
            layer.mask,
            layer.arguments,
            **{name: given[name] for name in kept},
        )

    def _same_kind(self, layer: Any) -> Any:
        """A layer of Keras 3 of the same name and arguments."""
        own_name = type(layer).__name__
        name, renamed = _RENAMED.get(own_name, (own_name, {}))
        kind = getattr(layers, name, None)
        if kind is None or own_name in _OTHERS:
            raise NoCounterpartError(f"of class {own_name}")
        arguments = dict(self._arguments(layer, kind, renamed))
        if isinstance(layer, self._tf_keras.layers.Discretization):
            # Its boundaries are no weights in Keras 3.
            boundaries = [float(boundary) for boundary in layer.bin_boundaries]
            arguments |= {"bin_boundaries": boundaries, "num_bins": None}
            # Of integers as outputs, Keras 3 would make integers of the inputs.
            if layer.output_mode == "int":
                arguments["dtype"] = "float32"
        return kind(**arguments)

    def _arguments(
        self, layer: Any, kind: type, renamed: Mapping[str, str] = {}
    ) -> Iterator[tuple[str, Any]]:
        """The configuration of a layer, as far as Keras 3's takes it."""
        taken = _parameters(kind)
        lacking = []
        for name, value in self._members(layer):
            if (
                name == "interpolation"
                and value in tf_functions.LACKING_INTERPOLATIONS
            ):
                lacking.append(f"{name}={value}")
            elif renamed.get(name, name) in taken:
                yield renamed.get(name, name), value
            elif (
                name not in _WITHOUT_MEANING
                and not name.endswith("_initializer")  # the weights are there
                and not _is_default(type(layer), name, value)
            ):
                lacking.append(f"{name}={value}")
        if lacking:
            raise NoCounterpartError(f"with {', '.join(lacking)}")

    def _members(self, layer: Any) -> Iterator[tuple[str, Any]]:
        """The configuration of a layer, with objects of others as they are."""
        yield "name", name_of(layer)
        yield "dtype", layer.dtype_policy.name
        config = plain(layer.get_config())
        if layer.activity_regularizer is not None:  # in few configurations
            config["activity_regularizer"] = (
                self._tf_keras.regularizers.serialize(
                    layer.activity_regularizer
                )
            )
        for name in inspect.signature(type(layer)).parameters:
            # A few arguments are in no configuration.
            if name not in (*config, *_NO_ARGUMENTS) and hasattr(layer, name):
                value = plain(getattr(layer, name))
                if not _is_default(type(layer), name, value):
                    config[name] = value
        for name, value in config.items():
            if name in ("name", "dtype", "trainable"):  # the last is set later
                continue
            member = value if callable(value) else getattr(layer, name, None)
            if name.endswith("activation"):
                yield name, self._activation(layer, member)
            elif isinstance(member, self._tf_keras.layers.Layer):
                yield name, self._inner(member)
            elif name == "cells":
                yield name, [self._inner(cell) for cell in layer.cells]
            elif not callable(member) or is_of_tf_keras(_kind_of(member)):
                yield name, value
            elif not name.endswith("_initializer"):  # the weights are there
                yield name, self._function(member)

    def _inner(self, layer: Any) -> Any:
        new = self._new_of(layer)
        if new is None:
            raise NotedError
        return new

    def _activation(self, layer: Any, function: Any) -> Any:
        if isinstance(function, self._tf_keras.layers.Layer):
            return self._inner(function)
        name = getattr(function, "__name__", "")
        if function is None or name in self._custom_objects:
            return self._custom_objects.get(name)
        if function is self._tf_keras.activations.hard_sigmoid:
            # That of Keras 3 is x / 6 + 0.5 between 0 and 1.
            dtype = layer.dtype_policy.name
            return keras.Sequential(
                [
                    layers.Rescaling(0.2, offset=0.5, dtype=dtype),
                    layers.ReLU(max_value=1.0, dtype=dtype),
                ]
            )
        if is_of_tf_keras(function):
            return name
        if function.__module__.startswith("tensorflow."):
            return tf_functions.ACTIVATIONS.get(name, function)
        return self._function(function)

    def _function(self, function: Any) -> Any:
        """A function, or an object like one, that is not Keras's."""
        name = getattr(function, "__name__", type(function).__name__)
        self._known[name] = self._custom_objects.get(name, function)
        return self._known[name]

    def _graph(self, model: Any) -> keras.Model:
        """The model of Keras 3 with the graph of a model."""
        raise NotImplementedError


def inside_of(layer: Any) -> list[Any]:
    """The layers that a layer of either holds."""
    if isinstance(layer, layers.Layer):
        return inside(layer)
    return list(layer._flatten_layers(include_self=False))


def in_order(layer: Any) -> Iterator[Any]:
    """A layer and those inside, of Keras 3 in the order of Keras 2."""
    yield layer
    held = inside_of(layer)
    deeper = {id(inner) for layer in held for inner in inside_of(layer)}
    for inner in held:
        if id(inner) not in deeper:
            yield from in_order(inner)


def own_weights(layer: Any) -> list[Any]:
    """The weights of a layer, those inside excepted, as Keras 2 orders them.

    Of batch normalization those that both have.
    """
    if hasattr(layer, "moving_variance"):
        own = [getattr(layer, name, None) for name in _WEIGHTS]
        return [weight for weight in own if weight is not None]
    inner = {id(weight) for held in inside_of(layer) for weight in held.weights}
    return sorted(
        (weight for weight in layer.weights if id(weight) not in inner),
        key=lambda weight: not weight.trainable,
    )


def reason_of(error: Exception) -> str:
    """What an error says first, without where Keras caught it."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")
    reported = [
        line.strip()
        for line in lines
        if line.strip() and not line.startswith("Exception encountered")
    ]
    return reported[0] if reported else ""


def _is_added(loss: Any) -> bool:
    """Whether a loss of a layer is not that of a regularizer of a weight."""
    function = getattr(loss.args[0], "func", None)
    return getattr(function, "__name__", None) != "_loss_for_variable"


def _parameters(kind: type) -> set[str]:
    """The arguments of a class of Keras 3, those that it passes on included."""
    taken: set[str] = set()
    for parent in kind.__mro__:
        parameters = inspect.signature(parent.__init__).parameters  # type: ignore[misc]
        taken |= parameters.keys()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return taken


def _is_default(kind: type, name: str, value: Any) -> bool:
    """Whether an argument of a layer of tf_keras asks for nothing."""
    for parent in kind.__mro__:
        parameter = inspect.signature(parent.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None:
            return bool(value == parameter.default)
    return value is None


def _kind_of(value: Any) -> Any:
    return value if hasattr(value, "__name__") else type(value)


def is_of_tf_keras(value: Any) -> bool:
    """Whether tf_keras defines a class or a function."""
    return str(value.__module__).startswith("tf_keras.")


def plain(structure: Any) -> Any:
    """TensorFlow's wrapped lists and dictionaries as Python's own."""
    if isinstance(structure, dict):
        return {key: plain(value) for key, value in structure.items()}
    if isinstance(structure, tuple):
        return tuple(map(plain, structure))
    if isinstance(structure, list):
        return list(map(plain, structure))
    return structure


def name_of(layer: Any) -> str:
    """The name of a layer, as Keras 3 allows it."""
    # Keras 3 refuses slashes; its own networks write underscores.
    return str(layer.name).replace("/", "_")
