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

from typing import Any, NamedTuple

from keras import ops

from keras_renorm import backend, functional, schedules
from keras_renorm.functional import Moments, Response, State, Tensor

# How much of the gradient is corrected at most. With all of it, the
# statistics being held then, a U-Net trained with a constant rate diverged.
HIGHEST_WEIGHT = 0.8
# Half the highest weight at this agreement. That of b independent examples is
# 1 / b at most.
HALF_WEIGHT_AGREEMENT = 0.12
AGREEMENT_MOMENTUM = 0.98
# Means of batches scatter more from step to step than gradients do.
SCATTER_MOMENTUM = 0.99
# The correction is at its highest where r may be as large as in the paper.
OPEN_R_MAX = schedules.R_MAX
# Where the gate is half open: where a batch is worth 1 / 0.35 examples; or
# where it has 1.7 times as many as it is worth, and is worth no more than 20.
# Half shut: at this persistence.
HALF_OPEN_WORTH = 0.35
HALF_OPEN_EXAMPLES = 1.7
LEAST_WORTH = 0.05
HALF_SHUT_PERSISTENCE = 0.4
STEEPNESS = 12.0


class Gate(NamedTuple):
    """Moving averages of a layer, by which its gate opens.

    Attributes:
        between: How far the means of batches scatter: half the squared
            distance of successive ones, in variances, the mean of channels.
        within: How far the means of examples scatter in a batch, likewise.
        examples: How many examples a batch has.
        persistence: The cosine of the mean gradients of successive steps.
    """

    between: Tensor
    within: Tensor
    examples: Tensor
    persistence: Tensor


def openness(agreement: Any, gate: Gate) -> Any:
    """How far the gate is open, from 0 (batch normalization) to 1.

        f = between / (between + within)
        u = max(mean(agreement), f)
        g = (1 - (1 - H(u, 0.35)) (1 - H(n u, 1.7) H(u, 0.05)))
            * (1 - H(persistence, 0.4))
        H(x, h) = x¹² / (x¹² + h¹²)

    1 / u is the number of independent examples that a batch of n is worth, by
    its gradients or its means: f is 1/n for independent examples, and more
    where a batch's have something in common. So it is open where a batch is
    worth fewer than three examples, or few and far fewer than it has; and shut
    where successive gradients point the same way, as where data are sorted.
    """
    whole = gate.between + gate.within
    known = whole > 0
    share = gate.between / ops.where(known, whole, ops.ones_like(whole))
    share = ops.where(known, share, ops.zeros_like(share))
    inverse = _at_least(_mean(agreement), share)
    excess = _switch(gate.examples * inverse, HALF_OPEN_EXAMPLES) * _switch(
        inverse, LEAST_WORTH
    )
    shut = (1.0 - _switch(inverse, HALF_OPEN_WORTH)) * (1.0 - excess)
    persists = _switch(gate.persistence, HALF_SHUT_PERSISTENCE)
    return (1.0 - shut) * (1.0 - persists)


def _switch(value: Any, half: float) -> Any:
    """H above, of what is negative 0."""
    ratio = _at_least(value / half, 1e-6)
    return ops.sigmoid(STEEPNESS * ops.log(ratio))


# Of float64, Keras's `maximum` gives float32 on PyTorch, and its `mean` is
# computed in float32 on all but TensorFlow.
def _at_least(value: Any, least: Any) -> Any:
    least = least * ops.ones_like(value)
    return ops.where(value < least, least, value)


def _at_most_one(value: Any) -> Any:
    return ops.where(value > 1.0, ops.ones_like(value), value)


def _mean(values: Any) -> Any:
    """The mean of a vector."""
    return ops.sum(values) / ops.cast(ops.shape(values)[0], values.dtype)


def respond(
    moments: Moments, state: State, total: Moments | None = None
) -> Response:
    """`functional.respond`, and how much of the gradient is to be corrected.

    In a graph all layers share the graph of it.
    """
    response = _respond(
        _of_presence(moments),
        # The fewer tensors, the sooner the node is made.
        state._replace(gamma=None, beta=None),
        None if total is None else _of_presence(total),
    )
    for value in (response.r, response.d, response.held):
        backend.set_shape(value, moments.mean)
    for value in (*response[2:4], response.rest):
        backend.set_shape(value, state.moving_mean)
    return response


