"""Step -> value: how the limits of batch renormalization relax."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_renorm._checks import (
    check_integer,
    check_number,
    is_number,
    python_value,
)

__all__ = ["LinearRamp", "ioffe2017"]

# No limit is lower. With both here, nothing is corrected: plain batch
# normalization.
MINIMA = {"r_max": 1.0, "d_max": 0.0}
CLOSED = (MINIMA["r_max"], MINIMA["d_max"])
# Ioffe 2017, section 4.2: where the limits end, in runs of 130,000 steps.
R_MAX, D_MAX = 3.0, 5.0
_PAPER_TOTAL_STEPS = 130_000
# By then a layer has measured how far to correct; see `gating`. Limits that
# open within fewer steps let trainings on inputs of 0.001 diverge.
LEAST_END = 200
# Infinity is stored as a number that survives sums, means and squares of
# weights; what is at least a millionth of it counts as infinity.
_UNLIMITED = 2.0**60
# How far an average of equal numbers may be off them.
_ROUNDING = 1e-4


def interpolate(
    xp: Any, initial_value: Any, final_value: Any, elapsed: Any, span: Any
) -> Any:
    """The value of a linear ramp, elementwise.

    `xp` is the namespace that computes it, `numpy` or `keras.ops`. `elapsed`
    are the steps since the ramp began (negative before), `span` is how many
    it takes, both as floats. Values are picked, not multiplied by zero, at
    both ends: they may be infinite there.
    """
    progress = elapsed / xp.maximum(span, 1.0)
    between = initial_value + (final_value - initial_value) * progress
    value = xp.where(elapsed <= 0, initial_value, between)
    # Last, so that a ramp of no length has switched at its step.
    return xp.where(elapsed >= span, final_value, value)


@keras.saving.register_keras_serializable(package="keras_renorm")
@dataclass(frozen=True, eq=False)
class LinearRamp:
    """A value that goes linearly from one number to another.

        value(step) = initial_value                          step <= begin_step
                      final_value                            step >= end_step
                      initial_value + (final_value - initial_value)
                          * (step - begin_step) / (end_step - begin_step)

    With `begin_step == end_step` it is a switch: `initial_value` before that
    step, `final_value` from it on. A ramp whose two values are equal is flat;
    flat ramps compare equal to each other and to that number.

    Args:
        initial_value: Value up to `begin_step`, a number.
        final_value: Value from `end_step` on, a number. Both may be infinite
            if `begin_step == end_step`.
        begin_step: Step at which the change begins, an integer >= 0.
        end_step: Step at which it ends, an integer >= `begin_step`.

    Raises:
        TypeError: If a value is not a number or a step is not an integer.
        ValueError: If a value is NaN, `begin_step` is negative, `end_step`
            lies before `begin_step`, or a value is infinite in a ramp that
            has a slope.

    Example:

    >>> ramp = LinearRamp(1.0, 3.0, begin_step=100, end_step=300)
    >>> [ramp(step) for step in (0, 100, 150, 300, 1_000)]
    [1.0, 1.0, 1.5, 3.0, 3.0]
    >>> LinearRamp(2.0, 2.0, 0, 0) == 2.0
    True
    """

    initial_value: float
    final_value: float
    begin_step: int
    end_step: int

    def __post_init__(self) -> None:
        for name in ("initial_value", "final_value"):
            value = check_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
        for name in ("begin_step", "end_step"):
            step = check_integer(name, getattr(self, name), 0)
            object.__setattr__(self, name, step)
        if self.end_step < self.begin_step:
            raise ValueError(
                "`end_step` must not lie before `begin_step`. Received: "
                f"begin_step={self.begin_step}, end_step={self.end_step}."
            )
        if self.begin_step < self.end_step:
            for name in ("initial_value", "final_value"):
                if math.isinf(getattr(self, name)):
                    raise ValueError(
                        f"`{name}` must be finite where `begin_step` is less "
                        f"than `end_step`. Received: "
                        f"{name}={getattr(self, name)}, "
                        f"begin_step={self.begin_step}, "
                        f"end_step={self.end_step}."
                    )

    @property
    def is_flat(self) -> bool:
        """Whether the value is the same at every step."""
        return self.initial_value == self.final_value

    def __call__(self, step: Any) -> Any:
        """The value at `step`: a float, or an array for an array of steps."""
        with np.errstate(invalid="ignore"):  # inf - inf, never picked
            value = interpolate(
                np,
                self.initial_value,
                self.final_value,
                np.asarray(step, dtype=float) - self.begin_step,
                float(self.end_step - self.begin_step),
            )
        return float(value) if np.ndim(step) == 0 else value

    def scale_steps(self, factor: float) -> "LinearRamp":
        """The same shape over `factor` times as many steps."""
        return LinearRamp(
            self.initial_value,
            self.final_value,
            round(self.begin_step * factor),
            round(self.end_step * factor),
        )

    def _key(self) -> tuple[float, ...]:
        if self.is_flat:
            return (self.initial_value,)
        return (
            self.initial_value,
            self.final_value,
            self.begin_step,
            self.end_step,
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LinearRamp):
            return self._key() == other._key()
        other = python_value(other)
        if isinstance(other, numbers.Real):
            return self.is_flat and self.initial_value == other
        return NotImplemented

    def __hash__(self) -> int:
        key = self._key()
        return hash(key[0]) if len(key) == 1 else hash(key)

    def get_config(self) -> dict[str, Any]:
        """The four arguments, for serialization."""
        return {
            "initial_value": self.initial_value,
            "final_value": self.final_value,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LinearRamp":
        """The ramp of a `get_config()`."""
        return cls(**config)


_PAPER_R_MAX = LinearRamp(CLOSED[0], R_MAX, begin_step=5_000, end_step=40_000)
_PAPER_D_MAX = LinearRamp(CLOSED[1], D_MAX, begin_step=5_000, end_step=25_000)


def ioffe2017(
    total_steps: int | None = None,
) -> tuple[LinearRamp, LinearRamp]:
    """The limits of the batch renormalization paper: `(r_max, d_max)`.

    Plain batch normalization (r_max = 1, d_max = 0) for the first 5,000
    steps, then r_max to 3 at step 40,000 and d_max to 5 at step 25,000.

    Args:
        total_steps: Length of the training run, an integer >= 1. The steps
            of the paper, whose runs take about 130,000, are scaled to it.
            `None` (default) gives the paper's own steps.

    Returns:
        Two `LinearRamp`s, for `r_max` and for `d_max`.

    Raises:
        TypeError: If `total_steps` is not an integer.
        ValueError: If `total_steps` is below 1.

    Example:

    >>> r_max, d_max = ioffe2017(total_steps=1_300)
    >>> (r_max.begin_step, r_max.end_step, d_max.end_step)
    (50, 400, 250)

    References:
        Ioffe 2017, arXiv:1702.03275, section 4.2.
    """
    if total_steps is None:
        return _PAPER_R_MAX, _PAPER_D_MAX
    total_steps = check_integer("total_steps", total_steps, 1)
    factor = total_steps / _PAPER_TOTAL_STEPS
    return _PAPER_R_MAX.scale_steps(factor), _PAPER_D_MAX.scale_steps(factor)


def default_limits(momentum: float) -> tuple[LinearRamp, LinearRamp]:
    """The limits of a layer that is given none: `(r_max, d_max)`.

    r and d measure a batch against the moving statistics, which begin at 0
    and 1 and need some steps to mean anything. With n = 1 / (1 - momentum),
    that is how many steps they remember, the limits are closed (r_max = 1,
    d_max = 0, plain batch normalization) for 3 n steps, when 95 % of the
    beginning is forgotten, and open to the paper's 3 and 5 at step 5 n, or at
    step 200 if that is later. Where
    inputs have a mean of a thousand standard deviations, the moving mean is
    seven of them off then, and within one at step 7 n.

    Args:
        momentum: Share of the old moving statistics kept at each step, in
            [0, 1]. With 1 they never move, and limits never open.

    Returns:
        Two `LinearRamp`s, for `r_max` and for `d_max`.

    Example:

    >>> r_max, d_max = default_limits(momentum=0.99)
    >>> (r_max.begin_step, r_max.end_step, r_max.final_value)
    (300, 500, 3.0)
    """
    if momentum == 1:
        r_max, d_max = (LinearRamp(value, value, 0, 0) for value in CLOSED)
        return r_max, d_max
    remembered = round(1 / (1 - momentum))
    steps = 3 * remembered, max(5 * remembered, LEAST_END)
    return (
        LinearRamp(CLOSED[0], R_MAX, *steps),
        LinearRamp(CLOSED[1], D_MAX, *steps),
    )


def store_ramps(ramps: Iterable[LinearRamp]) -> tuple[np.ndarray, np.ndarray]:
    """Values and steps of ramps, a row each, as weights of a layer."""
    rows = [
        (
            (
                min(ramp.initial_value, _UNLIMITED),
                min(ramp.final_value, _UNLIMITED),
            ),
            (ramp.begin_step, ramp.end_step),
        )
        for ramp in ramps
    ]
    values, steps = zip(*rows, strict=True)
    return np.array(values, "float64"), np.array(steps, "float64")


def stored_ramp(name: str, layer: str, values: Any, steps: Any) -> LinearRamp:
    """The ramp of a row of a layer's weights, which may be a mean of others.

    Raises:
        ValueError: If it is none, or goes below the limit's minimum.
    """
    # `str` gives the shortest decimal: 1.1, not 1.10000002384.
    ends = [float(str(value)) for value in values]
    times = [float(step) for step in steps]
    lowest = MINIMA[name]
    is_finite = all(map(math.isfinite, times))
    begin, end = map(round, times) if is_finite else (0, -1)
    # (No comparison holds of NaN.)
    if not (
        all(value >= lowest - _ROUNDING for value in ends) and 0 <= begin <= end
    ):
        raise ValueError(
            f"`{name}` must be at least {lowest:g}, from a step of at least 0 "
            f"to a later one. Received: {ends[0]} at step {times[0]:g} to "
            f"{ends[1]} at step {times[1]:g}, as weights of layer {layer}. "
            f"`layer.{name} = ...` sets them anew."
        )
    initial, final = (
        math.inf if value >= _UNLIMITED / 1e6 else max(value, lowest)
        for value in ends
    )
    # The mean of infinity and a ramp is no limit as soon as it begins, or
    # until it ends.
    if math.isinf(initial):
        begin = end
    elif math.isinf(final) and begin < end:
        begin = end = begin + 1
    return LinearRamp(initial, final, begin, end)


def limit(name: str, value: Any) -> LinearRamp:
    """The ramp that `value`, a ramp or a number, gives `name`, a limit.

    Raises:
        TypeError: If `value` is neither.
        ValueError: If it ever goes below the limit's minimum, or is NaN.
    """
    minimum = MINIMA[name]
    value = python_value(value)
    if isinstance(value, LinearRamp):
        ramp = value
    elif is_number(value):
        value = float(value)
        if math.isnan(value):
            raise ValueError(
                f"`{name}` must be at least {minimum:g}. "
                f"Received: {name}={value}."
            )
        ramp = LinearRamp(value, value, 0, 0)
    else:
        raise TypeError(
            f'`{name}` must be a number, a `LinearRamp`, or "auto" for a new '
            "layer. "
            f"Received: {name}={value!r}."
        )
    if min(ramp.initial_value, ramp.final_value) < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum:g}. Received: {name}={value}."
        )
    return ramp
