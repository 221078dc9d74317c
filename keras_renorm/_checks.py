"""Checks of arguments: the error names the argument, the rule, the value."""

import difflib
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

# What other libraries call an argument.
_OTHER_NAMES = {
    "affine": ("center", "scale"),
    "bias": ("center",),
    "decay": ("momentum",),
    "decay_rate": ("momentum",),
    "eps": ("epsilon",),
    "use_bias": ("center",),
    "use_scale": ("scale",),
}
_OF_RENORMALIZATION = {"r_max", "d_max", "rmax", "dmax", "gradient_momentum"}


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may be meant by a name that is not `known`; empty where unclear."""
    known = set(known)
    close = difflib.get_close_matches(name.lower(), sorted(known), 1)
    other = _OTHER_NAMES.get(name)
    if name == "num_features":
        return "A layer sees by itself how many channels there are."
    if name in _OF_RENORMALIZATION and "r_max" not in known:
        return "`keras_renorm.BatchRenormalization` has it."
    if other and known.issuperset(other):
        return f"Did you mean `{'` and `'.join(other)}`?"
    return f"Did you mean `{close[0]}`?" if close else ""


def check_known(
    given: Mapping[str, Any], known: Iterable[str], of: str
) -> None:
    """Raises for a name that `of` does not take but has another name for.

    A name that is like none of those `known` is left to whoever comes next.
    """
    known = set(known)
    for name in given.keys() - known:
        hint = suggestion(name, known)
        if hint:
            raise ValueError(
                f"`{name}` must be an argument of {of}. Received: "
                f"{name}={given[name]!r}. {hint}"
            )


def python_value(value: Any) -> Any:
    """A scalar of NumPy, or an array of no axes, as a value of Python."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def is_number(value: Any) -> bool:
    """Whether `value` is a real number (a bool is not)."""
    value = python_value(value)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_boolean(value: Any) -> bool:
    """Whether `value` is True or False, of Python or of NumPy."""
    return isinstance(python_value(value), bool)


def check_number(name: str, value: Any) -> float:
    """`value` as a float, infinities allowed."""
    value = python_value(value)
    if not is_number(value):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r}."
        )
    if math.isnan(value):
        raise ValueError(f"`{name}` must not be NaN. Received: {name}={value}.")
    return float(value)


def check_integer(name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int of at least `minimum`."""
    value = python_value(value)
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


class Intended(float):
    """A momentum of which nothing is to be said: it was given before."""


def warn_of_low_momentum(value: float) -> None:
    """Warns of a momentum that may be meant as PyTorch means it.

    0 is meant: in PyTorch's sense the statistics would never move.
    """
    if not isinstance(value, Intended) and 0 < check_momentum(value) < 0.5:
        warn(
            f"`momentum` is the share of the old moving statistics that is "
            f"kept: with {value:g} they are those of the last batch or two. "
            f"What PyTorch calls momentum={value:g} is "
            f"momentum={1 - value:g} here."
        )


def warn(message: str) -> None:
    """Warns of what the first caller outside this package and Keras does."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("keras_renorm.", "keras.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


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
