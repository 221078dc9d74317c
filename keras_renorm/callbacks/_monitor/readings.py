"""One training step of a layer, by its moving statistics before and after."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_renorm._backend.variables import to_numpy
from keras_renorm.diagnostics._report.drawing import pyplot
from keras_renorm.diagnostics._report.measurement import (
    BatchFigures,
    batch_figures,
)
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.schedules import CLOSED, D_MAX, R_MAX


class LayerState(NamedTuple):
    """The state of a layer between two steps.

    Attributes:
        moving_mean: The moving mean, float64.
        moving_variance: The moving variance, float64.
        gamma: The scale, or 1.
        beta: The offset, or 0.
        step: The step counter, or `None` where the layer has none.
        limits: r_max and d_max of the next step, or `None`.
        correction: How far the next step corrects within them, from 0 to 1.
    """

    moving_mean: np.ndarray
    moving_variance: np.ndarray
    gamma: np.ndarray | float
    beta: np.ndarray | float
    step: int | None
    limits: tuple[float, float] | None
    correction: float


def batch_statistic(
    before: np.ndarray, after: np.ndarray, momentum: float, steps: int = 1
) -> np.ndarray:
    """The statistic that moved a moving average: its update, inverted.

    The statistic of the batch, where it moved once. Where it moved several
    times, the average of the batches', in which each weighs `momentum` times
    as much as the next one.
    """
    kept = momentum**steps
    return (after - kept * before) / (1 - kept)


def read_state(layer: Any) -> LayerState:
    """The state of a layer before a step."""
    limits, correction = None, 0.0
    if isinstance(layer, BatchRenormalization):
        limits = layer.current_limits()
        correction = layer.current_correction()
    return read_moved(
        layer,
        LayerState(
            np.zeros(0),
            np.zeros(0),
            1.0 if layer.gamma is None else _value(layer.gamma),
            0.0 if layer.beta is None else _value(layer.beta),
            None,
            limits,
            correction,
        ),
    )


def read_moved(layer: Any, before: LayerState) -> LayerState:
    """The state after it: only the parts that a step moves are read again."""
    step = None
    if isinstance(layer, BatchRenormalization):
        step = layer.current_step()
    return before._replace(
        moving_mean=_value(layer.moving_mean),
        moving_variance=_value(layer.moving_variance),
        step=step,
    )


def _value(variable: Any) -> np.ndarray:
    return to_numpy(variable).astype("float64")


def has_moved(layer: Any, before: LayerState, after: LayerState) -> bool:
    """Whether the moving statistics show the batch."""
    return 0 < layer.momentum < 1 and not (
        np.array_equal(before.moving_mean, after.moving_mean)
        and np.array_equal(before.moving_variance, after.moving_variance)
    )


def figures_of(
    layer: Any, before: LayerState, after: LayerState, steps: int
) -> dict[str, float]:
    """Figures of the steps between two states of a layer.

    `r` is the 95 % quantile over channels of max(r, 1/r), `d` that of |d|;
    `clipped` the share of channels beyond the layer's limits, or 3 and 5
    where it has none; `jeffreys` a mean over channels; `correction` of
    renormalization only.
    """
    mean, variance = (
        batch_statistic(old, new, layer.momentum, steps)
        for old, new in zip(before[:2], after[:2], strict=True)
    )
    variance = np.maximum(variance, 0.0)  # of a rounding error
    limits = before.limits or (R_MAX, D_MAX)
    found = batch_figures(mean, variance, *before[:2], layer.epsilon, limits)
    figures = {
        "r": float(np.quantile(np.maximum(found.r, 1 / found.r), 0.95)),
        "r_median": float(np.median(found.r)),
        "d": float(np.quantile(np.abs(found.d), 0.95)),
        "d_median": float(np.median(found.d)),
        "clipped": float(np.mean(found.is_beyond_r | found.is_beyond_d)),
        "jeffreys": float(np.mean(found.jeffreys)),
        "gap": _gap(found, before, variance / (variance + layer.epsilon)),
    }
    if before.limits is not None:
        figures["r_max"], figures["d_max"] = before.limits
        figures["correction"] = before.correction
    return figures


def _gap(found: BatchFigures, state: LayerState, size: np.ndarray) -> float:
    """Training-mode less inference-mode outputs, of the size of the former.

    The training output is γ (x̂ r' + d') + β and the inference output of the
    same input γ (x̂ r + d) + β, where x̂ has mean 0 and the mean square `size`,
    v_B / σ_B², and r', d' are clipped, then r'^g and g d' with the correction
    g. So their difference has the mean square

        γ² ((r' − r)² v_B / σ_B² + (d' − d)²)

    and the training output γ² r'² v_B / σ_B² + (γ d' + β)².
    """
    r_max, d_max = state.limits or CLOSED
    r = np.clip(found.r, 1 / r_max, r_max) ** state.correction
    d = np.clip(found.d, -d_max, d_max) * state.correction
    difference = (r - found.r) ** 2 * size + (d - found.d) ** 2
    outputs = (state.gamma * r) ** 2 * size + (
        state.gamma * d + state.beta
    ) ** 2
    total = np.sum(state.gamma**2 * difference)
    return float(np.sqrt(total / max(np.sum(outputs), 1e-30)))


# The first of any layer, the others of renormalization.
_LOGGED = ("r", "d", "clipped", "gap")
_LOGGED_OF_RENORM = ("r_max", "d_max", "correction")


def logged_names(layers: Sequence[Any]) -> list[str]:
    """What `means_of` names of all these layers, where all was measured."""
    names: tuple[str, ...] = _LOGGED
    if any(isinstance(layer, BatchRenormalization) for layer in layers):
        names += _LOGGED_OF_RENORM
    return [f"renorm_{name}" for name in names]


def means_of(rows: list[dict[str, Any]], per_layer: bool) -> dict[str, float]:
    """Means over steps, the largest of all layers, and of each on request.

    Args:
        rows: A dict for each step and layer: its name as `layer`, and the
            figures of `figures_of`.
        per_layer: Whether to name each layer's means, too.
    """
    largest: dict[str, float] = {}
    of_layers: dict[str, float] = {}
    for figure in _LOGGED + _LOGGED_OF_RENORM:
        for name in dict.fromkeys(row["layer"] for row in rows):
            mean = mean_of(figure, name, rows)
            if mean is not None:
                of_layers[f"{name}/renorm_{figure}"] = mean
                key = f"renorm_{figure}"
                # NumPy's: figures of other layers do not hide NaN.
                largest[key] = float(np.maximum(largest.get(key, mean), mean))
    return {**largest, **(of_layers if per_layer else {})}


def mean_of(figure: str, name: str, rows: list[dict[str, Any]]) -> float | None:
    """The mean of a figure of a layer over steps, where any has it."""
    values = [
        row[figure] for row in rows if row["layer"] == name and figure in row
    ]
    return float(np.mean(values)) if values else None


def draw_steps(rows: Sequence[dict[str, Any]]) -> Any:
    """Draws the rows of `RenormMonitor`; returns the figure.

    A line a layer: the gap, r and d over the steps, and how far layers of
    renormalization correct. Limits are dotted.
    """
    labels = {
        "gap": "gap",
        "r": "max(r, 1/r), 95 % quantile",
        "d": "|d|, 95 % quantile",
    }
    if any("correction" in row for row in rows):
        labels["correction"] = "correction"
    figure, panels = pyplot().subplots(
        len(labels), 1, figsize=(8, 8), sharex=True, layout="constrained"
    )
    names = list(dict.fromkeys(row["layer"] for row in rows))
    for name in names:
        own = [row for row in rows if row["layer"] == name]
        steps = [row["step"] for row in own]
        for ax, key in zip(panels, labels, strict=True):
            values = [row.get(key, np.nan) for row in own]
            (line,) = ax.plot(steps, values, marker=".", label=name)
            limits = [row.get(f"{key}_max") for row in own]
            if None not in limits:
                ax.plot(steps, limits, ":", color=line.get_color())
    for ax, label in zip(panels, labels.values(), strict=True):
        ax.set_ylabel(label)
    panels[-1].set_xlabel("step")
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure
