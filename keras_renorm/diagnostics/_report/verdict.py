"""From measured figures to causes, reasons and remedies: the rules."""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from keras_renorm.diagnostics._report import advice
from keras_renorm.diagnostics._report.conditions import (
    FAINT,
    HIGH_MOMENTUM,
    LOW_MOMENTUM,
    Case,
    Scores,
    is_scattered,
)
from keras_renorm.diagnostics._report.measurement import Measurement
from keras_renorm.models._data.totals import GROUPED
from keras_renorm.schedules import D_MAX, R_MAX


class Verdict(NamedTuple):
    """One cause of the measured figures.

    Attributes:
        cause: What is wrong, in the words of `RULES`.
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


class Rule(NamedTuple):
    """One cause; in braces, its texts have attributes of `_Found`."""

    cause: str
    condition: Callable[[Case, Measurement], Any]  # of each layer
    reason: str
    remedy: str
    # Whether it counts only where no rule before it does.
    is_last_resort: bool = False


_RECALIBRATE = (
    "`keras_renorm.recalibrate(model, training_data)`; in training {momentum}"
    "more steps, or `RecalibrateStatistics`."
)
_ADAPT = (
    "`keras_renorm.recalibrate` on this data, with `prior_examples` where "
    "there is little of it; `get_statistics` keeps the bank of the old domain."
)
_DISTANCE = (
    "{where} moving statistics are up to {most[shift].shift:.2f} standard "
    "deviations ({most[shift].name}) from those of this data"
)
_REFERENCE_DISTANCE = "{reference_shift:.2f} from those of the reference"
# The gravest first.
RULES = (
    Rule(
        "statistics not finite",
        lambda _, layer: layer.is_broken,
        "{where} moving statistics are NaN or infinite, or a variance is "
        "negative; one bad sample is enough for Keras's layer.",
        "`keras_renorm.recalibrate(model, training_data)`; "
        "`keras_renorm.BatchNormalization`, which such samples do not reach.",
    ),
    Rule(
        "statistics never trained",
        lambda _, layer: layer.is_untrained,
        "{where} every moving mean is exactly 0 and every moving variance "
        "exactly 1, as they are made.",
        "Load the weights, train with training=True and the layers trainable, "
        "or `keras_renorm.recalibrate(model, training_data)`.",
    ),
    Rule(
        "batches not i.i.d.",
        lambda _, layer: (
            is_scattered(layer)
            and not layer.gap < GROUPED
            and not layer.is_frozen
        ),
        "{where} examples of a batch are more alike than random ones: batch "
        "means vary {most[f].f:.1f} times as much as random draws make them "
        "({most[f].name}; by chance below {most[f].f_limit:.1f}), by "
        "{most[f].scatter:.2f} standard deviations.",
        "Shuffle the data before it is cut into batches; where that cannot "
        "be: {instead_of_groups}",
    ),
    Rule(
        "another domain",
        lambda case, layer: case.why_shifted(layer) == "another domain",
        f"{_DISTANCE}, and {_REFERENCE_DISTANCE}: the averages are right, and "
        "the data is other data.",
        _ADAPT,
    ),
    Rule(
        "moving averages lag",
        lambda case, layer: case.why_shifted(layer) == "they lag",
        f"{_DISTANCE}, and {_REFERENCE_DISTANCE}.",
        _RECALIBRATE,
    ),
    Rule(
        "moving averages lag",
        lambda case, layer: case.why_shifted(layer) == "too few steps",
        f"{_DISTANCE}, on the line from their start (mean 0, variance 1) to "
        "them: {latest.from_start:.0%} of the way in {latest.name}. The moving "
        "averages have seen too few steps.",
        _RECALIBRATE,
    ),
    Rule(
        "moving averages lag, or another domain",
        lambda case, layer: case.why_shifted(layer) == "unknown",
        f"{_DISTANCE}, though batches agree among each other. Either the "
        "averages lag behind the weights, or they are those of other data; "
        "this data alone cannot tell.",
        f"If this is the training data: {_RECALIBRATE} If it is other data: "
        f"{_ADAPT} `reference=training_data` tells which.",
    ),
    Rule(
        "moving averages jitter",
        lambda case, layer: layer in case.jittery,
        "{where} moving statistics are up to {most[distance].distance:.2f} "
        "standard deviations ({most[distance].name}) from those of this data, "
        "as the last few batches were: `momentum` is low ({convention}).",
        "Train with a higher `momentum`, 0.9 or more; for the model as it is, "
        "`keras_renorm.recalibrate(model, training_data)`.",
    ),
    Rule(
        "batches too small",
        Case.is_too_small,
        "{where} statistics of a batch are too uncertain: alone they put "
        "training outputs {most[batch_noise].batch_noise:.2f} of their size "
        "away from what is served ({most[batch_noise].name}, "
        "{most[batch_noise].elements:.4g} elements a channel). Batch means "
        "scatter by {most[batch_noise].scatter:.2f} standard deviations; "
        "{expected_scatter}.",
        "Larger batches, or `synchronized=True` over replicas"
        "{instead_of_larger}",
    ),
    Rule(
        "another domain",
        Case.is_slight_domain,
        f"{{model_distance}}. {_DISTANCE}; from those of the reference they "
        "are half as far or less. Such shifts are small, but add up over "
        "layers.",
        _ADAPT,
        is_last_resort=True,
    ),
    Rule(
        "training and inference differ",
        lambda case, _: case.differs,
        "{model_distance}. No layer explains it by itself: moving statistics "
        "are up to {most[shift].shift:.2f} standard deviations "
        "({most[shift].name}) from those of this data, and the noise of "
        "batches is up to {most[batch_noise].batch_noise:.2f} "
        "({most[batch_noise].name}).",
        "{against_differences}",
        is_last_resort=True,
    ),
    Rule(
        "constant channels",
        lambda _, layer: layer.constant_channels,
        "{where} {constant_share} channels have a variance below a hundredth "
        "of epsilon over all data ({constant_channels}); what is normalized "
        "there is epsilon.",
        "Look at what feeds them (dead units, constant inputs): prune them, "
        "initialize them anew, or lower `epsilon` if the activations are "
        "meant to be so small.",
    ),
)


def verdicts_of(
    layers: Sequence[Measurement],
    references: Sequence[Measurement] | None = None,
    gap: float = 0.0,
    scores: Scores = ({}, {}),
    is_convertible: bool = True,
) -> list[Verdict]:
    """The verdicts on a model's layers, the gravest first; none if healthy.

    Args: those of `Case`.
    """
    case = Case(layers, references, gap, scores, is_convertible)
    verdicts: list[Verdict] = []
    for rule in RULES:
        concerned = [layer for layer in layers if rule.condition(case, layer)]
        if concerned and not (rule.is_last_resort and verdicts):
            found = _Found(case, concerned)
            verdicts.append(
                Verdict(
                    rule.cause,
                    rule.reason.format_map(found),
                    rule.remedy.format_map(found),
                    tuple(layer.name for layer in concerned),
                )
            )
    return verdicts


class _Found:
    """Figures and names for the texts of a rule.

    Attributes:
        most: By the name of a figure, the layer in which it is the largest.
        convention: The likely mistake in its momentum where averages jitter.
    """

    def __init__(self, case: Case, layers: Sequence[Measurement]) -> None:
        self.case = case
        self.layers = layers
        self.most = {
            figure: max(layers, key=attrgetter(figure))
            for figure in ("batch_noise", "distance", "f", "shift")
        }
        self.convention = _convention(self.most["distance"].momentum)
        self._renormalized = [
            layer for layer in layers if layer.kind == "BatchRenormalization"
        ]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @property
    def where(self) -> str:
        found, count = len(self.layers), len(self.case.layers)
        if count == 1:
            return f"In {self.layers[0].name}"
        if found == count:
            return f"In all {count} layers"
        only = " only" if 2 * found <= count else ""
        names = ", ".join(layer.name for layer in self.layers[:6])
        more = f" and {found - 6} more" if found > 6 else ""
        return f"In {found} of {count} layers{only} ({names}{more})"

    @property
    def reference_shift(self) -> float:
        return self.case.reference_shifts[self.most["shift"].name]

    @property
    def model_distance(self) -> str:
        training, inference = self.case.scores
        parts = [
            f"Outputs of the model differ by {self.case.gap:.2f} of their size"
        ]
        for name in self.case.different_scores:
            parts.append(
                f"{name} is {training[name]:.4g} in training mode and "
                f"{inference[name]:.4g} in inference"
            )
        return "; ".join(parts)

    @property
    def latest(self) -> Measurement:
        """The layer whose averages have come the least way."""
        return min(self.case.on_the_way, key=attrgetter("from_start"))

    @property
    def momentum(self) -> str:
        """Which other momentum helps averages that lag."""
        lowest = min(layer.momentum for layer in self.layers)
        if lowest < LOW_MOMENTUM:
            return f"a higher `momentum` ({_convention(lowest)}), "
        return "a lower `momentum`, " if lowest > HIGH_MOMENTUM else ""

    @property
    def expected_scatter(self) -> str:
        layer = self.most["batch_noise"]
        if not math.isfinite(layer.scatter_expected):
            return "the examples of a batch cannot be compared"
        return (
            f"random draws of {layer.examples:.3g} examples make "
            f"{layer.scatter_expected:.2f}"
        )

    @property
    def instead_of_groups(self) -> str:
        layer = self.most["f"]
        return self._advised(
            advice.advice_for(layer.examples, layer.elements, is_grouped=True)
        )

    @property
    def instead_of_larger(self) -> str:
        layer = self.most["batch_noise"]
        if layer.examples >= advice.FEW:  # no layer learns better there
            return f"; or {self._as_served}."
        row = advice.advice_for(layer.examples, layer.elements)
        return f"; or else: {self._advised(row)}"

    @property
    def against_differences(self) -> str:
        """The remedy where the model differs, and no layer by much."""
        case = self.case
        remedy = f"Larger batches, or {self._as_served}."
        if any(shift > FAINT for shift in case.reference_shifts.values()):
            remedy = (
                "`keras_renorm.recalibrate(model, training_data)` and compare "
                f"anew. If it stays, larger batches, or {self._as_served}."
            )
        if not case.has_reference:
            remedy += (
                " If this is not the training data, `reference=training_data` "
                "tells whether it is another domain."
            )
        if not case.scores[0]:
            remedy = (
                "Compile the model and give labels, too: loss and metrics say "
                f"whether this matters. If so, {remedy}"
            )
        return remedy

    @property
    def constant_share(self) -> str:
        count = sum(len(layer.constant_channels) for layer in self.layers)
        return f"{count} of {sum(layer.channels for layer in self.case.layers)}"

    @property
    def constant_channels(self) -> str:
        """Those of the layer that has the most."""
        layer = max(self.layers, key=lambda layer: len(layer.constant_channels))
        listed = ", ".join(map(str, layer.constant_channels[:8]))
        more = ", ..." if len(layer.constant_channels) > 8 else ""
        return f"{layer.name}: {listed}{more}"

    def _convert(self, *arguments: str) -> str:
        if not self.case.is_convertible:
            arguments = ("in_place=True", *arguments)
        return f"`keras_renorm.convert({', '.join(('model', *arguments))})`"

    @property
    def _as_served(self) -> str:
        call = self._convert("gradient_momentum=None")
        if any(not layer.is_gated for layer in self._renormalized):
            call = "open limits (`layer.r_max`, `layer.d_max`)"
        return f"go on training with outputs as the model serves them: {call}"

    def _advised(self, row: advice.Advice) -> str:
        """A row of the table, and the way from these layers to there."""
        how = ""
        if row is not advice.ANY:
            how = f"for {row.where}, {row.take}. "
        gated = [layer for layer in self.layers if layer.is_gated]
        if gated:  # they are the advice
            return how + _left_to_do(gated)
        if not self._renormalized:
            return (
                f"{how}{self._convert()} puts `BatchRenormalization()` in the "
                "place of these layers."
            )
        layer = self._renormalized[0]
        names = ("r_max", "d_max", "gradient_momentum")
        call = self._convert(*(f'{name}="auto"' for name in names))
        return (
            f"{how}Let `BatchRenormalization` measure how far to correct, in "
            f"the place of r_max={layer.r_max:.3g} and d_max={layer.d_max:.3g} "
            f"as they are now: {call}."
        )


def _left_to_do(gated: Sequence[Measurement]) -> str:
    """For layers that measure how far to correct."""
    for layer in gated:
        if layer.r_max < R_MAX or layer.d_max < D_MAX:
            return (
                f"Train for longer: limits, now r_max={layer.r_max:.3g} and "
                f"d_max={layer.d_max:.3g}, are not yet open."
            )
    corrections = [layer.correction for layer in gated]
    least, most = min(corrections), max(corrections)
    share = f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"
    return (
        "No setting: these layers measure how far to correct, and do it "
        f"({share} of the way)."
    )


def _convention(momentum: float) -> str:
    """The likely mistake in a low momentum."""
    meaning = f"it is {momentum:.3g}, the share of the old value that is kept"
    if not momentum:
        return meaning
    return f"{meaning}; PyTorch's {momentum:.3g} is {1 - momentum:.3g} here"
