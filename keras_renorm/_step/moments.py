"""Moments of tensors, and what is normalized by them.

Statistics have the shape of the axes of `inputs` that are `kept`, all others
being reduced: the channel axis, or a group axis and the channel axis.
Parameters (scales, offsets) are vectors of one value a channel, or have that
shape too.
"""

from typing import NamedTuple

import numpy as np

from keras_renorm._backend.operations import Tensor, ops

# Below what counts, where it stands for no element: not infinite, or
# `tf.debugging.enable_check_numerics` would stop at it.
LEAST = float(np.finfo("float32").min)


class Moments(NamedTuple):
    """Statistics of the examples that one training step normalizes together.

    Attributes:
        count: Number of unmasked elements of each statistic, a scalar or of a
            shape that broadcasts against the others.
        shift: A value near the mean.
        residual: The mean less `shift`. Two numbers hold more digits than
            one; see `pooling`.
        variance: Population variance (divisor `count`).
    """

    count: Tensor
    shift: Tensor
    residual: Tensor
    variance: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.shift + self.residual


def without_gradient(moments: Moments) -> Moments:
    """The same, without gradients."""
    return Moments(*map(ops.stop_gradient, moments))


def reduction_axes(rank: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    """All axes of a tensor of `rank` axes but those that are kept."""
    return tuple(index for index in range(rank) if index not in kept)


def spread(values: Tensor, rank: int, kept: tuple[int, ...]) -> Tensor:
    """Shapes statistics or parameters so that they broadcast over inputs."""
    if kept[-1] == rank - 1 and len(kept) == 1:
        return values
    if len(values.shape) < 2:
        return ops.reshape(values, [-1] + [1] * (rank - 1 - kept[-1]))
    for index in reduction_axes(rank, kept):
        if index > kept[0]:
            values = ops.expand_dims(values, index)
    return values


def _sum(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum over ascending axes, the last of them first.

    TensorFlow adds what has channels last one by one: in float32 a sum over
    2**24 elements of (1, 4096, 4096, 3) at once is off by 3e-2 of its value.
    """
    if len(axes) > 1:
        values, axes = ops.sum(values, axis=axes[-1]), axes[:-1]
    return ops.sum(values, axis=axes)


def element_count(
    inputs: Tensor, kept: tuple[int, ...], mask: Tensor | None
) -> Tensor:
    """Number of (unmasked) elements a statistic, in the type of `inputs`.

    `mask` has the rank of `inputs`. Without it the count is a scalar; with
    it, in a shape that broadcasts against statistics, one a group, and one a
    channel where channels have masks of their own.
    """
    sizes = ops.shape(inputs)
    axes = reduction_axes(len(sizes), kept)
    known = 1.0  # a Python product: what is static costs nothing
    unknown = []
    for index in axes:
        size = sizes[index]
        if mask is not None:
            # An entry of the mask is for this many elements.
            mask_size = ops.shape(mask)[index]
            if isinstance(size, int) and isinstance(mask_size, int):
                size = size / max(mask_size, 1)
            else:
                size = ops.cast(size, inputs.dtype) / ops.maximum(
                    ops.cast(mask_size, inputs.dtype), 1.0
                )
        if isinstance(size, int | float):
            known = known * size
        else:
            unknown.append(ops.cast(size, inputs.dtype))
    count = ops.convert_to_tensor(known, dtype=inputs.dtype)
    for size in unknown:
        count = count * size
    if mask is not None:
        count = count * _sum(ops.cast(mask, inputs.dtype), axes)
    return count


def centered_moments(
    inputs: Tensor,
    kept: tuple[int, ...],
    mask: Tensor | None = None,
    is_mean_held: bool = False,
) -> tuple[Tensor, Moments]:
    """Inputs less their mean, and their moments.

    Everything is computed on `inputs - shift`, where the shift is one of the
    channel's own values: its first, or under a mask its largest. A float32
    sum over 100,000 elements can be off by 1e-3 of its value. What is summed
    here is of the size of the spread and not of the mean, so the error is
    too: a channel that is constant at 1e7 comes out as exactly zero. (No
    value lies further from the mean than `sqrt(count)` standard deviations,
    so an outlier as the shift costs little.) The variance is the mean of the
    squared distances from the mean: E[x²] − E[x]² cancels.

    Args:
        inputs: Tensor of any rank.
        kept: The axes that the statistics keep, ascending.
        mask: Boolean tensor of the rank of `inputs`, its sizes 1 or theirs;
            `True` marks what counts. Masked elements may hold NaN.
        is_mean_held: Whether to take the mean in `centered` as a constant;
            `held_mean` then has its derivative. Backwards that needs a sum
            over all elements less.

    Returns:
        `(centered, moments)`. Masked elements of `centered` hold whatever
        the input held. Without any element, mean and variance are 0.
    """
    rank = len(inputs.shape)
    axes = reduction_axes(rank, kept)
    count = element_count(inputs, kept, mask)
    divisor = ops.maximum(count, ops.ones_like(count))
    if mask is None:
        first = tuple(
            slice(None) if index in kept else slice(0, 1)
            for index in range(rank)
        )
        # The sum of the one element, or of none.
        shift = ops.sum(inputs[first], axis=axes)
    else:
        shift = ops.max(
            ops.where(mask, inputs, ops.full_like(inputs, LEAST)),
            axis=axes,
            initial=LEAST,
        )
        shift = ops.where(count > 0, shift, ops.zeros_like(shift))

    def unmasked(values: Tensor) -> Tensor:
        if mask is None:
            return values
        return ops.where(mask, values, ops.zeros_like(values))

    # No gradient passes through the shift: whatever it is, it cancels.
    shift = ops.stop_gradient(shift)
    shifted = inputs - spread(shift, rank, kept)
    residual = _sum(unmasked(shifted), axes) / divisor
    mean = ops.stop_gradient(residual) if is_mean_held else residual
    centered = shifted - spread(mean, rank, kept)
    # Selected, then squared: the gradient of a squared NaN is NaN times zero.
    variance = _sum(ops.square(unmasked(centered)), axes) / divisor
    if is_mean_held:
        # What holds of the squared distances from any constant.
        variance = variance - ops.square(residual - mean)
    return centered, Moments(count, shift, residual, variance)


def held_mean(moments: Moments) -> Tensor:
    """0, with the derivatives that `centered` lacks where the mean was held.

    Of any order: x − c + (c − mean) is x − mean, whatever the constant c is.
    """
    return ops.stop_gradient(moments.residual) - moments.residual


def total_moments(moments: Moments) -> Moments:
    """Moments of all elements together, of groups along the first axis.

    The law of total variance: the mean of the variances and the variance of
    the means, weighted by count. The means are taken from a rough mean of
    all, so that what is squared is of the size of their spread.
    """
    counts = moments.count * ops.ones_like(moments.variance[:, :1])
    count = ops.sum(counts, axis=0)
    weights = counts / ops.maximum(count, ops.ones_like(count))

    def average(values: Tensor) -> Tensor:
        return ops.sum(weights * values, axis=0)

    shift = ops.stop_gradient(average(moments.mean))
    distances = (moments.shift - shift) + moments.residual
    residual = average(distances)
    variance = average(moments.variance + ops.square(distances - residual))
    return Moments(count, shift, residual, variance)


def scale_and_offset(
    centered: Tensor,
    kept: tuple[int, ...],
    scale: Tensor,
    offset: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """`centered * scale + offset`, no gradient from masked elements.

    It is applied to centered values: with the mean in the offset, digits would
    cancel where |mean| is large compared with the standard deviation. A masked
    element gets the same formula, but neither its value (NaN, say) nor the
    gradient that arrives there reaches any gradient.
    """
    rank = len(centered.shape)
    scale = spread(scale, rank, kept)
    offset = None if offset is None else spread(offset, rank, kept)

    def affine(values: Tensor) -> Tensor:
        outputs = values * scale
        return outputs if offset is None else outputs + offset

    if mask is None:
        return affine(centered)
    safe = ops.where(mask, centered, ops.zeros_like(centered))
    return ops.where(mask, affine(safe), ops.stop_gradient(affine(centered)))


def align_mask(mask: Tensor, inputs: Tensor, axis: int) -> Tensor:
    """A mask as booleans of the rank of `inputs`, size 1 on all it lacks.

    The axes of a mask are the leading non-channel axes of `inputs`; it is
    broadcast over the others. A mask that does not fit these may have the
    leading axes with the channel axis among them: Keras makes such masks of
    inputs with channels first. An unknown size fits.

    Raises:
        ValueError: If it can be broadcast against neither.
    """
    mask = ops.convert_to_tensor(mask)
    rank = len(inputs.shape)
    sizes = tuple(mask.shape)
    shape = tuple(inputs.shape)
    expected = tuple(shape[index] for index in reduction_axes(rank, (axis,)))

    def fits(axes: tuple[int | None, ...]) -> bool:
        return len(sizes) <= len(axes) and all(
            size is None or whole is None or size in (1, whole)
            for size, whole in zip(sizes, axes, strict=False)
        )

    mask = ops.cast(mask, "bool")
    if fits(expected):
        for index in range(len(sizes), rank - 1):
            mask = ops.expand_dims(mask, index)
        return ops.expand_dims(mask, axis)
    if not fits(shape[:-1]):
        raise ValueError(
            "`mask` must broadcast against the leading non-channel axes of "
            f"`inputs`, {expected}. Received: mask.shape={sizes}, "
            f"inputs.shape={shape}, axis={axis}."
        )
    for index in range(len(sizes), rank):
        mask = ops.expand_dims(mask, index)
    return mask
