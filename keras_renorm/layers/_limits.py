"""The limits of r and d, as weights of a layer."""

from typing import Any

import keras
import numpy as np

from keras_renorm import schedules
from keras_renorm._backend import runtime
from keras_renorm._backend.operations import ops
from keras_renorm._backend.variables import read, to_numpy
from keras_renorm._step.records import Limits
from keras_renorm.layers._weights import CheckedWeights
from keras_renorm.schedules import LinearRamp

# Of a network that diverged they are not finite, and a file takes them.
_OF_BATCH_NORMALIZATION = ("gamma", "beta", "moving_mean", "moving_variance")


class StoredLimits(CheckedWeights):
    """A layer that counts its steps, and keeps ramps of r_max and d_max.

    What the constructor sets, `build` puts into the weights; they rule from
    then on.
    """

    _initial_ramps: tuple[LinearRamp, ...]
    _is_given: bool
    step: Any
    limit_values: Any
    limit_steps: Any
    gated: Any

    def _add_limits(self, dtype: str) -> None:
        """The weights `step`, `limit_values` and `limit_steps`.

        Row 0 of the limits is r_max, row 1 d_max; the columns are where the
        ramp begins and where it ends.
        """
        values, steps = schedules.store_ramps(self._initial_ramps)
        # No integers: a mean of weights would be cut.
        counter = runtime.counter_dtype(dtype)
        # Each replica counts, also where it cannot meet the others.
        self.step = keras.Variable(
            "zeros",
            name="step",
            shape=(),
            dtype=counter,
            trainable=False,
            autocast=False,
            synchronization="on_read",
            aggregation="only_first_replica",
        )
        self.limit_values = self._add_state("limit_values", values, dtype)
        self.limit_steps = self._add_state("limit_steps", steps, counter)

    def _add_state(self, name: str, value: Any, dtype: str) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=np.shape(value),
            dtype=dtype,
            initializer=lambda shape, dtype: ops.convert_to_tensor(
                value, dtype=dtype
            ),
            trainable=False,
            autocast=False,
            # The same on all replicas, and a counter must not be summed.
            aggregation="only_first_replica",
        )

    @property
    def r_max(self) -> LinearRamp:
        """Limit of r, as a ramp over `step`; assign a number or a ramp."""
        return self._ramp(0)

    @r_max.setter
    def r_max(self, value: float | LinearRamp) -> None:
        self._set_ramp(0, schedules.limit("r_max", value))

    @property
    def d_max(self) -> LinearRamp:
        """Limit of d, as a ramp over `step`; assign a number or a ramp."""
        return self._ramp(1)

    @d_max.setter
    def d_max(self, value: float | LinearRamp) -> None:
        self._set_ramp(1, schedules.limit("d_max", value))

    def current_limits(self) -> tuple[float, float]:
        """The values of r_max and d_max that the next training step uses."""
        step = 0.0 if self.step is None else self._step()
        return self.r_max(step), self.d_max(step)

    def current_step(self) -> int:
        """How many training calls the layer has seen."""
        return 0 if self.step is None else round(self._step())

    def _step(self) -> float:
        return float(to_numpy(self.step))

    def _ramp(self, row: int) -> LinearRamp:
        if not self.built:
            return self._initial_ramps[row]
        return schedules.stored_ramp(
            list(schedules.MINIMA)[row],
            self.name,
            to_numpy(self.limit_values)[row],
            to_numpy(self.limit_steps)[row],
        )

    def _set_ramp(self, row: int, ramp: LinearRamp) -> None:
        self._is_given = True
        if self.gated is not None:
            self.gated.assign(0.0)
        if not self.built:
            ramps = list(self._initial_ramps)
            ramps[row] = ramp
            self._initial_ramps = tuple(ramps)
            return
        for variable, new in zip(
            (self.limit_values, self.limit_steps),
            schedules.store_ramps([ramp]),
            strict=True,
        ):
            rows = to_numpy(variable)
            rows[row] = new[0]
            variable.assign(rows)

    def _limits(self) -> Limits:
        return Limits(
            *(
                read(weight, weight.dtype)
                for weight in (self.limit_values, self.limit_steps, self.step)
            )
        )

    def _end_step(self, state: Any, update: Any) -> None:
        self.step.assign_add(1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in schedules.MINIMA:
            # TensorFlow reads what is there first, which may be no limit.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_state(self, weights: Any) -> list[np.ndarray]:
        arrays = super()._check_state(weights)
        if not self.built:
            return arrays
        values, steps = (
            next(i for i, each in enumerate(self.weights) if each is weight)
            for weight in (self.limit_values, self.limit_steps)
        )
        for at, (weight, array) in enumerate(
            zip(self.weights, arrays, strict=True)
        ):
            # What the layer counts and measures; no training makes it so.
            is_plain = weight.name in _OF_BATCH_NORMALIZATION
            if (
                not (is_plain or at in (values, steps))
                and (bad := array[~np.isfinite(array)]).size
            ):
                raise ValueError(
                    f"`{weight.name}` of layer {self.name} must be finite. "
                    f"Received: {weight.name}={bad.flat[0]}."
                )
        # Earlier versions stored infinity.
        arrays[values], _ = schedules.store_ramps(
            schedules.stored_ramp(name, self.name, *rows)
            for name, *rows in zip(
                schedules.MINIMA, arrays[values], arrays[steps], strict=True
            )
        )
        return arrays
