"""Which examples share statistics.

One place decides it. Today: the unmasked examples of the batch on one
device. A wider pool (all replicas) or a narrower one (virtual batches) is a
change of `batch_moments` and of nothing else.
"""

from keras_renorm.functional import Moments, Tensor, centered_moments


def batch_moments(
    inputs: Tensor, axis: int, mask: Tensor | None
) -> tuple[Tensor, Moments]:
    """Inputs less the mean of their pool, and the moments of the pool.

    Args:
        inputs: Tensor `(batch, ..., channels)`, channels on `axis`, of
            float32 or float64.
        axis: The channel axis, non-negative.
        mask: `None`, or a boolean tensor of the rank of `inputs` with size 1
            along `axis`.

    Returns:
        `(centered, moments)`, differentiable in `inputs`.
    """
    return centered_moments(inputs, axis, mask)
