"""Finding layers in a model, and their names."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from keras_renorm import arguments

Layer = TypeVar("Layer")

# A name that Keras gives: it counts the layers of a class in a session.
_GIVEN = re.compile(r"(batch_normalization|batch_renormalization)(?:_(\d+))?")


def find_layers(model: Any, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind, the model included, at any depth, each once.

    Nested models, wrappers and the layers inside custom layers are searched;
    what holds a layer comes before it.
    Keras has no public way to reach the last; this is the one place that
    uses its `_flatten_layers`. Every function of a model begins here, so this
    is where it is checked that it is one.

    Raises:
        TypeError: If `model` is not of Keras.
    """
    arguments.check_model(model)
    found: dict[int, Layer] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kind):
            found[id(layer)] = layer
    return list(found.values())


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
    taken = set(wanted)
    seen: set[str] = set()
    unique = []
    for name, stem in zip(wanted, stems, strict=True):
        if name in seen:
            name = next(
                numbered
                for number in itertools.count(1)
                if (numbered := f"{stem}_{number}") not in taken
            )
            taken.add(name)
        seen.add(name)
        unique.append(name)
    return unique
