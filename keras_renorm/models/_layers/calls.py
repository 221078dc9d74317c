"""Calls of layers, replaced for a while."""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from keras_renorm.layers.batch_normalization import BatchNormalization

_PLAIN = (BatchNormalization, keras.layers.BatchNormalization)


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


@contextmanager
def replaced_bases(
    layers: Sequence[Any], make: Callable[[Any, Callable[..., Any]], Any]
) -> Iterator[None]:
    """Puts `make(layer, call)` in the place of the `call` that `super()` finds.

    In batch normalization of a class with a `call` of its own, which need not
    hand on the inputs or the mask that it gets.
    """
    owned = [(layer, type(layer)) for layer in layers if has_own_call(layer)]
    try:
        for layer, own in owned:
            layer.__class__ = _with_base(layer, own, make)
        yield
    finally:
        for layer, own in owned:
            layer.__class__ = own


def _with_base(
    layer: Any, own: type, make: Callable[[Any, Callable[..., Any]], Any]
) -> type:
    base: Any = next(parent for parent in own.__mro__ if parent in _PLAIN)
    replaced = make(layer, types.MethodType(base.call, layer))

    class Between(base):
        def call(self, *arguments: Any, **named: Any) -> Any:
            return replaced(*arguments, **named)

    # Python's order of classes puts it between the user's and `base`.
    return types.new_class(own.__name__, (own, Between))


def has_own_call(layer: Any) -> bool:
    """Whether the class of batch normalization is the user's, with a `call`."""
    return type(layer).call not in [plain.call for plain in _PLAIN]
