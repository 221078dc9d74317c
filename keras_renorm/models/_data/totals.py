"""Moments of all batches of a dataset, and whether these are random draws."""

import math
import warnings
from typing import Any

import numpy as np

# Batch means that scatter by this much of the standard deviation of all data,
# where batches are no random draws. A smaller scatter harms there: training
# subtracts from the examples of a batch the part that they share.
GROUPED = 0.1


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
        within: The part of it within batches: their variances, weighted by
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
    def between(self) -> Any:
        """Variance of the batch means (divisor: batches less 1)."""
        between = np.maximum(self.variance - self.within, 0)
        return between * self.batches / max(self.batches - 1, 1)

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


def f_of_batches(examples: "Total", epsilon: float) -> tuple[float, float]:
    """F of one-way analysis of variance, and its limit by chance.

    Of the examples' channel means in batches. F is a mean over channels; the
    limit is four standard deviations of the F of one channel, for channels may
    all say the same, and 2 at least. NaN where it is unknown.
    """
    batches = examples.batches
    free = examples.count - batches
    if batches < 2 or free <= 0:
        return math.nan, math.nan
    between = examples.variance - examples.within
    between = between * examples.count / (batches - 1)
    within = examples.within * examples.count / free
    varies = examples.variance > 1e-12 * (examples.mean**2 + epsilon)
    if not np.any(varies):
        return math.nan, math.nan
    # Where nothing varies within batches, but between them.
    f = between[varies] / np.maximum(
        within[varies], 1e-6 * examples.variance[varies]
    )
    limit = 1 + 4 * math.sqrt(2 / (batches - 1) + 2 / free)
    return float(np.mean(f)), max(2.0, limit)


def warn_of_likeness(
    layer: Any, name: str, total: Total, examples: Total
) -> None:
    """Warns of batches that are no random draws, where that matters."""
    f, limit = f_of_batches(examples, layer.epsilon)
    scatter = np.sqrt(np.mean(total.between / (total.variance + layer.epsilon)))
    if f > limit and scatter > GROUPED:
        warnings.warn(
            "Batches of `dataset` do not look i.i.d.: their means vary "
            f"{f:.1f} times as much as random draws make them ({name}; "
            f"by chance below {limit:.1f}). Statistics of the layers after it "
            "are those of such batches: shuffle the data, or give "
            "layer_by_layer=True.",
            stacklevel=2,
        )
