"""What batches tell of one layer: counting first, then figures."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from keras_renorm import kernels
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models.observe import Total
from keras_renorm.models.statistics import is_untrained

# The final limits of the paper (Ioffe 2017, section 4).
R_MAX, D_MAX = 3.0, 5.0
# Quantiles rest on at most this many batches, evenly spread over all.
KEPT_BATCHES = 512
QUANTILES = (0.05, 0.5, 0.95)


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


@dataclass(frozen=True)
class Measurement:
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
        is_frozen: Whether training mode, too, uses the moving statistics.
        is_untrained: Whether these are exactly 0 and 1.
        is_broken: Whether they are not finite, or a variance is negative.
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
            beyond noise, in standard deviations; see `shift_of`.
        f: Between-batch F statistic of the examples' channel means, mean
            over channels. 1 where batches are random draws, NaN where it
            cannot be told (one batch, or one example a batch).
        f_limit: What F stays below by chance.
        scatter: Standard deviation of batch means, over that of the elements
            of all data (root mean square over channels).
        scatter_expected: What random draws of this many examples make of it;
            NaN where it cannot be told.
        from_start: Where the moving statistics stand on the way from (0, 1)
            to the data's, 0 to 1, if they stand on that line; else NaN.
        constant_channels: Indices of the channels whose variance over all
            data is below a hundredth of epsilon: normalization divides by
            epsilon's root, and what comes out is nearly constant.
    """

    name: str
    kind: str
    channels: int
    batches: int
    elements: float
    examples: float
    is_frozen: bool
    is_untrained: bool
    is_broken: bool
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
    f: float
    f_limit: float
    scatter: float
    scatter_expected: float
    from_start: float
    constant_channels: tuple[int, ...]

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        row: dict[str, Any] = {"layer": self.name}
        for name in self.__dataclass_fields__:
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


