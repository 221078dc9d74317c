"""A copy of a model with other layers in the place of some."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import keras

from keras_renorm.models.configuration import (
    Configurations,
    compile_alike,
    name_in,
)
from keras_renorm.models.replacing import as_asked
from keras_renorm.models.state import copy_state, not_made_anew
from keras_renorm.models.traversal import find_layers

# From a layer and its configuration to class and configuration of the new one.
Replace = Callable[[Any, dict[str, Any]], tuple[type, dict[str, Any]]]


def describe(layers: Sequence[Any]) -> str:
    """Names of layers, for messages: the first few."""
    names = [layer.name for layer in layers[:8]]
    return ", ".join(names) + (", ..." if len(layers) > 8 else "")


def has_graph(layer: Any) -> bool:
    """Whether a layer is a sequential or a functional model."""
    return isinstance(layer, keras.Sequential | _functional_class())


def check_has_graph(model: Any) -> None:
    """Raises if the layers of a model cannot be replaced."""
    if has_graph(model):
        return
    held = find_layers(model, keras.layers.BatchNormalization)
    layers = f", with the layers {describe(held)}" if held else ""
    raise ValueError(
        "`model` must be a sequential or a functional model: of another no "
        "copy with other layers can be made (`keras_renorm.convert` changes "
        "any with in_place=True). Received: model="
        f"{model.name}, of class {type(model).__name__}{layers}."
    )


@functools.cache
def _functional_class() -> type:
    # Keras does not export it.
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, keras.layers.Identity()(inputs)))


def rebuild(
    model: keras.Model,
    layers: Iterable[Any],
    replace: Replace,
    dropped: Collection[int] = (),
) -> tuple[keras.Model, dict[int, Any]]:
    """A copy of a sequential or functional model, some layers replaced.

    Reaches nested models, shared layers, and what wrappers and custom layers
    keep in their configuration. Names, `trainable` flags and sharing are
    those of the model; all state is copied, except that of the layers that
    are replaced. Functions that the model was made or compiled with are the
    copy's too: no file is written, so none need be registered. If the model is
    compiled, the copy is compiled alike, with a new optimizer. A functional
    model of a class of its own becomes a plain one.

    Args:
        model: The model; it is not changed.
        layers: The layers of the model that are replaced.
        replace: From such a layer and its configuration to the class and the
            configuration of the new one.
        dropped: The `id` of layers to leave out. Each must be called once, in
            a graph, with one tensor.

    Returns:
        `(copy, copies)`: the model, and for the `id` of each layer of the old
        one the layer in its place.

    Raises:
        ValueError: If the model has no graph, or has layers of the kinds out
            of reach.
    """
    check_has_graph(model)
    with as_asked():
        return _rebuild(model, list(layers), replace, dropped)


def _rebuild(
    model: keras.Model,
    layers: Sequence[Any],
    replace: Replace,
    dropped: Collection[int],
) -> tuple[keras.Model, dict[int, Any]]:
    replaced = {id(layer) for layer in layers}
    configurations = Configurations()
    copies: dict[int, Any] = {}
    stand_ins: set[int] = set()

    def copy(layer: Any) -> Any:
        # Remembered across nested models, so that what they share they share.
        if id(layer) not in copies:
            copies[id(layer)] = new_of(layer)
        return copies[id(layer)]

    def new_of(layer: Any) -> Any:
        if id(layer) in dropped:
            new = keras.layers.Identity(name=layer.name)
            stand_ins.add(id(new))
            return new
        if not isinstance(layer, keras.layers.Layer):  # an operation: x + y
            return type(layer).from_config(layer.get_config())
        if id(layer) in replaced:
            return configurations.make(
                *replace(layer, configurations.of(layer))
            )
        if has_graph(layer):
            return clone(layer)
        if any(id(each) in replaced for each in _inside(layer)):
            return _rewritten(layer, replaced, replace, configurations)
        return configurations.alike(layer)

    def call(layer: Any, *arguments: Any, **named: Any) -> Any:
        if id(layer) in stand_ins:
            return arguments[0]
        return layer(*arguments, **named)

    def clone(nested: keras.Model) -> keras.Model:
        if isinstance(nested, keras.Sequential):
            kept = [
                new
                for new in map(copy, nested.layers)
                if id(new) not in stand_ins
            ]
            if hasattr(nested, "inputs"):
                kept = [_new_inputs(nested, nested.inputs[0]), *kept]
            return keras.Sequential(kept, name=nested.name)
        # Its graph alone: the constructor of a class of its own may take other
        # arguments, and what is compiled is cloned by names.
        graph = keras.Model(nested.input, nested.output, name=nested.name)
        return keras.models.clone_model(
            graph,
            input_tensors=_new_inputs(nested, nested.input),
            clone_function=copy,
            call_function=call,
        )

    new_model = clone(model)
    copies[id(model)] = new_model
    for layer in find_layers(model, keras.layers.Layer):
        if id(layer) in copies and not has_graph(layer):
            _pair_contents(layer, copies)
    missed = [layer for layer in layers if id(layer) not in copies]
    if missed:
        raise _out_of_reach(missed)
    _copy_state(model, replaced, dropped, copies)
    for each in find_layers(model, keras.Model):
        # The last thing: now it is known what trains.
        if each.compiled and id(each) in copies:
            compile_alike(each, copies[id(each)])
    return new_model, copies


def _new_inputs(model: keras.Model, inputs: Any) -> Any:
    """Inputs for a copy of a model.

    Of the same names: those that `clone_model` makes have their tensors'.
    """
    layers = {
        id(layer.output): layer
        for layer in find_layers(model, keras.layers.InputLayer)
    }
    return keras.tree.map_structure(
        lambda tensor: (
            keras.layers.InputLayer.from_config(
                layers[id(tensor)].get_config()
            ).output
        ),
        inputs,
    )


def _inside(layer: Any) -> list[Any]:
    """The layers that a layer holds, at any depth."""
    return find_layers(layer, keras.layers.Layer)[1:]


def _rewritten(
    layer: Any,
    replaced: Collection[int],
    replace: Replace,
    configurations: Configurations,
) -> Any:
    """A layer that holds others, from its configuration with others."""
    held = [each for each in _inside(layer) if id(each) in replaced]
    # In a configuration a layer is known by its class and its name.
    wanted = {(type(each).__name__, each.name) for each in held}
    kept = {
        (type(each).__name__, each.name)
        for each in _inside(layer)
        if id(each) not in replaced
    }
    if wanted & kept:
        raise _out_of_reach(held)
    found: list[tuple[str, str]] = []

    def rewrite(node: Any) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(map(rewrite, node))
        if not isinstance(node, dict):
            return node
        key = (node.get("class_name"), name_in(node))
        if key in wanted:
            # The rest of the node says how it was built and called.
            new = configurations.serialized(
                configurations.make(
                    *replace(configurations.read(node), node["config"])
                )
            )
            new.pop("build_config", None)
            found.append(key)
            return {**node, **new}
        return {key: rewrite(value) for key, value in node.items()}

    try:
        new = configurations.make(
            type(layer), rewrite(configurations.of(layer))
        )
    except (NotImplementedError, TypeError) as error:
        raise _out_of_reach(held) from error
    if len(found) < len(held):
        raise _out_of_reach(held)
    return new


def _out_of_reach(layers: Sequence[Any]) -> ValueError:
    return ValueError(
        "`model` must hold its batch normalization where it can be replaced: "
        "in its graph, or, each under a name of its own, in what its layers' "
        "`get_config` returns. `keras_renorm.convert` reaches the others with "
        "in_place=True. Received: "
        f"a model with these inside custom layers: {describe(layers)}."
    )


def _pair_contents(layer: Any, copies: dict[int, Any]) -> None:
    """Finds the copies of the layers inside a wrapper or custom layer."""
    inner = [_inside(each) for each in (layer, copies[id(layer)])]
    if len(inner[0]) != len(inner[1]):
        raise not_made_anew(layer)
    for old, new in zip(*inner, strict=True):
        copies.setdefault(id(old), new)


def _copy_state(
    model: keras.Model,
    replaced: Collection[int],
    dropped: Collection[int],
    copies: dict[int, Any],
) -> None:
    """Copies weights and flags; containers come before what they hold."""
    for layer in find_layers(model, keras.layers.Layer):
        if id(layer) not in copies or id(layer) in dropped:
            continue
        new = copies[id(layer)]
        new.trainable = layer.trainable
        if id(layer) not in replaced:
            copy_state(layer, new)
