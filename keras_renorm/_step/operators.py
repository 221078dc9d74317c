"""TensorFlow's fused operators, with derivatives of their own.

Those that TensorFlow has take statistics for constants, and in a `tf.function`
under a `tf.autodiff.ForwardAccumulator` they are lost without an error.
"""

from collections.abc import Sequence
from typing import Any

from keras_renorm._backend import derivatives, runtime
from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import tf


class FusedOperators:
    """The operators with an epsilon, in a layout: "NHWC" or "NCHW".

    Derivatives of the first order are of operators; further ones of plain
    operations, which TensorFlow differentiates as often as is asked for.
    """

    def __init__(self, epsilon: float, data_format: str) -> None:
        self._epsilon = epsilon
        self._data_format = data_format

    def normalize(
        self,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        mean: Tensor = (),
        variance: Tensor = (),
    ) -> tuple[Tensor, ...]:
        """The operator: outputs, mean, variance, three reserve spaces.

        In its training form, unless it is given statistics. It is for what has
        a gradient of its own.
        """
        return tuple(
            tf.raw_ops.FusedBatchNormV3(
                x=x,
                scale=scale,
                offset=offset,
                mean=mean,
                variance=variance,
                epsilon=self._epsilon,
                data_format=self._data_format,
                is_training=isinstance(mean, tuple),
            )
        )

    def normalize_by(self, *tensors: Tensor) -> Tensor:
        """Outputs, of inputs, mean, variance, scale and offset."""

        @derivatives.custom_gradient
        def normalized(
            x: Tensor,
            mean: Tensor,
            variance: Tensor,
            scale: Tensor,
            offset: Tensor,
        ) -> Any:
            def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
                d_x, d_scale, d_offset = self.gradient_by(
                    upstream, x, mean, variance, scale
                )
                square = variance + self._epsilon
                d_mean = -tf.math.rsqrt(square) * scale * d_offset
                d_variance = -0.5 / square * scale * d_scale
                return d_x, d_mean, d_variance, d_scale, d_offset

            outputs, *_ = self.normalize(x, scale, offset, mean, variance)
            return (outputs,), gradient

        (outputs,) = normalized(*tensors)
        return outputs

    def gradient_by(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its gradient, of upstream, inputs, mean, variance and scale.

        That of inputs, scale and offset: with ρ = 1/σ, scale ρ dy, Σ dy x̂ and
        Σ dy.
        """

        @derivatives.custom_gradient
        def taken(
            upstream: Tensor,
            inputs: Tensor,
            mean: Tensor,
            variance: Tensor,
            scale: Tensor,
        ) -> Any:
            def gradient(*arrived: Tensor) -> tuple[Tensor, ...]:
                plain = _Plain(self._data_format, inputs)
                of_inputs, of_scale, of_offset = plain.of(*arrived)
                dy, x, mu, square, gamma = plain.of(
                    upstream, inputs, mean, variance, scale
                )
                centered = x - mu
                rsigma = tf.math.rsqrt(square + self._epsilon)
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
            return self._gradient(
                upstream, inputs, scale, reserves, is_training=False
            ), gradient

        # The operator takes no other layout, and differs from run to run on a
        # GPU.
        if self._data_format == "NHWC" and not runtime.must_be_deterministic():
            return taken(*tensors)
        return self._plain_gradient_by(*tensors)

    def _plain_gradient_by(
        self,
        upstream: Tensor,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plain = _Plain(self._data_format, inputs)
        dy, x, mu, square, gamma = plain.of(
            upstream, inputs, mean, variance, scale
        )
        rsigma = tf.math.rsqrt(square + self._epsilon)
        d_scale, d_offset = (
            tf.reshape(plain.sum(values), [-1])
            for values in (dy * ((x - mu) * rsigma), dy)
        )
        return tf.cast(gamma * rsigma * dy, inputs.dtype), d_scale, d_offset

    def gradient(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """That of the training form: of upstream, inputs, scale, reserves.

        With P(a) = a - mean(a) - x̂ mean(a x̂), which is symmetric, and
        ρ = 1/σ_B: scale ρ P(dy), Σ dy x̂ and Σ dy. As x̂ and ρ depend on x,
        with a, b and c arriving at these

            d dy    = scale ρ P(a) + b x̂ + c
            d scale = ρ Σ a P(dy)
            d x     = ρ P(b dy - scale ρ (mean(a x̂) dy + mean(dy x̂) a))
                      - scale ρ² mean(a P(dy)) x̂
        """

        @derivatives.custom_gradient
        def taken(
            upstream: Tensor, inputs: Tensor, scale: Tensor, *reserves: Tensor
        ) -> Any:
            def gradient(*arrived: Tensor) -> tuple[Tensor | None, ...]:
                plain = _Plain(self._data_format, inputs)
                of_inputs, of_scale, of_offset = plain.of(*arrived)
                dy, gamma = plain.of(upstream, scale)
                centered = plain.centered(inputs)
                variance = plain.mean(tf.square(centered))
                rsigma = tf.math.rsqrt(variance + self._epsilon)
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

            return self._gradient(
                upstream, inputs, scale, reserves, is_training=True
            ), gradient

        return taken(*tensors)

    def _gradient(
        self,
        upstream: Tensor,
        inputs: Tensor,
        scale: Tensor,
        reserves: Sequence[Tensor],
        *,
        is_training: bool,
    ) -> tuple[Tensor, ...]:
        return tuple(
            tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=inputs,
                scale=scale,
                reserve_space_1=reserves[0],
                reserve_space_2=reserves[1],
                reserve_space_3=reserves[2],
                epsilon=self._epsilon,
                data_format=self._data_format,
                is_training=is_training,
            )
        )[:3]


def with_derivatives(
    data_format: str, inputs: Tensor, residual: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual and variance as they are; to derivatives, of the inputs."""

    @derivatives.custom_gradient
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

    return derived(inputs, residual, variance)


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
