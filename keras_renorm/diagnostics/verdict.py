"""From measured figures to a cause, a reason and a remedy.

Pure rules. A rule is about single layers; what it says of several is one
verdict, which names them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from keras_renorm.diagnostics.measurement import Measurement

# Moving statistics this far from the data's, in standard deviations and beyond
# noise, are worth acting on: the layer's outputs are off by as much.
SHIFT = 0.25
# Batches that make a gap of this size by themselves are too uncertain, where
# they are random draws: n independent Gaussian elements make (1.5 / n)^½, so a
# batch then counts for 13 of them. Wu and He 2018 (arXiv:1803.08494, section
# 4.1) see errors rise from batches of eight images on.
NOISE = 1 / 3
# Where outputs of the model differ by this much of their size, and nothing
# else explains it, half that noise does. Healthy networks of three layers,
# trained on digits in batches of 16 to 64, were at 0.12 to 0.39.
OUTPUTS = 0.5
# Batch means that scatter by this much of the standard deviation of all data,
# where batches are no random draws. A smaller scatter harms there: what the
# examples of a batch have in common is taken from them in training.
GROUPED = 0.1
# A moving average that is closer than this to its end has arrived.
ARRIVED = 0.95

UNTRAINED = "statistics never trained"
BROKEN = "statistics not finite"
NOT_IID = "batches not i.i.d."
LAG = "moving averages lag"
DOMAIN = "another domain"
LAG_OR_DOMAIN = "moving averages lag, or another domain"
TOO_SMALL = "batches too small"
CONSTANT = "constant channels"


class Verdict(NamedTuple):
    """One cause of what was measured.

    Attributes:
        cause: What is wrong, in the words of this module's constants.
        reason: The figures that say so.
        remedy: What to do.
        layers: Names of the layers concerned.
    """

    cause: str
    reason: str
    remedy: str
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.cause}: {self.reason} Remedy: {self.remedy}"


def verdicts_of(
    layers: Sequence[Measurement],
    references: Sequence[Measurement] | None = None,
    gap: float = 0.0,
) -> list[Verdict]:
    """The verdicts on a model's layers, the gravest first; none if healthy.

    Args:
        layers: Measurements of all layers.
        references: The same layers on training data, where `layers` are on
            other data.
        gap: How much outputs of the model differ, of their size.
    """
    broken = [each for each in layers if each.is_broken]
    untrained = [each for each in layers if each.is_untrained]
    grouped = [each for each in layers if is_grouped(each)]
    shifted = [
        each
        for each in layers
        if each.shift > SHIFT and not (each.is_broken or each.is_untrained)
    ]
    is_explained = bool(broken or untrained or shifted)
    noise = NOISE / 2 if gap > OUTPUTS and not is_explained else NOISE
    small = [each for each in layers if is_too_small(each, noise)]
    constant = [each for each in layers if each.constant_channels]
    found: list[Verdict] = []
    if broken:
        found.append(_broken(broken, layers))
    if untrained:
        found.append(_untrained(untrained, layers))
    if grouped:
        found.append(_grouped(grouped, layers))
    found += _shifted(shifted, layers, references)
    if small:
        found.append(_too_small(small, layers))
    if constant:
        found.append(_constant(constant, layers))
    return found


def is_grouped(layer: Measurement) -> bool:
    """Whether examples of a batch are more alike than random ones, and matter.

    False where it cannot be told: comparisons with NaN are.
    """
    return (
        layer.f > layer.f_limit
        and layer.scatter > GROUPED
        and not layer.gap < GROUPED
        and not layer.is_frozen
    )


def is_too_small(layer: Measurement, noise: float = NOISE) -> bool:
    """Whether random draws of this size are too uncertain."""
    return (
        not layer.f > layer.f_limit
        and layer.batch_noise > noise
        and not layer.gap < noise
        and not layer.is_frozen
    )


def _where(found: Sequence[Measurement], layers: Sequence[Measurement]) -> str:
    """How a sentence about layers begins."""
    if len(layers) == 1:
        return f"In {found[0].name}"
    if len(found) == len(layers):
        return f"In all {len(layers)} layers"
    only = " only" if 2 * len(found) <= len(layers) else ""
    names = ", ".join(each.name for each in found[:6])
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return f"In {len(found)} of {len(layers)} layers{only} ({names}{more})"


def _names(found: Sequence[Measurement]) -> tuple[str, ...]:
    return tuple(each.name for each in found)


def _broken(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    return Verdict(
        BROKEN,
        f"{_where(found, layers)} moving statistics are NaN or infinite, or a "
        "variance is negative; one bad sample is enough for Keras's layer.",
        "`keras_renorm.recalibrate(model, training_data)`; "
        "`keras_renorm.BatchNormalization`, which such samples do not reach.",
        _names(found),
    )


def _untrained(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    return Verdict(
        UNTRAINED,
        f"{_where(found, layers)} every moving mean is exactly 0 and every "
        "moving variance exactly 1, as they are made.",
        "Load the weights, train with training=True and the layers trainable, "
        "or `keras_renorm.recalibrate(model, training_data)`.",
        _names(found),
    )


def _grouped(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    worst = max(found, key=lambda each: each.f)
    return Verdict(
        NOT_IID,
        f"{_where(found, layers)} examples of a batch are more alike than "
        f"random ones: batch means vary {worst.f:.1f} times as much as random "
        f"draws make them ({worst.name}; by chance below {worst.f_limit:.1f}), "
        f"by {worst.scatter:.2f} standard deviations.",
        "Shuffle the data before it is cut into batches; where that cannot be, "
        + _renormalize(found),
        _names(found),
    )


def _too_small(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    worst = max(found, key=lambda each: each.batch_noise)
    explained = "the examples of a batch cannot be compared"
    if math.isfinite(worst.scatter_expected):
        explained = (
            f"random draws of {worst.examples:.3g} examples make "
            f"{worst.scatter_expected:.2f}"
        )
    return Verdict(
        TOO_SMALL,
        f"{_where(found, layers)} statistics of a batch are too uncertain: "
        f"alone they put training outputs {worst.batch_noise:.2f} of their "
        f"size away from what is served ({worst.name}, {worst.elements:.4g} "
        f"elements a channel). Batch means scatter by {worst.scatter:.2f} "
        f"standard deviations; {explained}.",
        "Larger batches, or `synchronized=True` over replicas; or else "
        + _renormalize(found),
        _names(found),
    )


def _renormalize(found: Sequence[Measurement]) -> str:
    """What renormalization is to do, or to do more."""
    renormalized = [
        each for each in found if each.kind == "BatchRenormalization"
    ]
    if not renormalized:
        return (
            "`keras_renorm.convert(model)` and train with "
            "`BatchRenormalization` and `RenormScheduler()`."
        )
    first = renormalized[0]
    return (
        f"relax the limits of `BatchRenormalization`, now r_max="
        f"{first.r_max:.3g} and d_max={first.d_max:.3g}, with "
        "`RenormScheduler()`."
    )


def _shifted(
    found: Sequence[Measurement],
    layers: Sequence[Measurement],
    references: Sequence[Measurement] | None,
) -> list[Verdict]:
    """Moving statistics that are not those of the data."""
    if not found:
        return []
    if references is None:
        return [_without_reference(found, layers)]
    on_reference = {each.name: each.shift for each in references}
    domain = [each for each in found if not on_reference[each.name] > SHIFT]
    lag = [each for each in found if on_reference[each.name] > SHIFT]
    verdicts = []
    if domain:
        worst = max(domain, key=lambda each: each.shift)
        verdicts.append(
            Verdict(
                DOMAIN,
                f"{_distance(domain, layers)}, and "
                f"{on_reference[worst.name]:.2f} from those of the reference: "
                "the averages are right, and the data is other data.",
                _ADAPT,
                _names(domain),
            )
        )
    if lag:
        worst = max(lag, key=lambda each: each.shift)
        verdicts.append(
            Verdict(
                LAG,
                f"{_distance(lag, layers)}, and "
                f"{on_reference[worst.name]:.2f} from those of the reference.",
                _RECALIBRATE,
                _names(lag),
            )
        )
    return verdicts


_RECALIBRATE = (
    "`keras_renorm.recalibrate(model, training_data)`; in training a lower "
    "`momentum`, more steps, or `RecalibrateStatistics`."
)
_ADAPT = (
    "`keras_renorm.recalibrate` on this data, with `prior_examples` where "
    "there is little of it; `get_statistics` keeps the bank of the old domain."
)


def _without_reference(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    on_the_way = [each for each in found if each.from_start < ARRIVED]
    if 2 * len(on_the_way) >= len(found):
        least = min(on_the_way, key=lambda each: each.from_start)
        return Verdict(
            LAG,
            f"{_distance(found, layers)}, on the line from their start (mean "
            f"0, variance 1) to them: {least.from_start:.0%} of the way in "
            f"{least.name}. The moving averages have seen too few steps.",
            _RECALIBRATE,
            _names(found),
        )
    return Verdict(
        LAG_OR_DOMAIN,
        f"{_distance(found, layers)}, though batches agree among each other. "
        "Either the averages lag behind the weights, or they are those of "
        "other data; this data alone cannot tell.",
        "If this is the training data: " + _RECALIBRATE + " If it is other "
        "data: " + _ADAPT + " `reference=training_data` tells which.",
        _names(found),
    )


def _distance(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> str:
    worst = max(found, key=lambda each: each.shift)
    return (
        f"{_where(found, layers)} moving statistics stand up to "
        f"{worst.shift:.2f} standard deviations ({worst.name}) from those of "
        "this data"
    )


def _constant(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    count = sum(len(each.constant_channels) for each in found)
    channels = sum(each.channels for each in layers)
    worst = max(found, key=lambda each: len(each.constant_channels))
    listed = ", ".join(map(str, worst.constant_channels[:8]))
    more = ", ..." if len(worst.constant_channels) > 8 else ""
    return Verdict(
        CONSTANT,
        f"{_where(found, layers)} {count} of {channels} channels have a "
        f"variance below a hundredth of epsilon over all data ({worst.name}: "
        f"{listed}{more}); what is normalized there is epsilon.",
        "Look at what feeds them (dead units, constant inputs): prune them, "
        "initialize them anew, or lower `epsilon` if the activations are "
        "meant to be so small.",
        _names(found),
    )
