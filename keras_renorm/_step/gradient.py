"""The corrected gradient of renormalization, as functions of tensors.

The gradient of normalization subtracts two means of the minibatch from the
gradient that arrives: mean(dy) and x̂ · mean(dy · x̂). Where examples are few
or alike, both are as inaccurate as the batch's mean and variance. Here most of
each is replaced by what earlier minibatches had in common; two accumulators for
each channel hold it.

The control is that of Online Normalization (Chiley et al. 2019,
arXiv:1905.05894, section 3); to average gradients where batches are small is
also the idea of Yan et al. 2020, arXiv:2001.06838.
"""

from typing import Any

from keras_renorm._backend import tracing
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._step import gating
from keras_renorm._step.moments import Moments
from keras_renorm._step.records import Correction, GradientMemory

# How much of the gradient is corrected at most. With all of it, the
# statistics being held then, a U-Net trained with a constant rate diverged.
HIGHEST_WEIGHT = 0.8


# Half the highest weight at this agreement. That of b independent examples is
# 1 / b at most.
HALF_WEIGHT_AGREEMENT = 0.12


def weigh(agreement: Tensor) -> Tensor:
    """How much of a batch's gradient to correct where the gate is open.

        weight = 0.8 · a² / (a² + 0.12²)

    with the agreement a of `gating.observe_agreement`. Its inverse is the
    number of independent examples that a batch is worth. The two means of many
    are good, and the gradient of Algorithm 1 is the better one.
    """
    square = ops.square(agreement)
    weight = HIGHEST_WEIGHT * square / (square + HALF_WEIGHT_AGREEMENT**2)
    return ops.stop_gradient(weight)


@tracing.by_numpy
def correct(
    moments: Moments,
    memory: GradientMemory,
    correction: Correction,
    observation: gating.Observation,
    scaling: Tensor,
    epsilon: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The corrected gradient, in the terms of the uncorrected one.

    That of Algorithm 1 is γ r/σ_B (dy − mean(dy) − x̂ mean(dy x̂)). With
    z = r x̂ + d, k = 1 − gradient_momentum and the accumulators e₁ and e₂,

        q  = mean(z²)
        t  = dy − k e₂ z / max(k q, 1)
        e₂ = e₂ (1 − min(k q, 1)) + mean(dy z)
        u  = t − k e₁
        e₁ = e₁ + mean(u)
        dx = γ (w u min(1/σ, r/σ_B) + (1 − w) (Algorithm 1's, without γ))

    where w is the weight of `weigh`. The bounds: a control of gain above 1
    oscillates, and r/σ_B explodes where r is clipped. As z is affine in x̂,
    this is the first formula with other means, and its scale times
    `correction.held + correction.rest`.

    A batch of fewer examples than usual changes the accumulators by less
    (`gating.share_of`). They do not change where the gradient that arrives is
    not finite or the batch has no element; agreement and persistence, also
    where no gradient arrives.

    Args:
        moments: Those of the batch.
        memory: What the layer remembers.
        correction: What the forward pass made of both.
        observation: Of all elements that share `moments`.
        scaling: What the loss is multiplied by. Accumulators hold gradients
            of the loss itself, for a loss scale doubles and halves. 0 where
            it is not known, which counts as 1.
        epsilon: Added to variances under the root.

    Returns:
        What takes the place of the two means, and the changes of
        `GradientMemory.accumulators`.
    """
    # Constants of a second derivative.
    memory = memory.with_accumulators(
        map(ops.stop_gradient, memory.accumulators)
    )
    mean, earlier, agreement, *_ = memory.accumulators
    gain = 1.0 - memory.momentum
    scaling = ops.where(scaling == 0, 1.0, scaling)
    count = ops.cast(moments.count, observation.offset.dtype)
    divisor = scaling * ops.maximum(count, 1.0)
    offset_mean = observation.offset / divisor
    scale_mean = observation.scale / divisor
    r: Any = correction.r
    d: Any = correction.d
    stddev = ops.sqrt(moments.variance + epsilon)
    square = ops.square(r / stddev) * moments.variance + ops.square(d)  # q
    gained = gain * square
    projection = gain * earlier / ops.maximum(gained, 1.0)
    error = offset_mean - projection * d - gain * mean  # mean(u)
    arrived = r * scale_mean + d * offset_mean  # mean(dy z)
    forgotten = earlier * ops.minimum(gained, 1.0)
    valid = ops.isfinite(error + arrived + square)
    valid = ops.logical_and(valid, moments.count > 0)
    learned = (1.0 - gating.AGREEMENT_MOMENTUM) * (
        gating.observe_agreement(observation, agreement) - agreement
    )
    informed = ops.logical_and(valid, ops.isfinite(learned))

    means = _mixed(
        correction,
        (projection * d + gain * mean, projection * r),
        (offset_mean, scale_mean),
        scaling,
    )
    share = gating.share_of(observation.examples, memory.gate)
    changes = [
        (valid, share * error),
        (valid, share * (arrived - forgotten)),
        (informed, share * learned),
        *gating.measure(
            moments,
            memory,
            ops.maximum(moments.variance, correction.moving_variance) + epsilon,
            observation,
            offset_mean,
            valid,
            share,
        ),
    ]
    return means, [
        ops.where(condition, change, 0.0) for condition, change in changes
    ]


def _mixed(
    correction: Correction,
    earlier: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    scaling: Tensor,
) -> list[Tensor]:
    """The two means to subtract: of earlier batches, and of this one."""
    held: Any = correction.held
    rest: Any = correction.rest
    return [
        scaling * (held * before + rest * now) / (held + rest)
        for before, now in zip(earlier, own, strict=True)
    ]
