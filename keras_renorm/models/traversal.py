"""Finding layers in a model."""

from typing import Any, TypeVar

Layer = TypeVar("Layer")


def find_layers(model: Any, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind, the model included, at any depth, each once.

    Nested models, wrappers and the layers inside custom layers are searched;
    what holds a layer comes before it.
    Keras has no public way to reach the last; this is the one place that
    uses its `_flatten_layers`.
    """
    found: dict[int, Layer] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kind):
            found[id(layer)] = layer
    return list(found.values())
