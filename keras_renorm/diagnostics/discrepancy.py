"""How far training and inference are apart, and why."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm import arguments, functional, kernels, pooling
from keras_renorm.diagnostics.measurement import Gap, Measurement, Record
from keras_renorm.diagnostics.report import Report
from keras_renorm.diagnostics.verdict import verdicts_of
from keras_renorm.models.batches import Batches
from keras_renorm.models.observe import aligned_inputs, observed, to_float64
from keras_renorm.models.rebuild import describe
from keras_renorm.models.statistics import statistics_layers

Tensor = Any


def discrepancy(
    model: keras.Model,
    dataset: Any,
    steps: int | None = None,
    *,
    reference: Any = None,
    r_max: float | None = None,
    d_max: float | None = None,
    batch_size: int = 32,
    verbose: int | bool = True,
) -> Report:
    """Measures what batch normalization does differently when it serves.

    Each batch runs twice. In training mode each layer does what it does in
    training; in inference mode it uses its moving statistics. Everything else
    (dropout, say) infers in both, so that what differs is normalization
    alone. Batch statistics, r and d are those of the layers' inputs in
    training mode; whether examples within a batch are alike is tested on
    inputs in inference mode, which batches do not mix.

    Nothing in the model changes: no weight, statistic, counter, seed, metric
    or optimizer variable.

    Give it the batches that training uses: their size and what they hold
    together is what is measured. Arrays are cut in the order that they have,
    while `fit` shuffles them; shuffle them before, if so.

    Args:
        model: A built model with batch normalization, Keras's or ours, at any
            depth. With labels in the dataset and a compiled model, loss and
            metrics are computed in both modes.
        dataset: As for `recalibrate`: arrays, a `tf.data.Dataset`, a
            `PyDataset` or another iterable of `x`, `(x, y)` or `(x, y,
            sample_weight)`.
        steps: Number of batches, or `None` (default) for all. Twenty or more
            tell causes apart well; with one, batches cannot be compared.
        reference: Training data, where `dataset` is other data, in the same
            forms: tells averages that lag from a change of domain. As many
            batches of it are read as of `dataset`, or all if `steps` is
            `None`.
        r_max: Values of r beyond this are counted, >= 1. `None` (default) for
            the present limit of a `BatchRenormalization` layer, 3 for others.
        d_max: The same for d, >= 0; 5 for other layers.
        batch_size: Examples a batch where `dataset` is arrays.
        verbose: Whether to show a progress bar.

    Returns:
        A `Report`: `print` it, `report.verdicts` (cause, reason, remedy,
        layers), `report.rows` for a `pandas.DataFrame`, `report.plot()`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range; if the model has no batch
            normalization, or is not built; if the dataset is empty, holds
            fewer than `steps` batches, never ends without `steps`, does not
            reach a layer, or makes activations in training mode that are not
            finite.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (640, 2))
    >>> report = discrepancy(model, x, verbose=False)
    >>> [(verdict.cause, verdict.layers) for verdict in report.verdicts]
    [('statistics never trained', ('bn',))]
    >>> recalibrate(model, x, verbose=False)
    >>> discrepancy(model, x, verbose=False).verdicts
    []

    References:
        Ioffe 2017, arXiv:1702.03275, section 3 (r and d). Wu and Johnson
        2021, arXiv:2105.07576 (population statistics, domains, batches that
        are not i.i.d.). Jeffreys 1946, Proc. R. Soc. A 186 (the divergence).
    """
    if r_max is not None:
        r_max = _at_least("r_max", r_max, 1)
    if d_max is not None:
        d_max = _at_least("d_max", d_max, 0)
    batches = DiscrepancyPass(model)
    options = (steps, r_max, d_max, batch_size, verbose)
    referred = None
    if reference is not None:
        referred = batches.run(reference, *options).layers
    result = batches.run(dataset, *options)
    return Report(
        model=model.name,
        layers=result.layers,
        verdicts=verdicts_of(result.layers, referred),
        gap=result.gap,
        training=result.scores[0],
        inference=result.scores[1],
    )


def _at_least(name: str, value: Any, minimum: float) -> float:
    number = arguments.check_number(name, value)
    if number < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value}."
        )
    return number


class Result:
    """What a pass found.

    Attributes:
        layers: A measurement of each layer, in the order they are called.
        gap: Of the model's outputs, as `Measurement.gap`; of several outputs
            the largest.
        scores: Loss and metrics in training and in inference mode.
    """

    def __init__(
        self,
        layers: list[Measurement],
        gap: float,
        scores: tuple[dict[str, float], dict[str, float]],
    ) -> None:
        self.layers = layers
        self.gap = gap
        self.scores = scores


class DiscrepancyPass:
    """Passes over data that compare the two modes of a model.

    Kept by a callback, so that the graph is traced once.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.layers = statistics_layers(model)
        self._mode = ""
        # The layers that normalize by batch when the model trains; known
        # once a batch was seen. So are those that were called, in order.
        self._training: set[int] | None = None
        self._called: list[Any] = []
        self._found: list[Any] = []
        self._compare = kernels.compiled(lambda x: self._run_both(x))

    def run(
        self,
        dataset: Any,
        steps: int | None,
        r_max: float | None = None,
        d_max: float | None = None,
        batch_size: int = 32,
        verbose: int | bool = True,
    ) -> Result:
        """As `discrepancy`."""
        if steps is not None:
            steps = arguments.check_integer("steps", steps, minimum=1)
        batch_size = arguments.check_integer("batch_size", batch_size, 1)
        inputs = len(getattr(self.model, "inputs", None) or [None])
        data = Batches(dataset, steps, batch_size, inputs)
        records = {
            id(layer): Record(layer, r_max, d_max) for layer in self.layers
        }
        gaps: list[Gap] = []
        scores = (_Scores(self.model), _Scores(self.model))
        bar = keras.utils.Progbar(
            data.steps, verbose=int(bool(verbose)), unit_name="batch"
        )
        seen = 0
        with observed(self.layers, self._hook):
            for x, y, weight in data:
                outputs, losses, trained, inferred = self._compare(x)
                # Each call of a layer: first all in training mode.
                for layer, found in zip(
                    self._called, [*trained, *inferred], strict=True
                ):
                    _count(records[id(layer)], found)
                gaps = _added(gaps, outputs)
                for score, output, loss in zip(
                    scores, outputs, losses, strict=True
                ):
                    score.add(x, y, weight, output, loss)
                seen += 1
                bar.update(seen, finalize=False)
        bar.update(seen, finalize=True)
        data.check_complete(seen)
        _check(records, seen)
        order = dict.fromkeys(id(layer) for layer in self._called)
        return Result(
            [records[at].measure(self._is_frozen(at)) for at in order],
            float(max((gap.relative for gap in gaps), default=0.0)),
            (scores[0].values(), scores[1].values()),
        )

    def _is_frozen(self, at: int) -> bool:
        (layer,) = [each for each in self.layers if id(each) == at]
        return bool(
            at not in (self._training or ())
            or not layer.trainable
            or getattr(layer, "frozen_statistics", False)
        )

    def _run_both(self, x: Any) -> tuple[Any, ...]:
        """Outputs, activity losses, and what the layers' calls told."""
        if self._training is None:
            self._training = set()
            self._run_mode("listening", x)
        self._called = []
        training = self._run_mode("training", x)
        inference = self._run_mode("inference", x)
        outputs, losses, found = zip(training, inference, strict=True)
        return outputs, losses, found[0], found[1]

    def _run_mode(self, mode: str, x: Any) -> tuple[Any, Any, list[Any]]:
        self._mode, self._found = mode, []
        # What would be assigned goes to the scope, and ends there.
        with keras.StatelessScope(collect_losses=True) as scope:
            outputs = self.model(x, training=mode == "listening")
            return outputs, list(scope.losses), self._found

    def _hook(self, layer: Any, call: Callable[..., Any]) -> Any:
        def hooked(
            inputs: Tensor, training: bool | None = None, mask: Any = None
        ) -> Tensor:
            if self._mode == "listening":
                if training and self._training is not None:
                    self._training.add(id(layer))
                return call(inputs, training=False, mask=mask)
            # Each call in a scope of its own: a second call of a shared
            # layer must find the statistics as they are.
            with keras.StatelessScope():
                inferred = call(inputs, training=False, mask=mask)
            self._called.append(layer)
            values, axis, aligned = aligned_inputs(layer, inputs, mask)
            if self._mode == "inference":
                self._found.append(_example_moments(values, axis, aligned))
                return inferred
            with keras.StatelessScope():
                outputs = call(
                    inputs,
                    training=id(layer) in (self._training or ()),
                    mask=mask,
                )
            self._found.append(
                (
                    _normalized_moments(layer, values, axis, aligned),
                    _squares(outputs, inferred, aligned),
                )
            )
            return outputs

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
        record.examples.add(*to_float64(found))
        return
    moments, squares = found
    record.gap = record.gap.plus(Gap(*(float(each) for each in squares)))
    arrays = to_float64(moments)
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


