"""A training step in plain operations, with what its gradient is made of."""

import math
from collections.abc import Sequence
from typing import Any

from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.runtime import tf
from keras_renorm._step import pooling
from keras_renorm._step.moments import (
    Moments,
    element_count,
    reduction_axes,
    scale_and_offset,
    spread,
)
from keras_renorm._step.pooling import Pool
from keras_renorm._step.records import State


class PlainStep:
    """What a training step asks of its inputs, on any axis, with a mask.

    Attributes:
        moments: Of the pool.
        kept: What the backward pass needs besides the gradient that arrives.
        has_gradient: Whether Algorithm 1's is one operation (`gradients`).
    """

    has_gradient = False

    def __init__(
        self,
        inputs: Tensor,
        axis: int,
        mask: Tensor | None,
        state: State,
        pool: Pool,
        as_rows: bool = False,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        """Of inputs, or of what a step with inputs of this shape has kept.

        Channels last without a mask may be taken `as_rows`: `(elements,
        channels)`.
        """
        self._shape = ops.shape(inputs) if as_rows else None
        self._axis, self._mask = (1 if as_rows else axis), mask
        self._rank = 2 if as_rows else len(inputs.shape)
        self._axes = reduction_axes(self._rank, (self._axis,))
        if kept is None:
            self._centered, self.moments = pooling.batch_moments(
                self._of(inputs), (self._axis,), mask, state.moving_mean, pool
            )
            self.kept = (self._centered, *self.moments)
        else:
            self._centered, *moments = kept
            self.moments = Moments(*moments)
        self._rsigma = ops.rsqrt(self.moments.variance + state.epsilon)

    def _of(self, tensor: Tensor) -> Tensor:
        if self._shape is None:
            return tensor
        return tf.reshape(tensor, [-1, self._shape[-1]])

    def _restored(self, values: Tensor) -> Tensor:
        if self._shape is None:
            return values
        return tf.reshape(values, self._shape)

    def _spread(self, values: Tensor) -> Tensor:
        return spread(values, self._rank, (self._axis,))

    def _selected(self, values: Tensor) -> Tensor:
        if self._mask is None:
            return values
        return ops.where(self._mask, values, ops.zeros_like(values))

    def _scaled(self, scale: Tensor | None) -> Tensor:
        return self._rsigma if scale is None else self._rsigma * scale

    def branch(self, opening: Tensor | None) -> None:
        """As `fused.FusedStep.branch`; nothing is saved here."""

    def outputs(self, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        """x̂ times scale plus offset."""
        return self._restored(
            scale_and_offset(
                self._centered, (self._axis,), self._scaled(scale), offset
            )
        )

    def sums(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `inputs_gradient` takes, Σ dy x̂ and Σ dy."""
        upstream = self._selected(self._of(upstream))
        products = upstream * self._selected(self._centered)
        d_scale = ops.sum(products, self._axes) * self._rsigma
        return upstream, d_scale, ops.sum(upstream, self._axes)

    def by_example(
        self, upstream: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sums of squares over the examples, and how many have an element.

        Of each one's Σ dy, and of its mean's distance from the batch's. All are
        vectors; `None` for the second is the variance times the examples.
        """
        if self._shape is not None:
            return by_example_of_rows(
                upstream, self._centered, None, self._shape
            )
        return _by_example_of_any(
            self._selected(upstream),
            self._selected(self._centered),
            self._axis,
            self._mask,
        )

    def inputs_gradient(
        self,
        upstream: Tensor,
        scale: Tensor | None,
        offset_mean: Tensor,
        scale_mean: Tensor,
    ) -> Tensor:
        """Scale / σ_B (dy − offset_mean − x̂ scale_mean)."""
        along = self._spread(scale_mean * self._rsigma)
        gradient = self._spread(self._scaled(scale)) * (
            upstream
            - self._spread(offset_mean)
            - self._selected(self._centered) * along
        )
        return self._restored(self._selected(gradient))


def by_example_of_rows(
    upstream: Tensor, values: Tensor, mean: Tensor | None, shape: Sequence[Any]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`PlainStep.by_example` of rows of inputs that were of `shape` once.

    Channels last, in the order of the inputs, none masked. `values` are inputs
    that have this mean; `None` is 0.
    """
    upstream, values = (
        tf.cast(each, tf.float32) for each in (upstream, values)
    )
    count, *others, channels = shape
    # Not -1 elements an example: a batch may be empty.
    elements = math.prod(others)

    def sum_of(values: Tensor, sizes: Sequence[Any]) -> Tensor:
        # A product with ones reads at the speed of a copy, `reduce_sum` over
        # all but the last axis at 0.6 of it on a CPU.
        ones = tf.ones([*sizes[:-2], 1, sizes[-2]], values.dtype)
        return tf.matmul(ones, tf.reshape(values, sizes))

    def square_of(values: Tensor) -> Tensor:
        return sum_of(tf.square(values), [count, channels])[0]

    examples = tf.reshape(count, [1])
    if not others:
        return square_of(upstream), None, examples
    sizes = [count, elements, channels]
    divisor = tf.maximum(tf.cast(elements, values.dtype), 1.0)
    distances = sum_of(values, sizes) / divisor
    if mean is not None:
        distances -= mean
    return square_of(sum_of(upstream, sizes)), square_of(distances), examples


def _by_example_of_any(
    upstream: Tensor, values: Tensor, axis: int, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`PlainStep.by_example`; what is masked is 0.

    Examples lie on the first axis that is not the channels'.
    """
    first, *others = reduction_axes(len(values.shape), (axis,))
    is_turned = first > axis

    def sum_of(values: Tensor) -> Tensor:
        sums = ops.sum(values, others)
        return ops.transpose(sums) if is_turned else sums

    def square_of(values: Tensor) -> Tensor:
        return ops.sum(ops.square(values), axis=0)

    sums = sum_of(upstream)
    elements = element_count(values, tuple(sorted((first, axis))), mask)
    if len(elements.shape) == 2 and is_turned:
        elements = ops.transpose(elements)
    if mask is None:
        count = ops.cast(ops.shape(sums)[0], sums.dtype)
        examples = ops.reshape(count, (1,))
    else:
        # A mask of size 1 is for every example.
        present = ops.broadcast_to(
            elements > 0, (ops.shape(sums)[0], ops.shape(elements)[1])
        )
        examples = ops.sum(ops.cast(present, sums.dtype), axis=0)
    if not others:
        return square_of(sums), None, examples
    distances = sum_of(values) / ops.maximum(elements, ops.ones_like(elements))
    return square_of(sums), square_of(distances), examples
