"""A copy of a model with other layers in the place of some."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import keras

from keras_renorm.models.configuration import (
    Configurations,
    compile_alike,
    name_in,
)
from keras_renorm.models.finding import (
    describe,
    find_layers,
    has_graph,
    inside,
)
from keras_renorm.models.replacing import as_asked
from keras_renorm.models.state import copy_state, not_made_anew

# From a layer and its configuration to class and configuration of the new one.
Replace = Callable[[Any, dict[str, Any]], tuple[type, dict[str, Any]]]


def check_has_graph(model: Any) -> None:
    """Raises if the layers of a model cannot be replaced."""
    if has_graph(model):
        return
    held = find_layers(model, keras.layers.BatchNormalization)
    layers = f", with the layers {describe(held, model)}" if held else ""
    raise ValueError(
        "`model` must be a sequential or a functional model: of another no "
        "copy with other layers can be made (`keras_renorm.convert` changes "
        "any with in_place=True). Received: model="
        f"{model.name}, of class {type(model).__name__}{layers}."
    )


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
        return _Rebuilding(model, list(layers), replace, dropped).run()


class _Rebuilding:
    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[Any],
        replace: Replace,
        dropped: Collection[int],
    ) -> None:
        self._model = model
        self._layers = layers
        self._replaced = {id(layer) for layer in layers}
        self._replace = replace
        self._dropped = dropped
        self._configurations = Configurations()
        # By the `id` of the old layer; across nested models, so that what they
        # share they share.
        self._copies: dict[int, Any] = {}
        # By their own `id`, layers that take the place of dropped ones.
        self._stand_ins: set[int] = set()

    def run(self) -> tuple[keras.Model, dict[int, Any]]:
        new_model = self._clone(self._model)
        self._copies[id(self._model)] = new_model
        held = find_layers(self._model, keras.layers.Layer)
        for layer in held:
            if id(layer) in self._copies and not has_graph(layer):
                self._pair_contents(layer)
        missed = [each for each in self._layers if id(each) not in self._copies]
        if missed:
            raise _out_of_reach(missed)
        self._copy_state(held)
        for each in held:
            # The last thing: now it is known what trains.
            new = self._copies.get(id(each))
            if (
                isinstance(each, keras.Model)
                and each.compiled
                and new is not None
            ):
                compile_alike(each, new)
        return new_model, self._copies

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._new_of(layer)
        return self._copies[id(layer)]

    def _new_of(self, layer: Any) -> Any:
        if id(layer) in self._dropped:
            new = keras.layers.Identity(name=layer.name)
            self._stand_ins.add(id(new))
            return new
        if not isinstance(layer, keras.layers.Layer):  # an operation: x + y
            return type(layer).from_config(layer.get_config())
        if id(layer) in self._replaced:
            config = self._configurations.of(layer)
            return self._configurations.make(*self._replace(layer, config))
        if has_graph(layer):
            return self._clone(layer)
        held = inside(layer)
        if any(id(each) in self._replaced for each in held):
            return self._rewritten(layer, held)
        return self._configurations.alike(layer)

    def _call(self, layer: Any, *arguments: Any, **named: Any) -> Any:
        if id(layer) in self._stand_ins:
            return arguments[0]
        return layer(*arguments, **named)

    def _clone(self, nested: keras.Model) -> keras.Model:
        if isinstance(nested, keras.Sequential):
            kept = [
                new
                for new in map(self._copy, nested.layers)
                if id(new) not in self._stand_ins
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
            clone_function=self._copy,
            call_function=self._call,
        )

    def _rewritten(self, layer: Any, inner: Sequence[Any]) -> Any:
        """A layer that holds others, from its configuration with others."""
        held = [each for each in inner if id(each) in self._replaced]
        # In a configuration a layer is known by its class and its name.
        wanted = {(type(each).__name__, each.name) for each in held}
        kept = {
            (type(each).__name__, each.name)
            for each in inner
            if id(each) not in self._replaced
        }
        if wanted & kept:
            raise _out_of_reach(held)
        found: list[tuple[str, str]] = []
        configurations = self._configurations

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
                        *self._replace(
                            configurations.read(node), node["config"]
                        )
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

    def _pair_contents(self, layer: Any) -> None:
        """Finds the copies of the layers inside a wrapper or custom layer."""
        old, new = inside(layer), inside(self._copies[id(layer)])
        if len(old) != len(new):
            raise not_made_anew(layer)
        for before, after in zip(old, new, strict=True):
            self._copies.setdefault(id(before), after)

    def _copy_state(self, layers: Sequence[Any]) -> None:
        """Copies weights and flags; containers come before what they hold."""
        for layer in layers:
            if id(layer) not in self._copies or id(layer) in self._dropped:
                continue
            new = self._copies[id(layer)]
            new.trainable = layer.trainable
            if id(layer) not in self._replaced:
                copy_state(layer, new)


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


def _out_of_reach(layers: Sequence[Any]) -> ValueError:
    return ValueError(
        "`model` must hold its batch normalization where it can be replaced: "
        "in its graph, or, each under a name of its own, in what its layers' "
        "`get_config` returns. `keras_renorm.convert` reaches the others with "
        "in_place=True. Received: "
        f"a model with these inside custom layers: {describe(layers)}."
    )
