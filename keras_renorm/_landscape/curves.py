"""Results of the landscape functions: arrays, and a picture of them.

Each `plot` returns the figure, as that of a `Report` does.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_renorm.diagnostics._report.drawing import pyplot


@dataclass(frozen=True, eq=False)
class LossAlongGradient:
    """The loss at θ − η g(θ).

    Attributes:
        step_sizes: Step sizes η, shape `(steps,)`.
        values: The loss after each step, shape `(steps,)`.
        initial_loss: The loss at θ.
        gradient_norm: ||g(θ)||₂.
    """

    step_sizes: np.ndarray
    values: np.ndarray
    initial_loss: float
    gradient_norm: float

    @property
    def relative_losses(self) -> np.ndarray:
        """The loss after each step over the loss before it."""
        with np.errstate(all="ignore"):
            return self.values / np.float64(self.initial_loss)

    def plot(self, ax: Any = None) -> Any:
        """Draws the loss against the step size; returns the figure."""
        return _drawn(self, ax, "loss", self.initial_loss)


@dataclass(frozen=True, eq=False)
class GradientPredictiveness:
    """How far the gradient at θ − η g(θ) is from that at θ.

    Attributes:
        step_sizes: Step sizes η, shape `(steps,)`.
        values: ||g(θ) − g(θ − η g(θ))||₂, shape `(steps,)`.
        gradient_norm: ||g(θ)||₂.
    """

    step_sizes: np.ndarray
    values: np.ndarray
    gradient_norm: float

    def plot(self, ax: Any = None) -> Any:
        """Draws the distance against the step size; returns the figure."""
        return _drawn(self, ax, "ℓ2 change of the gradient")


@dataclass(frozen=True, eq=False)
class EffectiveSmoothness:
    """The change of the gradient over the distance moved.

    Attributes:
        step_sizes: Step sizes η, shape `(steps,)`.
        values: ||g(θ) − g(θ − η g(θ))||₂ / ||η g(θ)||₂, shape `(steps,)`.
        gradient_norm: ||g(θ)||₂.
    """

    step_sizes: np.ndarray
    values: np.ndarray
    gradient_norm: float

    @property
    def maximum(self) -> float:
        """The effective β-smoothness: the largest value on the line."""
        return float(np.max(self.values))

    def plot(self, ax: Any = None) -> Any:
        """Draws the values and their maximum; returns the figure."""
        label = "change of the gradient / distance"
        return _drawn(self, ax, label, self.maximum)


@dataclass(frozen=True, eq=False)
class InternalCovariateShift:
    """What an update of the layers before it does to a layer's gradient.

    Attributes:
        step_sizes: Step sizes η, shape `(steps,)`.
        layers: Names of the layers that own trainable weights, in order.
        values: ||G_i − G'_i||₂, shape `(steps, layers)`.
        cosines: Cosine of the angle between G_i and G'_i, shape
            `(steps, layers)`; NaN where one of them is zero.
    """

    step_sizes: np.ndarray
    layers: tuple[str, ...]
    values: np.ndarray
    cosines: np.ndarray

    def plot(self, ax: Any = None) -> Any:
        """Draws the shift of each layer; returns the figure."""
        ax = _axes(ax)
        places = np.arange(len(self.layers))
        for step_size, values in zip(self.step_sizes, self.values, strict=True):
            ax.plot(places, values, marker=".", label=f"{step_size:g}")
        ax.set_xticks(places, self.layers, rotation=90)
        ax.set_ylabel("ℓ2 change of the layer's gradient")
        ax.legend(title="step size")
        return ax.figure


def _axes(ax: Any) -> Any:
    """The given axes, or new ones."""
    return pyplot().subplots()[1] if ax is None else ax


def _drawn(curve: Any, ax: Any, label: str, level: float | None = None) -> Any:
    """The figure of values over step sizes, which are compared by ratios."""
    ax = _axes(ax)
    ax.plot(curve.step_sizes, curve.values, marker=".")
    if level is not None:
        ax.axhline(level, color="gray", linestyle=":")
    ax.set_xscale("log")
    ax.set_xlabel("step size")
    ax.set_ylabel(label)
    return ax.figure
