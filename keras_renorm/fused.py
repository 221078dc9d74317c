"""TensorFlow's fused operators, on inputs of any rank and axis."""

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

        The operator's sums are off by some 1e-5 of the mean. Where that is much
        compared with the spread, a channel's first value is subtracted before;
        see `functional.centered_moments`.

        Returns:
            Outputs, shift, mean less shift, variance (divisor count), three
            reserve spaces.
        """
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
            self.inputs,
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
        *,
        is_training: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inputs, scale and offset.

        `reserves` are the three of the training form; or, for the gradient
        with the statistics held, mean, variance and any third.
        """
        d_inputs, d_scale, d_offset, *_ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=upstream,
            x=inputs,
            scale=tf.ones([self.channels]) if scale is None else scale,
            reserve_space_1=reserves[0],
            reserve_space_2=reserves[1],
            reserve_space_3=reserves[2],
            epsilon=epsilon,
            data_format=self.data_format,
            is_training=is_training,
        )
        return d_inputs, d_scale, d_offset

    def scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values in the operators' layout, times a float32 for each channel."""
        if values.dtype == tf.float32:
            return values * tf.reshape(scale, self.vector_shape)
        # As one operator, which rounds the product and not the factor.
        return tf.raw_ops.FusedBatchNormV3(
            x=values,
            scale=scale,
            offset=tf.zeros_like(scale),
            mean=tf.zeros_like(scale),
            variance=tf.ones_like(scale),
            epsilon=0.0,
            data_format=self.data_format,
            is_training=False,
        )[0]


def _as_it_is(outputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    """What `FusedView.normalize_accurately` returns where means are small."""
    y, mean, variance, *reserves = outputs
    return (y, tf.zeros_like(mean), mean, variance, *reserves)


def _shifted(
    _: Sequence[Tensor],
    inputs: Tensor,
    share: Tensor,
    data_format: str,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The same where a mean is large: of inputs less their first value."""
    view = FusedView(inputs, 3 if data_format == "NHWC" else 1)
    shift = view.first()
    y, mean, variance, mean_reserve, *rest = view.normalize(
        *arguments, shift=shift
    )
    shift = tf.cast(tf.reshape(shift, [-1]), mean.dtype)
    variance = tf.math.multiply_no_nan(variance, share)
    return (y, shift, mean, variance, mean_reserve + shift, *rest)
