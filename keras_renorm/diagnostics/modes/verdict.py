"""From measured figures to a cause, a reason and a remedy.

Pure rules. A rule is about single layers; what it says of several is one
verdict, which names them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from keras_renorm.diagnostics import advice
from keras_renorm.diagnostics.modes.measurement import Measurement
from keras_renorm.models.passes import GROUPED
from keras_renorm.schedules import D_MAX, R_MAX

# Moving statistics this far from the data's, in standard deviations and beyond
# noise, are worth acting on: the layer's outputs are off by as much.
SHIFT = 0.25
# Shifts below this are what is left of noise: healthy networks of nine layers,
# trained on digits, were at 0.04 to 0.06.
FAINT = 0.05
# A moving average of a lower momentum jitters: it is mostly the last batch.
# PyTorch's `momentum` is the share of the new value, so that its 0.1 is 0.9.
LOW_MOMENTUM = 0.5
# A lower one than this, of ten steps, helps no average that lags.
HIGH_MOMENTUM = 0.9
# Batches that make a gap of this size by themselves are too uncertain, where
# they are random draws: n independent Gaussian elements make (1.5 / n)^½, so a
# batch then counts for 13 of them. Wu and He 2018 (arXiv:1803.08494, section
# 4.1) see errors rise from batches of eight images on.
NOISE = 1 / 3
# Where outputs of the model differ by this much of their size, and nothing
# else explains it, half that noise does. Healthy networks of three layers,
# trained on digits in batches of 16 to 64, were at 0.12 to 0.39.
OUTPUTS = 0.5
# Outputs that differ by this much are a reason to look at loss and metrics; it
# is a cause for a verdict where there are none.
VISIBLE = 0.25
# A loss that is higher in inference by more than this share of the larger one,
# and metrics that differ by more, either way, differ by much. (A loss that is
# lower in inference is what the noise of batches makes: healthy networks that
# have learned their data were at a fifth of the training mode's.) Of numbers
# within [0, 1], as accuracies are, SHARES is enough: the networks above, in
# batches of 16 to 32, were at 0.035.
SCORES = 2 / 3
SHARES = 0.05
# Limits that cut more than this share of the values, when they have relaxed
# to their end, leave training and inference apart.
SATURATED = 0.25
# A layer that corrects less than this is batch normalization more than not;
# what its limits cut does not matter.
CORRECTS = 0.5
# A moving average that is closer than this to its end has arrived.
ARRIVED = 0.95

UNTRAINED = "statistics never trained"
BROKEN = "statistics not finite"
NOT_IID = "batches not i.i.d."
LAG = "moving averages lag"
JITTER = "moving averages jitter"
DOMAIN = "another domain"
LAG_OR_DOMAIN = "moving averages lag, or another domain"
TOO_SMALL = "batches too small"
CONSTANT = "constant channels"
DIFFERENT = "training and inference differ"


# Loss and metrics in training and in inference mode, by name.
Scores: TypeAlias = tuple[Mapping[str, float], Mapping[str, float]]


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
    scores: Scores = ({}, {}),
    is_convertible: bool = True,
) -> list[Verdict]:
    """The verdicts on a model's layers, the gravest first; none if healthy.

    Args:
        layers: Measurements of all layers.
        references: The same layers on training data, where `layers` are on
            other data.
        gap: How much outputs of the model differ, of their size.
        scores: Loss and metrics in training and in inference mode, by name.
        is_convertible: Whether `convert` takes the model.
    """
    broken = [each for each in layers if each.is_broken]
    untrained = [each for each in layers if each.is_untrained]
    grouped = [each for each in layers if is_grouped(each)]
    known = [
        each for each in layers if not (each.is_broken or each.is_untrained)
    ]
    jittery = [each for each in known if jitters(each)]
    if references is not None or all(each.shift > SHIFT for each in jittery):
        # Only where noise explains one layer, others are no other data either.
        jittery = [each for each in jittery if not each.shift > SHIFT]
    shifted = [
        each for each in known if each.shift > SHIFT and each not in jittery
    ]
    is_explained = bool(broken or untrained or shifted or jittery)
    noise = NOISE / 2 if gap > OUTPUTS and not is_explained else NOISE
    differs = _differ(gap, scores)
    small = [
        each
        for each in layers
        if is_too_small(each, noise)
        # Where no layer is better than batch normalization, only if it matters.
        and (
            each.examples < advice.FEW
            or (scores[0] and differs and not is_explained)
        )
        # It has learned in spite of the noise.
        and not _is_much_better(scores)
    ]
    constant = [each for each in layers if each.constant_channels]
    found: list[Verdict] = []
    if broken:
        found.append(_broken(broken, layers))
    if untrained:
        found.append(_untrained(untrained, layers))
    if grouped:
        found.append(_grouped(grouped, layers, is_convertible))
    found += _shifted(shifted, layers, references)
    if jittery:
        found.append(_jittery(jittery, layers))
    if small:
        found.append(_too_small(small, layers, is_convertible))
    if not found and differs:
        found.append(
            _different(layers, references, gap, scores, is_convertible)
        )
    if constant:
        found.append(_constant(constant, layers))
    return found


def is_grouped(layer: Measurement) -> bool:
    """Whether examples of a batch are more alike than random ones, and matter.

    False where it cannot be told: comparisons with NaN are.
    """
    return (
        _is_scattered(layer) and not layer.gap < GROUPED and not layer.is_frozen
    )


def _is_scattered(layer: Measurement) -> bool:
    return layer.f > layer.f_limit and layer.scatter > GROUPED


def is_too_small(layer: Measurement, noise: float = NOISE) -> bool:
    """Whether random draws of this size are too uncertain."""
    return (
        not layer.f > layer.f_limit
        and layer.batch_noise > noise
        and not layer.gap < noise
        and not layer.is_frozen
    )


def jitters(layer: Measurement) -> bool:
    """Whether the moving statistics are off as a low momentum makes them."""
    return (
        layer.momentum < LOW_MOMENTUM
        and layer.distance > SHIFT
        and not layer.is_frozen
    )


def _differ(gap: float, scores: Scores) -> bool:
    """Whether the model is another one in inference, whatever the layers.

    And not a better one: noise of batches, which inference has not, makes
    outputs and metrics differ as well.
    """
    if not scores[0]:
        return not gap <= VISIBLE
    if scores[1]["loss"] < scores[0]["loss"]:
        return not math.isfinite(gap)
    return not gap <= OUTPUTS or bool(_different_scores(scores))


def _is_much_better(scores: Scores) -> bool:
    """Whether the loss is lower by much in inference."""
    if not scores[0]:
        return False
    trained, served = (each["loss"] for each in scores)
    return trained - served > SCORES * max(abs(trained), abs(served))


def _different_scores(scores: Scores) -> list[str]:
    """Names of the loss and the metrics that differ by much."""
    names = []
    for name, trained in scores[0].items():
        served = scores[1][name]
        distance = served - trained if name == "loss" else abs(served - trained)
        larger = max(abs(trained), abs(served))
        allowed = SCORES * larger
        if name != "loss" and min(trained, served) >= 0 and larger <= 1:
            allowed = SHARES
        if not distance <= allowed:
            names.append(name)
    return names


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
    found: Sequence[Measurement],
    layers: Sequence[Measurement],
    is_convertible: bool,
) -> Verdict:
    worst = max(found, key=lambda each: each.f)
    row = advice.advice_for(worst.examples, worst.elements, is_grouped=True)
    return Verdict(
        NOT_IID,
        f"{_where(found, layers)} examples of a batch are more alike than "
        f"random ones: batch means vary {worst.f:.1f} times as much as random "
        f"draws make them ({worst.name}; by chance below {worst.f_limit:.1f}), "
        f"by {worst.scatter:.2f} standard deviations.",
        "Shuffle the data before it is cut into batches; where that cannot "
        "be: " + _advised(row, found, is_convertible),
        _names(found),
    )


def _too_small(
    found: Sequence[Measurement],
    layers: Sequence[Measurement],
    is_convertible: bool,
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
        "Larger batches, or `synchronized=True` over replicas"
        + _instead_of_larger_batches(worst, found, is_convertible),
        _names(found),
    )


def _instead_of_larger_batches(
    worst: Measurement, found: Sequence[Measurement], is_convertible: bool
) -> str:
    if worst.examples >= advice.FEW:  # no layer learns better there
        return f"; or {_as_served(found, is_convertible)}."
    row = advice.advice_for(worst.examples, worst.elements)
    return f"; or else: {_advised(row, found, is_convertible)}"


def _renormalized(found: Sequence[Measurement]) -> list[Measurement]:
    return [each for each in found if each.kind == "BatchRenormalization"]


def _advised(
    row: advice.Advice, found: Sequence[Measurement], is_convertible: bool
) -> str:
    """A row of the table, and the way from these layers to there."""
    how = ""
    if row is not advice.ANY:
        how = f"for {row.where}, {row.take}. "
    gated = [each for each in found if each.is_gated]
    if gated:  # which have what rows advise
        return how + _of_gated(gated)
    renormalized = _renormalized(found)
    if renormalized:
        each = renormalized[0]
        call = _convert(is_convertible, *(f'{name}="auto"' for name in _AUTO))
        return (
            f"{how}Let `BatchRenormalization` measure how far to correct, in "
            f"the place of r_max={each.r_max:.3g} and d_max={each.d_max:.3g} "
            f"as they are now: {call}."
        )
    return (
        f"{how}{_convert(is_convertible)} puts `BatchRenormalization()` in the "
        "place of these layers."
    )


def _of_gated(found: Sequence[Measurement]) -> str:
    """What is left to do for layers that measure how far to correct."""
    for each in found:
        if each.r_max < R_MAX or each.d_max < D_MAX:
            return (
                f"Train for longer: limits, now r_max={each.r_max:.3g} and "
                f"d_max={each.d_max:.3g}, are not yet open."
            )
    least, most = (
        limit(each.correction for each in found) for limit in (min, max)
    )
    share = f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"
    return (
        "No setting: these layers measure how far to correct, and do it "
        f"({share} of the way)."
    )


def _convert(is_convertible: bool, *arguments: str) -> str:
    """The call that changes these layers."""
    if not is_convertible:
        arguments = ("in_place=True", *arguments)
    return f"`keras_renorm.convert({', '.join(('model', *arguments))})`"


def _different(
    layers: Sequence[Measurement],
    references: Sequence[Measurement] | None,
    gap: float,
    scores: Scores,
    is_convertible: bool,
) -> Verdict:
    names = _different_scores(scores)
    said = [f"Outputs of the model differ by {gap:.2f} of their size"] + [
        f"{name} is {scores[0][name]:.4g} in training mode and "
        f"{scores[1][name]:.4g} in inference"
        for name in names
    ]
    noisy = max(layers, key=lambda each: each.batch_noise)
    shifted = max(layers, key=lambda each: each.shift)
    other = _small_shifts_of_a_domain(layers, references)
    if other:
        return Verdict(
            DOMAIN,
            f"{'; '.join(said)}. {_distance(other, layers)}; from those of the "
            "reference they are half as far or less. Such shifts are small, "
            "but add up over layers.",
            _ADAPT,
            _names(other),
        )
    trained = layers if references is None else references
    served = _as_served(layers, is_convertible)
    remedy = f"Larger batches, or {served}."
    if any(each.shift > FAINT for each in trained):
        remedy = (
            "`keras_renorm.recalibrate(model, training_data)` and compare "
            f"anew. If it stays, larger batches, or {served}."
        )
    if references is None:
        remedy += (
            " If this is not the training data, `reference=training_data` "
            "tells whether it is another domain."
        )
    if not scores[0]:
        remedy = (
            "Compile the model and give labels, too: loss and metrics say "
            "whether this matters. If so, " + remedy
        )
    return Verdict(
        DIFFERENT,
        f"{'; '.join(said)}. No layer explains it by itself: moving "
        f"statistics are up to {shifted.shift:.2f} standard deviations "
        f"({shifted.name}) from those of this data, and the noise of batches "
        f"is up to {noisy.batch_noise:.2f} ({noisy.name}).",
        remedy,
        _names(layers),
    )


def _small_shifts_of_a_domain(
    layers: Sequence[Measurement], references: Sequence[Measurement] | None
) -> list[Measurement]:
    """The layers of which the averages fit the reference much better.

    None where, over all layers, they do not: half of the squares is left on
    the reference.
    """
    on_reference = {each.name: each.shift for each in references or layers}
    there = sum(on_reference[each.name] ** 2 for each in layers)
    if not sum(each.shift**2 for each in layers) > 2 * there:
        return []
    return [
        each
        for each in layers
        if each.shift > FAINT and each.shift > 2 * on_reference[each.name]
    ]


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
                _recalibrate(lag),
                _names(lag),
            )
        )
    return verdicts


def _recalibrate(found: Sequence[Measurement]) -> str:
    lowest = min(each.momentum for each in found)
    momentum = "a lower `momentum`, " if lowest > HIGH_MOMENTUM else ""
    if lowest < LOW_MOMENTUM:
        momentum = f"a higher `momentum` ({_convention(lowest)}), "
    return (
        "`keras_renorm.recalibrate(model, training_data)`; in training "
        f"{momentum}more steps, or `RecalibrateStatistics`."
    )


def _convention(momentum: float) -> str:
    """What a low momentum is most often."""
    said = f"it is {momentum:.3g}, the share of the old value that is kept"
    if not momentum:
        return said
    return f"{said}; PyTorch's {momentum:.3g} is {1 - momentum:.3g} here"


_AUTO = ("r_max", "d_max", "gradient_momentum")


def _as_served(found: Sequence[Measurement], is_convertible: bool) -> str:
    """Where larger batches are no way, nor a layer that measures."""
    call = _convert(is_convertible, "gradient_momentum=None")
    if any(not each.is_gated for each in _renormalized(found)):
        call = "open limits (`layer.r_max`, `layer.d_max`)"
    return f"go on training with outputs as the model serves them: {call}"


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
            _recalibrate(found),
            _names(found),
        )
    return Verdict(
        LAG_OR_DOMAIN,
        f"{_distance(found, layers)}, though batches agree among each other. "
        "Either the averages lag behind the weights, or they are those of "
        "other data; this data alone cannot tell.",
        f"If this is the training data: {_recalibrate(found)} If it is other "
        f"data: {_ADAPT} `reference=training_data` tells which.",
        _names(found),
    )


def _distance(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> str:
    worst = max(found, key=lambda each: each.shift)
    return (
        f"{_where(found, layers)} moving statistics are up to "
        f"{worst.shift:.2f} standard deviations ({worst.name}) from those of "
        "this data"
    )


def _jittery(
    found: Sequence[Measurement], layers: Sequence[Measurement]
) -> Verdict:
    worst = max(found, key=lambda each: each.distance)
    return Verdict(
        JITTER,
        f"{_where(found, layers)} moving statistics are up to "
        f"{worst.distance:.2f} standard deviations ({worst.name}) from those "
        "of this data, as the last few batches were: `momentum` is low "
        f"({_convention(worst.momentum)}).",
        "Train with a higher `momentum`, 0.9 or more; for the model as it is, "
        "`keras_renorm.recalibrate(model, training_data)`.",
        _names(found),
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


def said_of_batches(layers: Sequence[Measurement]) -> str | None:
    """What to warn of while a model trains: batches that are no random draws.

    Of data, not of the model: whether a layer is frozen or well as it is does
    not matter here.
    """
    found = [each for each in layers if _is_scattered(each)]
    if not found:
        return None
    worst = max(found, key=lambda each: each.f)
    return (
        "Batches of `dataset` do not look i.i.d.: their means vary "
        f"{worst.f:.1f} times as much as random draws make them "
        f"({worst.name}; by chance below {worst.f_limit:.1f}). "
        "Shuffle before batching, or renormalize."
    )


class LimitsAtEnd(NamedTuple):
    """Limits of renormalization when a run ends.

    Attributes:
        name: Name of the layer.
        is_closed: Whether they are those of plain batch normalization.
        has_relaxed: Whether both ramps are at their end.
        clipped: Share of channels that they clip, `None` if not measured.
        correction: How far the layer corrects, likewise.
        is_gated: Whether it measures that itself.
        begin_step: Step at which the first ramp begins.
    """

    name: str
    is_closed: bool
    has_relaxed: bool
    clipped: float | None
    correction: float | None
    is_gated: bool
    begin_step: int


def said_of_limits(layers: Sequence[LimitsAtEnd]) -> dict[str, str]:
    """What to warn of when a run ends: limits that do nothing, or too much."""
    said = {}
    closed = [each for each in layers if each.is_closed]
    if closed:
        later = [each.begin_step for each in closed if not each.has_relaxed]
        begin = f" They would from step {min(later):,} on." if later else ""
        remedy = "`RenormScheduler()` scales the ramps to the run."
        if any(each.is_gated for each in closed):
            remedy = "with a lower `momentum` they relax sooner."
        said["closed"] = (
            "Limits of renormalization never relaxed in this run: r_max "
            "is 1 and d_max is 0 still, in layers "
            f"{', '.join(each.name for each in closed)}.{begin} "
            f"That is plain batch normalization; {remedy}"
        )
    saturated = [
        each
        for each in layers
        if each.has_relaxed
        and not each.is_closed
        and each.clipped is not None
        and each.clipped > SATURATED
        and (each.correction or 0.0) >= CORRECTS
    ]
    if saturated:
        worst = max(saturated, key=lambda each: each.clipped or 0.0)
        # Limits that are given end the measuring.
        remedy = "See" if worst.is_gated else "Raise r_max and d_max, or see"
        said["clipped"] = (
            f"Limits of renormalization clip {worst.clipped:.0%} of the "
            f"channels in {worst.name} (above {SATURATED:.0%} in layers "
            f"{', '.join(each.name for each in saturated)}), though they have "
            "relaxed: training and inference stay apart. "
            f"{remedy} `keras_renorm.diagnostics.discrepancy`."
        )
    return said