def _check(records: dict[int, Record], seen: int) -> None:
    unseen = [
        each.layer for each in records.values() if not each.elements.count
    ]
    if unseen:
        raise ValueError(
            "`dataset` must reach every batch normalization layer with at "
            f"least one unmasked element. Received: {seen} batches that gave "
            f"none to {describe(unseen)}."
        )
    bad = [
        each.layer for each in records.values() if not each.elements.is_finite
    ]
    if bad:
        raise ValueError(
            "`dataset` must make finite activations. Received: one that makes "
            f"the batch statistics of {describe(bad)} NaN or infinite."
        )


class _Scores:
    """Loss and metrics of a compiled model in one mode.

    The metrics' state is held here, not in the metrics.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._state: list[tuple[Any, Any]] | None = None
        self._metrics: dict[str, Any] = {}
        self._loss = 0.0
        self._examples = 0

    def add(
        self, x: Any, y: Any, weight: Any, outputs: Any, losses: Any
    ) -> None:
        """One batch; `losses` are those of activities."""
        if y is None or not getattr(self.model, "compiled", False):
            return
        examples = int(tree.flatten(x)[0].shape[0])
        y, weight = (
            None if each is None else tree.map_structure(_tensor, each)
            for each in (y, weight)
        )
        # Regularizers read their variables from the scope.
        weights = [
            (each, each.value) for each in self.model.trainable_variables
        ]
        with keras.StatelessScope([*weights, *(self._state or [])]) as scope:
            if self._state is None:
                for metric in self.model.metrics:
                    metric.reset_state()
            loss = float(
                self.model.compute_loss(
                    x=x, y=y, y_pred=outputs, sample_weight=weight
                )
            ) + sum(float(each) for each in losses)
            self._metrics = self.model.compute_metrics(x, y, outputs, weight)
            found = [
                (variable, scope.get_current_value(variable))
                for variable in self.model.metrics_variables
            ]
        self._state = [pair for pair in found if pair[1] is not None]
        self._loss += loss * examples
        self._examples += examples

    def values(self) -> dict[str, float]:
        """By name, the loss first; empty without labels."""
        if not self._examples:
            return {}
        values = {
            name: float(value)
            for name, value in self._metrics.items()
            if name != "loss" and np.ndim(value) == 0
        }
        return {"loss": self._loss / self._examples, **values}


def _tensor(value: Any) -> Any:
    return ops.convert_to_tensor(value)
