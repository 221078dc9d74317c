"""How a training or an inference step is computed.

The layers call `normalize_by_batch` and `normalize_by_moving_statistics` and
own all variables. Which computation runs is decided in one place, `choose`;
the numbers are the same to rounding whichever it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_renorm import aten, backend, functional, gating, gradients, pooling
from keras_renorm.backend import tf
from keras_renorm.functional import (
    Correction,
    Moments,
    NewStatistics,
    Parameters,
    State,
)
from keras_renorm.fused import FusedStep, FusedView
from keras_renorm.operations import Tensor, ops
from keras_renorm.plain import PlainStep
from keras_renorm.pooling import ALONE, Pool

# A tensor of fewer elements is normalized with plain operations in a graph:
# below, the fused operators' fixed cost outweighs what they save. A training
# step on two cores, plain over fused: 0.78 at 50,000 elements, (16, 14, 14,
# 16); 1.02 at 100,000, (32, 14, 14, 16); 1.14 at 131,000, (32, 8, 8, 64); 1.6
# at 524,000, (32, 32, 32, 16).
SMALL_ELEMENTS = 100_000
# In `fit` the batch size is unknown while the graph is built; Keras's default
# is assumed.
ASSUMED_BATCH_SIZE = 32

# cuDNN normalizes by given statistics no more than this along the first axis.
LARGEST_BATCH_OF_CUDNN = 65_535

# Operations after which the fused operator infers fastest: TensorFlow's
# optimizer joins it, and the activation, to a convolution without bias; and an
# argument of a graph cannot be written over.
JOINED = ("Conv2D", "Placeholder")


def statistics_dtype(dtype: Any) -> str:
    """The type that statistics are computed and stored in: float32 at least."""
    # Not `result_type`, which gives float32 for float64 on Keras's JAX backend.
    is_double = keras.backend.standardize_dtype(dtype) == "float64"
    return "float64" if is_double else "float32"


def choose(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    pool: Pool = ALONE,
    is_corrected: bool = False,
    is_moving: bool = False,
    is_forward: bool = False,
) -> str:
    """Which computation, by its name.

    - "fused": TensorFlow's fused operators, near the bandwidth limit.
    - "affine": x a + b, with moving statistics (`is_moving`) in a graph.
      TensorFlow writes both passes over what the operation before wrote, and
      joins the second with a residual network's sum; the fused operator
      writes to new memory, and in networks that takes longer. Not in 16
      bits, which that operator reads as they are, nor after `JOINED`.
    - "matrix": plain operations on a `(rows, channels)` view. Under XLA,
      where the fused training operator computes E[x²] - E[x]² and 4-D
      reductions are slow; for small tensors in a graph.
    - "plain": operations of `keras.ops` on any axis, with a mask, in groups,
      in float64 (which the fused operators do not take), on other backends;
      and in forward mode (`is_forward`), which in a graph passes by the
      gradients that the others have.
    - "corrected": the same operations, with the corrected gradient written out
      (`is_corrected`; not in forward mode, where nothing is remembered).
    - "aten": PyTorch's operators, on a CPU.

    Neither does a GPU take more examples than `LARGEST_BATCH_OF_CUDNN`.

    Where replicas share statistics, or the gradient is corrected, the fused
    path is for float32 with channels last: its gradient is a sum of two
    tensors there, too coarse in 16 bits, and the operator for it takes no
    other layout.
    """
    plain = "corrected" if is_corrected and not is_forward else "plain"
    if mask is not None or pool.virtual_batch_size is not None or is_forward:
        return plain
    if not backend.has_fused_operators():
        return "aten" if backend.has_aten(inputs) else plain
    if keras.backend.standardize_dtype(inputs.dtype) not in (
        "float32",
        "bfloat16",
        "float16",
    ):
        return plain
    is_last = axis == len(inputs.shape) - 1
    if _is_compiled_by_xla(inputs) or _is_too_large_for_cudnn(inputs, axis):
        return "matrix" if is_last else plain
    is_sum = is_corrected or pool.spans_replicas
    if is_sum and not (is_last and inputs.dtype == tf.float32):
        return "matrix" if is_last else plain
    if tf.executing_eagerly() and (
        is_moving or not backend.runs_as_one_graph()
    ):
        return "fused"  # one operator, one dispatch
    if is_moving and is_last:
        is_joined = inputs.op.type in JOINED or inputs.dtype != tf.float32
        return "fused" if is_joined else "affine"
    sizes = [ASSUMED_BATCH_SIZE if n is None else n for n in inputs.shape]
    if math.prod(sizes) >= SMALL_ELEMENTS:
        return "fused"
    return "matrix" if is_last else plain


def _is_too_large_for_cudnn(inputs: Tensor, axis: int) -> bool:
    """Whether it is known that the first axis of a `FusedView` is."""
    if axis == len(inputs.shape) - 1:
        axis = 0 if axis == 1 else 1  # rows are on another axis
    batch = math.prod(size or 1 for size in inputs.shape[:axis])
    return batch > LARGEST_BATCH_OF_CUDNN and backend.has_gpu()


def _is_compiled_by_xla(inputs: Tensor) -> bool:
    """Whether the graph that `inputs` belongs to will be compiled by XLA.

    TensorFlow has no public way to ask. While it traces a function with
    `jit_compile=True`, the function's graph, or one outside it, has a
    control-flow context of this name.
    """
    graph = getattr(inputs, "graph", None)
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if type(context).__name__ == "XLAControlFlowContext":
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


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
    inputs = backend.as_tensor(inputs)
    is_forward = backend.carry_tangents([inputs, state.gamma, state.beta])
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
_shared_batch_step = backend.traced_when_eager(_batch_step)


def normalize_by_moving_statistics(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    parameters: Parameters,
    is_trained: bool = True,
) -> Tensor:
    """An inference step, or a training step with frozen statistics.

    γ (x − μ) / σ + β, with the arguments of `normalize_by_batch`; `is_trained`
    says whether gradients of γ and β are likely to be asked for. They are right
    either way; what makes them is apart where they are not.
    """
    inputs = backend.as_tensor(inputs)
    is_forward = backend.carry_tangents(
        [inputs, parameters.gamma, parameters.beta]
    )
    path = choose(inputs, axis, mask, is_moving=True, is_forward=is_forward)
    # A graph drops what nobody asks for. Eagerly it would be computed.
    is_apart = not is_trained and backend.drops_what_is_unused()
    step = _moving_step if is_forward else _shared_moving_step
    return step(path, inputs, axis, mask, parameters, is_apart)


def _moving_step(
    path: str,
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    parameters: Parameters,
    is_apart: bool,
) -> Tensor:
    if path == "affine" or (path == "fused" and is_apart):
        return _written_out(path, inputs, axis, parameters, is_apart)
    if path == "fused":
        return _fused_moving(inputs, axis, parameters)
    if path == "aten":
        return aten.normalize_by(inputs, axis, parameters)
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    rank = len(inputs.shape)
    centered = inputs - functional.spread(parameters.moving_mean, rank, (axis,))
    scale = ops.rsqrt(parameters.moving_variance + parameters.epsilon)
    if parameters.gamma is not None:
        scale = scale * parameters.gamma
    return functional.scale_and_offset(
        centered, (axis,), scale, parameters.beta, mask
    )


_shared_moving_step = backend.traced_when_eager(_moving_step)


def _fused_moving(inputs: Tensor, axis: int, parameters: Parameters) -> Tensor:
    view = FusedView(inputs, axis)
    outputs = view.normalize_by(
        view.inputs,
        parameters.moving_mean,
        parameters.moving_variance,
        parameters.gamma,
        parameters.beta,
        parameters.epsilon,
    )
    return view.restore(outputs)


def _written_out(
    path: str,
    inputs: Tensor,
    axis: int,
    parameters: Parameters,
    is_apart: bool,
) -> Tensor:
    """An inference step with its own gradient; channels last if "affine".

    That is x a + b, a = γ/σ and b = β − μ a: three roundings of the size of
    μ/σ, where the inputs come with one. The gradient has none of them.

    If `is_apart`, the gradient of the inputs is dy a, and not a result of the
    operator that makes those of γ and β too. It needs no inputs: TensorFlow
    then joins a convolution, the normalization and the activation in training
    also.
    """
    scale = tf.math.rsqrt(parameters.moving_variance + parameters.epsilon)
    if parameters.gamma is not None:
        scale = scale * parameters.gamma

    @backend.custom_gradient
    def step(x: Tensor, *_: Tensor) -> Any:
        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            view = FusedView(x, axis)
            d_x, d_gamma, d_beta = view.gradient_by(
                view.of(upstream),
                view.inputs,
                parameters.moving_mean,
                parameters.moving_variance,
                parameters.gamma,
                parameters.epsilon,
            )
            if is_apart:
                d_x = view.scaled(view.of(upstream), scale)
            gradients = [view.restore(d_x)]
            if parameters.gamma is not None:
                gradients.append(d_gamma)
            if parameters.beta is not None:
                gradients.append(d_beta)
            return tuple(gradients)

        if path == "fused":
            return (_fused_moving(x, axis, parameters),), gradient
        centre = parameters.moving_mean * scale
        offset = -centre
        if parameters.beta is not None:
            offset = parameters.beta - centre
        return (x * scale + offset,), gradient

    given = [parameters.gamma, parameters.beta]
    (outputs,) = step(inputs, *(each for each in given if each is not None))
    return outputs


def _renormalized(
    state: State, correction: Correction
) -> tuple[Tensor | None, Tensor | None]:
    """Scale γr and offset γd + β; `None` for 1 and 0.

    r and d carry no gradient, so renormalization is batch normalization with
    this scale and offset.
    """
    gamma, beta, r, d = state.gamma, state.beta, correction.r, correction.d
    if r is None:
        return gamma, beta
    if gamma is not None:
        r, d = gamma * r, gamma * d
    return r, d if beta is None else d + beta


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
    held = functional.constant(moments)
    total = held if len(kept) == 1 else functional.total_moments(held)
    correction = gradients.respond(held, state, total)
    scale = ops.rsqrt(moments.variance + state.epsilon)
    factor, offset = _renormalized(state, correction)
    if factor is not None:
        scale = scale * factor
    # The mean's derivative on vectors: what the sums of the offset's gradient
    # and of the scale's are, not another over all elements.
    of_mean = scale * functional.held_mean(moments)
    offset = of_mean if offset is None else offset + of_mean
    outputs = functional.scale_and_offset(centered, kept, scale, offset, mask)
    update = NewStatistics(correction.moving_mean, correction.moving_variance)
    return outputs if len(kept) == 1 else restore(outputs), update


def _parameters(state: State) -> list[Tensor]:
    """What a step gives gradients of, besides the inputs."""
    values = [state.gamma, state.beta]
    if state.memory is not None:
        values += state.memory.accumulators
    return [value for value in values if value is not None]


def _parameter_gradients(
    state: State,
    correction: Correction,
    d_scale: Tensor,
    d_offset: Tensor,
    changes: list[Tensor],
) -> list[Tensor]:
    """Gradients of `_parameters`, from those of γr and γd + β.

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
    by_example: Callable[[], tuple[Tensor, Tensor, Tensor]],
    others: Sequence[Tensor],
    moments: Moments,
    state: State,
    correction: Correction,
    pool: Pool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The two means that the gradient of the inputs subtracts.

    Over all that share `moments`, of sums of a replica; corrected, if that is
    asked for. `by_example` then gives the gradient's sums
    of each example, `(examples, channels)`, the distances of each example's
    mean of the inputs from the batch's, likewise, and the number of examples
    that have an element, a vector. `others` are the gradients that arrive at
    what a step returns besides its outputs (`_moved`). Gradients of gamma and
    beta remain the replica's own: the optimizer adds them up.

    Returns:
        The mean to subtract everywhere and the one along x̂; and the changes of
        the accumulators.
    """
    sums = [d_offset, d_scale]
    if state.memory is not None:
        parts, distances, examples = by_example()
        sums += [
            ops.sum(ops.square(parts), axis=0),
            ops.sum(ops.square(distances), axis=0),
            ops.cast(examples, d_offset.dtype),
        ]
    if pool.spans_replicas:
        sums = pooling.sum_over_replicas(sums)
    if state.memory is not None:
        return gradients.correct(
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


def _backward_scale(scale: Tensor | None, correction: Correction) -> Any:
    """The scale of the gradient of the inputs, from that of the outputs."""
    if correction.held is None:
        return scale
    factor = correction.held + correction.rest
    return factor if scale is None else scale * factor


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
    if path == "aten" and not backend.records_operations():
        step = aten.AtenStep(inputs, axis, state, pool)
        if step.is_accurate:
            return step
        inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    return PlainStep(inputs, axis, mask, state, pool, path == "matrix", kept)


def _forward(
    way: Way, inputs: Tensor, state: State
) -> tuple[Any, Correction, Tensor]:
    run = _step_of(way, inputs, state)
    correction = gradients.respond(run.moments, state)
    return run, correction, run.outputs(*_renormalized(state, correction))


def _backward(
    run: Any,
    correction: Correction,
    upstream: Tensor,
    others: Sequence[Tensor],
    state: State,
    pool: Pool,
) -> tuple[Tensor, ...]:
    """Gradients of the inputs and of `_parameters`."""
    changes: list[Tensor] = []
    scale, _ = _renormalized(state, correction)
    is_alone = state.memory is None and not pool.spans_replicas
    if is_alone and run.has_gradient:
        d_x, d_scale, d_offset = run.gradients(upstream, scale)
    else:
        scale = _backward_scale(scale, correction)
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
    run, correction, outputs = _forward(way, inputs, state)
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
    return _backward(run, correction, upstream, others, state, way.pool)


# Forward and backward as nodes of a graph, by whether they stay nodes.
_NODES = {
    stays: tuple(
        backend.shared_call(function, stays)
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
    given = _parameters(state)
    known = backend.kept_for_gradient(state)
    if way.path not in ("fused", "aten") or state.memory is not None:
        # The corrected gradient is a sum, too coarse in 16 bits.
        inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))

    def step(x: Tensor, *parameters: Tensor) -> Any:
        own = _with_parameters(known, parameters)
        run, correction, outputs = _forward(way, x, own)

        def gradient(upstream: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            return _backward(run, correction, upstream, others, own, way.pool)

        return (outputs, *_moved(correction)), gradient

    if backend.shares_nodes():
        step = _of_nodes(step, way, known)
    outputs, *moved = backend.custom_gradient(step)(inputs, *given)
    return outputs, _update(moved)


def _of_nodes(step: Any, way: Way, known: State) -> Any:
    """The step of `_written_out_batch` as two nodes: forward, and backward.

    A node has no gradient. So of the gradient a derivative is taken by doing
    the step again, operation by operation.
    """

    # Those of small tensors do not; see `choose`.
    forward, backward = _NODES[way.path == "fused"]

    def step_of_nodes(x: Tensor, *parameters: Tensor) -> Any:
        own = _with_parameters(known, parameters)
        outputs, correction, kept = forward(way, x, own)
        backend.set_shape(outputs, x)
        for value in correction:
            backend.set_shape(value, own.moving_mean)

        def gradient(*upstream: Tensor) -> tuple[Tensor, ...]:
            if backend.carry_tangents(upstream):
                return step(x, *parameters)[1](*upstream)
            count = len(upstream)
            # Constants of all layers, which the gradient of a loop loses.
            known_still = known._replace(shares=(), limits=None)

            def taken(*tensors: Tensor) -> Any:
                arriving, *others = tensors[:count]
                inputs, *values = tensors[count:]
                results = backward(
                    way,
                    # Others need their shape only, and would keep them.
                    inputs if way.path == "fused" else arriving,
                    _with_parameters(known_still, values),
                    kept,
                    correction,
                    arriving,
                    others,
                )
                for result, like in zip(results, tensors[count:], strict=True):
                    backend.set_shape(result, like)

                def again(*tensors: Tensor) -> Any:
                    return step(*tensors[count:])[1](*tensors[:count])

                return results, lambda *of_results: backend.gradients_of(
                    again, tensors, of_results
                )

            return backend.custom_gradient(taken)(*upstream, x, *parameters)

        return (outputs, *_moved(correction)), gradient

    return step_of_nodes


def _with_parameters(state: State, values: Sequence[Tensor]) -> State:
    """A state with these in the place of its `_parameters`."""
    rest = iter(values)
    gamma, beta = (
        None if each is None else next(rest)
        for each in (state.gamma, state.beta)
    )
    memory = state.memory
    if memory is not None:
        memory = memory.with_accumulators(rest)
    return state._replace(gamma=gamma, beta=beta, memory=memory)
