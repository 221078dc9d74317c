"""Finding layers in a model, and their names."""

import difflib
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import keras

from keras_renorm._checks import check_model

Layer = TypeVar("Layer")
# Which layers a function of a model is about; `None` for all.
Chooser: TypeAlias = (
    str | keras.layers.Layer | type[keras.layers.Layer] | Callable[[Any], bool]
)
Choice: TypeAlias = Chooser | Iterable[Chooser] | None
# An error lists all names of so many layers, and the nearest of more.
LISTED = 12


def find_layers(model: Any, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind, the model included, at any depth, each once.

    Nested models, wrappers and custom layers are searched; a holder comes
    before the layers in it. Keras has no public way into custom layers; only
    this file uses its `_flatten_layers`. Every function of a model begins here,
    so the type of `model` is checked here.

    Raises:
        TypeError: If `model` is not of Keras.
    """
    check_model(model)
    found: dict[int, Layer] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kind):
            found[id(layer)] = layer
    return list(found.values())


def inside(layer: Any) -> list[Any]:
    """The layers that a layer holds, at any depth."""
    return find_layers(layer, keras.layers.Layer)[1:]


def own_variables(layer: Any) -> list[keras.Variable]:
    """The variables of a layer that belong to no layer inside it."""
    inner = {
        id(variable) for held in inside(layer) for variable in held.variables
    }
    return [
        variable for variable in layer.variables if id(variable) not in inner
    ]


def has_graph(layer: Any) -> bool:
    """Whether a layer is a sequential or a functional model."""
    return isinstance(layer, keras.Sequential | _functional_class())


@functools.cache
def _functional_class() -> type:
    # Keras does not export it.
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, keras.layers.Identity()(inputs)))


def choose_layers(model: Any, layers: Choice = None) -> list[Any]:
    """The batch normalization of a model, Keras's and ours, or some of it.

    The one place that says what an argument `layers` means.

    Args:
        model: A model.
        layers: `None` (default) for all; a function of a layer that says
            whether it is meant; a class, for all layers of it; a layer of the
            model, or its name (`names_of`), or its path; or several of such. A
            layer that holds others (a block, a nested model) means all batch
            normalization in it.

    Returns:
        The layers, in the order of the model, each once. May be empty only
        where `layers` is `None`.

    Raises:
        TypeError: If `model` is not of Keras, or `layers` of no such kind.
        ValueError: If a name or a layer is not the model's, a name is that of
            several layers, or none is chosen.
    """
    normalization = find_layers(model, keras.layers.BatchNormalization)
    if layers is None:
        return normalization
    if isinstance(layers, Iterable) and not _is_chooser(layers):
        layers = list(layers)
    choosers: list[Any] = layers if isinstance(layers, list) else [layers]
    if not all(map(_is_chooser, choosers)):
        raise TypeError(
            "`layers` must be a function of a layer, a class of layers, a "
            "layer, a name, or a list of such. Received: "
            f"layers={layers!r}."
        )
    named = _named(model, choosers)
    chosen: set[int] = set()
    for chooser in choosers:
        if isinstance(chooser, str | keras.layers.Layer):
            meant = [named[chooser] if isinstance(chooser, str) else chooser]
        elif isinstance(chooser, type):
            meant = find_layers(model, chooser)
        else:
            meant = [layer for layer in normalization if chooser(layer)]
        for layer in meant:
            chosen.update(
                map(id, find_layers(layer, keras.layers.BatchNormalization))
            )
    if not chosen:
        raise ValueError(
            "`layers` must choose batch normalization. Received: "
            f"layers={layers!r}, which chooses none of the "
            f"{len(normalization)} layers of model={model.name}."
        )
    return [layer for layer in normalization if id(layer) in chosen]


def _is_chooser(layers: Any) -> bool:
    return isinstance(layers, str) or callable(layers)  # as layers are


def _named(model: Any, choosers: Sequence[Any]) -> dict[str, Any]:
    """The layers that are meant by names; an error for unknown ones."""
    ways = _ways(model)
    held = find_layers(model, keras.layers.Layer)
    found: dict[str, list[Any]] = {}
    for layer in held[1:]:
        for name in {layer.name, "/".join(ways[id(layer)])}:
            found.setdefault(name, []).append(layer)
    # Only one layer has such a name, even where it is part of others.
    found |= {
        name: [layer]
        for name, layer in zip(names_of(model, held[1:]), held[1:], strict=True)
    }
    found.setdefault(model.name, [model])
    unknown = [
        chooser
        for chooser in choosers
        if (isinstance(chooser, str) and chooser not in found)
        or (isinstance(chooser, keras.layers.Layer) and id(chooser) not in ways)
    ]
    if unknown:
        raise ValueError(
            f"`layers` must be layers of the model. Received: {unknown}, "
            f"which are not in model={model.name}. {_known(model, unknown)}"
        )
    names = [chooser for chooser in choosers if isinstance(chooser, str)]
    for name in names:
        if len(found[name]) > 1:
            raise ValueError(
                "`layers` must say which: several layers have the name. "
                f"Received: {name!r}, in model={model.name} the name of "
                f"{describe(found[name], model)}."
            )
    return {name: found[name][0] for name in names}


def _known(model: Any, unknown: Sequence[Any]) -> str:
    """The names of a model's normalization, for the error of a name."""
    normalization = find_layers(model, keras.layers.BatchNormalization)
    names = names_of(model, normalization)
    if len(names) <= LISTED:
        return f"Its batch normalization: {', '.join(names) or 'none'}."
    blocks = [
        layer
        for layer in find_layers(model, keras.layers.Layer)[1:]
        if find_layers(layer, keras.layers.BatchNormalization)
    ]
    near = [
        name
        for chooser in unknown
        for name in difflib.get_close_matches(
            chooser if isinstance(chooser, str) else chooser.name,
            names_of(model, blocks),
            n=4,
            cutoff=0,
        )
    ]
    return (
        f"It has {len(names)} layers of batch normalization; nearest: "
        f"{', '.join(dict.fromkeys(near))}."
    )


def require_layers(model: Any, layers: Choice = None) -> list[Any]:
    """`choose_layers`, and an error where there are none."""
    chosen = choose_layers(model, layers)
    if not chosen:
        raise no_normalization(model)
    return chosen


def no_normalization(model: Any) -> ValueError:
    """The error for a model, of Keras or tf_keras, that does not normalize."""
    return ValueError(
        "`model` must have a batch normalization layer. Received: "
        f"model={model.name}, which has none."
    )


def built_layers(model: Any, layers: Choice = None) -> list[Any]:
    """`require_layers`, and an error where they are not built.

    A model that has run may hold layers that it never calls. They are left out.

    Warns:
        UserWarning: The layers that were left out.
    """
    chosen = require_layers(model, layers)
    unbuilt = [layer for layer in chosen if not layer.built]
    if len(unbuilt) == len(chosen) or (unbuilt and not model.built):
        raise ValueError(
            "`model` must be built: call it on data, or give it an `Input`. "
            f"Received: model={model.name}, with the layers "
            f"{describe(unbuilt, model)} not built."
        )
    if unbuilt:
        warnings.warn(
            "Layers that the model never called are left out: "
            f"{describe(unbuilt, model)}, not built.",
            stacklevel=3,
        )
    return [layer for layer in chosen if layer.built]


def check_no_keras_renorm(layers: list[Any]) -> None:
    """Raises if a layer's moving statistics are not averages of a batch's."""
    renormalized = [
        layer for layer in layers if getattr(layer, "renorm", False)
    ]
    if renormalized:
        raise ValueError(
            "`model` must have no Keras layer with `renorm=True`, whose "
            "moving statistics follow from others; `keras_renorm.convert` "
            f"it. Received: layers {describe(renormalized)}."
        )


def names_of(model: Any, layers: Iterable[Any]) -> list[str]:
    """Names of layers of a model in this package: no two alike.

    A layer is called `layer.name`. Where another layer of the model, of
    whatever class, has the same name, it is called by its path: the names of
    the layers that hold it, the outermost first (the model is not among them),
    and its own, as in "encoder/block/bn". Of several ways to a layer, the
    path is the first that Keras finds. Layers with the same path get numbers,
    in the order in which their holder got them: "block/bn:1", "block/bn:2". No
    name of Keras has a slash, so no path is a name of another layer.
    """
    ways = _ways(model)
    count = Counter(way[-1] for way in ways.values() if way)
    names = {
        at: "/".join(way if count[way[-1]] > 1 else way[-1:])
        for at, way in ways.items()
        if way
    }
    alike = Counter(names.values())
    taken = set(alike)
    for at, name in names.items():
        if alike[name] > 1:
            names[at] = next(
                free
                for number in itertools.count(1)
                if (free := f"{name}:{number}") not in taken
            )
            taken.add(names[at])
    return [names.get(id(layer), layer.name) for layer in layers]


def _ways(model: Any) -> dict[int, tuple[str, ...]]:
    """By `id`, the names on the way from a model to each layer in it.

    What one layer holds is in the order in which it got it.
    """
    ways: dict[int, tuple[str, ...]] = {id(model): ()}
    for layer in find_layers(model, keras.layers.Layer):
        for held in layer._flatten_layers(include_self=False, recursive=False):
            ways.setdefault(id(held), (*ways[id(layer)], held.name))
    return ways


def describe(layers: Sequence[Any], model: Any = None) -> str:
    """The first few names of layers, for messages; `names_of` where known."""
    shown = layers[:8]
    names = (
        [layer.name for layer in shown]
        if model is None
        else names_of(model, shown)
    )
    return ", ".join(names) + (", ..." if len(layers) > 8 else "")