def _of_presence(moments: Moments) -> Moments:
    """Moments whose count, if it is a number, says only whether it is 0.

    More of it is not asked for, and a graph is made for each number.
    """
    if isinstance(moments.count, (int, float)):
        return moments._replace(count=int(moments.count > 0))
    return moments


@backend.as_one_node
def _respond(moments: Moments, state: State, total: Moments | None) -> Response:
    response = functional.respond(moments, state, total)
    feedback = state.feedback
    if feedback is None:
        return response
    r: Any = response.r
    d: Any = response.d
    is_gated = feedback.is_gated > 0
    opening = openness(feedback.agreement, Gate(*ops.unstack(feedback.gate, 4)))
    # Or a second derivative would add its gradient to the accumulators.
    opening = ops.stop_gradient(opening)
    r = ops.where(is_gated, ops.power(r, opening), r)
    d = ops.where(is_gated, opening * d, d)
    by_limits = float(feedback.corrects_by_limits) * _opening_of_limits(state)
    weight = weigh(feedback.agreement) * ops.where(is_gated, opening, by_limits)
    # σ_B / (σ r) is 1 where r is not clipped.
    ratio = ops.sqrt(
        (moments.variance + state.epsilon)
        / (state.moving_variance + state.epsilon)
    )
    bound = _at_most_one(ratio / r)
    return response._replace(
        r=r,
        d=d,
        held=ops.stop_gradient(weight * bound),
        rest=1.0 - weight,
    )


def _opening_of_limits(state: State) -> Tensor:
    """min((r_max − 1) / 2, 1): how far limits that were given are open."""
    limits: Any = state.limits
    r_max, _ = functional.current_limits(limits, state.moving_mean.dtype)
    return _at_most_one((r_max - 1.0) / (OPEN_R_MAX - 1.0))


def weigh(agreement: Tensor) -> Tensor:
    """How much of a batch's gradient to correct where the gate is open.

        weight = 0.8 · a² / (a² + 0.12²)

    with the agreement a of `observe_agreement`. Its inverse is the number of
    independent examples that a batch is worth. The two means of many are
    good, and the gradient of Algorithm 1 is the better one.
    """
    square = ops.square(agreement)
    weight = HIGHEST_WEIGHT * square / (square + HALF_WEIGHT_AGREEMENT**2)
    return ops.stop_gradient(weight)


class Observation(NamedTuple):
    """What a batch's gradient is made of, a value a channel.

    All but `count` are sums over the examples that share moments.

    Attributes:
        offset: Σ dy.
        scale: Σ dy x̂.
        square: The sum of the squares of each example's Σ dy.
        scatter: The sum of the squared distances of each example's mean of the
            inputs from that of the batch.
        examples: How many examples have an element.
    """

    offset: Tensor
    scale: Tensor
    square: Tensor
    scatter: Tensor
    examples: Tensor


def observe_agreement(observation: Observation, otherwise: Tensor) -> Tensor:
    """How alike the gradients of a batch's examples are, from 0 to 1.

        (Σ_i s_i)² / (n Σ_i s_i²)

    where s_i is the sum of the gradient over example i, of n. It is 1 where
    all are the same, and 1/n in the mean where they are independent with a
    mean of zero, however many elements an example has and whatever the loss
    is multiplied by. Where no gradient arrives it is `otherwise`.
    """
    square = observation.square * ops.cast(
        observation.examples, observation.square.dtype
    )
    arrives = square > 0
    divisor = ops.where(arrives, square, ops.ones_like(square))
    agreement = ops.square(observation.offset) / divisor
    return ops.where(arrives, agreement, otherwise)


