"""A training step, forward and backward.

The layers call `normalize_by_batch` and own all variables.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras_renorm._backend import derivatives, runtime, tracing
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.variables import kept_for_gradient
from keras_renorm._step import aten, gating, pooling
from keras_renorm._step.choice import choose, statistics_dtype
from keras_renorm._step.correction import respond
from keras_renorm._step.fused import FusedStep
from keras_renorm._step.gradient import correct
from keras_renorm._step.moments import (
    Moments,
    held_mean,
    scale_and_offset,
    total_moments,
    without_gradient,
)
from keras_renorm._step.plain import PlainStep
from keras_renorm._step.pooling import Pool
from keras_renorm._step.records import Correction, NewStatistics, State


class Way(NamedTuple):
    """How a training step is computed.

    Attributes:
        path: Which computation; see `choose`.
        axis: The channel axis, non-negative.
        mask: `None`, or a boolean tensor of the rank of the inputs, its sizes
            1 or theirs.
        pool: Who shares statistics.
    """

    path: str
    axis: int
    mask: Tensor | None
    pool: Pool


def normalize_by_batch(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    state: State,
    pool: Pool,
) -> tuple[Tensor, NewStatistics]:
    """A training step: γ ((x − μ_B) / σ_B · r + d) + β.

    Args:
        inputs: Tensor of any rank and numeric type.
        axis: The channel axis, non-negative.
        mask: `None`, or a boolean tensor of the rank of `inputs`, its sizes
            1 or theirs.
        state: Parameters, moving statistics and limits of the layer.
        pool: Who shares statistics.

    Returns:
        `(outputs, update)`: the outputs, in the type of the inputs or of the
        statistics, and the new moving statistics.

    Raises:
        NotImplementedError: In forward mode, where replicas share statistics.
    """
    inputs = runtime.as_tensor(inputs)
    is_forward = derivatives.carry_tangents([inputs, state.gamma, state.beta])
    if is_forward and pool.spans_replicas:
        raise NotImplementedError(
            "`synchronized` must be False under a `tf.autodiff."
            "ForwardAccumulator`: sums over replicas have no derivative in "
            "forward mode. Received: synchronized=True."
        )
    path = choose(
        inputs,
        axis,
        mask,
        pool,
        is_corrected=state.memory is not None,
        is_forward=is_forward,
    )
    step = _batch_step if is_forward else _shared_batch_step
    return step(Way(path, axis, mask, pool), inputs, state)


def _batch_step(
    way: Way, inputs: Tensor, state: State
) -> tuple[Tensor, NewStatistics]:
    step = _plain_batch if way.path == "plain" else _written_out_batch
    return step(way, inputs, state)


# In forward mode TensorFlow takes no gradient of what a graph's derivative is.
_shared_batch_step = tracing.traced_when_eager(_batch_step)


def _plain_batch(
    way: Way, inputs: Tensor, state: State
) -> tuple[Tensor, NewStatistics]:
    _, axis, mask, pool = way
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    kept: tuple[int, ...] = (axis,)
    if pool.virtual_batch_size is not None:
        inputs, mask, restore = pooling.split_into_groups(
            inputs, mask, pool.virtual_batch_size
        )
        kept = (0, axis + 1)
    centered, moments = pooling.batch_moments(
        inputs, kept, mask, state.moving_mean, pool, is_mean_held=True
    )
    held = without_gradient(moments)
    total = held if len(kept) == 1 else total_moments(held)
    correction = respond(held, state, total)
    scale = ops.rsqrt(moments.variance + state.epsilon)
    factor, offset = correction.scale_and_offset(state.gamma, state.beta)
    if factor is not None:
        scale = scale * factor
    # The mean's derivative on vectors: what the sums of the offset's gradient
    # and of the scale's are, not another over all elements.
    of_mean = scale * held_mean(moments)
    offset = of_mean if offset is None else offset + of_mean
    outputs = scale_and_offset(centered, kept, scale, offset, mask)
    update = NewStatistics(correction.moving_mean, correction.moving_variance)
    return outputs if len(kept) == 1 else restore(outputs), update


def _parameter_gradients(
    state: State,
    correction: Correction,
    d_scale: Tensor,
    d_offset: Tensor,
    changes: list[Tensor],
) -> list[Tensor]:
    """Gradients of `State.trained`, from those of γr and γd + β.

    As those of the accumulators, their changes.
    """
    gradients = []
    if state.gamma is not None:
        if correction.r is None:
            gradients.append(d_scale)
        else:
            gradients.append(correction.r * d_scale + correction.d * d_offset)
    if state.beta is not None:
        gradients.append(d_offset)
    return [*gradients, *changes]


def _subtracted_means(
    d_offset: Tensor,
    d_scale: Tensor,
    by_example: Callable[[], tuple[Tensor, Tensor | None, Tensor]],
    others: Sequence[Tensor],
    moments: Moments,
    state: State,
    correction: Correction,
    pool: Pool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The two means that the gradient of the inputs subtracts.

    Over all that share `moments`, of sums of a replica; corrected, if that is
    asked for, with what `by_example` then gives. `others` are the gradients
    that arrive at what a step returns besides its outputs (`_moved`). Gradients
    of gamma and beta remain the replica's own: the optimizer adds them up.

    Returns:
        The mean to subtract everywhere and the one along x̂; and the changes of
        the accumulators.
    """
    sums = [d_offset, d_scale]
    if state.memory is not None:
        square, scatter, examples = by_example()
        examples = ops.cast(examples, d_offset.dtype)
        if scatter is None:
            scatter = examples * moments.variance
        sums += [square, scatter, examples]
    if pool.spans_replicas:
        sums = pooling.sum_over_replicas(sums)
    if state.memory is not None:
        return correct(
            moments,
            state.memory,
            correction,
            gating.Observation(*sums),
            others[-1],
            state.epsilon,
        )
    count = ops.cast(moments.count, d_offset.dtype)
    divisor = ops.maximum(count, ops.ones_like(count))
    return [value * (1 / divisor) for value in sums], []


