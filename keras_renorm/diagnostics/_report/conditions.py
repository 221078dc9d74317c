"""Conditions of a model and its layers, by measured figures; no texts."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from keras_renorm.diagnostics._report import advice
from keras_renorm.diagnostics._report.measurement import Measurement
from keras_renorm.models._data.totals import GROUPED

# Moving statistics this far from the data's, in standard deviations and beyond
# noise, are worth acting on: the layer's outputs are off by as much.
SHIFT = 0.25
# Shifts below this are noise: healthy networks of nine layers,
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
# and metrics that differ by more, either way, differ by much. (The noise of
# batches makes a loss that is lower in inference: healthy networks that
# have learned their data were at a fifth of the training mode's.) Of numbers
# within [0, 1], as accuracies are, SHARES is enough: the networks above, in
# batches of 16 to 32, were at 0.035.
SCORES = 2 / 3
SHARES = 0.05
# A moving average that is closer than this to its end has arrived.
ARRIVED = 0.95

# Loss and metrics in training and in inference mode, by name.
Scores: TypeAlias = tuple[Mapping[str, float], Mapping[str, float]]


def is_scattered(layer: Measurement) -> bool:
    """Whether examples of a batch are more alike than random ones."""
    # False where it is unknown: comparisons with NaN are.
    return layer.f > layer.f_limit and layer.scatter > GROUPED


class Case:
    """The figures of a model.

    Args:
        layers: Measurements of all layers.
        references: The same layers on training data, where `layers` are on
            other data.
        gap: How much outputs of the model differ, of their size.
        scores: Loss and metrics in training and in inference mode, by name.
        is_convertible: Whether `convert` takes the model.
    """

    def __init__(
        self,
        layers: Sequence[Measurement],
        references: Sequence[Measurement] | None,
        gap: float,
        scores: Scores,
        is_convertible: bool,
    ) -> None:
        self.layers = layers
        self.has_reference = references is not None
        self.gap = gap
        self.scores = scores
        self.is_convertible = is_convertible
        # On the reference, if there is one; by name.
        self.reference_shifts = {
            layer.name: layer.shift for layer in references or layers
        }
        known = [
            layer
            for layer in layers
            if not (layer.is_broken or layer.is_untrained)
        ]
        far = [layer for layer in known if layer.shift > SHIFT]
        # Off as a low momentum makes them.
        self.jittery = [
            layer
            for layer in known
            if layer.momentum < LOW_MOMENTUM
            and layer.distance > SHIFT
            and not layer.is_frozen
        ]
        if self.has_reference or all(layer in far for layer in self.jittery):
            # Only where noise explains one layer, others are no other data
            # either.
            self.jittery = [layer for layer in self.jittery if layer not in far]
        self.shifted = [layer for layer in far if layer not in self.jittery]
        self.on_the_way = [
            layer for layer in self.shifted if layer.from_start < ARRIVED
        ]
        self._is_explained = bool(
            len(known) < len(layers) or self.shifted or self.jittery
        )

    def why_shifted(self, layer: Measurement) -> str:
        """Why averages are not those of the data; empty where they are."""
        if layer not in self.shifted:
            return ""
        if self.has_reference:
            shift = self.reference_shifts[layer.name]
            return "they lag" if shift > SHIFT else "another domain"
        # Half of them are between their start and the data.
        is_late = 2 * len(self.on_the_way) >= len(self.shifted)
        return "too few steps" if is_late else "unknown"

    def is_too_small(self, layer: Measurement) -> bool:
        """Whether random draws of this size are too uncertain, and it matters.

        From a few examples on no layer learns better than batch normalization.
        """
        if self.scores[0]:
            trained, served = (values["loss"] for values in self.scores)
            if trained - served > SCORES * max(abs(trained), abs(served)):
                return False  # it has learned in spite of the noise
        is_visible = self.gap > OUTPUTS and not self._is_explained
        noise = NOISE / 2 if is_visible else NOISE
        matters = self.scores[0] and self.differs and not self._is_explained
        return bool(
            not layer.f > layer.f_limit
            and layer.batch_noise > noise
            and not layer.gap < noise
            and not layer.is_frozen
            and (layer.examples < advice.FEW or matters)
        )

    def is_slight_domain(self, layer: Measurement) -> bool:
        """Whether small shifts add up that are half as small on the reference.

        Over all layers, less than half of the squares is left there.
        """
        shifts = self.reference_shifts
        there = sum(shifts[other.name] ** 2 for other in self.layers)
        return bool(
            self.differs
            and sum(other.shift**2 for other in self.layers) > 2 * there
            and layer.shift > FAINT
            and layer.shift > 2 * shifts[layer.name]
        )

    @property
    def differs(self) -> bool:
        """Whether the model is another one in inference, whatever the layers.

        And not a better one: the noise of batches, which is not in inference,
        makes outputs and metrics differ as well.
        """
        training, inference = self.scores
        if not training:
            return not self.gap <= VISIBLE
        if inference["loss"] < training["loss"]:
            return not math.isfinite(self.gap)
        return not self.gap <= OUTPUTS or bool(self.different_scores)

    @property
    def different_scores(self) -> list[str]:
        """Names of the loss and the metrics that differ by much."""
        names = []
        for name, trained in self.scores[0].items():
            served = self.scores[1][name]
            rise = served - trained
            larger = max(abs(trained), abs(served))
            allowed = SCORES * larger
            if name != "loss":
                rise = abs(rise)
                if min(trained, served) >= 0 and larger <= 1:
                    allowed = SHARES
            is_same = np.array_equal(trained, served, equal_nan=True)
            if not (is_same or rise <= allowed):
                names.append(name)
        return names
