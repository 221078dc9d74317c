"""How far renormalization corrects: what a layer measures, and what it opens.

A gate for each layer, between batch normalization and all that its limits and
the weight of its gradient allow. It goes by moving averages of what earlier
steps have seen.
"""

from typing import Any, NamedTuple

from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._step.moments import Moments
from keras_renorm._step.records import GradientMemory

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
# What is open by less is shut, and costs what batch normalization costs.
LEAST_OPENING = 0.05


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
            * (1 - H(persistence, 0.4) (1 - H(1 / n, 0.35)))
        H(x, h) = x¹² / (x¹² + h¹²)

    and 0 where that is less than 0.05. 1 / u is the number of independent
    examples that a batch of n is worth, by its gradients or its means: f is 1/n
    for independent examples, and more where a batch's have something in common.
    So it is open where a batch is worth fewer than three examples, or few and
    far fewer than it has; and shut where successive gradients point the same
    way, as where data are sorted. One or two examples are too few whatever
    their order is, and of an output layer of a U-Net gradients may point the
    same way although its images are drawn.
    """
    whole = gate.between + gate.within
    # None of it is 0, not a number.
    share = gate.between / ops.where(whole > 0, whole, 1.0)
    inverse = ops.maximum(_mean(agreement), share)
    excess = _switch(gate.examples * inverse, HALF_OPEN_EXAMPLES) * _switch(
        inverse, LEAST_WORTH
    )
    shut = (1.0 - _switch(inverse, HALF_OPEN_WORTH)) * (1.0 - excess)
    few = _switch(1.0 / ops.maximum(gate.examples, 1.0), HALF_OPEN_WORTH)
    persists = _switch(gate.persistence, HALF_SHUT_PERSISTENCE) * (1.0 - few)
    opening = (1.0 - shut) * (1.0 - persists)
    return ops.where(opening < LEAST_OPENING, 0.0, opening)


def _switch(value: Any, half: float) -> Any:
    """H above, of what is negative 0."""
    ratio = ops.maximum(value / half, 1e-6)
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
    divisor = ops.where(arrives, square, 1.0)
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
    _, _, usual, _ = ops.unstack(gate, 4)
    examples = _mean(ops.cast(examples, usual.dtype))
    return ops.minimum(examples / ops.maximum(usual, 1e-6), 1.0)


def measure(
    moments: Moments,
    memory: GradientMemory,
    variance: Tensor,
    observation: Observation,
    gradient: Tensor,
    valid: Tensor,
    share: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Changes of what the gate goes by, and where they are valid.

    `variance` is what scatter is measured in, σ_B² + ε; or σ² + ε where that
    is more: at first the moving variance may be far below that of the data.
    """
    averages = Gate(*ops.unstack(memory.gate, 4))
    mean = moments.mean
    known = ops.logical_and(ops.isfinite(mean + variance), moments.count > 0)
    examples = ops.cast(observation.examples, mean.dtype)
    within = observation.scatter / ops.maximum(examples, 1.0)
    between = 0.5 * ops.square(mean - memory.last_mean)
    cosine, arrives = _cosine(gradient, memory.last_gradient)
    is_first = averages.examples == 0
    seen = Gate(
        ops.where(is_first, averages.between, _mean(between / variance)),
        _mean(within / variance),
        _mean(examples),
        ops.where(arrives, cosine, averages.persistence),
    )
    slow = (1.0 - SCATTER_MOMENTUM) * share
    fast = (1.0 - AGREEMENT_MOMENTUM) * share
    # Another number of examples is seen at once.
    at_once = ops.ones_like(share) * (1.0 - AGREEMENT_MOMENTUM)
    change = ops.stack([slow, slow, at_once, fast]) * (
        ops.stack(list(seen)) - memory.gate
    )
    return [
        (ops.logical_and(ops.all(known), ops.isfinite(change)), change),
        (known, share * (mean - memory.last_mean)),
        (
            ops.logical_and(valid, ops.any(gradient != 0)),
            share * (gradient - memory.last_gradient),
        ),
    ]


def _cosine(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """That of two vectors, and whether there is one: of 0 there is none."""
    pair = ops.stack([one, other])
    # Before it is squared: that of 1e-20 is 0 in float32.
    sizes = ops.max(ops.abs(pair), axis=1, keepdims=True)
    exists = sizes > 0
    pair = pair / ops.where(exists, sizes, 1.0)
    one, other = ops.unstack(pair, 2)
    # Of what is not 0, 1 at least.
    squares = ops.maximum(ops.sum(ops.square(pair), axis=1), 1.0)
    first, second = ops.unstack(ops.rsqrt(squares), 2)
    return ops.sum(one * other) * first * second, ops.all(exists)
