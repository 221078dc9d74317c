"""The loss and its gradient along the gradient, by step size."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.variables import to_numpy
from keras_renorm._checks import check_boolean
from keras_renorm._landscape.curves import (
    EffectiveSmoothness,
    GradientPredictiveness,
    InternalCovariateShift,
    LossAlongGradient,
)
from keras_renorm._landscape.objective import Objective, checked_step_sizes


def loss_along_gradient(
    model: keras.Model,
    loss: Any,
    batch: Any,
    step_sizes: float | Sequence[float],
    *,
    training: bool = True,
) -> LossAlongGradient:
    """The loss after a step of gradient descent, by step size.

        values[k] = L(θ − step_sizes[k] g(θ))

    How much the loss varies along its gradient tells how far the gradient
    can be trusted. `relative_losses` of the result is the loss after the step
    over the loss before it, on the batch that the gradient is of: called at
    each of the first minibatches of a training, it shows which step sizes
    would have raised the loss.

    The model is left as it was, and needs no `compile`.

    Args:
        model: A built Keras model with trainable weights.
        loss: A Keras loss, its name, or a function `(y_true, y_pred)`; for
            several outputs a loss or a name for each, a function for all
            together, or a list or dict, one for each; they are added up. A
            name or a function is handed float64 where the outputs are
            float64, else float32; a Loss object takes its own type. (On JAX,
            Keras's losses average in float32.)
        batch: `(x, y)` or `(x, y, sample_weight)`.
        step_sizes: Step sizes η, positive and finite; one or several, in any
            order.
        training: Whether the model runs in training mode, with batch
            statistics and dropout. Default True.

    Returns:
        A `LossAlongGradient`: arrays `step_sizes` and `values`; the numbers
        `initial_loss` and `gradient_norm`; `relative_losses`; `plot(ax=None)`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a step size is not positive and finite, or there is
            none; if the model is not built or has no trainable weight; if the
            loss is not one number, or does not fit the outputs.
        RuntimeError: In the scope of a distribution strategy, or on another
            backend than TensorFlow, JAX and PyTorch.

    Example:

    The loss w² at w = 1, whose gradient is 2:

    >>> model = keras.Sequential([
    ...     keras.Input((1,)),
    ...     keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
    ... ])
    >>> batch = np.ones((1, 1)), np.zeros((1, 1))
    >>> line = loss_along_gradient(model, "mse", batch, [0.25, 0.5, 2.0])
    >>> line.values.tolist()
    [0.25, 0.0, 9.0]

    References:
        Santurkar et al. 2018, arXiv:1805.11604, section 3.1, Figure 4(a).
        Bjorck et al. 2018, arXiv:1806.02375, section 3.
    """
    objective, sizes = _prepared(model, loss, batch, step_sizes, training)
    gradients = objective.gradients(objective.weights)
    return LossAlongGradient(
        step_sizes=sizes,
        values=np.array(
            [
                objective.value(objective.moved(gradients, step_size))
                for step_size in sizes
            ]
        ),
        initial_loss=objective.value(objective.weights),
        gradient_norm=_norm(_vector(gradients)),
    )


def gradient_predictiveness(
    model: keras.Model,
    loss: Any,
    batch: Any,
    step_sizes: float | Sequence[float],
    *,
    training: bool = True,
) -> GradientPredictiveness:
    """How much the gradient changes along its own direction.

        values[k] = ||g(θ) − g(θ − step_sizes[k] g(θ))||₂

    over all trainable weights together: the smaller, the better a gradient
    tells those after it. The model is left as it was.

    Args:
        model: As of `loss_along_gradient`.
        loss: As of `loss_along_gradient`.
        batch: As of `loss_along_gradient`.
        step_sizes: As of `loss_along_gradient`.
        training: As of `loss_along_gradient`.

    Returns:
        A `GradientPredictiveness`: arrays `step_sizes` and `values`; the
        number `gradient_norm`; `plot(ax=None)`.

    Raises:
        TypeError, ValueError, RuntimeError: As `loss_along_gradient`.

    Example:

    The gradient of w² is 2 at w = 1, and 0 after a step of 0.5:

    >>> model = keras.Sequential([
    ...     keras.Input((1,)),
    ...     keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
    ... ])
    >>> batch = np.ones((1, 1)), np.zeros((1, 1))
    >>> line = gradient_predictiveness(model, "mse", batch, [0.25, 0.5])
    >>> line.values.tolist()
    [1.0, 2.0]

    References:
        Santurkar et al. 2018, arXiv:1805.11604, section 3.1, Figure 4(b).
    """
    objective, sizes = _prepared(model, loss, batch, step_sizes, training)
    norm, distances = _distances(objective, sizes)
    return GradientPredictiveness(sizes, distances, norm)


def effective_smoothness(
    model: keras.Model,
    loss: Any,
    batch: Any,
    step_sizes: float | Sequence[float],
    *,
    training: bool = True,
) -> EffectiveSmoothness:
    """The largest change of the gradient over the distance moved.

        values[k] = ||g(θ) − g(θ − step_sizes[k] g(θ))||₂
                    / ||step_sizes[k] g(θ)||₂

    and `maximum`, the largest of them: the "effective β-smoothness". It is
    the Lipschitz constant of the gradient as seen from θ, on this line only.
    For a quadratic loss with Hessian H all values are ||H g|| / ||g||, which
    is the largest eigenvalue where g is its eigenvector, and less elsewhere.

    Gradients are computed in the type of the weights: where a step changes
    them by no more than rounding does, so is the value. It is NaN where the
    gradient is zero. The model is left as it was.

    Args:
        model: As of `loss_along_gradient`.
        loss: As of `loss_along_gradient`.
        batch: As of `loss_along_gradient`.
        step_sizes: As of `loss_along_gradient`.
        training: As of `loss_along_gradient`.

    Returns:
        An `EffectiveSmoothness`: arrays `step_sizes` and `values`; the
        numbers `maximum` and `gradient_norm`; `plot(ax=None)`.

    Raises:
        TypeError, ValueError, RuntimeError: As `loss_along_gradient`.

    Example:

    The second derivative of w² is 2:

    >>> model = keras.Sequential([
    ...     keras.Input((1,)),
    ...     keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
    ... ])
    >>> batch = np.ones((1, 1)), np.zeros((1, 1))
    >>> effective_smoothness(model, "mse", batch, [0.25, 0.5]).maximum
    2.0

    References:
        Santurkar et al. 2018, arXiv:1805.11604, section 3.1, Figure 4(c).
    """
    objective, sizes = _prepared(model, loss, batch, step_sizes, training)
    norm, distances = _distances(objective, sizes)
    with np.errstate(all="ignore"):
        values = distances / (sizes * norm)
    return EffectiveSmoothness(sizes, values, norm)


def internal_covariate_shift(
    model: keras.Model,
    loss: Any,
    batch: Any,
    step_sizes: float | Sequence[float],
    *,
    training: bool = True,
) -> InternalCovariateShift:
    """How an update of the layers before it changes a layer's gradient.

        G_i  = ∇_{W_i} L(W_1, ..., W_k)
        G'_i = ∇_{W_i} L(W_1 − η g_1, ..., W_{i−1} − η g_{i−1}, W_i, ..., W_k)
        values[., i] = ||G_i − G'_i||₂

    and the cosine of the angle between the two: 0 and 1 where the layers
    before do not matter. A layer is an owner of trainable weights, at any
    depth, so that a normalization is a layer of its own. The layers are in the
    order of `model.trainable_variables`: the order of computation in sequential
    and functional models, that of their making in subclassed ones.

    This takes one gradient for each step size and layer but the first. The
    model is left as it was.

    Args:
        model: As of `loss_along_gradient`.
        loss: As of `loss_along_gradient`.
        batch: As of `loss_along_gradient`.
        step_sizes: As of `loss_along_gradient`; here the learning rate, as a
            rule one number.
        training: As of `loss_along_gradient`.

    Returns:
        An `InternalCovariateShift`: `layers`, the names; arrays `step_sizes`,
        `values` and `cosines`, the last two of shape `(steps, layers)`;
        `plot(ax=None)`.

    Raises:
        TypeError, ValueError, RuntimeError: As `loss_along_gradient`.

    Example:

    The loss (v w)² at w = v = 1: its gradient by v is 2 w² v, and w moves to
    0.5:

    >>> ones = dict(use_bias=False, kernel_initializer="ones")
    >>> model = keras.Sequential([
    ...     keras.Input((1,)),
    ...     keras.layers.Dense(1, name="w", **ones),
    ...     keras.layers.Dense(1, name="v", **ones),
    ... ])
    >>> batch = np.ones((1, 1)), np.zeros((1, 1))
    >>> shift = internal_covariate_shift(model, "mse", batch, 0.25)
    >>> dict(zip(shift.layers, shift.values[0].tolist()))
    {'w': 0.0, 'v': 1.5}

    References:
        Santurkar et al. 2018, arXiv:1805.11604, section 2.2, Definition 2.1.
    """
    objective, sizes = _prepared(model, loss, batch, step_sizes, training)
    layers = objective.layers()
    gradients = objective.gradients(objective.weights)
    values, cosines = np.empty((2, len(sizes), len(layers)))
    for row, step_size in enumerate(sizes):
        before: set[int] = set()
        for column, (_, places) in enumerate(layers):
            moved = gradients
            if before:
                weights = objective.moved(gradients, step_size, before)
                moved = objective.gradients(weights)
            old = _vector(gradients[at] for at in places)
            new = _vector(moved[at] for at in places)
            values[row, column] = _distance(old, new)
            cosines[row, column] = _cosine(old, new)
            before.update(places)
    return InternalCovariateShift(
        sizes, tuple(name for name, _ in layers), values, cosines
    )


def _prepared(
    model: Any, loss: Any, batch: Any, step_sizes: Any, training: Any
) -> tuple[Objective, np.ndarray]:
    sizes = checked_step_sizes(step_sizes)
    training = check_boolean("training", training)
    return Objective(model, loss, batch, training), sizes


def _distances(
    objective: Objective, sizes: np.ndarray
) -> tuple[float, np.ndarray]:
    """The norm of the gradient, and how far it moves with each step."""
    gradients = objective.gradients(objective.weights)
    here = _vector(gradients)
    distances = []
    for step_size in sizes:
        weights = objective.moved(gradients, step_size)
        there = _vector(objective.gradients(weights))
        distances.append(_distance(here, there))
    return _norm(here), np.array(distances)


def _vector(tensors: Iterable[Tensor]) -> np.ndarray:
    """In float64, in which differences of float32 lose nothing."""
    return np.concatenate(
        [np.asarray(to_numpy(tensor), "float64").ravel() for tensor in tensors]
    )


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    with np.errstate(all="ignore"):  # infinity less itself is NaN, as returned
        return _norm(first - second)


def _norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    lengths = _norm(first) * _norm(second)
    with np.errstate(all="ignore"):
        return float(first @ second) / lengths if lengths else math.nan