class Record:
    """Counts the batches of one layer, in float64."""

    def __init__(
        self, layer: Any, r_max: float | None, d_max: float | None
    ) -> None:
        self.layer = layer
        limits = (R_MAX, D_MAX)
        if isinstance(layer, BatchRenormalization):
            limits = layer.current_limits()
        self.r_max = limits[0] if r_max is None else r_max
        self.d_max = limits[1] if d_max is None else d_max
        self.epsilon = float(layer.epsilon)
        self.moving_mean, self.moving_variance = (
            kernels.to_numpy(weight).astype("float64")
            for weight in (layer.moving_mean, layer.moving_variance)
        )
        with np.errstate(all="ignore"):
            self.sigma = np.sqrt(self.moving_variance + self.epsilon)
        self.elements = Total()
        self.variances = Total()
        self.examples = Total()
        self.gap = Gap(0.0, 0.0)
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._stride = 1
        self._extremes: list[np.ndarray] = []
        self._beyond = np.zeros(3)
        self._jeffreys = 0.0

    def add_batch(
        self,
        count: np.ndarray,
        shift: np.ndarray,
        residual: np.ndarray,
        variance: np.ndarray,
    ) -> None:
        """Counts what training normalizes together: a batch, or a group."""
        if not np.max(count):
            return
        self.elements.add(count, shift, residual, variance)
        self.variances.add(1, variance, 0.0, 0.0)
        with np.errstate(all="ignore"):
            r = np.sqrt(variance + self.epsilon) / self.sigma
            d = ((shift - self.moving_mean) + residual) / self.sigma
            self._jeffreys += float(np.mean(jeffreys(r, d)))
        # To float32: a limit of 1 and a ratio of 1 + 1e-16 are the same.
        r, d = r.astype("float32"), d.astype("float32")
        beyond_r = (r > np.float32(self.r_max)) | (
            r < np.float32(1 / self.r_max)
        )
        beyond_d = np.abs(d) > np.float32(self.d_max)
        self._beyond += [
            np.mean(each) for each in (beyond_r, beyond_d, beyond_r | beyond_d)
        ]
        self._extremes.append(np.array([r.min(), r.max(), d.min(), d.max()]))
        if (self.elements.batches - 1) % self._stride == 0:
            self._kept.append((r, d))
            if len(self._kept) > KEPT_BATCHES:
                self._kept = self._kept[::2]
                self._stride *= 2

    def measure(self, is_frozen: bool) -> Measurement:
        """The figures of all batches so far."""
        batches = self.elements.batches
        is_broken = not bool(
            np.all(np.isfinite(self.moving_mean))
            and np.all(np.isfinite(self.moving_variance))
            and np.all(self.moving_variance >= 0)
        )
        with np.errstate(all="ignore"):
            f, f_limit = self._f()
            pooled_sigma = np.sqrt(self.elements.variance + self.epsilon)
            population = jeffreys(
                pooled_sigma / self.sigma,
                (self.elements.mean - self.moving_mean) / self.sigma,
            )
            scatter = np.sqrt(np.mean(self._between / pooled_sigma**2))
            expected = np.sqrt(np.mean(self._drawn / pooled_sigma**2))
            constant = self.elements.variance < self.epsilon / 100
            beyond = self._beyond / batches
        r, d = self._distributions()
        return Measurement(
            name=self.layer.name,
            kind=type(self.layer).__name__,
            channels=len(self.moving_mean),
            batches=batches,
            elements=self.elements.count / batches,
            examples=self.examples.count / max(self.examples.batches, 1),
            is_frozen=is_frozen,
            is_untrained=is_untrained(self.layer),
            is_broken=is_broken,
            r_max=self.r_max,
            d_max=self.d_max,
            r=r,
            d=d,
            beyond_r=float(beyond[0]),
            beyond_d=float(beyond[1]),
            beyond=float(beyond[2]),
            jeffreys=self._jeffreys / batches,
            population_jeffreys=float(np.mean(population)),
            gap=self.gap.relative,
            shift=math.nan if is_broken else self.shift(),
            f=f,
            f_limit=f_limit,
            scatter=float(scatter),
            scatter_expected=float(expected),
            from_start=self._from_start(),
            constant_channels=tuple(np.flatnonzero(constant).tolist()),
        )

    def _distributions(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        extremes = np.array(self._extremes)
        found = []
        for at in range(2):
            values = np.concatenate([pair[at] for pair in self._kept])
            low, high = extremes[:, 2 * at], extremes[:, 2 * at + 1]
            found.append(
                (
                    float(low.min()),
                    *(float(each) for each in np.quantile(values, QUANTILES)),
                    float(high.max()),
                )
            )
        return found[0], found[1]

    @property
    def _between(self) -> np.ndarray:
        """Variance of the batch means (divisor: batches less 1)."""
        batches = self.elements.batches
        if batches < 2:
            return self._drawn
        between = np.maximum(self.elements.variance - self.elements.within, 0)
        return between * batches / (batches - 1)

    @property
    def _drawn(self) -> np.ndarray:
        """What the variance of batch means is for random draws of examples.

        The variance of one example's mean, which takes the likeness of an
        example's elements into account, over the number of examples.
        """
        total, batches = self.examples, self.examples.batches
        if total.count <= batches:  # one example a batch
            return np.full_like(self.sigma, math.nan)
        within = total.within * total.count / (total.count - batches)
        return within * batches / total.count

    def _f(self) -> tuple[float, float]:
        """F of one-way analysis of variance, and what it may be by chance.

        The limit is four standard deviations of the F of one channel, for
        channels may all say the same; it is 2 at least.
        """
        total, batches = self.examples, self.examples.batches
        free = total.count - batches
        if batches < 2 or free <= 0:
            return math.nan, math.nan
        between = (total.variance - total.within) * total.count / (batches - 1)
        within = total.within * total.count / free
        varies = total.variance > 1e-12 * (total.mean**2 + self.epsilon)
        if not np.any(varies):
            return math.nan, math.nan
        # Where nothing varies within batches, but between them.
        f = between[varies] / np.maximum(
            within[varies], 1e-6 * total.variance[varies]
        )
        limit = 1 + 4 * math.sqrt(2 / (batches - 1) + 2 / free)
        return float(np.mean(f)), max(2.0, limit)

    def shift(self) -> float:
        """Distance of the moving statistics from the data's, without noise.

            shift² = mean over channels of d̄² − noise and (ln r̄)² − noise

        with d̄ = (mean of the data − μ) / σ, at most D_MAX, and r̄ the ratio
        of standard deviations, at most R_MAX either way. A moving variance is
        right if it is the mean variance of batches or that of all data, or
        anything between; r̄ is taken from the nearer. The noise is that of
        means over these batches and of a moving average with the layer's
        momentum m over batches like these: their variance times
        1/batches + (1 − m)/(1 + m).
        """
        batches = self.elements.batches
        momentum = float(self.layer.momentum)
        factor = 1 / batches + (1 - momentum) / (1 + momentum)
        noise = np.nan_to_num(self._between) / self.sigma**2
        d = (self.elements.mean - self.moving_mean) / self.sigma
        d = np.clip(d, -D_MAX, D_MAX)
        low, high, now = (
            0.5 * np.log(each + self.epsilon)
            for each in (
                self.elements.within,
                self.elements.variance,
                self.moving_variance,
            )
        )
        log_r = np.maximum(low - now, 0) + np.minimum(high - now, 0)
        log_r = np.clip(log_r, -math.log(R_MAX), math.log(R_MAX))
        log_noise = self.variances.variance / (
            4 * (self.variances.mean + self.epsilon) ** 2
        )
        squared = np.mean(d**2 - factor * noise) + max(
            np.mean(log_r**2 - factor * log_noise), 0.0
        )
        return math.sqrt(max(squared, 0.0))

    def _from_start(self) -> float:
        """How far on the line from (0, 1) to the data's statistics.

        A moving average that began there after t steps is at 1 − momentum^t.
        The one number that fits all channels best, if it leaves a tenth or
        less of the squares.
        """
        sigma = np.sqrt(self.elements.variance + self.epsilon)
        way = np.concatenate(
            [
                self.elements.mean / sigma,
                (self.elements.within - 1) / (sigma**2 + 1),
            ]
        )
        gone = np.concatenate(
            [
                self.moving_mean / sigma,
                (self.moving_variance - 1) / (sigma**2 + 1),
            ]
        )
        fitted = float(way @ gone / max(way @ way, 1e-30))
        left = float(np.sum((gone - fitted * way) ** 2))
        if left > 0.1 * float(gone @ gone) or not 0 < fitted < 1:
            return math.nan
        return fitted
