"""The papers in float64 NumPy. Imports nothing of the package.

Batch normalization: Ioffe and Szegedy 2015, Algorithm 1. Batch
renormalization: Ioffe 2017, Algorithm 1, with the moving average of the
variance in place of the standard deviation's.
"""

import numpy as np


class Reference:
    """A layer over rows: inputs are `(elements, channels)`."""

    def __init__(self, channels, momentum=0.99, epsilon=1e-3):
        self.gamma = np.ones(channels)
        self.beta = np.zeros(channels)
        self.moving_mean = np.zeros(channels)
        self.moving_variance = np.ones(channels)
        self.momentum = momentum
        self.epsilon = epsilon

    def correction(self, rows, r_max, d_max):
        sigma_batch = np.sqrt(rows.var(axis=0) + self.epsilon)
        sigma = np.sqrt(self.moving_variance + self.epsilon)
        r = np.clip(sigma_batch / sigma, 1 / r_max, r_max)
        d = np.clip(
            (rows.mean(axis=0) - self.moving_mean) / sigma, -d_max, d_max
        )
        return r, d

    def normalize(self, rows, r=1.0, d=0.0):
        sigma_batch = np.sqrt(rows.var(axis=0) + self.epsilon)
        x_hat = (rows - rows.mean(axis=0)) / sigma_batch * r + d
        return self.gamma * x_hat + self.beta

    def train(self, rows, r_max=1.0, d_max=0.0):
        outputs = self.normalize(rows, *self.correction(rows, r_max, d_max))
        self.move(rows)
        return outputs

    def move(self, rows):
        keep, take = self.momentum, 1 - self.momentum
        self.moving_mean = self.moving_mean * keep + rows.mean(0) * take
        self.moving_variance = self.moving_variance * keep + rows.var(0) * take

    def gradients(self, rows, upstream, r=1.0, d=0.0):
        """Of rows, gamma and beta, with r and d held.

        Ioffe 2017, section 3 (backpropagation), written out for the
        population variance. The tests hold the layers to central differences
        on small inputs; this is for large ones.
        """
        sigma_batch = np.sqrt(rows.var(axis=0) + self.epsilon)
        normalized = (rows - rows.mean(axis=0)) / sigma_batch
        d_hat = upstream * self.gamma * r
        d_rows = (
            d_hat
            - d_hat.mean(axis=0)
            - normalized * (d_hat * normalized).mean(axis=0)
        ) / sigma_batch
        d_gamma = (upstream * (normalized * r + d)).sum(axis=0)
        return d_rows, d_gamma, upstream.sum(axis=0)

    def infer(self, rows):
        sigma = np.sqrt(self.moving_variance + self.epsilon)
        return self.gamma * (rows - self.moving_mean) / sigma + self.beta


