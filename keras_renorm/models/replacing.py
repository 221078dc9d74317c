"""Models whose batch normalization is ours as they are made."""

import contextvars
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models._surgery.translation import (
    KERAS,
    check_arguments,
    check_class,
    without_renorm,
)

# Makes, from the arguments of Keras's layer, the one in its place; of this
# thread.
_maker: contextvars.ContextVar[type | None] = contextvars.ContextVar(
    "_maker", default=None
)
_lock = threading.Lock()
_scopes = 0


@contextmanager
def replacing(
    to: type[BatchNormalization] = BatchRenormalization,
    **layer_arguments: Any,
) -> Iterator[None]:
    """A scope in which Keras's batch normalization is made as ours.

    For models that make their normalization themselves: subclassed models,
    custom layers, backbones of keras-hub. In a `with` block, whatever calls
    `keras.layers.BatchNormalization(...)`, or reads one from a configuration,
    gets a layer of `to` with the same arguments, and the name that Keras would
    give:

        with keras_renorm.replacing(BatchNormalization):
            model = MyModel()

    Layers that exist already stay as they are (`convert` changes them), and so
    does a subclass of Keras's layer. Scopes may be nested; the innermost
    counts. A scope is that of its thread (and of the `asyncio` task); others
    make Keras's layers at the same time. `convert`, `revert` and `fold` do the
    same inside as outside. When the block ends, also by an exception, all is as
    before.

    **Save and load.** A file of a model that makes its own layers says how to
    make the model, and not of which class its normalization was made. So load
    in the same scope: `keras.saving.load_model`, or a new model and
    `load_weights`. Outside, the model has Keras's layers: files of
    `BatchRenormalization` do not fit them, which is an error, and files of
    `BatchNormalization` do.

    Args:
        to: The class to make: `BatchRenormalization` (default) or
            `BatchNormalization`, which takes weights of Keras's layer.
        **layer_arguments: Arguments for each new layer, in place of those that
            it is made with: `momentum=0.95`, `r_max=2.0`... No `name`.

    Raises:
        TypeError: If `to` is neither class, or an argument is of the wrong
            kind.
        ValueError: If an argument is out of range.

    Example:

    >>> class Block(keras.layers.Layer):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bn = keras.layers.BatchNormalization()
    ...
    ...     def call(self, inputs, training=None):
    ...         return self.bn(inputs, training=training)
    >>> with replacing(momentum=0.95):
    ...     block = Block()
    >>> type(block.bn).__name__, block.bn.momentum
    ('BatchRenormalization', 0.95)
    """
    maker = _maker_of(to, layer_arguments)
    with _hooked(), _makes(maker):
        yield


@contextmanager
def as_asked() -> Iterator[None]:
    """A scope in which Keras's layers are made as such, inside others too."""
    with _makes(None):
        yield


@contextmanager
def _makes(maker: type | None) -> Iterator[None]:
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


def _maker_of(to: Any, layer_arguments: dict[str, Any]) -> type:
    """A class that takes Keras's arguments and makes layers of `to`."""
    check_class(to)
    check_arguments(layer_arguments, to, "replacing", ["to"])
    # Raises; with a name, so that Keras does not count it.
    to(name="checked", **layer_arguments)
    signature = inspect.signature(KERAS.__init__)

    class Maker(to):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            signature.bind(self, *arguments, **named)  # raises as Keras does
            given = {**signature.bind(self, *arguments).arguments, **named}
            given.pop("self")
            super().__init__(
                **{
                    **without_renorm(given, to, layer_arguments),
                    **layer_arguments,
                }
            )
            self.__class__ = to

    # Keras names layers after their class.
    Maker.__name__ = KERAS.__name__
    return Maker


@contextmanager
def _hooked() -> Iterator[None]:
    """Lets Keras's class ask `_maker` while there are scopes."""
    global _scopes
    with _lock:
        _scopes += 1
        if _scopes == 1:
            KERAS.__new__ = _new_of(KERAS.__new__)
    try:
        yield
    finally:
        with _lock:
            _scopes -= 1
            if not _scopes:
                del KERAS.__new__  # it inherits one again


def _new_of(inherited: Callable[..., Any]) -> Callable[..., Any]:
    # Not `__init__`: of what `__new__` returns, Python calls that of its class.
    def __new__(cls: type, *arguments: Any, **named: Any) -> Any:  # noqa: N807
        maker = _maker.get() if cls is KERAS else None
        return inherited(maker or cls, *arguments, **named)

    return __new__
