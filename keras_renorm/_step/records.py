"""What a step reads of a layer, and what it gives back."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from keras_renorm._backend.operations import Tensor, ops


class Limits(NamedTuple):
    """The ramps of r_max and d_max, a row each, and the current step.

    Attributes:
        values: Where each begins and ends, shape `(2, 2)`.
        steps: When each begins and ends, shape `(2, 2)`.
        step: The current step, a scalar.
    """

    values: Tensor
    steps: Tensor
    step: Tensor


class GradientMemory(NamedTuple):
    """What a layer remembers of earlier steps; see `gradient`.

    All but the last two are accumulators: what a step gives as the gradient of
    one is added to it (`variables.with_accumulators`).

    Attributes:
        mean: Of the gradient's mean, shape `(channels,)`.
        projection: Of its product with the normalized inputs, likewise.
        agreement: Moving average of how alike the gradients of a batch's
            examples are, from 0 to 1, likewise.
        gate: Moving averages of the layer, shape `(4,)`; see `gating.Gate`.
        last_mean: The mean of the last batch, shape `(channels,)`.
        last_gradient: The mean of the last gradient, likewise.
        is_gated: 1 where the gate rules how far r, d and the gradient are
            corrected; 0 where limits of r and d were given.
        momentum: Share of the first two accumulators that is kept.
        corrects_by_limits: Whether the gradient is corrected also where limits
            were given.
    """

    mean: Tensor
    projection: Tensor
    agreement: Tensor
    gate: Tensor
    last_mean: Tensor
    last_gradient: Tensor
    is_gated: Tensor
    momentum: float
    corrects_by_limits: bool

    @property
    def accumulators(self) -> tuple[Tensor, ...]:
        """What a step adds to."""
        return self[:6]

    def with_accumulators(self, values: Iterable[Tensor]) -> "GradientMemory":
        """The same with these in the place of its accumulators."""
        fields: list[Any] = [*values, *self[6:]]
        return GradientMemory(*fields)


class Parameters(NamedTuple):
    """What an inference step reads of a layer.

    Attributes:
        gamma: Scale, shape `(channels,)`, or `None` for 1.
        beta: Offset, shape `(channels,)`, or `None` for 0.
        moving_mean: Shape `(channels,)`.
        moving_variance: Shape `(channels,)`.
        epsilon: Added to variances under the root.
    """

    gamma: Tensor | None
    beta: Tensor | None
    moving_mean: Tensor
    moving_variance: Tensor
    epsilon: float


class State(NamedTuple):
    """What a training step reads of a layer: `Parameters`, and more.

    Attributes:
        gamma, beta, moving_mean, moving_variance, epsilon: As there.
        shares: Those of the moving statistics and of the batch's in the new
            moving statistics: momentum and 1 - momentum.
        limits: Those of r and d. `None` is r = 1, d = 0.
        memory: What corrects the gradient, or `None`.
    """

    gamma: Tensor | None
    beta: Tensor | None
    moving_mean: Tensor
    moving_variance: Tensor
    epsilon: float
    shares: tuple[Tensor, ...]
    limits: Limits | None
    memory: GradientMemory | None

    @property
    def trained(self) -> list[Tensor]:
        """What a step gives gradients of, besides the inputs."""
        values = [self.gamma, self.beta]
        if self.memory is not None:
            values += self.memory.accumulators
        return [value for value in values if value is not None]

    def with_trained(self, values: Iterable[Tensor]) -> "State":
        """The same with these in the place of what is `trained`."""
        rest = iter(values)
        gamma, beta = (
            None if value is None else next(rest)
            for value in (self.gamma, self.beta)
        )
        memory = self.memory
        if memory is not None:
            memory = memory.with_accumulators(rest)
        return self._replace(gamma=gamma, beta=beta, memory=memory)


class Correction(NamedTuple):
    """What a training step makes of the moments of its batch.

    Attributes:
        r: Correction of the scale, or `None` for 1.
        d: Correction of the offset, or `None` for 0.
        moving_mean: The new moving mean.
        moving_variance: The new moving variance.
        held: With `State.memory`, the share of the gradient, in terms of
            Algorithm 1's scale, that is taken as if the statistics were
            constants.
        rest: With it, the share that is Algorithm 1's own.
        opening: With it, how far the gate is open, a scalar; 1 without a gate.
    """

    r: Tensor | None
    d: Tensor | None
    moving_mean: Tensor
    moving_variance: Tensor
    held: Tensor | None = None
    rest: Tensor | None = None
    opening: Tensor | None = None

    def scale_and_offset(
        self, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scale γr and offset γd + β; `None` for 1 and 0.

        r and d carry no gradient, so renormalization is batch normalization
        with this scale and offset.
        """
        r, d = self.r, self.d
        if r is None:
            return gamma, beta
        if gamma is not None:
            r, d = gamma * r, gamma * d
        return r, d if beta is None else d + beta

    def backward_scale(self, scale: Tensor | None) -> Tensor | None:
        """The scale of the gradient of the inputs, from that of the outputs."""
        if self.held is None:
            return scale
        factor = self.held + self.rest
        return factor if scale is None else scale * factor


class NewStatistics(NamedTuple):
    """What a training step gives its layer besides the outputs.

    Attributes:
        moving_mean: The new moving mean, without gradient.
        moving_variance: The new moving variance, without gradient.
        probe: With `State.memory`, a zero. Part of the loss, it tells the
            backward pass what the loss is multiplied by.
    """

    moving_mean: Tensor
    moving_variance: Tensor
    probe: Tensor | None = None

    def moves(self, state: State) -> Tensor:
        """Whether those of all channels are others than before.

        But for channels that are constant, whose variance can fall no further.
        """
        moves = ops.logical_or(
            self.moving_mean != state.moving_mean,
            self.moving_variance != state.moving_variance,
        )
        return ops.all(ops.logical_or(moves, self.moving_variance < 1e-30))
