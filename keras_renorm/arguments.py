"""Checks of arguments: the error names the argument, the rule, the value."""

import math
import numbers
import os
from typing import Any

import keras
import numpy as np


def plain(value: Any) -> Any:
    """A scalar of NumPy, or an array of no axes, as a value of Python."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def is_number(value: Any) -> bool:
    """Whether `value` is a real number (a bool is not)."""
    return isinstance(plain(value), numbers.Real) and not is_boolean(value)


def is_boolean(value: Any) -> bool:
    """Whether `value` is True or False, of Python or of NumPy."""
    return isinstance(plain(value), bool)


def check_number(name: str, value: Any) -> float:
    """`value` as a float, infinities allowed."""
    value = plain(value)
    if not is_number(value):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r}."
        )
    if math.isnan(value):
        raise ValueError(f"`{name}` must not be NaN. Received: {name}={value}.")
    return float(value)


def check_integer(name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int of at least `minimum`."""
    value = plain(value)
    if not isinstance(value, numbers.Integral) or is_boolean(value):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r}."
        )
    if minimum is not None and value < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value}."
        )
    return int(value)


def check_at_least(
    name: str, value: Any, minimum: float, *, is_finite: bool = False
) -> float:
    """`value` as a float of at least `minimum`, infinity if allowed."""
    number = check_number(name, value)
    if number < minimum or (is_finite and number == math.inf):
        rule = "finite and at least" if is_finite else "at least"
        raise ValueError(
            f"`{name}` must be {rule} {minimum:g}. Received: {name}={value}."
        )
    return number


def check_boolean(name: str, value: Any) -> bool:
    """`value` as a bool."""
    if not is_boolean(value):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r}."
        )
    return bool(value)


def check_momentum(value: Any) -> float:
    """`value` as a float in [0, 1]."""
    momentum = check_number("momentum", value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"`momentum` must be in [0, 1]. Received: momentum={value}."
        )
    return momentum


def check_epsilon(value: Any) -> float:
    """`value` as a positive, finite float."""
    epsilon = check_number("epsilon", value)
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"`epsilon` must be positive and finite. Received: epsilon={value}."
        )
    return epsilon


def check_model(model: Any) -> Any:
    """`model`, if it is of Keras 3; a layer is accepted, too."""
    if not isinstance(model, keras.layers.Layer):
        if isinstance(model, str | os.PathLike):
            hint = " `keras.saving.load_model` reads a file."
        elif type(model).__module__.startswith("tf_keras."):
            hint = " `keras_renorm.convert` makes one of a model of tf_keras."
        else:
            hint = ""
        raise TypeError(
            f"`model` must be a Keras model. Received: model={model!r}.{hint}"
        )
    return model
