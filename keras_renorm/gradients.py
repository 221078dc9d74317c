"""The corrected gradient of renormalization, as functions of tensors.

The gradient of normalization takes two means of the minibatch out of what
arrives, mean(dy) and x̂ · mean(dy · x̂). Of few or like examples both are as
wrong as the batch's mean and variance. Here most of them is replaced by what
the minibatches before had in common, which two accumulators a channel hold.

The control is that of Online Normalization (Chiley et al. 2019,
arXiv:1905.05894, section 3); to average what comes back where batches are
small is also the idea of Yan et al. 2020, arXiv:2001.06838.
"""

from typing import Any

from keras import ops

from keras_renorm import functional
from keras_renorm.functional import Moments, Response, State, Tensor

# How much of the gradient is corrected at most. With all of it, the
# statistics being held then, a U-Net trained with a constant rate diverged.
HIGHEST_WEIGHT = 0.8
# Half the highest weight at this mismatch. Its mean over steps is about 0.001
# in a convolution with minibatches of 16 unlike images, and 0.3 with 16 of
# one class.
HALF_WEIGHT_MISMATCH = 0.03
MISMATCH_MOMENTUM = 0.98
# The correction is at its highest where r may be as large as in the paper.
OPEN_R_MAX = 3.0


def respond(
    moments: Moments, state: State, total: Moments | None = None
) -> Response:
    """`functional.respond`, and how much of the gradient is to be corrected."""
    response = functional.respond(moments, state, total)
    if state.feedback is None:
        return response
    weight, mismatch = measure(moments, state)
    # σ_B / (σ r) is 1 where r is not clipped.
    ratio = ops.sqrt(
        (moments.variance + state.epsilon)
        / (state.moving_variance + state.epsilon)
    )
    bound = ops.minimum(ratio / response.r, ops.ones_like(ratio))
    return response._replace(
        mismatch=mismatch,
        held=ops.stop_gradient(weight * bound),
        rest=1.0 - weight,
    )


def measure(moments: Moments, state: State) -> tuple[Tensor, Tensor]:
    """How much of a batch's gradient to correct, and the new mismatch.

        mismatch = 0.98 mismatch
                   + 0.02 (((μ_B − μ) / σ)² + log²(σ_B / σ))
        weight   = 0.8 · min((r_max − 1) / 2, 1)
                   · mismatch / (mismatch + 0.03)

    The statistics of i.i.d. batches of many elements lie near the moving
    ones; their means are good, and the gradient of Algorithm 1 is the better
    one. A channel whose statistics are not finite keeps its mismatch.
    """
    feedback: Any = state.feedback
    limits: Any = state.limits
    r_max, _ = functional.current_limits(limits, feedback.mismatch.dtype)
    variance = state.moving_variance + state.epsilon
    distance = moments.mean - state.moving_mean
    # log²(σ_B / σ) is a quarter of that of the variances.
    log_ratio = ops.log((moments.variance + state.epsilon) / variance)
    seen = ops.square(distance) / variance + ops.square(log_ratio) / 4.0
    is_valid = ops.logical_and(ops.isfinite(seen), moments.count > 0)
    mismatch = ops.where(
        is_valid,
        MISMATCH_MOMENTUM * feedback.mismatch
        + (1.0 - MISMATCH_MOMENTUM) * seen,
        feedback.mismatch,
    )
    opening = ops.minimum((r_max - 1.0) / (OPEN_R_MAX - 1.0), 1.0)
    weight = HIGHEST_WEIGHT * opening * mismatch
    weight = weight / (mismatch + HALF_WEIGHT_MISMATCH)
    return ops.stop_gradient(weight), ops.stop_gradient(mismatch)


def correct(
    moments: Moments,
    state: State,
    response: Response,
    offset_mean: Tensor,
    scale_mean: Tensor,
    scaling: Tensor,
) -> list[Tensor]:
    """The corrected gradient, in the terms of the uncorrected one.

    That of Algorithm 1 is γ r/σ_B (dy − mean(dy) − x̂ mean(dy x̂)). With
    z = r x̂ + d, k = 1 − gradient_momentum and the accumulators e₁ and e₂,

        q  = mean(z²)
        t  = dy − k e₂ z / max(k q, 1)
        e₂ = e₂ (1 − min(k q, 1)) + mean(dy z)
        u  = t − k e₁
        e₁ = e₁ + mean(u)
        dx = γ (w u min(1/σ, r/σ_B) + (1 − w) (Algorithm 1's, without γ))

    where w is the weight of `measure`. The bounds: a control of gain above 1
    oscillates, and r/σ_B explodes where r is clipped. As z is affine in x̂,
    this is the first formula with other means, and its scale times
    `response.held + response.rest`.

    Moves the accumulators, but not where what arrives is not finite or the
    batch has no element.

    Args:
        moments: Those of the batch.
        state: Of the layer, with `feedback`.
        response: What the forward pass made of both.
        offset_mean: mean(dy), of all elements that share `moments`.
        scale_mean: mean(dy x̂), the same.
        scaling: What the loss is multiplied by. Accumulators hold gradients
            of the loss itself, for a loss scale doubles and halves. 0 where
            it is not known, which counts as 1.

    Returns:
        What takes the place of the two means.
    """
    feedback: Any = state.feedback
    gain = 1.0 - feedback.momentum
    scaling = ops.where(scaling == 0, ops.ones_like(scaling), scaling)
    offset_mean, scale_mean = offset_mean / scaling, scale_mean / scaling
    r: Any = response.r
    d: Any = response.d
    stddev = ops.sqrt(moments.variance + state.epsilon)
    square = ops.square(r / stddev) * moments.variance + ops.square(d)  # q
    gained = gain * square
    projection = (
        gain * feedback.projection / ops.maximum(gained, ops.ones_like(gained))
    )
    error = offset_mean - projection * d - gain * feedback.mean  # mean(u)
    arrived = r * scale_mean + d * offset_mean  # mean(dy z)
    forgotten = feedback.projection * ops.minimum(gained, ops.ones_like(gained))
    valid = ops.isfinite(error + arrived + square)
    valid = ops.logical_and(valid, moments.count > 0)

    def where_valid(change: Tensor) -> Tensor:
        return ops.where(valid, change, ops.zeros_like(change))

    held: Any = response.held
    rest: Any = response.rest
    whole = held + rest
    means = [
        scaling
        * (held * (projection * d + gain * feedback.mean) + rest * offset_mean)
        / whole,
        scaling * (held * projection * r + rest * scale_mean) / whole,
    ]
    return feedback.add(
        [where_valid(error), where_valid(arrived - forgotten)], means
    )
