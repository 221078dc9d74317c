"""How a training or an inference step is computed.

The layers call `normalize_by_batch` and `normalize_by_moving_statistics` and
own all variables. Which computation runs is decided in one place, `choose`;
the numbers are the same to rounding whichever it is.
"""

import functools
import math
from typing import Any

from keras import backend, ops

from keras_renorm import functional, pooling
from keras_renorm.functional import Response, State, Tensor

if backend.backend() == "tensorflow":
    import tensorflow as tf

# A tensor of fewer elements is normalized with plain operations in a graph:
# below, the fused operators' fixed cost outweighs what they save. A training
# step on two cores, plain over fused: 0.78 at 50,000 elements, (16, 14, 14,
# 16); 1.02 at 100,000, (32, 14, 14, 16); 1.14 at 131,000, (32, 8, 8, 64); 1.6
# at 524,000, (32, 32, 32, 16).
SMALL_ELEMENTS = 100_000
# In `fit` the batch size is unknown while the graph is built; Keras's default
# stands in for it.
ASSUMED_BATCH_SIZE = 32
# The fused operators sum in float32 over the whole tensor; where |mean| is
# more than this many standard deviations, the rounding error of that sum is
# taken out by shifting the inputs first, which costs one pass more. On (32,
# 56, 56, 64) the mean is off by 6e-5 standard deviations where it is 10 of
# them, 7e-4 where it is 100 (Keras: 3e-5 and 3e-4).
LARGE_MEAN = 30.0


def statistics_dtype(dtype: Any) -> str:
    """The type that statistics are computed and stored in: float32 at least."""
    # Not `result_type`, which gives float32 for float64 on Keras's JAX backend.
    is_double = backend.standardize_dtype(dtype) == "float64"
    return "float64" if is_double else "float32"


def choose(inputs: Tensor, axis: int, mask: Tensor | None) -> str:
    """Which computation: "fused", "matrix" or "plain".

    - "fused": TensorFlow's fused operators, near the bandwidth limit.
    - "matrix": plain operations on a `(rows, channels)` view. Under XLA,
      where the fused training operator computes E[x²] - E[x]² and 4-D
      reductions are slow; for small tensors in a graph.
    - "plain": operations of `keras.ops` on any axis, with a mask, in float64
      (which the fused operators do not take), on other backends.
    """
    if backend.backend() != "tensorflow" or mask is not None:
        return "plain"
    if backend.standardize_dtype(inputs.dtype) not in (
        "float32",
        "bfloat16",
        "float16",
    ):
        return "plain"
    is_last = axis == len(inputs.shape) - 1
    if _is_compiled_by_xla(inputs):
        return "matrix" if is_last else "plain"
    if tf.executing_eagerly():  # in inference: one operator, one dispatch
        return "fused"
    sizes = [ASSUMED_BATCH_SIZE if n is None else n for n in inputs.shape]
    if math.prod(sizes) >= SMALL_ELEMENTS:
        return "fused"
    return "matrix" if is_last else "plain"


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


def as_one_graph(method: Any) -> Any:
    """A method of a layer, as a graph of its own where it is called eagerly.

    In eager mode each operation on a vector costs its dispatch, and a step
    has some fifty of them. The arguments are tensors, or values that the
    graph is made anew for; what the method reads of the layer but does not
    get as an argument must not change. Under a distribution strategy, and on
    other backends, it is the method itself.
    """
    if backend.backend() != "tensorflow":
        return method
    graph = tf.function(method, autograph=False, reduce_retracing=True)

    @functools.wraps(method)
    def called(self: Any, *arguments: Any) -> Any:
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            # By way of the descriptor, which holds the layer weakly.
            return graph.__get__(self, type(self))(*arguments)
        return method(self, *arguments)

    return called


def read(variable: Any, dtype: str) -> Tensor:
    """The value of a variable as it is now, in a type."""
    if backend.backend() == "tensorflow":
        return tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return ops.cast(variable.value, dtype)


def normalize_by_batch(
    inputs: Tensor, axis: int, mask: Tensor | None, state: State
) -> tuple[Tensor, Response]:
    """A training step: γ ((x − μ_B) / σ_B · r + d) + β.

    Args:
        inputs: Tensor of any rank and numeric type.
        axis: The channel axis, non-negative.
        mask: `None`, or a boolean tensor of the rank of `inputs` with size 1
            along `axis`.
        state: Parameters, moving statistics and limits of the layer.

    Returns:
        `(outputs, response)`: the outputs, in the type of the inputs or of
        the statistics, and the new moving statistics, which carry no
        gradient.
    """
    path = choose(inputs, axis, mask)
    if path == "fused":
        return _fused_batch(inputs, axis, state)
    if path == "matrix":
        return _matrix_batch(inputs, state)
    return _plain_batch(inputs, axis, mask, state)


