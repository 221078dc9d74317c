"""Finding layers in a model."""

from typing import Any, TypeVar

from keras_renorm import arguments

Layer = TypeVar("Layer")


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
