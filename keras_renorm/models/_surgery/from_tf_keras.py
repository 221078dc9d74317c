"""From the models of tf_keras (Keras 2) to Keras 3."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from keras_renorm._checks import python_value
from keras_renorm.models._layers.finding import (
    describe,
    find_layers,
    no_normalization,
)
from keras_renorm.models._layers.state import reload
from keras_renorm.models._surgery import tf_functions
from keras_renorm.models._surgery.tf_keras_layers import (
    Layers,
    NoCounterpartError,
    NotedError,
    in_order,
    inside_of,
    is_of_tf_keras,
    name_of,
    own_weights,
    plain,
    reason_of,
)
from keras_renorm.models.replacing import as_asked

# Where all is masked, the softmax is 0 in Keras 3 and 1 / n in Keras 2.
_OF_A_MASK = "with a mask"


def is_tf_keras(model: Any) -> bool:
    """Whether this is a model of tf_keras, which need not be installed."""
    tf_keras = sys.modules.get("tf_keras")
    return tf_keras is not None and isinstance(model, tf_keras.Model)


def translate(
    model: Any,
    normalization: Callable[[dict[str, Any]], layers.Layer],
    custom_objects: Mapping[str, Callable[..., Any]],
) -> keras.Model:
    """A Keras 3 model with the outputs of a tf_keras model in inference.

    Sequential and functional models, nested and with shared layers, of the
    layers that Keras 3 has too, and of operations on tensors. Weights, names
    (a slash becomes an underscore) and `trainable` flags are the model's; it is
    not compiled.

    `normalization` makes a layer from the configuration of one of batch
    normalization; `custom_objects` are those of `keras_renorm.convert`.

    Raises:
        ValueError: If the model has no graph, has no batch normalization, or
            holds parts without a counterpart, which are all listed.
    """
    if not _has_graph(model):
        raise ValueError(
            "`model` must be a built sequential or functional model. "
            f"Received: model={model.name}, of class "
            f"{type(model).__name__} of tf_keras."
        )
    with as_asked():
        return _Translation(normalization, custom_objects).run(model)


class _Translation(Layers):
    """What a model of tf_keras is in Keras 3: its layers, called alike."""

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
        trained = {id(weight) for weight in model.trainable_weights}
        for old in [model, *inside_of(model)]:
            if isinstance(self._new.get(id(old)), layers.Layer):
                own = {id(weight) for weight in old.trainable_weights}
                # In Keras 2 a layer inside a frozen one does not train,
                # whatever its flag.
                is_frozen = own and own.isdisjoint(trained)
                self._new[id(old)].trainable = old.trainable and not is_frozen
        return new

    def _copy_weights(self, old: Any, new: Any) -> None:
        """Copies the weights of a layer, and of those that it alone holds."""
        made = {id(copy) for copy in self._new.values()}
        pairs = [
            [
                (layer, own)
                for layer in in_order(whole)
                if (layer is whole or id(layer) not in others)
                and (own := own_weights(layer))
            ]
            for whole, others in ((old, self._new.keys()), (new, made))
        ]
        shapes = [
            [[_shape(weight) for weight in own] for _, own in several]
            for several in pairs
        ]
        if shapes[0] != shapes[1]:
            raise NoCounterpartError("whose weights are others there")
        for (source, weights), (its, copies) in zip(*pairs, strict=True):
            self._new[id(source)] = its
            for weight, copy in zip(weights, copies, strict=True):
                copy.assign(np.reshape(weight.numpy(), copy.shape))
            if not isinstance(its, layers.BatchNormalization):
                reload(its)
        if getattr(old, "stateful", False):
            for state, copy in zip(old.states, new.states, strict=True):
                copy.assign(state.numpy())

    def _graph(self, model: Any) -> keras.Model:
        if not _has_graph(model):
            raise NoCounterpartError(f"of class {type(model).__name__}")
        refused = None
        tensors: dict[int, Any] = {}
        for tensor, name in zip(model.inputs, model.input_names, strict=True):
            layer = tensor.node.layer
            if layer.ragged:
                raise NoCounterpartError(f"with a ragged input, {name}")
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
                        [*tensors.values(), *new_layers], name=name_of(model)
                    )
                except Exception as error:  # of which layer is seen below
                    refused = error
                else:
                    for node in nodes:
                        self._attempt(node.layer, self._check_output, node)
                    if self._obstacles:
                        raise NotedError
                    return new
        for node in nodes:
            self._follow(model, node, tensors)
        if self._obstacles:
            raise NotedError
        if refused is not None:
            raise refused
        return keras.Model(
            _mapped(model.input, tensors),
            _mapped(model.output, tensors),
            name=name_of(model),
        )

    def _check_output(self, node: Any) -> None:
        try:
            output = self._new[id(node.layer)].output
        except (AttributeError, ValueError):  # it is called elsewhere, too
            return
        _check(node, output)

    def _follow(self, model: Any, node: Any, tensors: dict[int, Any]) -> None:
        """Makes the call of a node of a graph."""
        expected = plain(node.outputs)
        outputs = self._attempt(node.layer, self._outputs, model, node, tensors)
        if outputs is None:  # go on: others may lack a counterpart, too
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
        if type(layer).__name__ in self._custom_objects:
            return new(*arguments, **named)
        bound = inspect.signature(layer.call).bind(*arguments, **named)
        flag = bound.arguments.get("training")
        if isinstance(flag, bool | int) and flag:
            raise NoCounterpartError(
                "called with training=True, which `predict` and `evaluate` of "
                "Keras 3 override"
            )
        if isinstance(layer, self._tf_keras.Model):
            return new(*arguments, **named)
        # Keras 3 has arguments of the same names, in another order.
        (_, first), *others = bound.arguments.items()
        given = dict(others)
        kinds = self._tf_keras.layers
        if isinstance(layer, kinds.MultiHeadAttention | kinds.Softmax) and (
            not {"attention_mask", "mask"}.isdisjoint(given)
        ):
            raise NoCounterpartError(_OF_A_MASK)
        if isinstance(layer, kinds.RNN | kinds.Bidirectional) and isinstance(
            first, list
        ):
            first, *given["initial_state"] = first
        if "initial_state" in given and _is_masked(
            tree.flatten(plain(node.call_args))[0]
        ):
            # Of several tensors Keras 3 does not take the mask by itself.
            given.setdefault("mask", getattr(first, "_keras_mask", None))
            if given["mask"] is None:
                raise NoCounterpartError("with states and a mask")
        lacking = [
            name
            for name in given
            if name not in inspect.signature(new.call).parameters
        ]
        if lacking:
            raise NoCounterpartError(f"called with {', '.join(lacking)}")
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
            operation = f"the operation tf.{symbol} {reason_of(error)}"
            raise NoCounterpartError(operation.strip()) from error

    def _shape_of(self, model: Any, tensor: Any) -> tuple[int | None, ...]:
        """The shape of a tensor of a model, `None` where examples change it.

        tf_keras does not know that of `tf.reshape(x, (tf.shape(y)[0], -1))`.
        """
        shape = tuple(tensor.shape)
        if shape.count(None) < 2 or any(
            None in tensor.shape[1:] for tensor in model.inputs
        ):
            return shape
        part = self._tf_keras.Model(model.inputs, tensor)
        shapes = []
        for examples in (2, 5, 11):  # sizes that are alike in all are fixed
            zeros = [
                np.zeros((examples, *tensor.shape[1:]), tensor.dtype.name)
                for tensor in model.inputs
            ]
            shapes.append(part(zeros, training=False).shape)
        return tuple(
            sizes[0] if len(set(sizes)) == 1 else None
            for sizes in zip(*shapes, strict=True)
        )


def _reserve_names(model: Any) -> None:
    """Lets Keras give no operation the name of a layer of the model."""
    for layer in [model, *inside_of(model)]:
        stem, _, number = name_of(layer).rpartition("_")
        if not number.isdecimal():
            stem, number = name_of(layer), "0"
        while keras.backend.get_uid(stem) <= int(number):
            pass


def _has_graph(model: Any) -> bool:
    """Whether a model is no more than its graph."""
    call = inspect.getattr_static(type(model), "call")
    return (
        hasattr(model, "_nodes_by_depth")
        and model.built
        and is_of_tf_keras(call)
    )


def _shape(weight: Any) -> list[int]:
    # With virtual batches, axes of length 1 are put in.
    return [size for size in weight.shape if size != 1]


def _check(node: Any, outputs: Any) -> None:
    """Raises where a layer of Keras 3 is seen to give something else."""
    tf_keras = sys.modules["tf_keras"]
    kinds = tf_keras.layers
    inputs = tree.flatten(plain((node.call_args, node.call_kwargs)))
    if isinstance(node.layer, kinds.MultiHeadAttention | kinds.Softmax) and any(
        map(_is_masked, inputs)
    ):
        raise NoCounterpartError(_OF_A_MASK)
    for new, old in zip(
        tree.flatten(outputs), tree.flatten(plain(node.outputs)), strict=True
    ):
        if len(new.shape) != len(old.shape) or any(
            one is not None and other is not None and one != other
            for one, other in zip(new.shape, old.shape, strict=True)
        ):
            raise NoCounterpartError(
                f"which gives {tuple(new.shape)} there, not {tuple(old.shape)}"
            )
        if _is_masked(new) != _is_masked(old) and not isinstance(
            node.layer,
            tf_keras.Model,  # Keras 3 knows its mask in a call only
        ):
            raise NoCounterpartError("which hands on another mask there")


def _is_masked(tensor: Any) -> bool:
    return getattr(tensor, "_keras_mask", None) is not None


def _stand_in(tensor: Any) -> keras.KerasTensor:
    return keras.KerasTensor(tuple(tensor.shape), tensor.dtype.name)


def _mapped(structure: Any, tensors: dict[int, Any]) -> Any:
    """Arguments of a call, with the tensors of the new model."""

    def leaf(value: Any) -> Any:
        if id(value) in tensors:
            return tensors[id(value)]
        if hasattr(value, "numpy"):
            value = value.numpy()
        return python_value(value)

    def slices(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"start", "stop", "step"}:
                return slice(value["start"], value["stop"], value["step"])
            return {name: slices(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(slices, value))
        return value

    return slices(tree.map_structure(leaf, plain(structure)))


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