def normalize_by_moving_statistics(
    inputs: Tensor, axis: int, mask: Tensor | None, state: State
) -> Tensor:
    """An inference step, or a training step with frozen statistics.

    γ (x − μ) / σ + β, with the arguments of `normalize_by_batch`.
    """
    if choose(inputs, axis, mask) == "fused":
        view = _FusedView(inputs, axis)
        outputs, *_ = view.normalize(
            state.gamma,
            state.beta,
            state.epsilon,
            mean=state.moving_mean,
            variance=state.moving_variance,
        )
        return view.restore(outputs)
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    rank = len(inputs.shape)
    centered = inputs - functional.per_channel(state.moving_mean, rank, axis)
    scale = ops.rsqrt(state.moving_variance + state.epsilon)
    if state.gamma is not None:
        scale = scale * state.gamma
    return functional.scale_and_offset(centered, axis, scale, state.beta, mask)


def _renormalized(
    state: State, response: Response
) -> tuple[Tensor | None, Tensor | None]:
    """Scale γr and offset γd + β; `None` for 1 and 0.

    r and d carry no gradient, so renormalization is batch normalization with
    this scale and offset.
    """
    gamma, beta, r, d = state.gamma, state.beta, response.r, response.d
    if r is None:
        return gamma, beta
    if gamma is not None:
        r, d = gamma * r, gamma * d
    return r, d if beta is None else d + beta


def _plain_batch(
    inputs: Tensor, axis: int, mask: Tensor | None, state: State
) -> tuple[Tensor, Response]:
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    centered, moments = pooling.batch_moments(inputs, axis, mask)
    response = functional.respond(
        ops.stop_gradient(moments.mean),
        ops.stop_gradient(moments.variance),
        moments.count > 0,
        state,
    )
    scale = ops.rsqrt(moments.variance + state.epsilon)
    factor, offset = _renormalized(state, response)
    if factor is not None:
        scale = scale * factor
    outputs = functional.scale_and_offset(centered, axis, scale, offset, mask)
    return outputs, response


