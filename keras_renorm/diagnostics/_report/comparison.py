"""Runs data through a model in training and in inference mode."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.variables import kept_buffers
from keras_renorm._step import choice, pooling
from keras_renorm._step.moments import Moments, centered_moments
from keras_renorm.diagnostics._report.measurement import Gap, Measurement
from keras_renorm.diagnostics._report.record import Record
from keras_renorm.diagnostics._report.scores import Scores
from keras_renorm.models._data.batches import Batches
from keras_renorm.models._data.feeding import Feed
from keras_renorm.models._data.passes import (
    Calls,
    LayerCall,
    Reports,
    aligned_inputs,
    example_moments,
    reached_layers,
)
from keras_renorm.models._layers.finding import (
    Choice,
    built_layers,
    find_layers,
    names_of,
)
from keras_renorm.models._layers.graphs import (
    compiled,
    forgotten_after_errors,
    kept,
)


class Result(NamedTuple):
    """The findings of a pass.

    Attributes:
        layers: A measurement of each layer, in the order they are called.
        gap: Of the model's outputs, as `Measurement.gap`; of several outputs
            the largest.
        scores: Loss and metrics in training and in inference mode.
    """

    layers: list[Measurement]
    gap: float
    scores: tuple[dict[str, float], dict[str, float]]


def comparison(model: keras.Model, layers: Choice = None) -> "Comparison":
    """The comparison of a model, with the graph that it has traced."""
    normalization = built_layers(model)
    chosen = built_layers(model, layers)
    return kept(
        model,
        "comparison",
        (*normalization, *chosen),
        lambda: Comparison(model, normalization, chosen),
    )


class Comparison:
    """Passes over data that compare the two modes of a model."""

    def __init__(
        self, model: keras.Model, layers: Sequence[Any], chosen: Sequence[Any]
    ) -> None:
        self._model = weakref.ref(model)
        self._layers = layers
        self._chosen = chosen
        self._mode = ""
        # The layers that normalize by batch when the model trains; known
        # once a batch was seen. So are those that were called, in order.
        self._training: set[int] | None = None
        self._called: list[Any] = []
        self._reports = Reports()
        self._compare = compiled(model, self._run_both)

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
                self._layers, names_of(self._model(), self._layers), strict=True
            )
        }
        gaps: list[Gap] = []
        scores = (Scores(data.model, True), Scores(data.model, False))

        def count(feed: Feed, found: Any, calls: Calls) -> None:
            nonlocal gaps
            outputs, losses = found
            for layer, report in calls:
                _count(records[id(layer)], report)
            gaps = _added(gaps, outputs)
            for score, *given in zip(scores, outputs, losses, strict=True):
                score.add(feed, *given)

        with forgotten_after_errors(self._model()):
            seen = self._reports.run_over(
                data, self._layers, self._hook, self._compare, count, verbose
            )
        reached = reached_layers(
            data.model,
            [(layer, records[id(layer)].elements) for layer in self._chosen],
            seen,
            "batch statistics",
        )
        places = {id(layer): at for at, layer in enumerate(self._called)}
        return Result(
            [
                records[id(layer)].measure(self._is_frozen(layer))
                for layer in sorted(
                    reached, key=lambda layer: places[id(layer)]
                )
            ],
            float(max((gap.relative for gap in gaps), default=0.0)),
            (scores[0].values(), scores[1].values()),
        )

    def _is_frozen(self, layer: Any) -> bool:
        return bool(
            id(layer) not in (self._training or ())
            or not layer.trainable
            or getattr(layer, "uses_moving_statistics", False)
        )

    def _run_both(self, x: Any, named: dict[str, Any]) -> tuple[Any, Any]:
        """Outputs and activity losses, in training mode and in inference."""
        if self._training is None:
            self._training = set()
            with kept_buffers(
                lambda: find_layers(self._model(), keras.layers.Layer)
            ):
                self._run_mode("listening", x, named)
        self._called = []
        training = self._run_mode("training", x, named)
        inference = self._run_mode("inference", x, named)
        outputs, losses = zip(training, inference, strict=True)
        return outputs, losses

    def _run_mode(
        self, mode: str, x: Any, named: dict[str, Any]
    ) -> tuple[Any, Any]:
        self._mode = mode
        model: Any = self._model()
        # Assignments go to the scope, and end there.
        with keras.StatelessScope(collect_losses=True) as scope:
            outputs = model(x, training=mode == "listening", **named)
            return outputs, list(scope.losses)

    def _hook(self, layer: Any, call: LayerCall) -> Tensor:
        training: Any = self._training
        if self._mode == "listening":
            if call.training:
                training.add(id(layer))
            return call.run(False)
        # The flag that arrives: a model may fix it to `True`.
        inferred = call.run(call.training)
        self._called.append(layer)
        values, axis, mask = aligned_inputs(layer, call.inputs, call.mask)
        if self._mode == "inference":
            return self._reports.report(
                layer, example_moments(values, axis, mask), inferred
            )
        outputs = call.run(id(layer) in training)
        return self._reports.report(
            layer,
            (
                _normalized_moments(layer, values, axis, mask),
                _squares(outputs, inferred, mask),
            ),
            outputs,
        )


def _normalized_moments(
    layer: Any, values: Tensor, axis: int, mask: Tensor | None
) -> Moments:
    """Moments of the batch, or a row for each virtual batch of the layer."""
    kept: tuple[int, ...] = (axis,)
    size = getattr(layer, "virtual_batch_size", None)
    if size is not None:
        values, mask, _ = pooling.split_into_groups(values, mask, size)
        kept = (0, axis + 1)
    return centered_moments(values, kept, mask)[1]


def _squares(
    outputs: Tensor, inferred: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Sums of squares of the difference, and of the outputs."""
    dtype = choice.statistics_dtype(outputs.dtype)
    outputs, inferred = ops.cast(outputs, dtype), ops.cast(inferred, dtype)
    sums = []
    for values in (outputs - inferred, outputs):
        if mask is not None:
            values = ops.where(mask, values, ops.zeros_like(values))
        sums.append(ops.sum(ops.square(values)))
    return sums