def _moved(correction: Correction) -> list[Tensor]:
    """What a step returns besides its outputs; `_update` reads it."""
    moved = [correction.moving_mean, correction.moving_variance]
    if correction.held is not None:
        moved.append(ops.zeros([], correction.held.dtype))
    return moved


def _update(moved: list[Tensor]) -> NewStatistics:
    mean, variance, *probe = moved
    return NewStatistics(
        ops.stop_gradient(mean), ops.stop_gradient(variance), *probe
    )


def _step_of(
    way: Way,
    inputs: Tensor,
    state: State,
    kept: Sequence[Tensor] | None = None,
) -> Any:
    """Plain operations where these are differentiated, or a mean is large."""
    path, axis, mask, pool = way
    if path == "fused":
        return FusedStep(inputs, axis, state, pool, kept)
    if path == "aten" and not runtime.records_operations():
        step = aten.AtenStep(inputs, axis, state, pool)
        if step.is_accurate:
            return step
        inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    return PlainStep(inputs, axis, mask, state, pool, path == "matrix", kept)


def _forward(
    way: Way, inputs: Tensor, state: State, is_node: bool = False
) -> tuple[Any, Correction, Tensor]:
    run = _step_of(way, inputs, state)
    correction = respond(run.moments, state)
    if is_node or way.path == "aten":
        run.branch(correction.opening)
    scale, offset = correction.scale_and_offset(state.gamma, state.beta)
    return run, correction, run.outputs(scale, offset)


def _backward(
    run: Any,
    correction: Correction,
    upstream: Tensor,
    others: Sequence[Tensor],
    state: State,
    pool: Pool,
) -> tuple[Tensor, ...]:
    """Gradients of the inputs and of `State.trained`."""
    changes: list[Tensor] = []
    scale, _ = correction.scale_and_offset(state.gamma, state.beta)
    is_alone = state.memory is None and not pool.spans_replicas
    if is_alone and run.has_gradient:
        d_x, d_scale, d_offset = run.gradients(upstream, scale)
    else:
        scale = correction.backward_scale(scale)
        held, d_scale, d_offset = run.sums(upstream, scale)
        means, changes = _subtracted_means(
            d_offset,
            d_scale,
            lambda: run.by_example(upstream),
            others,
            run.moments,
            state,
            correction,
            pool,
        )
        d_x = run.inputs_gradient(held, scale, *means)
    return d_x, *_parameter_gradients(
        state, correction, d_scale, d_offset, changes
    )