def _matrix_batch(inputs: Tensor, state: State) -> tuple[Tensor, Response]:
    """`_plain_batch` with channels last, with fewer operations each way."""
    rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
    rows = tf.cast(rows, statistics_dtype(inputs.dtype))

    @tf.custom_gradient
    def step(x: Tensor, *_: Tensor) -> Any:
        centered, moments = pooling.batch_moments(x, 1, None)
        response = functional.respond(
            moments.mean, moments.variance, moments.count > 0, state
        )
        rsigma = tf.math.rsqrt(moments.variance + state.epsilon)
        factor, offset = _renormalized(state, response)
        scale = rsigma if factor is None else rsigma * factor
        outputs = centered * scale
        if offset is not None:
            outputs = outputs + offset

        def gradient(upstream: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            d_offset = tf.reduce_sum(upstream, axis=0)
            d_scale = tf.reduce_sum(upstream * centered, axis=0) * rsigma
            share = 1 / tf.maximum(moments.count, 1)
            d_x = scale * (
                upstream
                - d_offset * share
                - centered * (d_scale * rsigma * share)
            )
            return d_x, *_parameter_gradients(
                state, response, d_scale, d_offset
            )

        return (
            outputs,
            response.moving_mean,
            response.moving_variance,
        ), gradient

    outputs, *moving = step(rows, *_parameters(state))
    return tf.reshape(outputs, tf.shape(inputs)), _constant(moving)


def _parameters(state: State) -> list[Tensor]:
    return [value for value in (state.gamma, state.beta) if value is not None]


def _parameter_gradients(
    state: State, response: Response, d_scale: Tensor, d_offset: Tensor
) -> list[Tensor]:
    """Gradients of `_parameters`, from those of γr and γd + β."""
    gradients = []
    if state.gamma is not None:
        if response.r is None:
            gradients.append(d_scale)
        else:
            gradients.append(response.r * d_scale + response.d * d_offset)
    if state.beta is not None:
        gradients.append(d_offset)
    return gradients


def _constant(moving: list[Tensor]) -> Response:
    moving_mean, moving_variance = map(tf.stop_gradient, moving)
    return Response(None, None, moving_mean, moving_variance)


class _FusedView:
    """Inputs in one of the two layouts of the fused operators, uncopied.

    Channels last are `(1, 1, rows, channels)`; channels on any other axis
    are `(before, channels, 1, after)`. With the rows on the first axis the
    operators of a CPU take up to 1.4 times as long.
    """

    def __init__(self, inputs: Tensor, axis: int) -> None:
        self.shape = ops.shape(inputs)
        self.channels = self.shape[axis]
        before = math.prod(self.shape[:axis])
        after = math.prod(self.shape[axis + 1 :])
        if axis == len(self.shape) - 1:
            self.data_format = "NHWC"
            view = (1, 1, before, self.channels)
            self.vector_shape: tuple[int, ...] = (self.channels,)
        else:
            self.data_format = "NCHW"
            view = (before, self.channels, 1, after)
            self.vector_shape = (self.channels, 1, 1)
        self.inputs = tf.reshape(inputs, view)
        # Elements a channel: a number, or where unknown a tensor.
        self.count = before * after
        if not isinstance(self.count, int):
            self.count = tf.cast(self.count, tf.float32)

    def restore(self, outputs: Tensor) -> Tensor:
        """`outputs` of the operators in the shape of the inputs."""
        return tf.reshape(outputs, self.shape)

    def first(self) -> Tensor:
        """The first element of each channel, in a shape that broadcasts."""
        first = (slice(1), slice(1), slice(1), slice(None))
        if self.data_format == "NCHW":
            first = (slice(1), slice(None), slice(1), slice(1))
        # The sum of the one element, or of none.
        row = tf.reshape(self.inputs[first], (-1, self.channels))
        return tf.reshape(tf.reduce_sum(row, axis=0), self.vector_shape)

    def normalize(
        self,
        gamma: Tensor | None,
        beta: Tensor | None,
        epsilon: float,
        *,
        shift: Tensor | None = None,
        mean: Tensor = (),
        variance: Tensor = (),
    ) -> tuple[Tensor, ...]:
        """The operator: outputs, mean, variance, three reserve spaces.

        In its training form, unless it is given statistics.
        """
        return tuple(
            tf.raw_ops.FusedBatchNormV3(
                x=self.inputs if shift is None else self.inputs - shift,
                scale=tf.ones([self.channels]) if gamma is None else gamma,
                offset=tf.zeros([self.channels]) if beta is None else beta,
                mean=mean,
                variance=variance,
                epsilon=epsilon,
                data_format=self.data_format,
                is_training=isinstance(mean, tuple),
            )
        )

    def normalize_accurately(self, *arguments: Any) -> tuple[Tensor, ...]:
        """`normalize` in its training form, at any mean.

        The operator's sums are off by some 1e-5 of the mean. Where that is
        much beside the spread, a channel's first value is taken off first;
        see `functional.centered_moments`.
        """
        outputs = self.normalize(*arguments)
        mean, variance = outputs[1], outputs[2]

        def shifted() -> tuple[Tensor, ...]:
            shift = self.first()
            y, mean, variance, mean_reserve, *rest = self.normalize(
                *arguments, shift=shift
            )
            shift = tf.cast(tf.reshape(shift, [-1]), mean.dtype)
            return (y, mean + shift, variance, mean_reserve + shift, *rest)

        # A NaN counts as large. XLA, where it compiles a function that was
        # traced without it, computes E[x²] - E[x]², which may be negative.
        is_small = tf.reduce_all(tf.square(mean) <= LARGE_MEAN**2 * variance)
        return tf.cond(is_small, lambda: outputs, shifted)


def _fused_batch(
    inputs: Tensor, axis: int, state: State
) -> tuple[Tensor, Response]:
    """A training step on the fused operators, with its own gradient.

    The gradient is that of the fused operator with scale γr; then
    dγ = r dscale + d doffset and dβ = doffset.
    """
    view = _FusedView(inputs, axis)
    count = view.count
    if isinstance(count, int):
        bessel = max(count - 1, 1) / max(count, 1)
    else:
        bessel = tf.maximum(count - 1, 1) / tf.maximum(count, 1)

    @tf.custom_gradient
    def step(x: Tensor, *_: Tensor) -> Any:
        outputs, mean, variance, *reserves = view.normalize_accurately(
            state.gamma, state.beta, state.epsilon
        )
        # The operator's variance has divisor count - 1 (or 1).
        variance = variance * bessel
        response = functional.respond(mean, variance, count > 0, state)
        scale, offset = _renormalized(state, response)
        if response.r is not None:
            outputs = view.normalize(
                scale, offset, state.epsilon, mean=mean, variance=variance
            )[0]

        def gradient(upstream: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            d_x, d_scale, d_offset, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=x,
                scale=tf.ones([view.channels]) if scale is None else scale,
                reserve_space_1=reserves[0],
                reserve_space_2=reserves[1],
                reserve_space_3=reserves[2],
                epsilon=state.epsilon,
                data_format=view.data_format,
                is_training=True,
            )
            return d_x, *_parameter_gradients(
                state, response, d_scale, d_offset
            )

        return (
            outputs,
            response.moving_mean,
            response.moving_variance,
        ), gradient

    outputs, *moving = step(view.inputs, *_parameters(state))
    return view.restore(outputs), _constant(moving)
