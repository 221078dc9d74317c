"""What normalizes: the contenders, each in the words of its one line."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras

import keras_renorm
from benchmarks.quality.variants import (
    AdaptiveRenormalization,
    VariantRenormalization,
)
from keras_renorm.schedules import LinearRamp


class Contender(NamedTuple):
    """A normalization and how it is trained.

    Attributes:
        label: What tables call it.
        layer: Makes one, from the number of steps of the run.
        scheduler: `(r_max, d_max)` for `RenormScheduler`, a function of the
            number of steps, or `None` where there is nothing to schedule.
        frozen_from: Share of the run after which statistics are frozen, or
            `None`.
        adapted: Whether statistics are recalibrated on the data of the
            fine-tuning before it begins.
    """

    label: str
    layer: Callable
    scheduler: Callable | None = None
    frozen_from: float | None = None
    adapted: bool = False


def _ignoring_steps(layer, **arguments):
    return lambda steps: layer(**arguments)


def _paper_shape(steps):
    """`RenormScheduler`'s default."""
    return None, None


def ramp(r_max, d_max, begin, end):
    """Limits that open from `begin` to `end`, shares of the run."""

    def limits(steps):
        begin_step, end_step = round(begin * steps), round(end * steps)
        return (
            LinearRamp(1.0, r_max, begin_step, end_step),
            LinearRamp(0.0, d_max, begin_step, end_step),
        )

    return limits


# Algorithm 1, where nothing else is said.
_renorm = functools.partial(
    _ignoring_steps, keras_renorm.BatchRenormalization, gradient_momentum=None
)
_variant = functools.partial(
    _ignoring_steps, VariantRenormalization, gradient_momentum=None
)

# Momentum is 0.99, everybody's default, where nothing else is said.
CONTENDERS = {
    "bn": Contender(
        "batch normalization",
        _ignoring_steps(keras.layers.BatchNormalization),
    ),
    "bn_frozen_late": Contender(
        "batch norm., frozen for the last fifth",
        _ignoring_steps(keras_renorm.BatchNormalization),
        frozen_from=0.8,
    ),
    "bn_frozen": Contender(
        "batch norm., frozen from the start",
        _ignoring_steps(keras_renorm.BatchNormalization),
        frozen_from=0.0,
    ),
    "bn_adapted_frozen": Contender(
        "batch norm., recalibrated first, then frozen",
        _ignoring_steps(keras_renorm.BatchNormalization),
        frozen_from=0.0,
        adapted=True,
    ),
    "gated": Contender(
        "renorm., as it comes",
        _ignoring_steps(keras_renorm.BatchRenormalization),
    ),
    "renorm": Contender("renorm., Algorithm 1", _renorm(), _paper_shape),
    "renorm_frozen_late": Contender(
        "renorm., frozen for the last fifth",
        _renorm(),
        _paper_shape,
        frozen_from=0.8,
    ),
    "renorm_adapted": Contender(
        "renorm., recalibrated first",
        _renorm(),
        _paper_shape,
        adapted=True,
    ),
    "renorm_corrected": Contender(
        "renorm., the gradient corrected too",
        _renorm(gradient_momentum=0.9),
        _paper_shape,
    ),
    "renorm_corrected_adapted": Contender(
        "renorm., corrected, recalibrated first",
        _renorm(gradient_momentum=0.9),
        _paper_shape,
        adapted=True,
    ),
    "renorm_open": Contender(
        "renorm., open from the first step",
        _renorm(),
        lambda steps: (3.0, 5.0),
    ),
    "renorm_crossq": Contender(
        "renorm., CrossQ's hard switch",
        _renorm(),
        ramp(3.0, 5.0, 0.1, 0.1),
    ),
    "renorm_gn": Contender(
        "renorm., the GN paper's 1.5 and 0.5",
        _renorm(),
        lambda steps: (1.5, 0.5),
    ),
    "keras_renorm": Contender(
        "Keras's renorm=True",
        _ignoring_steps(keras.layers.BatchNormalization, renorm=True),
    ),
    "group": Contender(
        "group normalization, 8 groups",
        _ignoring_steps(keras.layers.GroupNormalization, groups=8),
    ),
    "layer": Contender(
        "layer normalization",
        _ignoring_steps(keras.layers.GroupNormalization, groups=1),
    ),
    # The open questions: one thing changed at a time.
    **{
        f"renorm_momentum_{momentum}": Contender(
            f"renorm., momentum {momentum}",
            _renorm(momentum=momentum),
            _paper_shape,
        )
        for momentum in (0.9, 0.95, 0.98, 0.995, 0.998)
    },
    **{
        f"renorm_{moment}{'_debiased' if debiased else ''}": Contender(
            f"{moment}{', debiased' if debiased else ''}",
            _variant(moment=moment, debiased=debiased),
            _paper_shape,
        )
        for moment in ("variance", "unbiased", "stddev")
        for debiased in (False, True)
        if (moment, debiased) != ("variance", False)  # is "renorm"
    },
    **{
        f"renorm_ramp_{begin}_{end}": Contender(
            f"opens from {begin:.0%} to {end:.0%} of the run",
            _renorm(),
            ramp(3.0, 5.0, begin, end),
        )
        for begin, end in ((0.0, 0.1), (0.1, 0.9))
    },
    **{
        f"renorm_limits_{r_max}_{d_max}": Contender(
            f"opens to r_max {r_max}, d_max {d_max}",
            _renorm(),
            ramp(r_max, d_max, 0.04, 0.25),
        )
        for r_max, d_max in ((1.5, 1.0), (10.0, 25.0), (100.0, 1_000.0))
    },
    # Opens from a fixed step to a fixed step, however long the run. The
    # scheduler's shape for runs of 600 and of 4,900 steps.
    **{
        f"renorm_steps_{end}": Contender(
            f"opens from step {begin} to {end}",
            _renorm(),
            lambda steps, begin=begin, end=end: (
                LinearRamp(1.0, 3.0, begin, end),
                LinearRamp(0.0, 5.0, begin, end),
            ),
        )
        for begin, end in (
            *((25, 190), (100, 500), (200, 800)),
            *((300, 1_000), (190, 1_500)),
        )
    },
    "renorm_adaptive": Contender(
        "limits adapt to 10 % clipped channels",
        lambda steps: AdaptiveRenormalization(
            share=0.1, opening_steps=round(0.2 * steps)
        ),
    ),
}