def _forward_of(
    way: Way, inputs: Tensor, state: State
) -> tuple[Tensor, Correction, tuple[Tensor, ...]]:
    run, correction, outputs = _forward(way, inputs, state, is_node=True)
    return outputs, correction, run.kept


def _backward_of(
    way: Way,
    inputs: Tensor,
    state: State,
    kept: Sequence[Tensor],
    correction: Correction,
    upstream: Tensor,
    others: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    run = _step_of(way, inputs, state, kept)
    run.branch(correction.opening)
    return _backward(run, correction, upstream, others, state, way.pool)


# Forward and backward as nodes of a graph, by whether they stay nodes.
_NODES = {
    stays: tuple(
        tracing.shared_call(function, stays)
        for function in (_forward_of, _backward_of)
    )
    for stays in (True, False)
}


def _written_out_batch(
    way: Way, inputs: Tensor, state: State
) -> tuple[Tensor, NewStatistics]:
    """`_plain_batch` with its gradient, or the corrected one, written out.

    No group has statistics of its own here; the layer sees to that.
    """
    given = state.trained
    known = kept_for_gradient(state)
    if way.path not in ("fused", "aten"):
        inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))

    def step(
        constants: tuple[Way, State], x: Tensor, *parameters: Tensor
    ) -> Any:
        way, known = constants
        own = known.with_trained(parameters)
        run, correction, outputs = _forward(way, x, own)

        def gradient(upstream: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            return _backward(run, correction, upstream, others, own, way.pool)

        return (outputs, *_moved(correction)), gradient

    if tracing.shares_nodes():
        step = _of_nodes(step)
    outputs, *moved = derivatives.custom_gradient(step, (way, known))(
        inputs, *given
    )
    return outputs, _update(moved)


def _of_nodes(step: Any) -> Any:
    """The step of `_written_out_batch` as two nodes: forward, and backward.

    A node has no gradient. So of the gradient a derivative is taken by doing
    the step again, operation by operation.
    """

    def step_of_nodes(
        constants: tuple[Way, State], x: Tensor, *parameters: Tensor
    ) -> Any:
        way, known = constants
        # Those of small tensors do not stay; see `choose`.
        forward, backward = _NODES[way.path == "fused"]
        own = known.with_trained(parameters)
        outputs, correction, kept = forward(way, x, own)
        tracing.set_shape(outputs, x)
        for value in correction._replace(opening=None):
            tracing.set_shape(value, own.moving_mean)

        def gradient(*upstream: Tensor) -> tuple[Tensor, ...]:
            if derivatives.carry_tangents(upstream):
                whole = step(constants, x, *parameters)
                return whole[1](*upstream)
            count = len(upstream)
            # Constants of all layers, which the gradient of a loop loses.
            known_still = known._replace(shares=(), limits=None)

            def taken(*tensors: Tensor) -> Any:
                # Statistics pass no gradient on.
                arriving, _, _, *probe = tensors[:count]
                inputs, *values = tensors[count:]
                results = backward(
                    way,
                    # Others need their shape only, and would keep them.
                    inputs if way.path == "fused" else arriving,
                    known_still.with_trained(values),
                    kept,
                    correction,
                    arriving,
                    probe,
                )
                for result, like in zip(results, tensors[count:], strict=True):
                    tracing.set_shape(result, like)

                def again(*tensors: Tensor) -> Any:
                    whole = step(constants, *tensors[count:])
                    return whole[1](*tensors[:count])

                return results, lambda *of_results: derivatives.gradients_of(
                    again, tensors, of_results
                )

            return derivatives.custom_gradient(taken)(*upstream, x, *parameters)

        return (outputs, *_moved(correction)), gradient

    return step_of_nodes
