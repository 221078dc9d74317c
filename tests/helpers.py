"""One way to call and differentiate layers on every backend."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm._backend.variables import to_numpy

# Keras's `fit` takes one step after the other on PyTorch.
SEVERAL_STEPS = (pytest.mark.tensorflow, pytest.mark.jax)
# `torch.compile` takes a minute, warns of its own code, and does not train
# renormalization as it is without (docs/backends.md).
COMPILED = (pytest.mark.tensorflow, pytest.mark.jax)


def raises(kind, message):
    """Expects an error with this message, the whole of it."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def inputs_of(rng, shape, axis=-1, dtype="float32"):
    """Inputs whose channels differ in mean and scale."""
    channels = shape[axis]
    around = [1] * len(shape)
    around[axis] = channels
    mean = np.linspace(-3.0, 7.0, channels).reshape(around)
    stddev = np.geomspace(0.3, 5.0, channels).reshape(around)
    return (mean + stddev * rng.normal(size=shape)).astype(dtype)


def randomize(layer, rng):
    """Gives a built layer's four weights values that all differ."""
    channels = layer.moving_mean.shape[0]
    for variable, low, high in (
        (layer.gamma, 0.5, 2.0),
        (layer.beta, -2.0, 2.0),
        (layer.moving_mean, -4.0, 8.0),
        (layer.moving_variance, 0.2, 9.0),
    ):
        if variable is not None:
            variable.assign(rng.uniform(low, high, channels))


def statistics(layer):
    return to_numpy(layer.moving_mean), to_numpy(layer.moving_variance)


def gradients(layer, inputs, upstream, mask=None, training=True):
    """Outputs, d inputs, and d of each trainable variable, of one call.

    The loss is `sum(outputs * upstream)`. The layer's state moves.
    """
    inputs = ops.convert_to_tensor(inputs)
    upstream = ops.convert_to_tensor(upstream)
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=training, mask=mask)
            loss = tf.reduce_sum(outputs * upstream)
        weights = [weight.value for weight in layer.trainable_variables]
        d_inputs, d_weights = tape.gradient(loss, (inputs, weights))
    elif keras.backend.backend() == "torch":
        import torch

        inputs = inputs.detach().requires_grad_()
        outputs = layer(inputs, training=training, mask=mask)
        weights = [weight.value for weight in layer.trainable_variables]
        d_inputs, *d_weights = torch.autograd.grad(
            (outputs * upstream).sum(), [inputs, *weights]
        )
    else:
        import jax

        state = [weight.value for weight in layer.non_trainable_variables]

        def loss_of(weights, inputs):
            outputs, new_state = layer.stateless_call(
                weights, state, inputs, training=training, mask=mask
            )
            return (outputs * upstream).sum(), (outputs, new_state)

        (d_weights, d_inputs), (outputs, new_state) = jax.grad(
            loss_of, argnums=(0, 1), has_aux=True
        )([weight.value for weight in layer.trainable_variables], inputs)
        for weight, value in zip(
            layer.non_trainable_variables, new_state, strict=True
        ):
            weight.assign(value)
    return (
        to_numpy(outputs),
        to_numpy(d_inputs),
        [to_numpy(value) for value in d_weights],
    )


def learned(variables):
    """Without those that on JAX hold what a layer remembers."""
    return [
        variable
        for variable in variables
        if not getattr(variable, "overwrite_with_gradient", False)
    ]


def assert_close(actual, expected, tolerance):
    """Largest difference relative to the largest expected value."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=0.0)
    difference = np.abs(actual - expected).max(initial=0.0)
    assert difference <= tolerance * max(scale, 1e-30), (
        f"differs by {difference / max(scale, 1e-30):.3g} of the largest "
        f"value, allowed {tolerance:g}"
    )
