"""Finding layers in a model, and their names."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import keras

from keras_renorm import arguments

Layer = TypeVar("Layer")
# Which layers a function of a model is about; `None` for all.
Choice: TypeAlias = (
    str
    | keras.layers.Layer
    | Callable[[Any], bool]
    | Iterable[str | keras.layers.Layer]
    | None
)

# A name that Keras gives: it counts the layers of a class in a session.
_GIVEN = re.compile(r"(batch_normalization|batch_renormalization)(?:_(\d+))?")


def find_layers(model: Any, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind, the model included, at any depth, each once.

    Nested models, wrappers and custom layers are searched; what holds a layer
    comes before it. Keras has no public way into custom layers; only this
    function uses its `_flatten_layers`. Every function of a model begins here,
    so the type of `model` is checked here.

    Raises:
        TypeError: If `model` is not of Keras.
    """
    arguments.check_model(model)
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
        id(variable) for each in inside(layer) for variable in each.variables
    }
    return [each for each in layer.variables if id(each) not in inner]


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
            whether it is meant; a layer of the model, or its name, or a list
            of such. A layer that holds others (a block, a nested model) means
            all batch normalization in it. Names are those of the layers, or
            those that reports and `get_statistics` give them.

    Returns:
        The layers, in the order of the model, each once. May be empty only
        where `layers` is `None`.

    Raises:
        TypeError: If `model` is not of Keras, or `layers` of no such kind.
        ValueError: If a name or a layer is not the model's, a name is that of
            two layers, or none is chosen.
    """
    normalization = find_layers(model, keras.layers.BatchNormalization)
    if layers is None:
        return normalization
    is_one = isinstance(layers, str | keras.layers.Layer)
    if not is_one and callable(layers):
        chosen = {id(each) for each in normalization if layers(each)}
    else:
        chosen = {
            id(each)
            for layer in _named(model, [layers] if is_one else layers)
            for each in find_layers(layer, keras.layers.BatchNormalization)
        }
    if not chosen:
        raise ValueError(
            "`layers` must choose batch normalization. Received: "
            f"layers={layers!r}, which chooses none of the "
            f"{len(normalization)} layers of model={model.name}."
        )
    return [each for each in normalization if id(each) in chosen]


def _named(model: Any, layers: Any) -> list[Any]:
    """The layers of a model that are meant by names, or by themselves."""
    layers = list(layers) if isinstance(layers, Iterable) else layers
    if not isinstance(layers, list) or not all(
        isinstance(each, str | keras.layers.Layer) for each in layers
    ):
        raise TypeError(
            "`layers` must be a function of a layer, a layer, a name, or a "
            f"list of layers and names. Received: layers={layers!r}."
        )
    held = find_layers(model, keras.layers.Layer)
    normalization = find_layers(model, keras.layers.BatchNormalization)
    named: dict[str, dict[int, Any]] = {}
    for name, layer in itertools.chain(
        ((layer.name, layer) for layer in held),
        zip(names_of(normalization), normalization, strict=True),
    ):
        named.setdefault(name, {})[id(layer)] = layer
    known = {id(layer) for layer in held}
    unknown = [
        each if isinstance(each, str) else each.name
        for each in layers
        if (
            each not in named
            if isinstance(each, str)
            else id(each) not in known
        )
    ]
    if unknown:
        raise ValueError(
            f"`layers` must be layers of the model. Received: {unknown}, which "
            f"model={model.name} has not."
        )
    ambiguous = [
        each
        for each in layers
        if isinstance(each, str) and len(named[each]) > 1
    ]
    if ambiguous:
        raise ValueError(
            "`layers` must say which: choose by the layers themselves, or by "
            f"a function. Received: {ambiguous}, each the name of several "
            f"layers of model={model.name}."
        )
    return [
        next(iter(named[each].values())) if isinstance(each, str) else each
        for each in layers
    ]


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
    """`require_layers`, and an error where one is not built."""
    chosen = require_layers(model, layers)
    unbuilt = [layer for layer in chosen if not layer.built]
    if unbuilt:
        raise ValueError(
            "`model` must be built: call it on data, or give it an `Input`. "
            f"Received: model={model.name}, with the layers "
            f"{describe(unbuilt)} not built."
        )
    return chosen


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


def names_of(layers: Iterable[Any]) -> list[str]:
    """Names for all batch normalization layers of a model, no two alike.

    The one naming of this package: `unique_names` of their own names.
    """
    return unique_names([layer.name for layer in layers])


def unique_names(names: Sequence[str]) -> list[str]:
    """Names in the place of names, no two alike; their own where that can be.

    - A name that somebody chose stays.
    - Names that Keras gave are counted from this model's first on, in their
      order: `batch_normalization_7` and `_9` become `batch_normalization` and
      `batch_normalization_1`. So they do not depend on what else was made in
      the session, and are their own where nothing else was.
    - Of equal names the first stays, and each other gets the lowest number
      that is free: `norm`, `norm_1`.

    Names that this returned stay as they are.
    """
    given = [_GIVEN.fullmatch(name) for name in names]
    numbers: dict[str, set[int]] = {}
    for match in given:
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2] or 0))
    order = {
        stem: {number: at for at, number in enumerate(sorted(taken_numbers))}
        for stem, taken_numbers in numbers.items()
    }
    stems, wanted = [], []
    for name, match in zip(names, given, strict=True):
        stems.append(match[1] if match else name)
        at = order[match[1]][int(match[2] or 0)] if match else 0
        wanted.append(f"{stems[-1]}_{at}" if at else stems[-1])
    return _numbered(wanted, stems)


def numbered(names: Sequence[str]) -> list[str]:
    """Names, no two alike: the first of equal ones stays, others get numbers.

    Each the lowest that is free: `norm`, `norm`, `norm_2` are `norm`,
    `norm_1`, `norm_2`.
    """
    return _numbered(names, names)


def _numbered(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    """`numbered`, where the numbers go after other names, the stems."""
    taken = set(names)
    seen: set[str] = set()
    unique = []
    for name, stem in zip(names, stems, strict=True):
        if name in seen:
            name = next(
                free
                for number in itertools.count(1)
                if (free := f"{stem}_{number}") not in taken
            )
            taken.add(name)
        seen.add(name)
        unique.append(name)
    return unique


def describe(layers: Sequence[Any]) -> str:
    """Names of layers, for messages: the first few."""
    names = [layer.name for layer in layers[:8]]
    return ", ".join(names) + (", ..." if len(layers) > 8 else "")
