"""Calls of layers, replaced for a while."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from keras_renorm.layers.batch_normalization import BatchNormalization


@contextmanager
def replaced_calls(
    layers: Sequence[Any], make: Callable[[Any, Callable[..., Any]], Any]
) -> Iterator[None]:
    """Puts `make(layer, call)` in the place of each layer's `call`.

    At the end each `call` is what it was before, also after an exception.
    """
    before = {id(layer): vars(layer).get("call") for layer in layers}
    try:
        for layer in layers:
            layer.call = make(layer, layer.call)
        yield
    finally:
        for layer in layers:
            if before[id(layer)] is not None:
                layer.call = before[id(layer)]
            elif "call" in vars(layer):
                del layer.call  # that of the class is there again


def has_own_call(layer: Any) -> bool:
    """Whether the class of batch normalization is the user's, with a `call`."""
    plain = (keras.layers.BatchNormalization.call, BatchNormalization.call)
    return type(layer).call not in plain
