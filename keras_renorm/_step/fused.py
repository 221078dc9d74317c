"""TensorFlow's fused operators, on inputs of any rank and axis."""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import tf
from keras_renorm._step import operators
from keras_renorm._step.moments import Moments
from keras_renorm._step.operators import FusedOperators
from keras_renorm._step.plain import by_example_of_rows
from keras_renorm._step.pooling import Pool, pool_moments
from keras_renorm._step.records import State

# The fused operators sum in float32 over the whole tensor; where |mean| is
# more than this many standard deviations, the rounding error of that sum is
# avoided by shifting the inputs first, which costs one pass more. On (32,
# 56, 56, 64) the mean is off by 6e-5 standard deviations where it is 10 of
# them, 7e-4 where it is 100 (Keras: 3e-5 and 3e-4).
LARGE_MEAN = 30.0


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
        return self._operators(epsilon).normalize(
            inputs, scale, offset, mean, variance
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
        """Outputs by these statistics."""
        scale, offset = self._vectors(gamma, beta)
        return self._operators(epsilon).normalize_by(
            inputs, mean, variance, scale, offset
        )

    def normalize_accurately(
        self, gamma: Tensor | None, beta: Tensor | None, epsilon: float
    ) -> tuple[Tensor, ...]:
        """`normalize` in its training form, at any mean.

        The operator's sums are off by some 1e-5 of the mean. Where that is much
        compared with the spread, a channel's first value is subtracted before;
        see `moments.centered_moments`.

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
        is_small = tf.square(mean) <= LARGE_MEAN**2 * population
        results = (outputs, tf.zeros_like(mean), mean, population, *reserves)
        return tuple(
            tf.cond(
                tf.reduce_all(is_small),
                lambda: results,
                lambda: _shifted(share, is_small, self.data_format, *arguments),
            )
        )

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
        return self._operators(epsilon).gradient(
            upstream, inputs, scale, *reserves
        )

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
        return self._operators(epsilon).gradient_by(
            upstream, inputs, mean, variance, scale
        )

    def with_derivatives(
        self, inputs: Tensor, residual: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Residual and variance, as functions of the inputs to derivatives."""
        return operators.with_derivatives(
            self.data_format, inputs, residual, variance
        )

    def _operators(self, epsilon: float) -> FusedOperators:
        return FusedOperators(epsilon, self.data_format)

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


class FusedStep:
    """What a training step asks of its inputs, on the fused operators.

    Attributes as of `plain.PlainStep`.
    """

    has_gradient = True

    def __init__(
        self,
        inputs: Tensor,
        axis: int,
        state: State,
        pool: Pool,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self._view = FusedView(inputs, axis)
        self._is_half = inputs.dtype != tf.float32
        self._state = state
        self._is_shared = pool.spans_replicas
        self._is_shut: Tensor | None = None
        if kept is None:
            self._outputs, *kept = self._view.normalize_accurately(
                state.gamma, state.beta, state.epsilon
            )
        self.kept = tuple(kept)
        shift, residual, variance, *self._reserves = self.kept
        if self._is_shared or state.memory is not None:
            # What the gradient is made of depends on the inputs too.
            residual, variance = self._view.with_derivatives(
                self._view.inputs, residual, variance
            )
        local = Moments(self._view.count, shift, residual, variance)
        self.moments = pool_moments(local, state.moving_mean, pool)

    def branch(self, opening: Tensor | None) -> None:
        """From here on computes as batch normalization if the gate is shut.

        That is six passes over a tensor less. For graphs of which no derivative
        is taken: a conditional has none in forward mode.
        """
        if opening is not None and not self._is_shared:
            self._is_shut = tf.reshape(opening, []) == 0

    def _if_shut(self, shut: Any, otherwise: Any) -> Any:
        if self._is_shut is None:
            return otherwise()
        return tf.cond(self._is_shut, shut, otherwise)

    def outputs(self, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        """x̂ times scale plus offset."""
        outputs = self._outputs
        if scale is not self._state.gamma or self._is_shared:
            outputs = self._if_shut(
                lambda: self._outputs,
                lambda: self._view.normalize(
                    self._view.inputs,
                    scale,
                    offset,
                    self._state.epsilon,
                    mean=self.moments.mean,
                    variance=self.moments.variance,
                )[0],
            )
        return self._view.restore(outputs)

    def gradients(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the inputs, of scale and of offset; Algorithm 1's."""
        d_x, d_scale, d_offset = self._gradient(upstream, scale)
        return self._view.restore(d_x), d_scale, d_offset

    def _gradient(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._view.gradient(
            self._view.of(upstream),
            self._view.inputs,
            scale,
            self._state.epsilon,
            self._reserves,
        )

    def sums(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `plain.PlainStep.sums`; if shut, with the gradient itself."""

        def by_held_statistics() -> tuple[Tensor, Tensor, Tensor]:
            d_x, *sums = self._view.gradient_by(
                self._view.of(upstream),
                self._view.inputs,
                self.moments.mean,
                self.moments.variance,
                scale,
                self._state.epsilon,
            )
            # A sum of two terms of 16 bits would be coarse.
            return self._view.of(upstream) if self._is_half else d_x, *sums

        return self._if_shut(
            lambda: self._gradient(upstream, scale), by_held_statistics
        )

    def by_example(
        self, upstream: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `plain.PlainStep.by_example`."""
        return by_example_of_rows(
            upstream, self._view.inputs, self.moments.mean, self._view.shape
        )

    def inputs_gradient(
        self,
        held: Tensor,
        scale: Tensor | None,
        offset_mean: Tensor,
        scale_mean: Tensor,
    ) -> Tensor:
        """As `plain.PlainStep.inputs_gradient`.

        `held` is the gradient as if the statistics were constants; in 16 bits
        what arrives. They add scale / σ_B times the two means, one along x̂.
        """
        factor = -tf.math.rsqrt(self.moments.variance + self._state.epsilon)
        if scale is not None:
            factor = factor * scale

        def moved() -> Tensor:
            first = tf.cast(held, tf.float32)
            if self._is_half:
                first = self._view.scaled(first, -factor)
            second = self._view.normalize_by(
                tf.cast(self._view.inputs, tf.float32),
                self.moments.mean,
                self.moments.variance,
                factor * scale_mean,
                factor * offset_mean,
                self._state.epsilon,
            )
            return tf.cast(first + second, held.dtype)

        return self._view.restore(self._if_shut(lambda: held, moved))


def _shifted(
    share: Tensor,
    is_small: Tensor,
    data_format: str,
    inputs: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """`FusedView.normalize_accurately` where a mean is large.

    Of inputs less their first value, in channels where that is so: in 16 bits a
    difference is coarse where the value lies far from the others.
    """
    view = FusedView(inputs, 3 if data_format == "NHWC" else 1)
    shift = tf.where(
        tf.reshape(is_small, view.vector_shape),
        tf.zeros([], inputs.dtype),
        view.first(),
    )
    y, mean, variance, mean_reserve, *rest = view.normalize(
        inputs - shift, *arguments
    )
    shift = tf.cast(tf.reshape(shift, [-1]), mean.dtype)
    variance = tf.math.multiply_no_nan(variance, share)
    return (y, shift, mean, variance, mean_reserve + shift, *rest)
