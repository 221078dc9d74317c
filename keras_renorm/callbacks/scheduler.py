"""The limits of renormalization in `fit`."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_renorm import schedules
from keras_renorm._backend import runtime
from keras_renorm._backend.variables import to_numpy
from keras_renorm._checks import check_integer
from keras_renorm.callbacks._executions import Executions
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models._layers.finding import find_layers
from keras_renorm.schedules import LinearRamp

Limit = float | LinearRamp | Callable[[int], float]


class RenormScheduler(keras.callbacks.Callback):
    """Sets the limits of every `BatchRenormalization` layer for one run.

    Without arguments, the shape of the paper (`schedules.ioffe2017`) scaled
    to `epochs * steps` of the run. The limits are set once, when `fit`
    begins, and relax inside the graph: nothing runs per step. Layers are the
    paper's then: `BatchRenormalization()`, which needs no schedule, no longer
    measures how far to correct where limits are set.

    **Many runs.** Where one training is many calls of `fit` (of one epoch each,
    say: adversarial networks, reinforcement and active learning), give
    `total_steps`, of all calls together: without it the ramps would be those
    of the first call, and end in it. A warning says so where `fit` is called
    again. In a loop of `train_on_batch` no callback runs; set the ramps
    yourself, once, before it:

        for layer in layers:
            layer.r_max, layer.d_max = schedules.ioffe2017(total_steps)

    The ramps are over each layer's own step counter, which is saved with the
    model and never reset here. So a run that is resumed, by `BackupAndRestore`
    or by loading and `initial_epoch=`, continues its ramps; and in a second
    `fit` of a trained model the limits stay relaxed (`layer.step.assign(0)`
    begins again). A layer that is called several times a step (shared branches,
    the discriminator of a GAN) counts each call: the scaled ramps are stretched
    by that number, as measured on the first batch.

    At the end of each epoch it writes the present limits, the largest of all
    layers, into `logs` as `r_max` and `d_max`: History has them, and so have
    `CSVLogger` and `TensorBoard` if they come after this callback in the list.

    Args:
        r_max: `None` (default) for the paper's ramp scaled to the run; a
            number >= 1; a `LinearRamp` over the step; or a function from the
            step (an `int`) to a number, asked before every batch, such as one
            of `keras.optimizers.schedules`.
        d_max: The same for d_max, >= 0.
        total_steps: Steps of the whole training, an integer >= 1, to which
            the paper's ramps are scaled. `None` (default) for the `epochs *
            steps` of this run.

    With a function, each batch assigns a weight of each layer. Keras's JAX
    backend takes what callbacks assign only between epochs; there a function
    acts once an epoch. With `steps_per_execution`, it acts once an
    execution.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range, or `total_steps` is given
            with both limits; when `fit` begins, if the model has no
            `BatchRenormalization` layer, or if the ramp has to be scaled and
            the number of steps of an epoch is unknown.

    Example:

    >>> model = keras.Sequential([
    ...     keras.layers.Dense(8), BatchRenormalization(), keras.layers.Dense(1)
    ... ])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(size=(64, 4)), np.zeros((64, 1))
    >>> history = model.fit(
    ...     x, y, batch_size=2, epochs=5, verbose=0,
    ...     callbacks=[RenormScheduler()],
    ... )
    >>> [round(r_max, 1) for r_max in history.history["r_max"]]
    [2.2, 3.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        r_max: Limit | None = None,
        d_max: Limit | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.limits: dict[str, Any] = {"r_max": r_max, "d_max": d_max}
        for name, value in self.limits.items():
            if value is not None and not _is_function(value):
                schedules.limit(name, value)
        if total_steps is not None:
            total_steps = check_integer("total_steps", total_steps, 1)
            if not self._is_scaled:
                raise ValueError(
                    "`total_steps` must be None where both limits are given: "
                    "it scales the paper's ramps. Received: total_steps="
                    f"{total_steps}, r_max={r_max}, d_max={d_max}."
                )
        self.total_steps = total_steps
        self._layers: list[BatchRenormalization] = []
        # How often a step calls each layer, as measured in this run or before.
        self._calls: list[int] = []
        # The layers when the run began: before and after others restored them.
        self._found: list[_Start] = []
        self._before: list[_Start] | None = None
        self._first_epoch = self._batches = 0
        self._executions = Executions(self)
        self._is_measured = False
        self._is_warned = False
        # The last values of the functions, by layer and limit.
        self._asked: dict[tuple[int, str], float] = {}
        self._reaches_batches = runtime.lets_callbacks_reach_batches()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Sets the ramps: everything that needs no function."""
        layers = find_layers(self.model, BatchRenormalization)
        if not layers:
            raise ValueError(
                "`model` must contain a `BatchRenormalization` layer. "
                f"Received: model={self.model.name}."
            )
        self._found = [_start_of(layer) for layer in layers]
        if list(map(id, layers)) != list(map(id, self._layers)):
            self._calls = list(map(self._calls_before, self._found))
            self._layers = layers
        self._asked.clear()
        self._is_measured = not self._is_scaled
        ramps = [self._ramps(calls) for calls in self._calls]  # may raise
        self._before = None
        self._batches = 0
        self._executions.begin_run()
        for layer, limits in zip(layers, ramps, strict=True):
            _set_limits(layer, limits)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Asks the functions; notes the counters."""
        self._ask_functions()
        if self._before is None:
            # Not in `on_train_begin`: a callback after this one may restore
            # the counters there, and the limits.
            self._first_epoch = epoch
            now = [_start_of(layer) for layer in self._layers]
            self._before = [
                old if old.step == new.step else new
                for old, new in zip(self._found, now, strict=True)
            ]

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Asks the functions."""
        if not self._is_measured:
            self._executions.begin(batch)
        if self._reaches_batches:
            self._ask_functions()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """After the first batch, stretches the scaled ramps."""
        if self._is_measured:
            return
        self._batches += self._executions.end(batch)
        if self._reaches_batches:
            self._stretch()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes the limits into `logs`."""
        if not self._is_measured:
            self._stretch()
        if logs is not None:
            limits = [layer.current_limits() for layer in self._layers]
            logs["r_max"], logs["d_max"] = (
                max(values) for values in zip(*limits, strict=True)
            )

    @property
    def _is_scaled(self) -> bool:
        return any(value is None for value in self.limits.values())

    def _ramps(self, calls_per_step: int) -> dict[str, Any]:
        """What to assign to a layer, but for functions."""
        scaled: dict[str, Any] = {}
        if self._is_scaled:
            total_steps = self.total_steps
            if total_steps is None:
                steps = self.params.get("steps")
                if steps is None:
                    raise ValueError(
                        "`steps_per_epoch` must be given where the length of "
                        "the data is unknown, or `total_steps`, or `r_max` and "
                        "`d_max` as ramps: the paper's ramp is scaled to the "
                        "number of steps. Received: steps=None."
                    )
                total_steps = max(1, self.params["epochs"] * steps)
            r_max, d_max = schedules.ioffe2017(total_steps * calls_per_step)
            scaled = {"r_max": r_max, "d_max": d_max}
        return {
            name: scaled[name] if value is None else value
            for name, value in self.limits.items()
            if not _is_function(value)
        }

    def _calls_before(self, start: "_Start") -> int:
        """How often a step called a layer in the run that this one resumes.

        Its ramp says so, if it is this run's, stretched.
        """
        for name in ("r_max", "d_max"):
            if self.limits[name] is None:
                end = getattr(start, name).end_step
                # Of many, or it is rounded.
                calls = round(1_000 * end / self._ramps(1_000)[name].end_step)
                calls = max(1, calls)  # of a run of one step, ramps end at 0
                ramp = self._ramps(calls)[name]
                return calls if ramp == getattr(start, name) else 1
        return 1

    def _stretch(self) -> None:
        """Measures how often a step calls each layer, and sets its ramp anew.

        A layer that nobody called keeps its ramp.
        """
        self._is_measured = True
        starts = self._before or []
        for at, (layer, start) in enumerate(
            zip(self._layers, starts, strict=True)
        ):
            calls = (layer.current_step() - start.step) / self._batches
            calls = max(1, round(calls))
            if calls != self._calls[at]:
                self._calls[at] = calls
                _set_limits(layer, self._ramps(calls))
        if not (self.total_steps or self._is_warned) and any(
            map(self._is_again, starts, self._calls)
        ):
            self._warn()

    def _is_again(self, start: "_Start", calls: int) -> bool:
        """Whether a layer's ramp was that of another run, or is over.

        In a run that is resumed it is the same ramp.
        """
        ramps = {
            name: ramp
            for name, ramp in self._ramps(calls).items()
            if self.limits[name] is None
        }
        is_same = all(
            getattr(start, name) == ramp for name, ramp in ramps.items()
        )
        end = max(ramp.end_step for ramp in ramps.values())
        is_over = self._first_epoch == 0 and start.step >= end
        return start.step > 0 and (is_over or not is_same)

    def _warn(self) -> None:
        self._is_warned = True
        warnings.warn(
            "`RenormScheduler` scaled its ramps to this call of `fit`, and the "
            "layers have counted steps before it: their ramps were others, or "
            "are over. Where one training is many calls, give `total_steps=`, "
            "the steps of all of them; to begin anew, "
            "`layer.step.assign(0)`; to keep the limits, leave the callback "
            "out.",
            stacklevel=2,
        )

    def _ask_functions(self) -> None:
        for name, value in self.limits.items():
            if not _is_function(value):
                continue
            for layer in self._layers:
                limit = value(layer.current_step())
                if ops.is_tensor(limit):  # of a schedule of Keras
                    limit = to_numpy(limit)
                # (What was never asked for differs from all, also from None.)
                if self._asked.get((id(layer), name), math.nan) != limit:
                    setattr(layer, name, limit)
                    self._asked[id(layer), name] = limit


class _Start(NamedTuple):
    """A layer when a run begins."""

    step: int
    r_max: LinearRamp
    d_max: LinearRamp


def _start_of(layer: BatchRenormalization) -> _Start:
    return _Start(layer.current_step(), layer.r_max, layer.d_max)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, LinearRamp)


def _set_limits(layer: BatchRenormalization, limits: dict[str, Any]) -> None:
    for name, value in limits.items():
        setattr(layer, name, value)
