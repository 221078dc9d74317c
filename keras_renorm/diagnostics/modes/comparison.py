"""Runs data through a model in training and in inference mode."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_renorm import backend, functional, kernels, pooling
from keras_renorm.diagnostics.modes.measurement import Gap, Measurement
from keras_renorm.diagnostics.modes.record import Record
from keras_renorm.diagnostics.modes.scores import Scores
from keras_renorm.functional import Tensor
from keras_renorm.models.batches import Batches
from keras_renorm.models.finding import built_layers, names_of
from keras_renorm.models.passes import (
    Calls,
    Told,
    aligned_inputs,
    check_totals,
)


class Result(NamedTuple):
    """What a pass found.

    Attributes:
        layers: A measurement of each layer, in the order they are called.
        gap: Of the model's outputs, as `Measurement.gap`; of several outputs
            the largest.
        scores: Loss and metrics in training and in inference mode.
    """

    layers: list[Measurement]
    gap: float
    scores: tuple[dict[str, float], dict[str, float]]


class Comparison:
    """Passes over data that compare the two modes of a model.

    Kept by a callback, so that the graph is traced once.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.layers = built_layers(model)
        self._mode = ""
        # The layers that normalize by batch when the model trains; known
        # once a batch was seen. So are those that were called, in order.
        self._training: set[int] | None = None
        self._called: list[Any] = []
        self._told = Told()
        self._compare = backend.compiled(partial(self._run_both))

    def run(
        self,
        data: Batches,
        r_max: float | None = None,
        d_max: float | None = None,
        verbose: int | bool = True,
    ) -> Result:
        """As `discrepancy`."""
        records = {
            id(layer): Record(layer, name, r_max, d_max)
            for layer, name in zip(
                self.layers, names_of(self.layers), strict=True
            )
        }
        gaps: list[Gap] = []
        scores = (Scores(self.model), Scores(self.model))

        def count(batch: Any, found: Any, calls: Calls) -> None:
            nonlocal gaps
            outputs, losses = found
            for layer, told in calls:
                _count(records[id(layer)], told)
            gaps = _added(gaps, outputs)
            for score, *given in zip(scores, outputs, losses, strict=True):
                score.add(*batch, *given)

        seen = self._told.run_over(
            data,
            self.layers,
            self._hook,
            self._compare,
            count,
            verbose,
        )
        check_totals(
            [(each.layer, each.elements) for each in records.values()],
            seen,
            "batch statistics",
        )
        order = {id(layer): layer for layer in self._called}
        return Result(
            [
                records[at].measure(self._is_frozen(layer))
                for at, layer in order.items()
            ],
            float(max((gap.relative for gap in gaps), default=0.0)),
            (scores[0].values(), scores[1].values()),
        )

    def _is_frozen(self, layer: Any) -> bool:
        return bool(
            id(layer) not in (self._training or ())
            or not layer.trainable
            or getattr(layer, "statistics_stand", False)
        )

    def _run_both(self, x: Any) -> tuple[Any, Any]:
        """Outputs and activity losses, in training mode and in inference."""
        if self._training is None:
            self._training = set()
            self._run_mode("listening", x)
        self._called = []
        training = self._run_mode("training", x)
        inference = self._run_mode("inference", x)
        outputs, losses = zip(training, inference, strict=True)
        return outputs, losses

    def _run_mode(self, mode: str, x: Any) -> tuple[Any, Any]:
        self._mode = mode
        # What would be assigned goes to the scope, and ends there.
        with keras.StatelessScope(collect_losses=True) as scope:
            outputs = self.model(x, training=mode == "listening")
            return outputs, list(scope.losses)

    def _hook(self, layer: Any, call: Callable[..., Any]) -> Any:
        def hooked(
            inputs: Tensor, training: bool | None = None, mask: Any = None
        ) -> Tensor:
            if self._mode == "listening":
                if training and self._training is not None:
                    self._training.add(id(layer))
                return call(inputs, training=False, mask=mask)
            inputs = self._told.inputs(layer, inputs)
            # Each call in a scope of its own: a second call of a shared
            # layer must find the statistics as they are.
            with keras.StatelessScope():
                inferred = call(inputs, training=False, mask=mask)
            self._called.append(layer)
            values, axis, aligned = aligned_inputs(layer, inputs, mask)
            if self._mode == "inference":
                return self._told.tell(
                    layer, _example_moments(values, axis, aligned), inferred
                )
            with keras.StatelessScope():
                outputs = call(
                    inputs,
                    training=id(layer) in (self._training or ()),
                    mask=mask,
                )
            return self._told.tell(
                layer,
                (
                    _normalized_moments(layer, values, axis, aligned),
                    _squares(outputs, inferred, aligned),
                ),
                outputs,
            )

        return hooked


def _normalized_moments(
    layer: Any, values: Tensor, axis: int, mask: Tensor | None
) -> functional.Moments:
    """Moments of the batch, or a row for each virtual batch of the layer."""
    kept: tuple[int, ...] = (axis,)
    size = getattr(layer, "virtual_batch_size", None)
    if size is not None:
        values, mask, _ = pooling.split_into_groups(values, mask, size)
        kept = (0, axis + 1)
    return functional.centered_moments(values, kept, mask)[1]


def _example_moments(
    values: Tensor, axis: int, mask: Tensor | None
) -> functional.Moments:
    """Moments of the examples' channel means."""
    has_elements = mask
    if len(values.shape) > 2:
        moments = functional.centered_moments(values, (0, axis), mask)[1]
        values = moments.mean
        has_elements = None if mask is None else moments.count > 0
    return functional.centered_moments(values, (1,), has_elements)[1]


def _squares(
    outputs: Tensor, inferred: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Sums of squares of the difference, and of the outputs."""
    dtype = kernels.statistics_dtype(outputs.dtype)
    outputs, inferred = ops.cast(outputs, dtype), ops.cast(inferred, dtype)
    sums = []
    for values in (outputs - inferred, outputs):
        if mask is not None:
            values = ops.where(mask, values, ops.zeros_like(values))
        sums.append(ops.sum(ops.square(values)))
    return sums


def _count(record: Record, found: Any) -> None:
    """Puts what one call of a layer told into its record."""
    if isinstance(found, functional.Moments):
        record.examples.add(*found)
        return
    moments, squares = found
    record.gap = record.gap.plus(Gap(*(float(each) for each in squares)))
    arrays = list(moments)
    if arrays[-1].ndim == 1:
        record.add_batch(*arrays)
        return
    groups = len(arrays[-1])
    arrays[0] = np.broadcast_to(arrays[0], (groups, 1))
    for group in zip(*arrays, strict=True):
        record.add_batch(*group)


def _added(gaps: list[Gap], outputs: Any) -> list[Gap]:
    """The gaps of a model's outputs, with those of one more batch."""
    new = []
    for training, inference in zip(*map(tree.flatten, outputs), strict=True):
        if "float" in keras.backend.standardize_dtype(training.dtype):
            squares = _squares(training, inference)
            new.append(Gap(*(float(each) for each in squares)))
    if not gaps:
        return new
    return [old.plus(each) for old, each in zip(gaps, new, strict=True)]
