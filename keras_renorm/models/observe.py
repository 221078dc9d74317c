"""Watching what goes through a model's normalization, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from keras import ops

from keras_renorm import functional, kernels

Tensor = Any
Call = Callable[..., Any]


@contextmanager
def observed(
    layers: Sequence[Any], hook: Callable[[Any, Call], Call]
) -> Iterator[None]:
    """Puts `hook(layer, call)` in the place of each layer's `call`.

    What stood there is there again in the end, whatever happens.
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


def to_float64(moments: functional.Moments) -> list[np.ndarray]:
    """Moments as arrays."""
    return [
        np.asarray(ops.convert_to_numpy(value), dtype="float64")
        for value in moments
    ]


class Total:
    """Moments of all batches so far, in float64: Chan et al. 1983.

    Attributes:
        examples: Number of examples; kept by whoever adds.
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
        with np.errstate(all="ignore"):  # what is not finite is told later
            distance = (shift + residual) - self.mean
            self.variance = (
                (1 - share) * self.variance
                + share * variance
                + share * (1 - share) * distance**2
            )
            self.within = (1 - share) * self.within + share * variance
            self.mean = self.mean + share * distance