def correct(
    moments: Moments,
    state: State,
    response: Response,
    observation: Observation,
    scaling: Tensor,
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
    `response.held + response.rest`.

    The accumulators do not change where the gradient that arrives is not finite
    or the batch has no element; agreement and persistence, also where no
    gradient arrives.

    Args:
        moments: Those of the batch.
        state: Of the layer, with `feedback`.
        response: What the forward pass made of both.
        observation: Of all elements that share `moments`.
        scaling: What the loss is multiplied by. Accumulators hold gradients
            of the loss itself, for a loss scale doubles and halves. 0 where
            it is not known, which counts as 1.

    Returns:
        What takes the place of the two means, and the changes of
        `Feedback.accumulators`.
    """
    feedback: Any = state.feedback
    # Constants of a second derivative.
    accumulators = list(map(ops.stop_gradient, feedback.accumulators))
    mean, earlier, agreement, *_ = accumulators
    gain = 1.0 - feedback.momentum
    scaling = ops.where(scaling == 0, ops.ones_like(scaling), scaling)
    count = ops.cast(moments.count, observation.offset.dtype)
    divisor = scaling * _at_least(count, 1.0)
    offset_mean = observation.offset / divisor
    scale_mean = observation.scale / divisor
    r: Any = response.r
    d: Any = response.d
    stddev = ops.sqrt(moments.variance + state.epsilon)
    square = ops.square(r / stddev) * moments.variance + ops.square(d)  # q
    gained = gain * square
    projection = gain * earlier / _at_least(gained, 1.0)
    error = offset_mean - projection * d - gain * mean  # mean(u)
    arrived = r * scale_mean + d * offset_mean  # mean(dy z)
    forgotten = earlier * _at_most_one(gained)
    valid = ops.isfinite(error + arrived + square)
    valid = ops.logical_and(valid, moments.count > 0)
    learned = (1.0 - AGREEMENT_MOMENTUM) * (
        observe_agreement(observation, agreement) - agreement
    )
    informed = ops.logical_and(valid, ops.isfinite(learned))

    held: Any = response.held
    rest: Any = response.rest
    whole = held + rest
    means = [
        scaling
        * (held * (projection * d + gain * mean) + rest * offset_mean)
        / whole,
        scaling * (held * projection * r + rest * scale_mean) / whole,
    ]
    changes = [
        (valid, error),
        (valid, arrived - forgotten),
        (informed, learned),
        *_remember(moments, state, response, observation, offset_mean, valid),
    ]
    return means, [
        ops.where(condition, change, ops.zeros_like(change))
        for condition, change in changes
    ]


def _remember(
    moments: Moments,
    state: State,
    response: Response,
    observation: Observation,
    gradient: Tensor,
    valid: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Changes of what the gate goes by, and where they are valid."""
    feedback: Any = state.feedback
    *_, gate, last_mean, last_gradient = map(
        ops.stop_gradient, feedback.accumulators
    )
    averages = Gate(*ops.unstack(gate, 4))
    mean, variance = moments.mean, moments.variance
    known = ops.where(moments.count > 0, ops.isfinite(mean + variance), False)
    # At first the moving variance may be far below that of the data.
    variance = _at_least(variance, response.moving_variance) + state.epsilon
    examples = ops.cast(observation.examples, mean.dtype)
    within = observation.scatter / _at_least(examples, 1.0)
    between = 0.5 * ops.square(mean - last_mean)
    direction, arrives = _direction(gradient)
    last_direction, arrived = _direction(last_gradient)
    arrives = ops.logical_and(arrives, arrived)
    cosine = ops.sum(direction * last_direction)
    is_first = averages.examples == 0
    seen = Gate(
        ops.where(is_first, averages.between, _mean(between / variance)),
        _mean(within / variance),
        _mean(examples),
        ops.where(arrives, cosine, averages.persistence),
    )
    change = ops.stack(
        [
            (1.0 - momentum) * (new - old)
            for momentum, new, old in zip(
                (SCATTER_MOMENTUM,) * 2 + (AGREEMENT_MOMENTUM,) * 2,
                seen,
                averages,
                strict=True,
            )
        ]
    )
    return [
        (ops.logical_and(ops.all(known), ops.isfinite(change)), change),
        (known, mean - last_mean),
        (
            ops.logical_and(valid, ops.any(gradient != 0)),
            gradient - last_gradient,
        ),
    ]


def _direction(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A vector of length 1, and whether there is one: of 0 there is none."""
    # Before it is squared: that of 1e-20 is 0 in float32.
    size = ops.max(ops.abs(gradient))
    arrives = size > 0
    scaled = gradient / ops.where(arrives, size, ops.ones_like(size))
    square = ops.sum(ops.square(scaled))
    return scaled * ops.rsqrt(
        ops.where(arrives, square, ops.ones_like(square))
    ), arrives
