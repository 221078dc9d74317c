"""Counts the batches of one layer, and makes figures of them."""

import math
from typing import Any

import numpy as np

from keras_renorm._backend.variables import to_numpy
from keras_renorm.diagnostics._report.measurement import (
    Gap,
    Measurement,
    batch_figures,
    jeffreys,
)
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models._data.totals import Total, f_of_batches
from keras_renorm.models._layers.state import is_untrained
from keras_renorm.schedules import D_MAX, R_MAX

# Quantiles rest on at most this many batches, evenly spread over all.
KEPT_BATCHES = 512
QUANTILES = (0.05, 0.5, 0.95)


class Record:
    """Counts the batches of one layer, in float64."""

    def __init__(
        self,
        layer: Any,
        name: str,
        r_max: float | None,
        d_max: float | None,
    ) -> None:
        self.layer = layer
        self.name = name
        limits = (R_MAX, D_MAX)
        self.correction, self.is_gated = 0.0, False
        if isinstance(layer, BatchRenormalization):
            limits = layer.current_limits()
            self.correction = layer.current_correction()
            self.is_gated = layer.is_gated
        self.r_max = limits[0] if r_max is None else r_max
        self.d_max = limits[1] if d_max is None else d_max
        self.epsilon = float(layer.epsilon)
        self.moving_mean, self.moving_variance = (
            to_numpy(weight).astype("float64")
            for weight in (layer.moving_mean, layer.moving_variance)
        )
        with np.errstate(all="ignore"):
            self.sigma = np.sqrt(self.moving_variance + self.epsilon)
        self.elements = Total()
        self.variances = Total()
        self.deviations = Total()
        self.examples = Total()
        self.gap = Gap(0.0, 0.0)
        # r and d of a batch; the lowest and the highest of each.
        self._kept: list[np.ndarray] = []
        self._stride = 1
        self._extremes: list[list[np.ndarray]] = []
        self._beyond = np.zeros(3)
        self._jeffreys = 0.0

    def add_batch(
        self,
        count: np.ndarray,
        shift: np.ndarray,
        residual: np.ndarray,
        variance: np.ndarray,
    ) -> None:
        """Counts elements normalized together: a batch, or a group."""
        if not np.max(count):
            return
        self.elements.add(count, shift, residual, variance)
        with np.errstate(all="ignore"):
            sigma = np.sqrt(variance + self.epsilon)
        self.variances.add(1, variance, 0.0, 0.0)
        self.deviations.add(1, sigma, 0.0, 0.0)
        figures = batch_figures(
            shift + residual,
            variance,
            self.moving_mean,
            self.moving_variance,
            self.epsilon,
            (self.r_max, self.d_max),
        )
        beyond = figures.is_beyond_r, figures.is_beyond_d
        self._beyond += [
            np.mean(where) for where in (*beyond, np.any(beyond, 0))
        ]
        self._jeffreys += float(np.mean(figures.jeffreys))
        both = np.array([figures.r, figures.d], "float32")
        self._extremes.append([both.min(axis=1), both.max(axis=1)])
        if (self.elements.batches - 1) % self._stride == 0:
            self._kept.append(both)
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
            f, f_limit = f_of_batches(self.examples, self.epsilon)
            pooled_sigma = np.sqrt(self.elements.variance + self.epsilon)
            population = jeffreys(
                pooled_sigma / self.sigma,
                (self.elements.mean - self.moving_mean) / self.sigma,
            )
            scatter = np.sqrt(np.mean(self._between / pooled_sigma**2))
            expected = np.sqrt(np.mean(self._drawn / pooled_sigma**2))
            # Mean of (1 - σ_B / σ)², from the means of σ_B and σ_B².
            scales = (
                (self.variances.mean + self.epsilon) / pooled_sigma**2
                - 2 * self.deviations.mean / pooled_sigma
                + 1
            )
            noise = np.sqrt(np.mean(scales + self._between / pooled_sigma**2))
            constant = self.elements.variance < self.epsilon / 100
            beyond = self._beyond / batches
        r, d = self._distributions()
        return Measurement(
            name=self.name,
            kind=type(self.layer).__name__,
            channels=len(self.moving_mean),
            batches=batches,
            elements=self.elements.count / batches,
            examples=self.examples.count / max(self.examples.batches, 1),
            momentum=float(self.layer.momentum),
            is_frozen=is_frozen,
            is_untrained=is_untrained(self.layer),
            is_broken=is_broken,
            correction=self.correction,
            is_gated=self.is_gated,
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
            distance=math.nan if is_broken else self.shift(is_exact=True),
            f=f,
            f_limit=f_limit,
            scatter=float(scatter),
            scatter_expected=float(expected),
            batch_noise=float(noise),
            from_start=self._from_start(),
            constant_channels=tuple(np.flatnonzero(constant).tolist()),
        )

    def _distributions(self) -> list[tuple[float, ...]]:
        """The lowest, quantiles and the highest of r, and of d."""
        low, high = np.transpose(self._extremes, (1, 2, 0))
        kept = np.concatenate(self._kept, axis=1)
        quantiles = np.quantile(kept, QUANTILES, axis=1)
        lines = [low.min(axis=1), *quantiles, high.max(axis=1)]
        return [tuple(line) for line in np.transpose(lines).tolist()]

    @property
    def _between(self) -> np.ndarray:
        """Variance of the batch means (divisor: batches less 1)."""
        batches = self.elements.batches
        if batches < 2:
            return self._drawn
        return self.elements.between

    @property
    def _drawn(self) -> np.ndarray:
        """The variance of batch means for random draws of examples.

        The variance of one example's mean, which takes the likeness of an
        example's elements into account, over the number of examples.
        """
        total, batches = self.examples, self.examples.batches
        if total.count <= batches:  # one example a batch
            return np.full_like(self.sigma, math.nan)
        within = total.within * total.count / (total.count - batches)
        return within * batches / total.count

    def shift(self, is_exact: bool = False) -> float:
        """Distance of the moving statistics from the data's, without noise.

            shift² = mean over channels of d̄² − noise and (ln r̄)² − noise

        with d̄ = (mean of the data − μ) / σ, that difference at most D_MAX²,
        and r̄ the ratio of standard deviations, at most R_MAX either way. (In
        large units the noise is beyond D_MAX, too.) A moving variance is
        right if it is the mean variance of batches or that of all data, or
        anything between; r̄ is taken from the nearer. The noise is that of
        means over these batches and of a moving average with the layer's
        momentum m over batches like these: their variance times
        1/batches + (1 − m)/(1 + m).

        Args:
            is_exact: Whether moving statistics should be exact: the scatter of
                a moving average is not taken for noise.
        """
        batches = self.elements.batches
        momentum = 1.0 if is_exact else float(self.layer.momentum)
        factor = 1 / batches + (1 - momentum) / (1 + momentum)
        noise = np.nan_to_num(self._between) / self.sigma**2
        d = (self.elements.mean - self.moving_mean) / self.sigma
        low, high, now = (
            0.5 * np.log(values + self.epsilon)
            for values in (
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
        squared = np.mean(np.minimum(d**2 - factor * noise, D_MAX**2)) + max(
            np.mean(log_r**2 - factor * log_noise), 0.0
        )
        return math.sqrt(max(squared, 0.0))

    def _from_start(self) -> float:
        """How far on the line from (0, 1) to the data's statistics.

        A moving average that began there is at 1 − momentum^steps. NaN where
        no one number fits means and variances, each to 2 % of its squares:
        data that is brighter, say, has other means and the same variances.
        And each to half of the squares that averages moved so far may be off
        the line: beside data in large units, all averages are at the start.
        """
        sigma = np.sqrt(self.elements.variance + self.epsilon)
        scale = sigma**2 + 1
        ways = [
            (self.elements.mean / sigma, self.moving_mean / sigma),
            (
                (self.elements.within - 1) / scale,
                (self.moving_variance - 1) / scale,
            ),
        ]
        whole, gone = (
            np.concatenate(parts) for parts in zip(*ways, strict=True)
        )
        fitted = float(whole @ gone / max(whole @ whole, 1e-30))
        # What batches scatter by, about.
        noises = (1.0, self.elements.within / scale)
        for (way, part), noise in zip(ways, noises, strict=True):
            left = np.sum((part - fitted * way) ** 2)
            moved = fitted**2 * np.sum(np.maximum(way**2, noise**2))
            if left > min(0.02 * (way @ way), 0.5 * moved):
                return math.nan
        return fitted
