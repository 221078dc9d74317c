"""Loss and metrics, kept outside of a model."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend.variables import to_numpy
from keras_renorm.models._data.arrays import examples_of
from keras_renorm.models._data.feeding import Feed


class Scores:
    """Loss and metrics of a compiled model in one mode.

    The state of the metrics is here, not in the metrics.
    """

    def __init__(self, model: keras.Model, training: bool) -> None:
        self.model = model
        # As Keras says in which mode it asks, if a class of its own listens.
        known = inspect.signature(model.compute_loss).parameters
        takes = "training" in known or any(
            each.kind is each.VAR_KEYWORD for each in known.values()
        )
        self._flag = {"training": training} if takes else {}
        self._state: list[tuple[Any, Any]] | None = None
        self._metrics: dict[str, Any] = {}
        # Variables of metrics that were updated, by `id`.
        self._updated: set[int] = set()
        self._loss = 0.0
        self._examples = 0

    def add(self, feed: Feed, outputs: Any, losses: Any) -> None:
        """One batch; `losses` are those of activities."""
        if feed.y is None or not getattr(self.model, "compiled", False):
            return
        if self._has_no_loss():
            return
        y, weight = (
            None
            if part is None
            # Of their own: Keras's masks write into weights on PyTorch.
            else tree.map_structure(
                lambda leaf: ops.copy(ops.convert_to_tensor(leaf)), part
            )
            for part in (feed.y, feed.sample_weight)
        )
        # Regularizers read their variables from the scope.
        weights = [
            (variable, variable.value)
            for variable in self.model.trainable_variables
        ]
        with keras.StatelessScope([*weights, *(self._state or [])]) as scope:
            if self._state is None:
                for metric in self.model.metrics:
                    metric.reset_state()
            before = {
                id(variable): scope.get_current_value(variable)
                for variable in self.model.metrics_variables
            }
            loss = self.model.compute_loss(
                x=feed.x,
                y=y,
                y_pred=outputs,
                sample_weight=weight,
                **self._flag,
            )
            loss = sum(float(to_numpy(value)) for value in (loss, *losses))
            self._metrics = self.model.compute_metrics(
                feed.x, y, outputs, weight
            )
            found = [
                (variable, scope.get_current_value(variable))
                for variable in self.model.metrics_variables
            ]
        self._state = [pair for pair in found if pair[1] is not None]
        self._updated |= {
            id(variable)
            for variable, value in found
            if value is not before.get(id(variable))
        }
        examples = examples_of(feed.x)
        self._loss += loss * examples
        self._examples += examples

    def _has_no_loss(self) -> bool:
        """Whether only a `train_step` of its own knows the loss."""
        is_own = type(self.model).compute_loss is not keras.Model.compute_loss
        return getattr(self.model, "loss", None) is None and not is_own

    def values(self) -> dict[str, float]:
        """By name, the loss first; empty without labels.

        Without metrics that the model updates in its call, which are dropped.
        """
        if not self._examples:
            return {}
        silent = {
            metric.name
            for metric in self.model.metrics
            if not self._updated.intersection(map(id, metric.variables))
        }
        values = {
            name: float(value)
            for name, value in _flat(self._metrics)
            if name not in {"loss", *silent} and np.ndim(value) == 0
        }
        return {"loss": self._loss / self._examples, **values}


def _flat(metrics: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, as `evaluate` returns them: a metric may have many."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value
