"""An inference step, or a training step with frozen statistics."""

from typing import Any

from keras_renorm._backend import derivatives, runtime, tracing
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.runtime import tf
from keras_renorm._step import aten
from keras_renorm._step.choice import choose, statistics_dtype
from keras_renorm._step.fused import FusedView
from keras_renorm._step.moments import scale_and_offset, spread
from keras_renorm._step.records import Parameters


def normalize_by_moving_statistics(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    parameters: Parameters,
    is_trained: bool = True,
) -> Tensor:
    """An inference step, or a training step with frozen statistics.

    γ (x − μ) / σ + β, with the arguments of `normalize_by_batch`; `is_trained`
    says whether gradients of γ and β are likely to be asked for. They are right
    either way; what makes them is apart where they are not.
    """
    inputs = runtime.as_tensor(inputs)
    is_forward = derivatives.carry_tangents(
        [inputs, parameters.gamma, parameters.beta]
    )
    path = choose(inputs, axis, mask, is_moving=True, is_forward=is_forward)
    # A graph drops what nobody asks for. Eagerly it would be computed.
    is_apart = not is_trained and runtime.drops_what_is_unused()
    step = _moving_step if is_forward else _shared_moving_step
    return step(path, inputs, axis, mask, parameters, is_apart)


def _moving_step(
    path: str,
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    parameters: Parameters,
    is_apart: bool,
) -> Tensor:
    if path == "affine" or (path == "fused" and is_apart):
        return _written_out(path, inputs, axis, parameters, is_apart)
    if path == "fused":
        return _fused_moving(inputs, axis, parameters)
    if path == "aten":
        return aten.normalize_by(inputs, axis, parameters)
    inputs = ops.cast(inputs, statistics_dtype(inputs.dtype))
    rank = len(inputs.shape)
    centered = inputs - spread(parameters.moving_mean, rank, (axis,))
    scale = ops.rsqrt(parameters.moving_variance + parameters.epsilon)
    if parameters.gamma is not None:
        scale = scale * parameters.gamma
    return scale_and_offset(centered, (axis,), scale, parameters.beta, mask)


_shared_moving_step = tracing.traced_when_eager(_moving_step)


def _fused_moving(inputs: Tensor, axis: int, parameters: Parameters) -> Tensor:
    view = FusedView(inputs, axis)
    outputs = view.normalize_by(
        view.inputs,
        parameters.moving_mean,
        parameters.moving_variance,
        parameters.gamma,
        parameters.beta,
        parameters.epsilon,
    )
    return view.restore(outputs)


def _written_out(
    path: str,
    inputs: Tensor,
    axis: int,
    parameters: Parameters,
    is_apart: bool,
) -> Tensor:
    """An inference step with its own gradient; channels last if "affine".

    That is x a + b, a = γ/σ and b = β − μ a: three roundings of the size of
    μ/σ, where the inputs come with one. The gradient has none of them.

    If `is_apart`, the gradient of the inputs is dy a, and not a result of the
    operator that makes those of γ and β too. It needs no inputs: TensorFlow
    then joins a convolution, the normalization and the activation in training
    also.
    """
    scale = tf.math.rsqrt(parameters.moving_variance + parameters.epsilon)
    if parameters.gamma is not None:
        scale = scale * parameters.gamma

    @derivatives.custom_gradient
    def step(x: Tensor, *_: Tensor) -> Any:
        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            view = FusedView(x, axis)
            d_x, d_gamma, d_beta = view.gradient_by(
                view.of(upstream),
                view.inputs,
                parameters.moving_mean,
                parameters.moving_variance,
                parameters.gamma,
                parameters.epsilon,
            )
            if is_apart:
                d_x = view.scaled(view.of(upstream), scale)
            gradients = [view.restore(d_x)]
            if parameters.gamma is not None:
                gradients.append(d_gamma)
            if parameters.beta is not None:
                gradients.append(d_beta)
            return tuple(gradients)

        if path == "fused":
            return (_fused_moving(x, axis, parameters),), gradient
        centre = parameters.moving_mean * scale
        offset = -centre
        if parameters.beta is not None:
            offset = parameters.beta - centre
        return (x * scale + offset,), gradient

    given = [parameters.gamma, parameters.beta]
    (outputs,) = step(inputs, *(each for each in given if each is not None))
    return outputs
