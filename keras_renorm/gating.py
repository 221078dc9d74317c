"""How far renormalization corrects: what a layer measures, and what it opens.

A gate for each layer, between batch normalization and all that its limits and
the weight of its gradient allow. It goes by moving averages of what earlier
steps have seen.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_renorm.functional import (
    Moments,
    Response,
    State,
    Tensor,
    at_least,
    at_most_one,
)

AGREEMENT_MOMENTUM = 0.98
# Means of batches scatter more from step to step than gradients do.
SCATTER_MOMENTUM = 0.99
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
    inverse = at_least(_mean(agreement), share)
    excess = _switch(gate.examples * inverse, HALF_OPEN_EXAMPLES) * _switch(
        inverse, LEAST_WORTH
    )
    shut = (1.0 - _switch(inverse, HALF_OPEN_WORTH)) * (1.0 - excess)
    persists = _switch(gate.persistence, HALF_SHUT_PERSISTENCE)
    return (1.0 - shut) * (1.0 - persists)


def _switch(value: Any, half: float) -> Any:
    """H above, of what is negative 0."""
    ratio = at_least(value / half, 1e-6)
    return ops.sigmoid(STEEPNESS * ops.log(ratio))


class Observation(NamedTuple):
    """What a batch's gradient is made of, a value a channel.

    Sums over the examples that share moments.

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


def _mean(values: Any) -> Any:
    """The mean of a vector; Keras's is of float32 on all but TensorFlow."""
    return ops.sum(values) / ops.cast(ops.shape(values)[0], values.dtype)


def share_of(examples: Tensor, gate: Tensor) -> Tensor:
    """How much a batch says, beside one of the usual number of examples.

    The last batch of an epoch may hold one example, whose mean gradient is that
    of none before. 1 for batches of the usual number and more.
    """
    _, _, usual, _ = ops.unstack(ops.stop_gradient(gate), 4)
    examples = _mean(ops.cast(examples, usual.dtype))
    return at_most_one(examples / at_least(usual, 1e-6))


def measure(
    moments: Moments,
    state: State,
    response: Response,
    observation: Observation,
    gradient: Tensor,
    valid: Tensor,
    share: Tensor,
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
    variance = at_least(variance, response.moving_variance) + state.epsilon
    examples = ops.cast(observation.examples, mean.dtype)
    within = observation.scatter / at_least(examples, 1.0)
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
            (1.0 - momentum) * (new - old) * weight
            for momentum, new, old, weight in zip(
                (SCATTER_MOMENTUM,) * 2 + (AGREEMENT_MOMENTUM,) * 2,
                seen,
                averages,
                # Another number of examples is seen at once.
                (share, share, 1.0, share),
                strict=True,
            )
        ]
    )
    return [
        (ops.logical_and(ops.all(known), ops.isfinite(change)), change),
        (known, share * (mean - last_mean)),
        (
            ops.logical_and(valid, ops.any(gradient != 0)),
            share * (gradient - last_gradient),
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
