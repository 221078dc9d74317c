"""From the models of tf_keras (Keras 2) to Keras 3."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from keras_renorm import arguments
from keras_renorm.models import tf_functions
from keras_renorm.models.finding import (
    describe,
    find_layers,
    inside,
    no_normalization,
)
from keras_renorm.models.replacing import as_asked
from keras_renorm.models.state import copy_assets, reload

_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
# Layers of another name, and what their arguments are called.
_RENAMED = {
    "Layer": ("Identity", {}),
    "LeakyReLU": ("LeakyReLU", {"alpha": "negative_slope"}),
    "ThresholdedReLU": ("ReLU", {"theta": "threshold"}),
}
# How Keras 2 computes, or what was known before a call; not what is computed.
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
# Where all is masked, the softmax is 0 in Keras 3 and 1 / n in Keras 2.
_OF_A_MASK = "with a mask"
# What is something else in Keras 3: an image is not cropped in inference.
_OTHERS = {"RandomCrop"}


def is_tf_keras(model: Any) -> bool:
    """Whether this is a model of tf_keras, which need not be installed."""
    tf_keras = sys.modules.get("tf_keras")
    return tf_keras is not None and isinstance(model, tf_keras.Model)


def translate(
    model: Any,
    normalization: Callable[[dict[str, Any]], layers.Layer],
    custom_objects: Mapping[str, Callable[..., Any]],
) -> keras.Model:
    """A Keras 3 model that infers what a tf_keras model infers.

    Sequential and functional models, nested and with shared layers, of the
    layers that Keras 3 has too, and of operations on tensors. Weights, names
    (a slash becomes an underscore) and `trainable` flags are the model's; it is
    not compiled.

    Args:
        model: A built sequential or functional model of tf_keras.
        normalization: From the configuration of a batch normalization layer
            to the layer in its place.
        custom_objects: As for `keras_renorm.convert`.

    Returns:
        A new model.

    Raises:
        ValueError: If the model has no graph, has no batch normalization, or
            holds what has no counterpart: all of that.
    """
    if not _has_graph(model):
        raise ValueError(
            "`model` must be a built sequential or functional model. "
            f"Received: model={model.name}, of class "
            f"{type(model).__name__} of tf_keras."
        )
    with as_asked():
        return _Translation(normalization, custom_objects).run(model)


class _NoCounterpartError(Exception):
    """What of a layer Keras 3 lacks."""


class _NotedError(Exception):
    """Something inside has no counterpart, and that is noted."""


class _Translation:
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

    def run(self, model: Any) -> keras.Model:
        _reserve_names(model)
        new = self._new_of(model)
        for pair in self._pairs:
            if new is not None or pair[1].built:
                self._attempt(pair[0], self._copy_weights, *pair)
        if self._obstacles:
            raise _no_counterparts(self._obstacles.values())
        if not find_layers(new, layers.BatchNormalization):
            raise no_normalization(model)
        for old in model._flatten_layers():
            if isinstance(self._new.get(id(old)), layers.Layer):
                self._new[id(old)].trainable = old.trainable
        return new

    def _attempt(
        self, layer: Any, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a function returns; `None` if it cannot, and why is noted."""
        try:
            return function(*arguments)
        except _NotedError:
            return None
        except _NoCounterpartError as error:
            why = str(error)
        except Exception as error:  # whatever a layer of Keras 3 raises
            why = f"which is refused there: {_reason(error)}"
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
        if isinstance(layer, self._tf_keras.Model):
            return self._graph(layer)
        if not _is_of_tf_keras(type(layer)):
            raise _NoCounterpartError(f"of class {type(layer).__name__}")
        if type(layer).__name__ == "CustomScaleLayer":  # of InceptionResNetV2
            return lambda inputs: inputs[0] + inputs[1] * layer.scale
        if type(layer) in (
            kinds.BatchNormalization,
            kinds.experimental.SyncBatchNormalization,
        ):
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
                raise _NoCounterpartError("with output_mode=tf_idf")
            copy_assets(layer, new)
        elif not isinstance(layer, kinds.Discretization):
            self._pairs.append((layer, new))
        return new

    def _custom(self, layer: Any, custom: Callable[..., Any]) -> Any:
        """What `custom_objects` has for a layer."""
        if not isinstance(custom, type):
            new = custom(layer)
        else:
            config = _plain(layer.get_config())
            for name in ("batch_input_shape", "trainable"):
                config.pop(name, None)
            config["name"] = _name_of(layer)
            config["dtype"] = layer.dtype_policy.name
            new = custom.from_config(config)  # type: ignore[attr-defined]
            self._known[custom.__name__] = custom
        if not callable(new):
            raise _NoCounterpartError(
                f"for which `custom_objects` gives {new!r}"
            )
        if isinstance(new, layers.Layer) and not new.built:
            self._pairs.append((layer, new))
        return new

    def _copy_weights(self, old: Any, new: Any) -> None:
        """Copies the weights of a layer, and of those that it alone holds."""
        made = {id(each) for each in self._new.values()}
        pairs = [
            [
                (each, own)
                for each in _in_order(whole)
                if (each is whole or id(each) not in others)
                and (own := _own_weights(each))
            ]
            for whole, others in ((old, self._new.keys()), (new, made))
        ]
        shapes = [
            [[_shape(weight) for weight in own] for _, own in several]
            for several in pairs
        ]
        if shapes[0] != shapes[1]:
            raise _NoCounterpartError("whose weights are others there")
        for (each, weights), (its, copies) in zip(*pairs, strict=True):
            self._new[id(each)] = its
            for weight, copy in zip(weights, copies, strict=True):
                copy.assign(np.reshape(weight.numpy(), copy.shape))
            if not isinstance(its, layers.BatchNormalization):
                reload(its)
        if getattr(old, "stateful", False):
            for state, copy in zip(old.states, new.states, strict=True):
                copy.assign(state.numpy())

    def _normalization_config(self, layer: Any) -> dict[str, Any]:
        if layer.adjustment is not None:
            raise _NoCounterpartError("with an adjustment")
        axes = layer.axis if isinstance(layer.axis, int) else list(layer.axis)
        if isinstance(axes, list):
            if len(axes) > 1:
                raise _NoCounterpartError("of several axes")
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
        # It makes its first layer anew: what is made here is for that.
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
        return layers.Lambda(
            layer.function,
            None,  # the shape of the output is found by calling it
            layer.mask,
            layer.arguments,
            name=_name_of(layer),
            dtype=layer.dtype_policy.name,
        )

    def _same_kind(self, layer: Any) -> Any:
        """A layer of Keras 3 of the same name and arguments."""
        own_name = type(layer).__name__
        name, renamed = _RENAMED.get(own_name, (own_name, {}))
        kind = getattr(layers, name, None)
        if kind is None or own_name in _OTHERS:
            raise _NoCounterpartError(f"of class {own_name}")
        arguments = dict(self._arguments(layer, kind, renamed))
        if isinstance(layer, self._tf_keras.layers.Discretization):
            # Its boundaries are no weights in Keras 3.
            boundaries = [float(each) for each in layer.bin_boundaries]
            arguments |= {"bin_boundaries": boundaries, "num_bins": None}
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
            raise _NoCounterpartError(f"with {', '.join(lacking)}")

    def _members(self, layer: Any) -> Iterator[tuple[str, Any]]:
        """The configuration of a layer, with what is not Keras's as itself."""
        yield "name", _name_of(layer)
        yield "dtype", layer.dtype_policy.name
        config = _plain(layer.get_config())
        for name in inspect.signature(type(layer)).parameters:
            # A few arguments are in no configuration.
            if name not in (*config, *_NO_ARGUMENTS) and hasattr(layer, name):
                value = _plain(getattr(layer, name))
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
            elif not callable(member) or _is_of_tf_keras(_kind_of(member)):
                yield name, value
            elif not name.endswith("_initializer"):  # the weights are there
                yield name, self._function(member)

    def _inner(self, layer: Any) -> Any:
        new = self._new_of(layer)
        if new is None:
            raise _NotedError
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
        if _is_of_tf_keras(function):
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
        if not _has_graph(model):
            raise _NoCounterpartError(f"of class {type(model).__name__}")
        refused = None
        tensors: dict[int, Any] = {}
        for tensor, name in zip(model.inputs, model.input_names, strict=True):
            layer = tensor.node.layer
            if layer.ragged:
                raise _NoCounterpartError(f"with a ragged input, {name}")
            tensors[id(tensor)] = keras.Input(
                batch_shape=tuple(tensor.shape),
                dtype=tensor.dtype.name,
                sparse=bool(layer.sparse),
                name=name.replace("/", "_"),
            )
        nodes = [
            node
            for depth in sorted(model._nodes_by_depth, reverse=True)
            for node in model._nodes_by_depth[depth]
            if not node.is_input
        ]
        if isinstance(model, self._tf_keras.Sequential):
            new_layers = [self._new_of(layer) for layer in model.layers]
            if not self._obstacles:
                try:
                    new = keras.Sequential(
                        [*tensors.values(), *new_layers], name=_name_of(model)
                    )
                except Exception as error:  # of which layer is seen below
                    refused = error
                else:
                    for node in nodes:
                        self._attempt(node.layer, self._check_output, node)
                    if self._obstacles:
                        raise _NotedError
                    return new
        for node in nodes:
            self._follow(model, node, tensors)
        if self._obstacles:
            raise _NotedError
        if refused is not None:
            raise refused
        return keras.Model(
            _mapped(model.input, tensors),
            _mapped(model.output, tensors),
            name=_name_of(model),
        )

    def _check_output(self, node: Any) -> None:
        try:
            output = self._new[id(node.layer)].output
        except (AttributeError, ValueError):  # it is called elsewhere, too
            return
        _check(node, output)

    def _follow(self, model: Any, node: Any, tensors: dict[int, Any]) -> None:
        """Calls what is called in a graph."""
        expected = _plain(node.outputs)
        outputs = self._attempt(node.layer, self._outputs, model, node, tensors)
        if outputs is None:  # go on, for what else has no counterpart
            outputs = tree.map_structure(_stand_in, expected)
        if not isinstance(expected, list | tuple | dict):
            tensors[id(expected)] = (
                outputs[0] if isinstance(outputs, list) else outputs
            )
            return
        for old, new in zip(
            tree.flatten(expected), tree.flatten(outputs), strict=True
        ):
            tensors[id(old)] = new

    def _outputs(self, model: Any, node: Any, tensors: dict[int, Any]) -> Any:
        given = _mapped(node.call_args, tensors)
        named = {
            name: _mapped(value, tensors)
            for name, value in node.call_kwargs.items()
            if value is not None
        }
        if hasattr(node.layer, "symbol"):
            return self._operate(model, node, given, named)
        outputs = self._call(node, given, named)
        if not self._obstacles:
            _check(node, outputs)
        return outputs

    def _call(
        self, node: Any, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        layer = node.layer
        new = self._inner(layer)
        if type(layer).__name__ in self._custom_objects or isinstance(
            layer, self._tf_keras.Model
        ):
            return new(*arguments, **named)
        # Keras 3 has arguments of the same names, in another order.
        bound = inspect.signature(layer.call).bind(*arguments, **named)
        (_, first), *others = bound.arguments.items()
        given = dict(others)
        kinds = self._tf_keras.layers
        if isinstance(layer, kinds.MultiHeadAttention | kinds.Softmax) and (
            not {"attention_mask", "mask"}.isdisjoint(given)
        ):
            raise _NoCounterpartError(_OF_A_MASK)
        if isinstance(layer, kinds.RNN | kinds.Bidirectional) and isinstance(
            first, list
        ):
            first, *given["initial_state"] = first
        if "initial_state" in given and _is_masked(
            tree.flatten(_plain(node.call_args))[0]
        ):
            # Of several tensors Keras 3 does not take the mask by itself.
            given.setdefault("mask", getattr(first, "_keras_mask", None))
            if given["mask"] is None:
                raise _NoCounterpartError("with states and a mask")
        lacking = [
            name
            for name in given
            if name not in inspect.signature(new.call).parameters
        ]
        if lacking:
            raise _NoCounterpartError(f"called with {', '.join(lacking)}")
        return new(first, **given)

    def _operate(
        self,
        model: Any,
        node: Any,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        """What an operation gives, for which tf_keras has no layer."""
        symbol = node.layer.symbol
        custom = self._custom_objects.get(f"tf.{symbol}")
        if custom is not None:
            return custom(*arguments, **named)
        try:
            return tf_functions.apply(
                node.layer.function,
                symbol,
                arguments,
                named,
                node.outputs,
                lambda tensor: self._shape_of(model, tensor),
            )
        except Exception as error:
            what = f"the operation tf.{symbol} {_reason(error)}"
            raise _NoCounterpartError(what.strip()) from error

    def _shape_of(self, model: Any, tensor: Any) -> tuple[int | None, ...]:
        """The shape of a tensor of a model, `None` where examples change it.

        tf_keras does not know that of `tf.reshape(x, (tf.shape(y)[0], -1))`.
        """
        shape = tuple(tensor.shape)
        if shape.count(None) < 2 or any(
            None in each.shape[1:] for each in model.inputs
        ):
            return shape
        part = self._tf_keras.Model(model.inputs, tensor)
        shapes = []
        for examples in (2, 5, 11):  # what is alike in all is fixed
            zeros = [
                np.zeros((examples, *each.shape[1:]), each.dtype.name)
                for each in model.inputs
            ]
            shapes.append(part(zeros, training=False).shape)
        return tuple(
            sizes[0] if len(set(sizes)) == 1 else None
            for sizes in zip(*shapes, strict=True)
        )


def _reserve_names(model: Any) -> None:
    """Lets Keras give no operation the name of a layer of the model."""
    for layer in model._flatten_layers():
        stem, _, number = _name_of(layer).rpartition("_")
        if not number.isdecimal():
            stem, number = _name_of(layer), "0"
        while keras.backend.get_uid(stem) <= int(number):
            pass


def _has_graph(model: Any) -> bool:
    """Whether a model is no more than its graph."""
    call = inspect.getattr_static(type(model), "call")
    return (
        hasattr(model, "_nodes_by_depth")
        and model.built
        and _is_of_tf_keras(call)
    )


def _inside(layer: Any) -> list[Any]:
    """The layers that a layer of either holds."""
    if isinstance(layer, layers.Layer):
        return inside(layer)
    return list(layer._flatten_layers(include_self=False))


def _in_order(layer: Any) -> Iterator[Any]:
    """A layer and those inside, of Keras 3 in the order of Keras 2."""
    yield layer
    held = _inside(layer)
    deeper = {id(inner) for each in held for inner in _inside(each)}
    for each in held:
        if id(each) not in deeper:
            yield from _in_order(each)


def _own_weights(layer: Any) -> list[Any]:
    """The weights of a layer, those inside excepted, as Keras 2 orders them.

    Of batch normalization those that both have.
    """
    if hasattr(layer, "moving_variance"):
        own = [getattr(layer, name, None) for name in _WEIGHTS]
        return [weight for weight in own if weight is not None]
    inner = {id(weight) for each in _inside(layer) for weight in each.weights}
    return sorted(
        (weight for weight in layer.weights if id(weight) not in inner),
        key=lambda weight: not weight.trainable,
    )


def _shape(weight: Any) -> list[int]:
    # With virtual batches, axes of length 1 are put in.
    return [size for size in weight.shape if size != 1]


def _check(node: Any, outputs: Any) -> None:
    """Raises where a layer of Keras 3 is seen to give something else."""
    tf_keras = sys.modules["tf_keras"]
    kinds = tf_keras.layers
    inputs = tree.flatten(_plain((node.call_args, node.call_kwargs)))
    if isinstance(node.layer, kinds.MultiHeadAttention | kinds.Softmax) and any(
        map(_is_masked, inputs)
    ):
        raise _NoCounterpartError(_OF_A_MASK)
    for new, old in zip(
        tree.flatten(outputs), tree.flatten(_plain(node.outputs)), strict=True
    ):
        if len(new.shape) != len(old.shape) or any(
            one is not None and other is not None and one != other
            for one, other in zip(new.shape, old.shape, strict=True)
        ):
            raise _NoCounterpartError(
                f"which gives {tuple(new.shape)} there, not {tuple(old.shape)}"
            )
        if _is_masked(new) != _is_masked(old) and not isinstance(
            node.layer,
            tf_keras.Model,  # Keras 3 knows its mask in a call only
        ):
            raise _NoCounterpartError("which hands on another mask there")


def _is_masked(tensor: Any) -> bool:
    return getattr(tensor, "_keras_mask", None) is not None


def _stand_in(tensor: Any) -> keras.KerasTensor:
    return keras.KerasTensor(tuple(tensor.shape), tensor.dtype.name)


def _reason(error: Exception) -> str:
    """What an error says first, without where Keras caught it."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")
    said = [
        line.strip()
        for line in lines
        if line.strip() and not line.startswith("Exception encountered")
    ]
    return said[0] if said else ""


def _mapped(structure: Any, tensors: dict[int, Any]) -> Any:
    """Arguments of a call, with the tensors of the new model."""

    def leaf(value: Any) -> Any:
        if id(value) in tensors:
            return tensors[id(value)]
        if hasattr(value, "numpy"):
            value = value.numpy()
        return arguments.plain(value)

    def slices(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"start", "stop", "step"}:
                return slice(value["start"], value["stop"], value["step"])
            return {name: slices(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(slices, value))
        return value

    return slices(tree.map_structure(leaf, _plain(structure)))


def _parameters(kind: type) -> set[str]:
    """The arguments of a class of Keras 3, those that it passes on included."""
    taken: set[str] = set()
    for each in kind.__mro__:
        parameters = inspect.signature(each.__init__).parameters  # type: ignore[misc]
        taken |= parameters.keys()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return taken


def _is_default(kind: type, name: str, value: Any) -> bool:
    """Whether an argument of a layer of tf_keras asks for nothing."""
    for each in kind.__mro__:
        parameter = inspect.signature(each.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None:
            return bool(value == parameter.default)
    return value is None


def _kind_of(value: Any) -> Any:
    return value if hasattr(value, "__name__") else type(value)


def _is_of_tf_keras(value: Any) -> bool:
    return str(value.__module__).startswith("tf_keras.")


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


def _no_counterparts(obstacles: Iterable[tuple[Any, str]]) -> ValueError:
    alike: dict[str, list[Any]] = {}
    for layer, why in obstacles:
        alike.setdefault(why, []).append(layer)
    found = "; ".join(
        f"layer{'s' * (len(several) > 1)} {describe(several)}, {why}"
        for why, several in alike.items()
    )
    return ValueError(
        "`model` must hold only what Keras 3 has too, or what `convert` is "
        "given `custom_objects` for. Received: a model of tf_keras with "
        f"{found}."
    )