def _count(record: Record, found: Any) -> None:
    """Adds the report of one call of a layer to its record."""
    if isinstance(found, Moments):
        record.examples.add(*found)
        return
    moments, squares = found
    record.gap = record.gap.plus(Gap(*(float(total) for total in squares)))
    arrays = list(moments)
    if arrays[-1].ndim == 1:
        record.add_batch(*arrays)
        return
    arrays[0] = np.broadcast_to(arrays[0], arrays[-1].shape)
    for group in zip(*arrays, strict=True):
        record.add_batch(*group)


def _added(gaps: list[Gap], outputs: Any) -> list[Gap]:
    """The gaps of a model's outputs, with those of one more batch."""
    new = []
    for training, inference in zip(*map(tree.flatten, outputs), strict=True):
        if "float" in keras.backend.standardize_dtype(training.dtype):
            squares = _squares(training, inference, _mask_of(training))
            new.append(Gap(*(float(total) for total in squares)))
    if not gaps:
        return new
    return [old.plus(new_gap) for old, new_gap in zip(gaps, new, strict=True)]


def _mask_of(outputs: Tensor) -> Tensor | None:
    """The mask that Keras notes on outputs, of their rank, if it fits them."""
    mask = getattr(outputs, "_keras_mask", None)
    if mask is None:
        return None
    shape, sizes = tuple(outputs.shape), tuple(mask.shape)
    missing = len(shape) - len(sizes)
    if missing < 0 or any(
        size not in (1, whole)
        for size, whole in zip(sizes, shape, strict=False)
    ):
        return None
    return ops.reshape(ops.cast(mask, "bool"), (*sizes, *(1,) * missing))
