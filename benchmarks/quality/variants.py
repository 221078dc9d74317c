"""Batch renormalization with other moving statistics and other limits.

For questions that the library's layer does not let one ask: which moment the
moving average holds, whether its first values are debiased, and limits that
follow the share of channels that are clipped.
"""

from keras import ops

from keras_renorm import BatchRenormalization


class VariantRenormalization(BatchRenormalization):
    """Batch renormalization that keeps another moving statistic.

    Args:
        moment: "variance", of the population, as the library; "unbiased",
            with Bessel's correction; or "stddev", the squared average of the
            standard deviation, as the paper.
        debiased: Whether the averages forget their initial values: the
            weights of the batches seen so far sum to one at every step (as
            in Adam), and the first batch replaces the initial values.
        **arguments: Those of `BatchRenormalization`.
    """

    def __init__(self, moment="variance", debiased=False, **arguments):
        super().__init__(**arguments)
        self.moment = moment
        self.debiased = debiased

    def call(self, inputs, training=None, mask=None):
        """As the layer; then what it stored is replaced."""
        if not training or not self.trainable or self.frozen_statistics:
            return super().call(inputs, training=training, mask=mask)
        step = ops.cast(self.step, "float32")
        old_mean = ops.copy(self.moving_mean)
        old_variance = ops.copy(self.moving_variance)
        outputs = super().call(inputs, training=True, mask=mask)
        axes = tuple(range(len(inputs.shape) - 1))
        mean, variance = ops.moments(ops.stop_gradient(inputs), axes)
        keep = self.momentum
        if self.debiased:
            keep = keep * (1 - keep**step) / (1 - keep ** (step + 1))

        def average(old, new):
            return old * keep + new * (1 - keep)

        self.moving_mean.assign(average(old_mean, mean))
        if self.moment == "stddev":
            stddev = average(
                ops.sqrt(old_variance + self.epsilon),
                ops.sqrt(variance + self.epsilon),
            )
            variance = ops.square(stddev) - self.epsilon
        else:
            if self.moment == "unbiased":
                count = ops.cast(
                    ops.size(inputs) // inputs.shape[-1], "float32"
                )
                variance = variance * count / (count - 1)
            variance = average(old_variance, variance)
        self.moving_variance.assign(variance)
        return outputs


class AdaptiveRenormalization(BatchRenormalization):
    """Batch renormalization whose limits follow the share of clipped channels.

    A limit opens while more than `share` of the channels are clipped by it
    and closes while fewer are, at a speed that takes it from closed to the
    paper's 3 and 5, where it stops, in `opening_steps` if all channels are
    clipped.
    """

    def __init__(self, share=0.1, opening_steps=300, **arguments):
        super().__init__(r_max=1.0, d_max=0.0, **arguments)
        self.share = share
        self.opening_steps = opening_steps

    def call(self, inputs, training=None, mask=None):
        """As the layer, with the limits as they stand; then these move."""
        if training:
            axes = tuple(range(len(inputs.shape) - 1))
            mean, variance = ops.moments(ops.stop_gradient(inputs), axes)
            stddev = ops.sqrt(self.moving_variance + self.epsilon)
            r = ops.sqrt(variance + self.epsilon) / stddev
            d = ops.abs(mean - self.moving_mean) / stddev
            limits = ops.copy(self.limit_values)[:, 0]
            clipped = ops.stack(
                [
                    ops.mean(
                        ops.cast(ops.maximum(r, 1 / r) > limits[0], "float32")
                    ),
                    ops.mean(ops.cast(d > limits[1], "float32")),
                ]
            )
            closed, opened = ops.array([1.0, 0.0]), ops.array([3.0, 5.0])
            speed = (opened - closed) / self.opening_steps
            moved = ops.clip(
                limits + speed * (clipped - self.share) / (1 - self.share),
                closed,
                opened,
            )
        outputs = super().call(inputs, training=training, mask=mask)
        if training:
            self.limit_values.assign(ops.stack([moved, moved], axis=1))
        return outputs
