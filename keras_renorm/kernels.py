"""How a training or an inference step is computed.

The layers call these two functions and own all variables; a faster path for
some kind of input belongs behind them.
"""

from collections.abc import Callable
from typing import Any

from keras import backend, ops

from keras_renorm import functional, pooling
from keras_renorm.functional import Moments, Tensor

Correction = Callable[[Moments], tuple[Tensor, Tensor]]


def statistics_dtype(dtype: Any) -> str:
    """The type that statistics are computed and stored in: float32 at least."""
    # Not `result_type`, which gives float32 for float64 on Keras's JAX backend.
    is_double = backend.standardize_dtype(dtype) == "float64"
    return "float64" if is_double else "float32"


def normalize_by_batch(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    correction: Correction | None,
) -> tuple[Tensor, Moments]:
    """A training step: γ ((x − μ_B) / σ_B · r + d) + β.

    Args:
        inputs: Tensor of any rank and numeric type.
        axis: The channel axis, non-negative.
        mask: `None`, or a boolean tensor of the rank of `inputs` with size 1
            along `axis`.
        gamma: Scale, shape `(channels,)`, or `None` for 1.
        beta: Offset, shape `(channels,)`, or `None` for 0.
        epsilon: Added to the variance under the root.
        correction: Gives (r, d), constant to gradients, from the moments of
            the batch. `None` is r = 1, d = 0.

    Returns:
        `(outputs, moments)`: outputs in the statistics' type, and the
        moments, constant to gradients.
    """
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    centered, moments = pooling.batch_moments(inputs, axis, mask)
    scale = ops.rsqrt(moments.variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    moments = Moments(*(ops.stop_gradient(value) for value in moments))
    offset = beta
    if correction is not None:
        # Renormalization is normalization with scale γr and offset γd + β.
        r, d = correction(moments)
        scale = scale * r
        shift = d if gamma is None else d * gamma
        offset = shift if beta is None else shift + beta
    outputs = functional.scale_and_offset(centered, axis, scale, offset, mask)
    return outputs, moments


def normalize_by_moving_statistics(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    moving_mean: Tensor,
    moving_variance: Tensor,
) -> Tensor:
    """An inference step, or a training step with frozen statistics.

    γ (x − μ) / σ + β, with the arguments of `normalize_by_batch`.
    """
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    rank = len(inputs.shape)
    centered = inputs - functional.per_channel(moving_mean, rank, axis)
    scale = ops.rsqrt(moving_variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    return functional.scale_and_offset(centered, axis, scale, beta, mask)
