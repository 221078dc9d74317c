"""Which examples share statistics.

One place decides it: those of the batch on one device; those of all replicas
of a `tf.distribute` strategy (`synchronized`); or the examples of each group
of a fixed size (`virtual_batch_size`). Kernels ask here for moments, and for
sums over everything that they were pooled over.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from keras_renorm._backend import runtime
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.runtime import tf
from keras_renorm._step.moments import Moments, centered_moments, spread

# A pooled variance is a difference of float64 numbers of the size of the
# squared distance between the replicas' means and the moving mean. Below
# this share of it the difference is rounding, and counts as zero: a constant
# channel has variance 0. The share is the square of float32's resolution.
RESOLUTION = 2.0**-48


class Pool(NamedTuple):
    """The examples whose statistics a training step normalizes with.

    Attributes:
        synchronized: Those of all replicas, not of one.
        virtual_batch_size: At most so many, one after the other in the batch;
            `None` for all.
    """

    synchronized: bool = False
    virtual_batch_size: int | None = None

    @property
    def spans_replicas(self) -> bool:
        """Whether statistics are shared here and now, by several replicas.

        Raises:
            RuntimeError: If they would have to be, by processes of PyTorch.
        """
        if not self.synchronized:
            return False
        runtime.check_one_process()
        return runtime.replicas() is not None


ALONE = Pool()


def sum_over_replicas(values: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of one type, each summed over the replicas, in one all-reduce.

    Differentiable: the gradient is summed over the replicas as well.
    """
    sizes = [value.shape[0] for value in values]
    total = runtime.replicas().all_reduce("SUM", tf.concat(values, axis=0))
    return tf.split(total, sizes)


def average_over_replicas(values: Sequence[Tensor]) -> list[Tensor]:
    """The means of vectors over the replicas; alone, the vectors.

    Also in a branch, a loop or a function of one's own, where TensorFlow lets
    replicas not meet: each has its own there, as in Keras's layer.
    """
    replicas = runtime.replicas()
    if replicas is None:
        return list(values)
    try:
        return tf.unstack(replicas.all_reduce("MEAN", tf.stack(values)))
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        return list(values)


def pool_moments(local: Moments, reference: Tensor, pool: Pool) -> Moments:
    """Moments of the elements of all replicas, if they are shared.

    Each replica sends n, n δ and M2 + n δ² as float64, where δ is the
    distance of its mean from a `reference` that all know, the moving mean,
    and M2 = n * variance: one all-reduce of 2C + 1 numbers. A replica without
    elements adds nothing. (Where channels have masks of their own, n is one
    a channel.)
    """
    if not pool.spans_replicas:
        return local
    count = tf.cast(local.count, tf.float64)
    if count.shape.rank == 0:
        count = tf.reshape(count, [1])
    elif count.shape[0] != 1:  # one a channel, maybe of unknown number
        count = tf.broadcast_to(count, local.variance.shape)
    shift, residual, variance, reference = (
        tf.cast(value, tf.float64)
        for value in (
            local.shift,
            local.residual,
            local.variance,
            reference,
        )
    )
    distance = (shift - reference) + residual
    # Selected, not multiplied by zero: without elements both may be NaN.
    has_elements = count > 0
    zero = tf.zeros_like(variance)
    distance = tf.where(has_elements, distance, zero)
    variance = tf.where(has_elements, variance, zero)
    total_count, total_distance, total_square = sum_over_replicas(
        [
            count,
            count * distance,
            count * (variance + tf.square(distance)),
        ]
    )
    divisor = tf.maximum(total_count, 1)
    distance = total_distance / divisor
    square = tf.square(distance)
    variance = total_square / divisor - square
    variance = tf.where(variance <= RESOLUTION * square, zero, variance)
    mean = reference + distance
    dtype = local.variance.dtype
    shift = tf.stop_gradient(tf.cast(mean, dtype))
    residual = mean - tf.cast(shift, tf.float64)
    # A constant is exact. Its mean keeps its gradient, so nothing is selected.
    residual -= tf.stop_gradient(tf.where(variance == 0, residual, zero))
    return Moments(
        tf.cast(total_count, dtype),
        shift,
        tf.cast(residual, dtype),
        tf.cast(variance, dtype),
    )


def batch_moments(
    inputs: Tensor,
    kept: tuple[int, ...],
    mask: Tensor | None,
    reference: Tensor,
    pool: Pool,
    is_mean_held: bool = False,
) -> tuple[Tensor, Moments]:
    """Inputs less the mean of their pool, and the moments of the pool.

    Args:
        inputs: Tensor `(batch, ..., channels)` (or channels on another
            axis, or with a group axis first) of float32 or float64.
        kept: The axes that the statistics keep, ascending.
        mask: `None`, or a boolean tensor of the rank of `inputs`, its sizes
            1 or theirs.
        reference: The moving mean.
        pool: Who shares statistics.
        is_mean_held: As in `centered_moments`.

    Returns:
        `(centered, moments)`, differentiable in `inputs`.
    """
    centered, local = centered_moments(inputs, kept, mask, is_mean_held)
    moments = pool_moments(local, reference, pool)
    if moments is local:
        return centered, local
    distance = (moments.shift - local.shift) + (
        moments.residual - local.residual
    )
    if is_mean_held:
        distance = ops.stop_gradient(distance)
    return centered - spread(distance, len(inputs.shape), kept), moments


def split_into_groups(
    inputs: Tensor, mask: Tensor | None, size: int
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """A view with a new first axis: groups of `size` examples.

    The examples that are left over form a group of their own; it is filled
    up with masked zeros.

    Args:
        inputs: Tensor `(batch, ...)`.
        mask: `None`, or a boolean tensor of the rank of `inputs` whose sizes
            are 1 or those of `inputs`.
        size: Examples a group, at least 1.

    Returns:
        `(inputs, mask, restore)`: the views `(groups, examples, ...)`, and a
        function that undoes the view and drops what was filled up.
    """
    shape = ops.shape(inputs)
    batch = shape[0]
    if isinstance(batch, int):
        size = max(1, min(size, batch))
        missing = -batch % size
    else:
        size = ops.maximum(1, ops.minimum(size, batch))
        missing = (-batch) % size

    def grouped(values: Tensor) -> Tensor:
        rest = ops.shape(values)[1:]
        padding = ops.zeros((missing, *rest), dtype=values.dtype)
        values = ops.concatenate([values, padding], axis=0)
        return ops.reshape(values, (-1, size, *rest))

    def restore(outputs: Tensor) -> Tensor:
        outputs = ops.reshape(outputs, (-1, *shape[1:]))
        return outputs[:batch]

    # What is missing is known to be nothing, or is masked.
    if mask is None and not (isinstance(missing, int) and missing == 0):
        mask = ops.ones((1,) * len(shape), dtype="bool")
    if mask is not None:
        sizes = (batch, *ops.shape(mask)[1:])
        mask = grouped(ops.broadcast_to(mask, sizes))
    return grouped(inputs), mask, restore
