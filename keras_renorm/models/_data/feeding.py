"""Inputs of a model from a batch, which its own steps may change."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras

from keras_renorm._backend import watching
from keras_renorm.models._data.arrays import check_inputs
from keras_renorm.models._layers.calls import replaced_calls

# In this order: serving first, training last.
_STEPS = ("predict_step", "test_step", "train_step")


class Feed(NamedTuple):
    """The inputs of a model from a batch, and labels and weights.

    Attributes:
        x: Inputs of the model.
        named: Other arguments of its call, but `training`.
        y: Labels, or `None`.
        sample_weight: Their weights, or `None`.
    """

    x: Any
    named: dict[str, Any]
    y: Any
    sample_weight: Any


class _TrainsOthersError(BaseException):
    """An optimizer was called first: the step trains parts of the model."""


class _Called(BaseException):
    """The model was called: the step has done its part."""

    def __init__(self, x: Any, named: dict[str, Any]) -> None:
        super().__init__()
        self.x, self.named = x, named


class Feeder:
    """Inputs of a model, as its own steps make them of batches.

    A `predict_step`, `test_step` or `train_step` of one's own may divide by
    255, or pick parts of the data. It runs until it calls the model, and no
    further; its assignments are dropped.

    Warns:
        UserWarning: If the last of these steps raises for data of this form.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._steps = [name for name in _STEPS if _is_own(model, name)]
        self._form: int | None = None

    def __call__(self, batch: Any) -> Feed:
        """The inputs from a batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        called = self._called(batch)
        if called is not None:
            x = called.x
        check_inputs(self._model, x)
        return Feed(x, {} if called is None else called.named, y, sample_weight)

    def _called(self, batch: Any) -> "_Called | None":
        given = batch if isinstance(batch, tuple) else (batch,)
        # A step may unpack a batch without labels, or want it bare.
        forms = [
            batch,
            *((*given, *[None] * more) for more in (1, 2)),
            given[0],
        ]
        error: Exception | None = None
        while self._steps:
            name = self._steps[0]
            for at in range(4) if self._form is None else (self._form,):
                try:
                    called = _first_call(self._model, name, forms[at])
                except Exception as raised:
                    if self._form is not None:  # it took other batches
                        raise
                    error = raised
                    continue
                error = None
                if called is None:  # it trains parts of the model
                    break
                if _is_row(called.x, forms[at]):
                    continue
                self._form = at
                return called
            del self._steps[0]
        if error is not None:
            warnings.warn(
                f"`{name}` of model={self._model.name} does not take this "
                f"data, which goes in as it is. {type(error).__name__}: "
                f"{error}",
                stacklevel=2,
            )
        return None


def _is_own(model: Any, name: str) -> bool:
    return name in vars(model) or getattr(type(model), name) is not getattr(
        keras.Model, name
    )


def _is_row(x: Any, batch: Any) -> bool:
    """Whether a step took an example of a bare batch for all inputs.

    It unpacks inputs and labels, which two examples may be, too.
    """
    return (
        hasattr(x, "shape")
        and hasattr(batch, "shape")
        and tuple(x.shape) == tuple(batch.shape[1:])
    )


def _first_call(model: Any, name: str, batch: Any) -> _Called | None:
    """The arguments of a step's call of the model; `None` without one."""
    try:
        with keras.StatelessScope(), _stopped(model):
            getattr(model, name)(*watching.step_arguments(model, name, batch))
    except _Called as called:
        return called
    except _TrainsOthersError:
        pass
    return None


@contextmanager
def _stopped(model: Any) -> Iterator[None]:
    """Ends a step where it calls the model, or an optimizer, which assigns."""
    apply = keras.optimizers.Optimizer.apply

    def call(x: Any, *others: Any, **named: Any) -> Any:
        named.pop("training", None)
        named = {
            key: value for key, value in named.items() if value is not None
        }
        raise _Called(x, named)

    def stop(*_: Any, **__: Any) -> None:
        raise _TrainsOthersError

    keras.optimizers.Optimizer.apply = stop
    try:
        with replaced_calls([model], lambda *_: call):
            yield
    finally:
        keras.optimizers.Optimizer.apply = apply
