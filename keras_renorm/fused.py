"""TensorFlow's fused operators, on inputs of any rank and axis.

Each has a gradient of its own here, that of the gradients included: those that
TensorFlow has take statistics for constants, and in a `tf.function` under a
`tf.autodiff.ForwardAccumulator` they are lost without an error.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_renorm import backend
from keras_renorm.backend import tf
from keras_renorm.functional import Tensor

# The fused operators sum in float32 over the whole tensor; where |mean| is
# more than this many standard deviations, the rounding error of that sum is
# taken out by shifting the inputs first, which costs one pass more. On (32,
# 56, 56, 64) the mean is off by 6e-5 standard deviations where it is 10 of
# them, 7e-4 where it is 100 (Keras: 3e-5 and 3e-4).
LARGE_MEAN = 30.0


class _Plain:
    """Inputs of an operator's derivative in the operators' layout.

    What they hold is read anew from tensors, for a derivative may be taken in
    another graph than the one that they were made in.
    """

    def __init__(self, data_format: str, inputs: Tensor) -> None:
        is_last = data_format == "NHWC"
        self._axes = [0, 1, 2] if is_last else [0, 2, 3]
        self._vector_shape = [-1] if is_last else [-1, 1, 1]
        sizes = tf.gather(tf.shape(inputs), self._axes)
        self.count = tf.cast(tf.reduce_prod(sizes), tf.float32)

    def of(self, *tensors: Tensor) -> list[Tensor]:
        """In the type of statistics; vectors in a shape that broadcasts."""
        return [
            tf.reshape(tensor, self._vector_shape)
            if tensor.shape.rank == 1
            else tf.cast(tensor, tf.float32)
            for tensor in tensors
        ]

    def sum(self, values: Tensor) -> Tensor:
        """Over all elements of a channel."""
        total = tf.reduce_sum(values, self._axes)
        return tf.reshape(total, self._vector_shape)

    def mean(self, values: Tensor) -> Tensor:
        """0 without elements."""
        return tf.math.divide_no_nan(self.sum(values), self.count)

    def centered(self, inputs: Tensor) -> Tensor:
        """Inputs less their mean."""
        (values,) = self.of(inputs)
        # In two passes: a sum of large values loses digits.
        values -= self.mean(values)
        return values - self.mean(values)


def _with_gradient(function: Any) -> Any:
    """`tf.custom_gradient`, for use within a gradient also.

    There the tensors may be of the graph of the forward pass. A derivative of
    the gradient finds them only if they are made anew where it is computed.
    For the same reason the function closes over no tensor.
    """

    @functools.wraps(function)
    def called(*tensors: Tensor) -> Any:
        return tf.custom_gradient(function)(*map(tf.identity, tensors))

    return called


def _operator(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float,
    data_format: str,
    mean: Tensor = (),
    variance: Tensor = (),
) -> tuple[Tensor, ...]:
    return tuple(
        tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=scale,
            offset=offset,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            data_format=data_format,
            is_training=isinstance(mean, tuple),
        )
    )


def _gradient_operator(
    upstream: Tensor,
    x: Tensor,
    scale: Tensor,
    epsilon: float,
    data_format: str,
    reserves: Sequence[Tensor],
    *,
    is_training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_scale, d_offset, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=upstream,
        x=x,
        scale=scale,
        reserve_space_1=reserves[0],
        reserve_space_2=reserves[1],
        reserve_space_3=reserves[2],
        epsilon=epsilon,
        data_format=data_format,
        is_training=is_training,
    )
    return d_x, d_scale, d_offset


def _normalized_by(epsilon: float, data_format: str) -> Any:
    """Normalization of inputs by a mean and a variance, scale and offset."""

    @_with_gradient
    def normalized(
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        scale: Tensor,
        offset: Tensor,
    ) -> Any:
        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            d_x, d_scale, d_offset = _gradient_by(epsilon, data_format)(
                upstream, x, mean, variance, scale
            )
            d_mean = -tf.math.rsqrt(variance + epsilon) * scale * d_offset
            d_variance = -0.5 / (variance + epsilon) * scale * d_scale
            return d_x, d_mean, d_variance, d_scale, d_offset

        outputs, *_ = _operator(
            x, scale, offset, epsilon, data_format, mean, variance
        )
        return outputs, gradient

    return normalized


def _gradient_by(epsilon: float, data_format: str) -> Any:
    """Its gradient of inputs, scale and offset: scale ρ dy, Σ dy x̂ and Σ dy.

    With ρ = 1/σ.
    """

    @_with_gradient
    def taken(
        upstream: Tensor,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        scale: Tensor,
    ) -> Any:
        def gradient(*arrived: Tensor) -> tuple[Tensor, ...]:
            plain = _Plain(data_format, inputs)
            of_inputs, of_scale, of_offset = plain.of(*arrived)
            dy, x, mu, square, gamma = plain.of(
                upstream, inputs, mean, variance, scale
            )
            centered = x - mu
            rsigma = tf.math.rsqrt(square + epsilon)
            d_upstream = rsigma * (gamma * of_inputs + of_scale * centered)
            both = plain.sum(of_inputs * dy)
            d_rsigma = gamma * both + of_scale * plain.sum(dy * centered)
            d_variance = -0.5 * rsigma * tf.square(rsigma) * d_rsigma
            d_mean = -rsigma * of_scale * plain.sum(dy)
            return (
                tf.cast(d_upstream + of_offset, upstream.dtype),
                tf.cast(of_scale * rsigma * dy, inputs.dtype),
                *(
                    tf.reshape(each, [-1])
                    for each in (d_mean, d_variance, rsigma * both)
                ),
            )

        # Of the third reserve the operator reads nothing.
        reserves = (mean, variance, variance)
        return _gradient_operator(
            upstream,
            inputs,
            scale,
            epsilon,
            data_format,
            reserves,
            is_training=False,
        ), gradient

    return taken


def _gradient_by_batch(epsilon: float, data_format: str) -> Any:
    """Its gradient where the statistics are the batch's.

    With P(a) = a - mean(a) - x̂ mean(a x̂), which is symmetric, and ρ = 1/σ_B:
    scale ρ P(dy), Σ dy x̂ and Σ dy. As x̂ and ρ depend on x, with a, b and c
    arriving at these

        d dy    = scale ρ P(a) + b x̂ + c
        d scale = ρ Σ a P(dy)
        d x     = ρ P(b dy - scale ρ (mean(a x̂) dy + mean(dy x̂) a))
                  - scale ρ² mean(a P(dy)) x̂
    """

    @_with_gradient
    def taken(
        upstream: Tensor, inputs: Tensor, scale: Tensor, *reserves: Tensor
    ) -> Any:
        def gradient(*arrived: Tensor) -> tuple[Tensor | None, ...]:
            plain = _Plain(data_format, inputs)
            of_inputs, of_scale, of_offset = plain.of(*arrived)
            dy, gamma = plain.of(upstream, scale)
            centered = plain.centered(inputs)
            variance = plain.mean(tf.square(centered))
            rsigma = tf.math.rsqrt(variance + epsilon)
            normalized = centered * rsigma

            def projected(values: Tensor) -> Tensor:
                along = plain.mean(values * normalized)
                return values - plain.mean(values) - normalized * along

            both = plain.mean(of_inputs * projected(dy))
            d_upstream = (
                gamma * rsigma * projected(of_inputs)
                + of_scale * normalized
                + of_offset
            )
            d_normalized = of_scale * dy - gamma * rsigma * (
                plain.mean(of_inputs * normalized) * dy
                + plain.mean(dy * normalized) * of_inputs
            )
            d_inputs = rsigma * projected(d_normalized) - normalized * (
                gamma * tf.square(rsigma) * both
            )
            return (
                tf.cast(d_upstream, upstream.dtype),
                tf.cast(d_inputs, inputs.dtype),
                tf.reshape(rsigma * both * plain.count, [-1]),
                *[None] * len(reserves),
            )

        return _gradient_operator(
            upstream,
            inputs,
            scale,
            epsilon,
            data_format,
            reserves,
            is_training=True,
        ), gradient

    return taken


def _with_derivatives(data_format: str) -> Any:
    """Mean and variance as they are, to derivatives functions of inputs."""

    @_with_gradient
    def derived(inputs: Tensor, residual: Tensor, variance: Tensor) -> Any:
        def gradient(
            of_mean: Tensor, of_variance: Tensor
        ) -> tuple[Tensor | None, ...]:
            plain = _Plain(data_format, inputs)
            of_mean, of_variance = plain.of(of_mean, of_variance)
            d_x = of_mean + 2.0 * of_variance * plain.centered(inputs)
            d_x = tf.math.divide_no_nan(d_x, plain.count)
            return tf.cast(d_x, inputs.dtype), None, None

        return (residual, variance), gradient

    return derived


class FusedView:
    """Inputs in one of the two layouts of the fused operators, uncopied.

    Images with channels last are themselves: what TensorFlow's optimizer
    joins to other operations must have no change of shape between. Other
    channels last are `(batch, 1, rows, channels)`, and `(1, 1, batch,
    channels)` without other axes; channels on any other axis are `(before,
    channels, 1, after)`.
    """

    def __init__(self, inputs: Tensor, axis: int) -> None:
        self.shape = ops.shape(inputs)
        self.channels = self.shape[axis]
        before = math.prod(self.shape[:axis])
        after = math.prod(self.shape[axis + 1 :])
        if axis == len(self.shape) - 1:
            self.data_format = "NHWC"
            # On a CPU (1, 1, all rows, channels) takes 1.1 times as long on
            # (128, 8, 8, 512), and rows on the first axis up to 1.4 times on
            # (4096, 256).
            images = self.shape[0] if axis > 1 else 1
            rows = math.prod(self.shape[1:axis]) if axis > 1 else before
            view = (images, 1, rows, self.channels)
            if len(self.shape) == 4:
                view = self.shape
            self.vector_shape: tuple[int, ...] = (self.channels,)
        else:
            self.data_format = "NCHW"
            view = (before, self.channels, 1, after)
            self.vector_shape = (self.channels, 1, 1)
        self.view = view
        self.inputs = self.of(inputs)
        # Elements a channel: a number, or where unknown a tensor.
        self.count = before * after
        if not isinstance(self.count, int):
            self.count = tf.cast(self.count, tf.float32)

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape of the inputs in the operators' layout."""
        if self.view is self.shape:
            return tensor
        return tf.reshape(tensor, self.view)

    def restore(self, outputs: Tensor) -> Tensor:
        """`outputs` of the operators in the shape of the inputs."""
        if self.view is self.shape:
            return outputs
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
        inputs: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        epsilon: float,
        *,
        mean: Tensor = (),
        variance: Tensor = (),
    ) -> tuple[Tensor, ...]:
        """The operator: outputs, mean, variance, three reserve spaces.

        In its training form, unless it is given statistics. It is for what has
        a gradient of its own; else there is `normalize_by`.
        """
        scale, offset = self._vectors(gamma, beta)
        return _operator(
            inputs, scale, offset, epsilon, self.data_format, mean, variance
        )

    def normalize_by(
        self,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        epsilon: float,
    ) -> Tensor:
        """Outputs by these statistics, with derivatives of any order."""
        scale, offset = self._vectors(gamma, beta)
        normalized = _normalized_by(epsilon, self.data_format)
        return normalized(inputs, mean, variance, scale, offset)

    def normalize_accurately(
        self, gamma: Tensor | None, beta: Tensor | None, epsilon: float
    ) -> tuple[Tensor, ...]:
        """`normalize` in its training form, at any mean.

        The operator's sums are off by some 1e-5 of the mean. Where that is much
        compared with the spread, a channel's first value is subtracted before;
        see `functional.centered_moments`.

        Returns:
            Outputs, shift, mean less shift, variance (divisor count), three
            reserve spaces; all constants to derivatives.
        """
        # The conditional below has no forward-mode derivative.
        inputs = tf.stop_gradient(self.inputs)
        scale, offset = map(tf.stop_gradient, self._vectors(gamma, beta))
        arguments = (inputs, scale, offset, epsilon)
        outputs, mean, variance, *reserves = self.normalize(*arguments)
        share = self._population_share(variance.dtype)
        population = tf.math.multiply_no_nan(variance, share)
        # A NaN counts as large. XLA, where it compiles a function that was
        # traced without it, computes E[x²] - E[x]², which may be negative.
        is_small = tf.reduce_all(tf.square(mean) <= LARGE_MEAN**2 * population)
        results = backend.conditional(
            is_small,
            _as_it_is,
            _shifted,
            (outputs, mean, population, *reserves),
            share,
            self.data_format,
            *arguments,
        )
        # All but the last, which only the operator knows.
        for result, like in zip(results, (outputs, *[mean] * 5), strict=False):
            backend.set_shape(result, like)
        return tuple(results)

    def _population_share(self, dtype: Any) -> Tensor:
        """What the operator's variance, of divisor count - 1, is multiplied by.

        The divisor is then count. 0 for one element, whose variance is 0
        whatever a device divides by count - 1 = 0.
        """
        count = self.count
        if isinstance(count, int):
            share = 0 if count == 1 else max(count - 1, 1) / max(count, 1)
            return tf.constant(share, dtype)
        count = tf.cast(count, dtype)
        share = tf.maximum(count - 1, 1) / tf.maximum(count, 1)
        return tf.where(count == 1, tf.zeros_like(share), share)

    def gradient(
        self,
        upstream: Tensor,
        inputs: Tensor,
        scale: Tensor | None,
        epsilon: float,
        reserves: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inputs, scale and offset; statistics are the batch's.

        `reserves` are the three of the training form.
        """
        scale, _ = self._vectors(scale, None)
        taken = _gradient_by_batch(epsilon, self.data_format)
        return tuple(taken(upstream, inputs, scale, *reserves))

    def gradient_by(
        self,
        upstream: Tensor,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        scale: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inputs, scale and offset, by these statistics."""
        scale, _ = self._vectors(scale, None)
        taken = _gradient_by(epsilon, self.data_format)
        return tuple(taken(upstream, inputs, mean, variance, scale))

    def with_derivatives(
        self, inputs: Tensor, residual: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Residual and variance, as functions of the inputs to derivatives."""
        derived = _with_derivatives(self.data_format)
        return tuple(derived(inputs, residual, variance))

    def _vectors(
        self, scale: Tensor | None, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset; `None` is 1 and 0."""
        if scale is None:
            scale = tf.ones([self.channels])
        if offset is None:
            offset = tf.zeros([self.channels])
        return scale, offset

    def scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values in the operators' layout, times a float32 for each channel."""
        if values.dtype == tf.float32:
            return values * tf.reshape(scale, self.vector_shape)
        # As one operator, which rounds the product and not the factor.
        ones, zeros = self._vectors(None, None)
        return self.normalize_by(values, zeros, ones, scale, None, 0.0)


def _as_it_is(outputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    """What `FusedView.normalize_accurately` returns where means are small."""
    y, mean, variance, *reserves = outputs
    return (y, tf.zeros_like(mean), mean, variance, *reserves)


def _shifted(
    _: Sequence[Tensor],
    share: Tensor,
    data_format: str,
    inputs: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The same where a mean is large: of inputs less their first value."""
    view = FusedView(inputs, 3 if data_format == "NHWC" else 1)
    shift = view.first()
    y, mean, variance, mean_reserve, *rest = view.normalize(
        inputs - shift, *arguments
    )
    shift = tf.cast(tf.reshape(shift, [-1]), mean.dtype)
    variance = tf.math.multiply_no_nan(variance, share)
    return (y, shift, mean, variance, mean_reserve + shift, *rest)
