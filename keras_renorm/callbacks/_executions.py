"""How many steps of `fit` an execution took."""

import keras

from keras_renorm._backend.variables import to_numpy


class Executions:
    """Counts the steps of executions.

    With `steps_per_execution` Keras names the batch with which a whole one
    would end. The last of an epoch may end before, with the data, or be whole
    though the epoch should have ended: there the optimizer's counter tells.

    Attributes:
        size: Steps of a whole execution.
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        self._callback = callback
        self.size = 1
        self._first = 0
        self._updates: int | None = None

    def begin_run(self) -> None:
        """When `fit` begins."""
        model = self._callback.model
        self.size = int(getattr(model, "steps_per_execution", 1) or 1)

    def begin(self, batch: int) -> None:
        """An execution that begins with a batch."""
        self._first, self._updates = batch, None
        # (On JAX to ask for the model takes time.)
        if self.size > 1 and batch + self.size > (self._steps or 0):
            self._updates = _updates(self._callback.model)

    def end(self, batch: int) -> int:
        """Its number of steps, where Keras names a last batch."""
        if self._updates is not None:
            updates = (_updates(self._callback.model) or 0) - self._updates
            if updates > 0:
                return min(updates, batch - self._first + 1)
        if self._steps is not None:
            batch = min(batch, self._steps - 1)
        return batch - self._first + 1

    @property
    def _steps(self) -> int | None:
        """Those of an epoch, where they are known."""
        return self._callback.params.get("steps")


def _updates(model: keras.Model) -> int | None:
    """How often the optimizer was called; `None` where it does not say."""
    optimizer = getattr(model, "optimizer", None)
    counter = getattr(optimizer, "iterations", None)
    if (
        counter is None
        # They do not count each call.
        or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or getattr(optimizer, "gradient_accumulation_steps", None)
    ):
        return None
    return int(to_numpy(counter))
