"""The figures of one layer."""

import math
from typing import Any, NamedTuple

import numpy as np


class Gap(NamedTuple):
    """Sums of squares of training-mode outputs less inference-mode outputs.

    Attributes:
        difference: Of the difference.
        size: Of the training-mode outputs.
    """

    difference: float
    size: float

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of the outputs."""
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.size) if self.size else math.inf

    def plus(self, other: "Gap") -> "Gap":
        """Both together."""
        return Gap(self.difference + other.difference, self.size + other.size)


class Measurement(NamedTuple):
    """One layer over a dataset.

    Batch statistics are those of the layer's input in training mode, one
    value a batch and channel; σ_B and σ have epsilon under the root.

    Attributes:
        name: Name of the layer.
        kind: Name of its class.
        channels: Number of channels.
        batches: Number of batches (of groups, with virtual batches; a layer
            that is called twice counts each call).
        elements: Elements a batch and channel, on average.
        examples: Examples a batch, on average.
        momentum: The layer's: the share that the moving statistics keep.
        is_frozen: Whether training mode, too, uses the moving statistics.
        is_untrained: Whether these are as they were made, 0 and 1.
        is_broken: Whether they are not finite, or a variance is negative.
        correction: How far a training step corrects by r and d, from 0 to 1:
            0 is batch normalization, 1 all that the limits allow.
        is_gated: Whether the layer measures that itself, no limits being
            given.
        r_max, d_max: The limits that the shares below are counted by.
        r: Lowest, 5 %, median, 95 % and highest of r = σ_B / σ.
        d: The same of d = (μ_B − μ) / σ.
        beyond_r: Share of values of r outside [1 / r_max, r_max].
        beyond_d: Share of values of d outside [-d_max, d_max].
        beyond: Share of channels and batches where either is.
        jeffreys: Mean over batches and channels of the Jeffreys divergence
            ½ (r² + 1/r² − 2 + d² (1 + 1/r²)) of N(μ_B, σ_B²) and N(μ, σ²).
        population_jeffreys: The same for the pooled mean and variance of all
            batches in the place of a batch's, mean over channels.
        gap: Training-mode outputs less inference-mode outputs for the same
            input: root mean square, over that of the training-mode outputs.
        shift: How far the moving statistics are from those of the data,
            beyond noise, in standard deviations; see `Record.shift`.
        distance: The same, with the noise of a moving average of this
            momentum left in.
        f: Between-batch F statistic of the examples' channel means, mean
            over channels. 1 where batches are random draws, NaN where it
            is unknown (one batch, or one example a batch).
        f_limit: What F stays below by chance.
        scatter: Standard deviation of batch means, over that of the elements
            of all data (root mean square over channels).
        scatter_expected: The same for random draws of this many examples;
            NaN where it is unknown.
        batch_noise: The gap that batches like these make by themselves, where
            the moving statistics are those of all data: root mean square over
            batches and channels of (1 − r, d), with the pooled mean and
            variance in the place of the moving ones.
        from_start: How far the moving statistics are on the way from (0, 1) to
            the data's, 0 to 1, if they are on that line; else NaN.
        constant_channels: Indices of the channels whose variance over all
            data is below a hundredth of epsilon: normalization divides by
            epsilon's root, and the outputs are nearly constant.
    """

    name: str
    kind: str
    channels: int
    batches: int
    elements: float
    examples: float
    momentum: float
    is_frozen: bool
    is_untrained: bool
    is_broken: bool
    correction: float
    is_gated: bool
    r_max: float
    d_max: float
    r: tuple[float, ...]
    d: tuple[float, ...]
    beyond_r: float
    beyond_d: float
    beyond: float
    jeffreys: float
    population_jeffreys: float
    gap: float
    shift: float
    distance: float
    f: float
    f_limit: float
    scatter: float
    scatter_expected: float
    batch_noise: float
    from_start: float
    constant_channels: tuple[int, ...]

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        row: dict[str, Any] = {"layer": self.name}
        for name in self._fields:
            value = getattr(self, name)
            if name in ("r", "d"):
                names = ("lowest", "5%", "median", "95%", "highest")
                for part, number in zip(names, value, strict=True):
                    row[f"{name}_{part}"] = number
            elif name == "constant_channels":
                row[name] = len(value)
            elif name != "name":
                row[name] = value
        return row


def jeffreys(r: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Jeffreys divergence of N(μ_B, σ_B²) and N(μ, σ²), by r and d.

    KL(p ‖ q) + KL(q ‖ p) = ½ (v_p/v_q + v_q/v_p − 2 + (μ_p − μ_q)² (1/v_p +
    1/v_q)), in nats; with r = σ_B/σ and d = (μ_B − μ)/σ it is
    ½ (r² + 1/r² − 2 + d² (1 + 1/r²)).
    """
    return 0.5 * (r**2 + r**-2 - 2 + d**2 * (1 + r**-2))


class BatchFigures(NamedTuple):
    """A batch against the moving statistics, a value a channel.

    Attributes:
        r: σ_B / σ, not clipped.
        d: (μ_B − μ) / σ, not clipped.
        is_beyond_r: Whether r is outside [1 / r_max, r_max].
        is_beyond_d: Whether d is outside [-d_max, d_max].
        jeffreys: The Jeffreys divergence of the two Gaussians.
    """

    r: np.ndarray
    d: np.ndarray
    is_beyond_r: np.ndarray
    is_beyond_d: np.ndarray
    jeffreys: np.ndarray


def batch_figures(
    mean: np.ndarray,
    variance: np.ndarray,
    moving_mean: np.ndarray,
    moving_variance: np.ndarray,
    epsilon: float,
    limits: tuple[float, float],
) -> BatchFigures:
    """The figures of a batch; `limits` are r_max and d_max."""
    with np.errstate(all="ignore"):
        sigma = np.sqrt(moving_variance + epsilon)
        r = np.sqrt(variance + epsilon) / sigma
        d = (mean - moving_mean) / sigma
        divergence = jeffreys(r, d)
        # In float32: a limit of 1 and a ratio of 1 + 1e-16 are the same.
        low, high, d_max = np.array([1 / limits[0], *limits], "float32")
        rounded = r.astype("float32")
        is_beyond_r = (rounded > high) | (rounded < low)
        is_beyond_d = np.abs(d.astype("float32")) > d_max
    return BatchFigures(r, d, is_beyond_r, is_beyond_d, divergence)
