"""Steps of the gated layer: `python -m tests.gated_steps FOLDER`.

Every scenario gives arrays, which are the same on all backends. Run as a
program it writes those of all; tests compare them with another backend's.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_X64", "1")

import keras
import numpy as np
from keras import layers, ops

from keras_renorm import BatchRenormalization
from tests import helpers

# Of ten steps, limits still open in the first two, and the gate takes over.
MOMENTUM = 0.5
BEGIN = 8
STEPS = 10
RATE = 0.01


def value_of(variable):
    return helpers.to_numpy(variable)


def made(shape, **arguments):
    """A built layer whose weights differ from channel to channel."""
    layer = BatchRenormalization(**{"momentum": MOMENTUM, **arguments})
    layer.build(shape)
    helpers.randomize(layer, np.random.default_rng(7))
    half_open(layer)
    return layer


def half_open(layer):
    """Lets a layer begin with a gate that is neither open nor shut."""
    layer.step.assign(BEGIN)
    if layer.gate is None:
        return
    channels = layer.moving_mean.shape[0]
    agreement = np.random.default_rng(8).uniform(0.2, 0.4, channels)
    layer.gradient_agreement.assign(agreement)
    layer.gate.assign([0.1, 0.25, 3.0, 0.2])


def stepper(layer, count, mask=None):
    """A function that trains a step: outputs, and d of inputs and weights.

    Its arguments are the inputs of `count` calls, as many upstream gradients,
    and what the loss is multiplied by. The loss is the sum of the products
    with the latter, and the layer's own losses. All state moves.
    """
    mask = None if mask is None else ops.array(mask)
    learned = [each for each in (layer.gamma, layer.beta) if each is not None]

    def called(calls):
        return [layer(each, training=True, mask=mask) for each in calls]

    def loss_of(outputs, upstreams, losses, factor):
        total = sum(
            ops.sum(ops.cast(each, upstream.dtype) * upstream)
            for each, upstream in zip(outputs, upstreams, strict=True)
        )
        return factor * sum((ops.cast(x, total.dtype) for x in losses), total)

    def by_tensorflow(calls, upstreams, factor):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(calls)
            outputs = called(calls)
            loss = loss_of(outputs, upstreams, layer.losses, factor)
        weights = [each.value for each in learned]
        return outputs, tape.gradient(loss, [*calls, *weights])

    def by_torch(calls, upstreams, factor):
        import torch

        calls = [each.detach().requires_grad_() for each in calls]
        outputs = called(calls)
        loss = loss_of(outputs, upstreams, layer.losses, factor)
        weights = [each.value for each in learned]
        return outputs, torch.autograd.grad(loss, [*calls, *weights])

    trained, rest = layer.trainable_variables, layer.non_trainable_variables

    def compute(calls, values, state, upstreams, factor):
        pairs = [*zip([*trained, *rest], [*values, *state], strict=True)]
        with keras.StatelessScope(pairs, collect_losses=True) as scope:
            outputs = called(calls)
            loss = loss_of(outputs, upstreams, scope.losses, factor)
        return loss, (outputs, [scope.get_current_value(each) for each in rest])

    if keras.backend.backend() == "jax":
        import jax

        compute = jax.jit(jax.grad(compute, argnums=(0, 1), has_aux=True))

    def by_jax(calls, upstreams, factor):
        (d_calls, changes), (outputs, state) = compute(
            calls, *_values(trained, rest), upstreams, factor
        )
        for variable, value in zip(rest, state, strict=True):
            variable.assign(value)
        d_weights = []
        for variable, change in zip(trained, changes, strict=True):
            if variable.overwrite_with_gradient:
                variable.assign(variable.value + change)
            else:
                d_weights.append(change)
        return outputs, [*d_calls, *d_weights]

    def step(calls, upstreams, factor=1.0):
        assert len(calls) == count
        calls, upstreams = (
            [ops.convert_to_tensor(each, dtype) for each in values]
            for values, dtype in (
                (calls, layer.compute_dtype),
                (upstreams, layer.moving_mean.dtype),
            )
        )
        by = {"tensorflow": by_tensorflow, "jax": by_jax, "torch": by_torch}
        outputs, found = by[keras.backend.backend()](calls, upstreams, factor)
        # NumPy's files have no bfloat16.
        return [
            helpers.to_numpy(ops.cast(each, layer.moving_mean.dtype))
            for each in (*outputs, *found)
        ]

    return step


def _values(*groups):
    return [[each.value for each in group] for group in groups]


def stepped(
    shape=(4, 3),
    axis=-1,
    mask=None,
    calls=1,
    change=None,
    loss_scale=None,
    **more,
):
    """What ten steps of a layer give, and its weights after them."""
    rng = np.random.default_rng(11)
    layer = made(shape, axis=axis, **more)
    step = stepper(layer, calls, mask)
    results = {}
    for index in range(STEPS):
        inputs, upstreams = (
            [make() for _ in range(calls)]
            for make in (
                lambda: helpers.inputs_of(rng, shape, axis, "float64"),
                lambda: rng.normal(size=shape) + 0.3,
            )
        )
        # To the last bit the same in 32 bits, and in 16.
        inputs = [each.astype("float16") for each in inputs]
        if change is not None:
            inputs, upstreams = change(index, inputs, upstreams)
        upstreams = [each.astype(layer.moving_mean.dtype) for each in upstreams]
        factor = 1.0 if loss_scale is None else loss_scale(index)
        found = step(inputs, upstreams, factor)
        for at, each in enumerate(found):
            if mask is not None and at < 2:  # unspecified elsewhere
                keep = np.broadcast_to(
                    mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)),
                    shape,
                )
                each = np.where(keep, each, 0)
            results[f"{index} {at}"] = each
    results |= {each.name: value_of(each) for each in layer.weights}
    return results


def drawn(shape):
    return helpers.inputs_of(np.random.default_rng(5), shape, dtype="float64")


def second_derivatives(shape=(4, 2, 3)):
    """Of inputs, upstream gradient and gamma; state is held."""
    layer = made(shape, dtype="float64")
    rng = np.random.default_rng(2)
    step = stepper(layer, 1)
    for _ in range(3):  # accumulators that hold something
        step([drawn(shape)], [rng.normal(size=shape)])
    x, upstream, along = (
        ops.convert_to_tensor(each)
        for each in (drawn(shape), *rng.normal(size=(2, *shape)))
    )
    gamma = layer.gamma.value
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as outer:
            outer.watch([x, upstream])
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = layer(x, training=True)
                loss = ops.sum(outputs**2 * upstream)
            total = ops.sum(tape.gradient(loss, x) * along)
        found = outer.gradient(total, [x, upstream, gamma])
    elif keras.backend.backend() == "torch":
        import torch

        x, upstream = x.requires_grad_(), upstream.requires_grad_()
        loss = ops.sum(layer(x, training=True) ** 2 * upstream)
        (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
        total = ops.sum(d_x * along)
        found = torch.autograd.grad(total, [x, upstream, gamma])
    else:
        import jax

        values, state = _values(
            layer.trainable_variables, layer.non_trainable_variables
        )

        def loss_of(x, upstream, gamma):
            outputs, _ = layer.stateless_call(
                [gamma, *values[1:]], state, x, training=True
            )
            return ops.sum(outputs**2 * upstream)

        def total_of(*arguments):
            return ops.sum(jax.grad(loss_of)(*arguments) * along)

        found = jax.grad(total_of, argnums=(0, 1, 2))(x, upstream, gamma)
    return {f"{at}": helpers.to_numpy(each) for at, each in enumerate(found)}


def bad(index, inputs, upstreams):
    """Something that is not finite now and then, in the second channel."""
    if index in (2, 5):
        inputs[0][1, 1] = np.inf if index == 2 else np.nan
    if index == 4:
        upstreams[0][2, 1] = np.nan
    return inputs, upstreams


def now_and_then_empty(index, inputs, upstreams):
    if index in (0, 3):
        return [each[:0] for each in inputs], [each[:0] for each in upstreams]
    return inputs, upstreams


def network(dtype=None, norm=BatchRenormalization, **arguments):
    arguments = {"momentum": MOMENTUM, "dtype": dtype, **arguments}
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(5, 3, use_bias=False, dtype=dtype, name="conv"),
            norm(name="first", **arguments),
            layers.ReLU(dtype=dtype),
            layers.Flatten(dtype=dtype),
            layers.Dense(7, dtype=dtype, name="dense"),
            norm(name="second", **arguments),
            layers.Dense(2, dtype=dtype, name="outputs"),
        ]
    )
    rng = np.random.default_rng(0)
    for name in ("conv", "dense", "outputs"):
        kernel = model.get_layer(name).kernel
        kernel.assign(0.2 * rng.normal(size=kernel.shape))
    for name in ("first", "second"):
        half_open(model.get_layer(name))
    return model


def data(steps=STEPS, batch=2):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(steps * batch, 6, 6, 3)) + 1).astype("float32")
    return x, rng.normal(size=(steps * batch, 2)).astype("float32")


def weights_of(model):
    return {
        f"{layer.name} {weight.name}": value_of(weight)
        for layer in model.layers
        for weight in layer.weights
    }


def fitted(optimizer=None, batch=2, dtype=None, arguments=None, **compiled):
    """A network after ten steps of `fit`."""
    model = network(dtype, **(arguments or {}))
    if optimizer is None:
        optimizer = keras.optimizers.SGD(RATE)
    model.compile(optimizer, "mse", **compiled)
    x, y = data(batch=batch)
    model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
    return model


def trained(*arguments, **named):
    return weights_of(fitted(*arguments, **named))


def decayed():
    optimizer = keras.optimizers.AdamW(
        3e-3, weight_decay=0.1, global_clipnorm=0.5, use_ema=True
    )
    return trained(optimizer)


def scaled_by_keras(scale=256):
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(RATE), initial_scale=scale, dynamic_growth_steps=3
    )
    return trained(optimizer, batch=8, dtype="mixed_float16")


ROW_MASK = np.array([True, False, True, True])
MASK = np.arange(12).reshape(4, 3) % 5 != 2
# With each, how far results may differ, of the largest value of an array.
SCENARIOS = {
    # A steep gate makes more of what rounding makes.
    "fit": (trained, 1e-4),
    "fit, 8 examples": (lambda: trained(batch=8), 1e-4),
    "fit, limits": (
        lambda: trained(
            batch=4,
            arguments={"r_max": 2.0, "d_max": 1.0, "gradient_momentum": 0.8},
        ),
        1e-5,
    ),
    "fit, decay and clipping and averages": (decayed, 1e-4),
    # Sums of 16 bits, which backends make each in its order.
    "fit, the loss scaled": (scaled_by_keras, 6e-2),
    "rank 2": (stepped, 1e-5),
    # What is left of a difference.
    "one example": (lambda: stepped((1, 3)), 4e-5),
    "rank 3": (lambda: stepped((4, 5, 3)), 1e-5),
    "rank 4, channels first": (lambda: stepped((2, 3, 4, 5), axis=1), 1e-5),
    "rank 5": (lambda: stepped((2, 2, 3, 2, 3)), 1e-5),
    "channels on the first axis": (lambda: stepped((3, 4, 2), axis=0), 1e-5),
    "without gamma": (lambda: stepped(scale=False), 1e-5),
    "without beta": (lambda: stepped(center=False), 1e-5),
    "mask of examples": (lambda: stepped((4, 3, 3), mask=ROW_MASK), 1e-5),
    "mask": (lambda: stepped((4, 3, 3), mask=MASK), 1e-5),
    "all masked": (lambda: stepped((4, 3), mask=np.zeros(4, "bool")), 1e-5),
    "float64": (lambda: stepped((4, 3, 3), dtype="float64"), 1e-11),
    "float64, mask": (
        lambda: stepped((4, 3, 3), mask=MASK, dtype="float64"),
        1e-11,
    ),
    "bfloat16": (lambda: stepped((4, 3), dtype="mixed_bfloat16"), 2e-2),
    "float16, the loss scaled": (
        lambda: stepped(
            dtype="mixed_float16", loss_scale=lambda at: 2.0 ** (at % 4)
        ),
        3e-3,
    ),
    "second derivatives": (second_derivatives, 1e-9),
    "two calls": (lambda: stepped(calls=2), 1e-5),
    "not finite": (lambda: stepped(change=bad), 1e-5),
    "now and then empty": (lambda: stepped(change=now_and_then_empty), 1e-5),
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fitted().save(folder / "model.keras")
    np.savez(
        folder / "results.npz",
        **{
            f"{name}: {key}": value
            for name, (function, _) in SCENARIOS.items()
            for key, value in function().items()
        },
    )
