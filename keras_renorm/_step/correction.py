"""What a training step makes of the moments of its batch: r, d, statistics."""

from typing import Any

from keras_renorm import schedules
from keras_renorm._backend import tracing
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._step import gating
from keras_renorm._step.gradient import weigh
from keras_renorm._step.moments import Moments
from keras_renorm._step.records import Correction, Limits, State

# The correction is at its highest where r may be as large as in the paper.
OPEN_R_MAX = schedules.R_MAX


def respond(
    moments: Moments, state: State, total: Moments | None = None
) -> Correction:
    """r, d, the new statistics, and how much of the gradient to correct.

    In a graph all layers share the graph of it.
    """
    correction = _respond(
        moments,
        # The fewer tensors, the sooner the node is made.
        state._replace(gamma=None, beta=None),
        total,
    )
    for value in (correction.r, correction.d, correction.held):
        tracing.set_shape(value, moments.mean)
    for value in (*correction[2:4], correction.rest):
        tracing.set_shape(value, state.moving_mean)
    # Or a second derivative would add its gradient to the accumulators.
    return Correction(
        *(
            None if value is None else ops.stop_gradient(value)
            for value in correction
        )
    )


@tracing.shared_call
def _respond(
    moments: Moments, state: State, total: Moments | None
) -> Correction:
    limits: Any = None
    if state.limits is not None:
        dtype = state.moving_mean.dtype
        limits = current_limits(state.limits, dtype)
    correction = _respond_by_limits(moments, state, limits, total)
    memory = state.memory
    if memory is None:
        return correction
    r: Any = correction.r
    d: Any = correction.d
    is_gated = memory.is_gated > 0
    opening = ops.where(
        is_gated,
        gating.openness(
            memory.agreement, gating.Gate(*ops.unstack(memory.gate, 4))
        ),
        1.0,
    )
    r = ops.where(is_gated, ops.power(r, opening), r)
    d = opening * d
    by_limits = _opening_of(limits[0]) if memory.corrects_by_limits else 0.0
    weight = weigh(memory.agreement) * ops.where(is_gated, opening, by_limits)
    # σ_B / (σ r) is 1 where r is not clipped.
    ratio = ops.sqrt(
        (moments.variance + state.epsilon)
        / (state.moving_variance + state.epsilon)
    )
    bound = ops.minimum(ratio / r, 1.0)
    return correction._replace(
        r=r,
        d=d,
        held=weight * bound,
        rest=1.0 - weight,
        opening=opening,
    )


def _opening_of(r_max: Tensor) -> Tensor:
    """min((r_max − 1) / 2, 1): how far limits that were given are open."""
    return ops.minimum((r_max - 1.0) / (OPEN_R_MAX - 1.0), 1.0)


def renorm_correction(
    mean: Tensor,
    variance: Tensor,
    has_elements: Tensor | bool,
    moving_mean: Tensor,
    moving_variance: Tensor,
    epsilon: float,
    r_max: Tensor,
    d_max: Tensor,
) -> tuple[Tensor, Tensor]:
    """The correction (r, d) of batch renormalization, constant to gradients.

        r = clip(σ_B / σ, 1 / r_max, r_max)
        d = clip((μ_B − μ) / σ, −d_max, d_max)

    with σ_B = sqrt(batch_variance + epsilon) and σ = sqrt(moving_variance +
    epsilon); r = 1 and d = 0 for a batch without elements. Ioffe 2017,
    arXiv:1702.03275, Algorithm 1.
    """
    stddev = ops.sqrt(moving_variance + epsilon)
    r = ops.sqrt(variance + epsilon) / stddev
    d = (mean - moving_mean) / stddev
    r = ops.clip(r, 1 / r_max, r_max)
    d = ops.clip(d, -d_max, d_max)
    if has_elements is not True:
        r = ops.where(has_elements, r, 1.0)
        d = ops.where(has_elements, d, 0.0)
    return ops.stop_gradient(r), ops.stop_gradient(d)


def current_limits(limits: Limits, dtype: str) -> tuple[Tensor, Tensor]:
    """r_max and d_max of this step, at least 1 and 0.

    Weights may be an average that is off by rounding, or none at all.
    """
    # Each slice would be four nodes of a graph, in each layer.
    begin_steps, end_steps = ops.unstack(limits.steps, num=2, axis=1)
    values = ops.cast(limits.values, dtype)
    initial_values, final_values = ops.unstack(values, num=2, axis=1)
    r_max, d_max = ops.unstack(
        schedules.interpolate(
            ops,
            initial_values,
            final_values,
            ops.cast(limits.step - begin_steps, values.dtype),
            ops.cast(end_steps - begin_steps, values.dtype),
        ),
        num=2,
    )
    return ops.maximum(r_max, 1.0), ops.maximum(d_max, 0.0)


def _respond_by_limits(
    moments: Moments,
    state: State,
    limits: tuple[Tensor, Tensor] | None,
    total: Moments | None = None,
) -> Correction:
    """The correction by the moving statistics before a step, and the new ones.

    Both use the one value that is passed in: a graph may order a second read
    of a variable after its assignment. `moments` are what a step normalizes
    with; `limits` are r_max and d_max of the step, or `None`; `total`, where
    the batch has several groups of them, are those of the whole. A channel
    where the latter are not finite, or are of no element, keeps its moving
    statistics: one NaN would stay in them always.
    """
    moving_mean, moving_variance = state.moving_mean, state.moving_variance
    r = d = None
    if limits is not None:
        r, d = renorm_correction(
            moments.mean,
            moments.variance,
            moments.count > 0,
            moving_mean,
            moving_variance,
            state.epsilon,
            *limits,
        )
    total = moments if total is None else total
    mean, variance, has_elements = total.mean, total.variance, total.count > 0
    # Finite if both are: neither can be infinite against the other, since a
    # variance is not negative.
    valid = ops.isfinite(mean + variance)
    if has_elements is not True:
        valid = ops.logical_and(valid, has_elements)

    def moved(moving: Tensor, batch: Tensor) -> Tensor:
        updated = moving * state.shares[0] + batch * state.shares[1]
        return ops.where(valid, updated, moving)

    return Correction(
        r,
        d,
        moved(moving_mean, mean),
        moved(moving_variance, variance),
    )
