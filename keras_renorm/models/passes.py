"""Passes over data that watch what goes through a model's normalization."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm import backend, functional, kernels
from keras_renorm.functional import Tensor
from keras_renorm.models.batches import Batches
from keras_renorm.models.finding import describe

Call = Callable[..., Any]
# Of a batch: layers, and what a call of each reported.
Calls = list[tuple[Any, Any]]


@contextmanager
def observed(
    layers: Sequence[Any], hook: Callable[[Any, Call], Call]
) -> Iterator[None]:
    """Puts `hook(layer, call)` in the place of each layer's `call`.

    At the end each `call` is what it was before, also after an exception.
    """
    before = {id(layer): vars(layer).get("call") for layer in layers}
    try:
        for layer in layers:
            layer.call = hook(layer, layer.call)
        yield
    finally:
        for layer in layers:
            if before[id(layer)] is not None:
                layer.call = before[id(layer)]
            elif "call" in vars(layer):
                del layer.call  # what the class has is there again


def aligned_inputs(
    layer: Any, inputs: Tensor, mask: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """Inputs in the type of statistics, the channel axis, the aligned mask."""
    axis = layer.axis % len(inputs.shape)
    if mask is not None:
        mask = functional.align_mask(mask, inputs, axis)
    values = ops.cast(inputs, kernels.statistics_dtype(inputs.dtype))
    return values, axis, mask


class Told:
    """What the calls of layers report of a batch.

    A call may report tensors from any place: a recurrent cell, a loop or a
    branch of a conditional, too. In a loop it reports at each iteration.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, Any, Any]] = []
        self._error: ValueError | None = None
        self._places = 0

    def tell(self, layer: Any, found: Any, outputs: Tensor) -> Tensor:
        """The outputs of a call, which reports a structure of tensors."""
        form = tree.map_structure(lambda _: None, found)
        self._places += 1
        place = self._places

        def receive(*arrays: np.ndarray) -> None:
            # Copies: the memory is the backend's.
            values = [np.array(each, dtype="float64") for each in arrays]
            told = tree.pack_sequence_as(form, values)
            self._calls.append((place, layer, told))

        tensors = [ops.convert_to_tensor(each) for each in tree.flatten(found)]
        return backend.tell(receive, tensors, outputs)

    def inputs(self, layer: Any, inputs: Tensor) -> Tensor:
        """The inputs of a layer, which have its channels."""
        channels = layer.moving_mean.shape[0]

        def check(size: Any) -> None:
            if int(size) != channels:
                self._error = ValueError(
                    "`dataset` must give each layer its channels. Received: "
                    f"{int(size)} for the {channels} of {layer.name!r}."
                )
                raise self._error

        axis = layer.axis % len(inputs.shape)
        return backend.with_size(inputs, axis, channels, check)

    def run(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Calls]:
        """`function(x)`, and what it reported: `(layer, arrays)`.

        In the order of the calls; branches run in any order.
        """
        self._calls, self._error = [], None
        try:
            outputs = function(x)
            backend.wait()
        except Exception:
            if self._error is not None:  # a graph's error tells less
                raise self._error from None
            raise
        calls = sorted(self._calls, key=lambda call: call[0])
        self._calls = []
        return outputs, [(layer, found) for _, layer, found in calls]

    def run_over(
        self,
        data: Batches,
        layers: Sequence[Any],
        hook: Callable[[Any, Call], Call],
        function: Callable[[Any], Any],
        count: Callable[[tuple[Any, Any, Any], Any, Calls], None],
        verbose: int | bool,
        unit: str = "batch",
    ) -> int:
        """Runs a function of a model over data; the number of batches.

        Args:
            data: The batches.
            layers: What is watched.
            hook: As for `observed`.
            function: As for `run`.
            count: Takes each batch, what the function gave, and what was
                reported.
            verbose: Whether to show a progress bar.
            unit: What the bar counts.

        Raises:
            ValueError: As `Batches.check_complete`.
        """
        bar = keras.utils.Progbar(
            data.steps, verbose=int(bool(verbose)), unit_name=unit
        )
        seen = 0
        with observed(layers, hook):
            for batch in data:
                count(batch, *self.run(function, batch[0]))
                seen += 1
                bar.update(seen, finalize=False)
        bar.update(seen, finalize=True)
        data.check_complete(seen)
        return seen


class Total:
    """Moments of all batches so far, in float64: Chan et al. 1983.

    Attributes:
        examples: Number of examples; kept by whoever adds.
        skipped: Number of elements a channel that were left out; likewise.
        batches: Number of batches that had an element.
        count: Number of elements a channel; where channels have masks of
            their own, the fewest.
        mean: Mean of all elements.
        variance: Variance of all elements (divisor `count`).
        within: What of it is within batches: their variances, weighted by
            count. The rest is between their means.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.skipped = 0.0
        self.batches = 0
        self._counts: Any = 0.0
        self.mean: Any = 0.0
        self.variance: Any = 0.0
        self.within: Any = 0.0

    @property
    def count(self) -> float:
        """Number of elements of the channel that has the fewest."""
        return float(np.min(self._counts))

    @property
    def is_finite(self) -> bool:
        """Whether no batch brought NaN or infinity."""
        return bool(
            np.all(np.isfinite(self.mean))
            and np.all(np.isfinite(self.variance))
        )

    def add(
        self,
        count: Any,
        shift: np.ndarray,
        residual: Any,
        variance: Any,
    ) -> None:
        """Pools the `Moments` of a batch; nothing where it had no element."""
        if not np.max(count):
            return
        self.batches += 1
        self._counts = self._counts + count
        share = count / np.maximum(self._counts, 1)
        with np.errstate(all="ignore"):  # not finite: an error later
            distance = (shift + residual) - self.mean
            self.variance = (
                (1 - share) * self.variance
                + share * variance
                + share * (1 - share) * distance**2
            )
            self.within = (1 - share) * self.within + share * variance
            self.mean = self.mean + share * distance


def check_totals(
    totals: Sequence[tuple[Any, Total]], seen: int, statistics: str
) -> None:
    """Raises if data did not reach a layer, or made it NaN.

    Args:
        totals: Layers, and what was seen of their elements.
        seen: Number of batches.
        statistics: What is then not finite, in the words of the error.
    """
    unseen = [layer for layer, total in totals if not total.count]
    if unseen:
        raise ValueError(
            "`dataset` must reach every batch normalization layer with at "
            f"least one unmasked element. Received: {seen} batches that gave "
            f"none to {describe(unseen)}."
        )
    bad = [layer for layer, total in totals if not total.is_finite]
    if bad:
        raise ValueError(
            "`dataset` must make finite activations. Received: one that makes "
            f"the {statistics} of {describe(bad)} NaN or infinite."
        )