def central_difference(function, point, step=1e-5):
    """Gradient of a scalar function of an array."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        above, below = point.copy(), point.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def to_rows(inputs, axis):
    """`(..., channels on axis, ...)` to `(elements, channels)`."""
    moved = np.moveaxis(inputs, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def from_rows(rows, shape, axis):
    """The inverse of `to_rows` for inputs of `shape`."""
    moved = np.moveaxis(np.empty(shape), axis, -1).shape
    return np.moveaxis(rows.reshape(moved), -1, axis)


def of_examples(values, examples=None):
    """Of each channel, the values of each example; see `CorrectedReference`."""
    if examples is None:
        examples = np.arange(len(values))
    examples = np.broadcast_to(examples.T, values.T.shape)
    return [
        [channel[numbers == i] for i in np.unique(numbers)]
        for channel, numbers in zip(values.T, examples, strict=True)
    ]


def alike(values):
    """1 where all are the same, 1/n in the mean where they are independent."""
    return np.sum(values) ** 2 / (len(values) * np.sum(np.square(values)))


class CorrectedReference(Reference):
    """Renormalization with the corrected gradient, a step at a time.

    Chiley et al. 2019, section 3, for the control; the weight is this
    package's own: see `keras_renorm.BatchRenormalization`.
    """

    def __init__(
        self, channels, gradient_momentum, momentum=0.99, epsilon=1e-3
    ):
        super().__init__(channels, momentum, epsilon)
        self.gain = 1 - gradient_momentum
        self.gradient_mean = np.zeros(channels)
        self.gradient_projection = np.zeros(channels)
        self.gradient_agreement = np.ones(channels)

    def step(
        self,
        rows,
        upstream,
        r_max,
        d_max,
        examples=None,
        opening=None,
        share=1.0,
    ):
        """`(outputs, d_rows, d_gamma, d_beta)`; all state moves.

        `examples` is the number of the example that each row belongs to; by
        default, each is one. It is a vector, or has the shape of `rows`, where
        channels have masks of their own. `opening` is how far a gate has all
        that is corrected here; without one, limits say it of the gradient.
        `share` is how much of its change the memory takes.
        """
        sigma_batch = np.sqrt(rows.var(axis=0) + self.epsilon)
        sigma = np.sqrt(self.moving_variance + self.epsilon)
        agreement = self.gradient_agreement
        weight = 0.8 * agreement**2 / (agreement**2 + 0.12**2)
        weight *= min((r_max - 1) / 2, 1) if opening is None else opening
        opening = 1.0 if opening is None else opening
        self.gradient_agreement = np.array(
            [
                old
                + share
                * 0.02
                * (alike([each.sum() for each in gradients]) - old)
                if np.any(upstream[:, channel])
                else old
                for channel, (old, gradients) in enumerate(
                    zip(agreement, of_examples(upstream, examples), strict=True)
                )
            ]
        )
        r, d = self.correction(rows, r_max, d_max)
        r, d = r**opening, d * opening
        outputs = self.normalize(rows, r, d)
        self.move(rows)
        z = (rows - rows.mean(axis=0)) / sigma_batch * r + d
        gained = self.gain * np.mean(z**2, axis=0)
        projected = upstream - self.gain * self.gradient_projection * (
            z / np.maximum(gained, 1)
        )
        self.gradient_projection = self.gradient_projection + share * (
            np.mean(upstream * z, axis=0)
            - self.gradient_projection * np.minimum(gained, 1)
        )
        centered = projected - self.gain * self.gradient_mean
        self.gradient_mean = self.gradient_mean + share * centered.mean(axis=0)
        d_rows, d_gamma, d_beta = self.gradients(rows, upstream, r, d)
        scale = np.minimum(1 / sigma, r / sigma_batch)
        d_rows = weight * self.gamma * scale * centered + (1 - weight) * d_rows
        return outputs, d_rows, d_gamma, d_beta


class GatedReference(CorrectedReference):
    """The corrected layer, with a gate that measures how far to correct.

    The gate is this package's own: see `keras_renorm.BatchRenormalization`.
    `constants` are its numbers, which were tuned: `worth`, `examples`, `least`
    and `persistence`, where it is half open or half shut; `steepness`;
    `least_opening`, below which it is shut;
    `scatters` and `gradients`, the momenta of its averages; `begin` and `end`
    of the limits.
    """

    def __init__(
        self,
        channels,
        gradient_momentum,
        momentum=0.99,
        epsilon=1e-3,
        *,
        constants,
    ):
        super().__init__(channels, gradient_momentum, momentum, epsilon)
        self.constants = constants
        self.last_mean = np.zeros(channels)
        self.last_gradient = np.zeros(channels)
        # How far batch means scatter; how far means of examples do within a
        # batch; how many examples there are; cosine of successive gradients.
        self.gate = np.zeros(4)
        self.current_step = 0

    def switch(self, value, name):
        """From 0 to 1, 1/2 at the constant of this name."""
        power = self.constants["steepness"]
        value = max(value, 0.0) ** power
        return value / (value + self.constants[name] ** power)

    def limits(self):
        begin, end = self.constants["begin"], self.constants["end"]
        share = np.clip((self.current_step - begin) / (end - begin), 0, 1)
        return 1 + 2 * share, 5 * share

    def opening(self):
        """How far the next step corrects: what was measured, 1 at first."""
        between, within, examples, persistence = self.gate
        total = between + within
        worth = max(
            np.mean(self.gradient_agreement), between / total if total else 0.0
        )
        excess = self.switch(examples * worth, "examples")
        excess *= self.switch(worth, "least")
        measured = 1 - (1 - self.switch(worth, "worth")) * (1 - excess)
        few = self.switch(1 / max(examples, 1), "worth")
        persists = self.switch(persistence, "persistence") * (1 - few)
        opening = measured * (1 - persists)
        return opening if opening >= self.constants["least_opening"] else 0.0

    def gated_step(self, rows, upstream, examples=None):
        """As `step`, by the gate and the default limits."""
        groups = of_examples(rows, examples)
        usual, count = self.gate[2], np.mean([len(group) for group in groups])
        share = min(count / usual, 1) if usual else 1.0
        results = self.step(
            rows, upstream, *self.limits(), examples, self.opening(), share
        )
        mean, gradient = rows.mean(axis=0), upstream.mean(axis=0)
        variance = np.maximum(rows.var(axis=0), self.moving_variance)
        variance = variance + self.epsilon
        within = [
            np.mean([(each.mean() - centre) ** 2 for each in group])
            for group, centre in zip(groups, mean, strict=True)
        ]
        norms = np.linalg.norm(gradient) * np.linalg.norm(self.last_gradient)
        old = self.gate
        new = [
            # The first batch comes after none.
            np.mean((mean - self.last_mean) ** 2 / 2 / variance)
            if old[2]
            else old[0],
            np.mean(within / variance),
            count,
            gradient @ self.last_gradient / norms if norms else old[3],
        ]
        kept = np.repeat(
            [self.constants["scatters"], self.constants["gradients"]], 2
        )
        shares = np.array([share, share, 1.0, share])
        self.gate = old + shares * (1 - kept) * (new - old)
        self.last_mean = self.last_mean + share * (mean - self.last_mean)
        if np.any(gradient):
            change = gradient - self.last_gradient
            self.last_gradient = self.last_gradient + share * change
        self.current_step += 1
        return results
