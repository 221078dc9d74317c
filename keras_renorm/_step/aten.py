"""A training step on PyTorch's operators, near the bandwidth limit.

On a CPU a mean is off by 7e-5 standard deviations where it is 10 of them, by
7e-4 where it is 100, as with TensorFlow's (`fused.LARGE_MEAN`).
"""

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import torch
from keras_renorm._step.fused import LARGE_MEAN
from keras_renorm._step.moments import Moments, reduction_axes, spread
from keras_renorm._step.pooling import Pool, pool_moments
from keras_renorm._step.records import Parameters, State

# Where channels lie last the operators add their elements one by one, in
# float32. Of so many and more they get a copy with channels first: of
# (1, 1024, 1024, 8) a variance would be off by 2e-4, of (1, 4096, 4096, 3) by
# 1e-2.
LARGE_COUNT = 2**20


class AtenStep:
    """What a training step asks of its inputs, on PyTorch's operators.

    Attributes as of `plain.PlainStep`.
    """

    has_gradient = True

    def __init__(
        self, inputs: Tensor, axis: int, state: State, pool: Pool
    ) -> None:
        self._inputs, self._axis, self._state = inputs, axis, state
        self._is_shut = False
        self._view = _View(inputs, axis)
        channels = inputs.shape[axis]
        count = inputs.numel() // channels
        self._is_large = count >= LARGE_COUNT
        self._values = self._of(inputs)
        # The operator's results have the type of these. It writes to them.
        written = torch.zeros_like(state.moving_mean)
        mean, variance = torch.batch_norm_update_stats(
            self._values, written, written.clone(), 0.0
        )
        self._variance = variance
        local = Moments(written.new_full((), count), mean, written, variance)
        self.moments = pool_moments(local, state.moving_mean, pool)
        self._rsigma = torch.rsqrt(variance + state.epsilon)

    def _of(self, tensor: Tensor) -> Tensor:
        values = self._view.of(tensor)
        return values.contiguous() if self._is_large else values

    @property
    def is_accurate(self) -> bool:
        """Whether no mean is large beside the spread, or not a number."""
        limit = LARGE_MEAN**2 * self._variance
        return bool((torch.square(self.moments.shift) <= limit).all())

    def branch(self, opening: Tensor | None) -> None:
        """As `fused.FusedStep.branch`."""
        self._is_shut = opening is not None and bool(opening == 0)

    def outputs(self, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        """x̂ times scale plus offset."""
        return self._view.restore(
            normalized(
                self._values,
                self.moments.shift,
                self._variance,
                scale,
                offset,
                self._state.epsilon,
            )
        )

    def gradients(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the inputs, of scale and of offset; Algorithm 1's."""
        d_x, d_scale, d_offset = self._backward(upstream, scale, True)
        return self._view.restore(d_x), d_scale, d_offset

    def sums(
        self, upstream: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `plain.PlainStep.sums`; if shut, with the gradient itself."""
        if self._is_shut:
            return self.gradients(upstream, scale)
        _, d_scale, d_offset = self._backward(upstream, None, False)
        return upstream, d_scale, d_offset

    def _backward(
        self, upstream: Tensor, scale: Tensor | None, with_inputs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm_backward(
            self._of(upstream),
            self._values,
            torch.ones_like(self._rsigma) if scale is None else scale,
            None,
            None,
            self.moments.shift,
            self._rsigma,
            True,
            self._state.epsilon,
            [with_inputs, True, True],
        )

    def by_example(
        self, upstream: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `plain.PlainStep.by_example`."""
        first, *others = reduction_axes(self._inputs.dim(), (self._axis,))
        dtype = self._variance.dtype

        def sum_of(values: Tensor) -> Tensor:
            values = values.sum(others, dtype=dtype) if others else values
            sums = values.to(dtype)
            return sums.T if first > self._axis else sums

        def square_of(values: Tensor) -> Tensor:
            return values.square().sum(0)

        sums = sum_of(upstream)
        examples = len(sums)
        count = sums.new_full((1,), examples)
        if not others:
            return square_of(sums), None, count
        elements = self.moments.count / examples
        distances = sum_of(self._inputs) / elements - self.moments.shift
        return square_of(sums), square_of(distances), count

    def inputs_gradient(
        self,
        upstream: Tensor,
        scale: Tensor,
        offset_mean: Tensor,
        scale_mean: Tensor,
    ) -> Tensor:
        """Scale / σ_B (dy − offset_mean − x̂ scale_mean), as A dy + B x + C."""
        if self._is_shut:
            return upstream
        rank = self._inputs.dim()
        scale = scale * self._rsigma
        of_inputs = -scale * scale_mean * self._rsigma
        rest = -scale * offset_mean - of_inputs * self.moments.shift
        scale, of_inputs, rest = (
            spread(each, rank, (self._axis,))
            for each in (scale, of_inputs, rest)
        )
        d_x = torch.addcmul(rest, self._inputs, of_inputs)
        return d_x.addcmul_(upstream, scale).to(upstream.dtype)


def normalized(
    values: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
) -> Tensor:
    """What has channels second, normalized by these statistics."""
    if scale is None:  # of which the operator has no second derivative
        scale = torch.ones_like(mean)
    return torch.batch_norm(
        values, scale, offset, mean, variance, False, 0.0, epsilon, False
    )


def normalize_by(inputs: Tensor, axis: int, parameters: Parameters) -> Tensor:
    """An inference step, or one with frozen statistics."""
    view = _View(inputs, axis)
    return view.restore(
        normalized(
            view.of(inputs),
            # Constants, also where somebody asks for all gradients; and copies,
            # for a training step may write them over before the gradient.
            parameters.moving_mean.detach().clone(),
            parameters.moving_variance.detach().clone(),
            parameters.gamma,
            parameters.beta,
            parameters.epsilon,
        )
    )


class _View:
    """A tensor as the operators read it fast, uncopied: channels second.

    What lies in memory with channels last is of that format, `(1, channels, 1,
    rows)`. What does not, such as the outputs of Keras's convolutions, keeps
    its place.
    """

    def __init__(self, inputs: Tensor, axis: int) -> None:
        self._shape = inputs.shape
        self._axis = axis
        self._is_flat = axis == len(inputs.shape) - 1 and inputs.is_contiguous()

    def of(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the shape of the inputs."""
        if self._is_flat:
            rows = tensor.reshape(1, 1, -1, self._shape[-1])
            return rows.permute(0, 3, 1, 2)
        return tensor.movedim(self._axis, 1) if self._axis else tensor[None]

    def restore(self, values: Tensor) -> Tensor:
        """What undoes `of`."""
        if self._is_flat:
            return values.permute(0, 2, 3, 1).reshape(self._shape)
        return values.movedim(1, self._axis) if self._axis else values[0]
