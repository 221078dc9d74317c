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
        keep, take = self.momentum, 1 - self.momentum
        self.moving_mean = self.moving_mean * keep + rows.mean(0) * take
        self.moving_variance = self.moving_variance * keep + rows.var(0) * take
        return outputs

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

    def step(self, rows, upstream, r_max, d_max, examples=None):
        """`(outputs, d_rows, d_gamma, d_beta)`; all state moves.

        `examples` is the number of the example that each row belongs to; by
        default, each is one.
        """
        if examples is None:
            examples = np.arange(len(rows))
        sigma_batch = np.sqrt(rows.var(axis=0) + self.epsilon)
        sigma = np.sqrt(self.moving_variance + self.epsilon)
        opening = min((r_max - 1) / 2, 1)
        agreement = self.gradient_agreement
        weight = 0.8 * opening * agreement**2 / (agreement**2 + 0.12**2)
        sums = np.array(
            [upstream[examples == i].sum(axis=0) for i in np.unique(examples)]
        )
        self.gradient_agreement = 0.98 * agreement + 0.02 * (
            sums.sum(axis=0) ** 2 / (len(sums) * (sums**2).sum(axis=0))
        )
        r, d = self.correction(rows, r_max, d_max)
        outputs = self.train(rows, r_max, d_max)
        z = (rows - rows.mean(axis=0)) / sigma_batch * r + d
        gained = self.gain * np.mean(z**2, axis=0)
        projected = upstream - self.gain * self.gradient_projection * (
            z / np.maximum(gained, 1)
        )
        self.gradient_projection = self.gradient_projection * (
            1 - np.minimum(gained, 1)
        ) + np.mean(upstream * z, axis=0)
        centered = projected - self.gain * self.gradient_mean
        self.gradient_mean = self.gradient_mean + centered.mean(axis=0)
        d_rows, d_gamma, d_beta = self.gradients(rows, upstream, r, d)
        scale = np.minimum(1 / sigma, r / sigma_batch)
        d_rows = weight * self.gamma * scale * centered + (1 - weight) * d_rows
        return outputs, d_rows, d_gamma, d_beta
