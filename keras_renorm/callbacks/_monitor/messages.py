"""Warnings of `RenormMonitor`."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from keras_renorm.callbacks._monitor.readings import mean_of
from keras_renorm.diagnostics._report.conditions import is_scattered
from keras_renorm.diagnostics._report.measurement import Measurement
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.schedules import CLOSED

# Limits that cut more than this share of the values, when they have relaxed
# to their end, leave training and inference apart.
SATURATED = 0.25
# A layer that corrects less than this is batch normalization more than not;
# how much its limits cut does not matter.
CORRECTS = 0.5


def batches_message(layers: Sequence[Measurement]) -> str | None:
    """Of batches that are no random draws; `None` if they are.

    Of data, not of the model: whether a layer is frozen or well as it is does
    not matter here.
    """
    found = [layer for layer in layers if is_scattered(layer)]
    if not found:
        return None
    worst = max(found, key=attrgetter("f"))
    return (
        "Batches of `dataset` do not look i.i.d.: their means vary "
        f"{worst.f:.1f} times as much as random draws make them "
        f"({worst.name}; by chance below {worst.f_limit:.1f}). "
        "Shuffle before batching, or renormalize."
    )


def limits_messages(
    layers: Mapping[str, BatchRenormalization], rows: list[dict[str, Any]]
) -> dict[str, str]:
    """Of limits that do nothing, or too much, when a run ends; by kind.

    Args:
        layers: Layers by name.
        rows: Figures of the last epoch, as of `step.means_of`.
    """
    messages = {}
    closed = [
        name
        for name, layer in layers.items()
        if layer.current_limits() == CLOSED
    ]
    relaxed = [
        name
        for name, layer in layers.items()
        if layer.current_step()
        >= max(layer.r_max.end_step, layer.d_max.end_step)
    ]
    if closed:
        later = [
            min(layers[name].r_max.begin_step, layers[name].d_max.begin_step)
            for name in closed
            if name not in relaxed
        ]
        begin = f" They would from step {min(later):,} on." if later else ""
        remedy = "`RenormScheduler()` scales the ramps to the run."
        if any(layers[name].is_gated for name in closed):
            remedy = "with a lower `momentum` they relax sooner."
        messages["closed"] = (
            "Limits of renormalization never relaxed in this run: r_max "
            f"is 1 and d_max is 0 still, in layers {', '.join(closed)}.{begin} "
            f"That is plain batch normalization; {remedy}"
        )
    clipped = {
        name: mean_of("clipped", name, rows) or 0.0
        for name in relaxed
        if name not in closed
        and (mean_of("correction", name, rows) or 0.0) >= CORRECTS
    }
    saturated = [name for name in clipped if clipped[name] > SATURATED]
    if saturated:
        worst = max(saturated, key=clipped.__getitem__)
        # Limits that are given end the measuring.
        remedy = "Raise r_max and d_max, or see"
        if layers[worst].is_gated:
            remedy = "See"
        messages["clipped"] = (
            f"Limits of renormalization clip {clipped[worst]:.0%} of the "
            f"channels in {worst} (above {SATURATED:.0%} in layers "
            f"{', '.join(saturated)}), though they have relaxed: training and "
            f"inference stay apart. {remedy} "
            "`keras_renorm.diagnostics.discrepancy`."
        )
    return messages
