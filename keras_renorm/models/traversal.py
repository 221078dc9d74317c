"""Finding layers in a model."""

from typing import Any, TypeVar

Layer = TypeVar("Layer")


def find_layers(model: Any, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind, at any depth, each once, in order of creation.

    Nested models, wrappers and the layers inside custom layers included.
    Keras has no public way to reach the last; this is the one place that
    uses its `_flatten_layers`.
    """
    found: dict[int, Layer] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kind):
            found[id(layer)] = layer
    return list(found.values())
