"""The gated layer is the same on all backends."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_renorm import BatchRenormalization
from tests import gated_steps, helpers

HERE = keras.backend.backend()
OTHERS = ("jax", "torch") if HERE == "tensorflow" else ("tensorflow",)
ACCUMULATORS = (
    *("gradient_mean", "gradient_projection", "gradient_agreement"),
    *("last_mean", "last_gradient", "gate"),
)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What a backend gives, as a file, and a model that it trained."""
    found = {}

    def of(backend):
        if importlib.util.find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed")
        if backend not in found:
            folder = found[backend] = tmp_path_factory.mktemp(backend)
            done = subprocess.run(
                [sys.executable, "-m", "tests.gated_steps", str(folder)],
                env={**os.environ, "KERAS_BACKEND": backend},
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        return found[backend]

    return of


def results(folder):
    with np.load(folder / "results.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", gated_steps.SCENARIOS)
@pytest.mark.parametrize("backend", OTHERS)
def test_ten_steps_are_those_of_another_backend(backend, name, elsewhere):
    function, tolerance = gated_steps.SCENARIOS[name]
    expected = results(elsewhere(backend))
    for key, value in function().items():
        other = expected[f"{name}: {key}"]
        known = np.isfinite(other)
        assert np.array_equal(known, np.isfinite(value)), key
        try:
            helpers.assert_close(
                np.where(known, value, 0).astype("float64"),
                np.where(known, other, 0).astype("float64"),
                tolerance,
            )
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None


@pytest.mark.parametrize("backend", OTHERS)
def test_a_file_of_another_backend_loads(backend, elsewhere, tmp_path):
    expected = results(elsewhere(backend))
    model = keras.saving.load_model(elsewhere(backend) / "model.keras")
    names = []
    for key, value in gated_steps.weights_of(model).items():
        names.append(key)
        assert np.array_equal(value, expected[f"fit: {key}"]), key
    assert {f"second {name}" for name in ACCUMULATORS} <= set(names)
    # And what is saved here is what was loaded.
    model.save_weights(tmp_path / "own.weights.h5")
    again = gated_steps.network()
    again.load_weights(tmp_path / "own.weights.h5")
    assert [weight.name for weight in again.get_layer("first").weights] == [
        *("gamma", "beta", "moving_mean", "moving_variance"),
        *("step", "limit_values", "limit_steps", *ACCUMULATORS, "gated"),
    ]
    for one, other in zip(again.weights, model.weights, strict=True):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    # It goes on as what was trained here.
    x, y = gated_steps.data()
    weights = []
    for start in (model, gated_steps.fitted()):
        start.compile(keras.optimizers.SGD(gated_steps.RATE), "mse")
        start.fit(x, y, batch_size=2, shuffle=False, verbose=0)
        weights.append(start.get_weights())
    for one, other in zip(*weights, strict=True):
        helpers.assert_close(one, other, 1e-4)


def test_the_gate_is_neither_open_nor_shut():
    """So that the scenarios above are about it."""
    layer = gated_steps.made((4, 3))
    layer.step.assign(100.0)
    assert 0.1 < layer.current_correction() < 0.9


def state_of(layer):
    return [helpers.to_numpy(getattr(layer, name)) for name in ACCUMULATORS]


def two_heads():
    """A network whose second head the loss may leave out."""
    inputs = keras.Input((4,))
    heads = [
        layers.Dense(1, name=name)(
            BatchRenormalization(momentum=0.5, name=f"norm_{name}")(inputs)
        )
        for name in ("one", "other")
    ]
    return keras.Model(inputs, dict(zip(("one", "other"), heads, strict=True)))


# PyTorch has no gradients there, and Keras says so.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_what_the_loss_does_not_use_stays(rng):
    model = two_heads()
    norm = {name: model.get_layer(f"norm_{name}") for name in ("one", "other")}
    for losses in ({"one": "mse", "other": "mse"}, {"one": "mse"}):
        x = helpers.inputs_of(rng, (8, 4))
        before = {name: state_of(layer) for name, layer in norm.items()}
        model.compile(keras.optimizers.Adam(0.01), losses)
        model.fit(x, dict.fromkeys(losses, x[:, :1]), verbose=0)
        for name, layer in norm.items():
            for old, new in zip(before[name], state_of(layer), strict=True):
                assert np.array_equal(old, new) == (name not in losses)


@pytest.mark.parametrize(
    "freeze",
    [
        lambda layer: setattr(layer, "frozen_statistics", True),
        lambda layer: setattr(layer, "trainable", False),
        lambda layer: layer.hold_statistics(True),
    ],
)
def test_a_frozen_layer_keeps_its_state(freeze):
    model = gated_steps.fitted()
    freeze(model.get_layer("first"))
    model.compile(keras.optimizers.SGD(gated_steps.RATE), "mse")
    before = [state_of(model.get_layer(name)) for name in ("first", "second")]
    x, y = gated_steps.data()
    model.fit(x, y, batch_size=2, verbose=0)
    model.evaluate(x, y, verbose=0)
    model(x, training=False)
    for old, new in zip(
        before[0], state_of(model.get_layer("first")), strict=True
    ):
        assert np.array_equal(old, new)
    for old, new in zip(
        before[1], state_of(model.get_layer("second")), strict=True
    ):
        assert not np.array_equal(old, new)


def test_what_is_called_without_a_state_keeps_it(rng):
    layer = gated_steps.made((4, 3))
    before = state_of(layer)
    x = ops.convert_to_tensor(helpers.inputs_of(rng, (4, 3)))
    values = [
        [ops.copy(each.value) for each in group]
        for group in (layer.trainable_variables, layer.non_trainable_variables)
    ]

    def total(x):
        outputs, _ = layer.stateless_call(*values, x, training=True)
        return ops.sum(outputs**2)

    if HERE == "jax":
        import jax

        assert np.any(jax.grad(total)(x))
    elif HERE == "torch":
        x = x.requires_grad_()
        total(x).backward()
        assert np.any(helpers.to_numpy(x.grad))
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = total(x)
        assert np.any(tape.gradient(loss, x))
    for old, new in zip(before, state_of(layer), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.tensorflow
@pytest.mark.jax
def test_several_steps_an_execution_are_the_same():
    expected = gated_steps.trained()
    actual = gated_steps.trained(steps_per_execution=5)
    for key, value in expected.items():
        # Two graphs, in which TensorFlow rounds in another order.
        helpers.assert_close(actual[key], value, 5e-5)


def test_the_scale_of_the_loss_is_not_in_the_state():
    expected = gated_steps.scaled_by_keras(2.0**4)
    actual = gated_steps.scaled_by_keras(2.0**10)
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, 2e-2)


@pytest.mark.torch
@pytest.mark.parametrize("order", [1, 2])
def test_weights_assigned_before_the_gradient_change_none_of_it(order, rng):
    """On PyTorch an assignment writes over the values."""
    import torch

    results = []
    for is_assigned in (False, True):
        layer = gated_steps.made((4, 3), dtype="float64")
        x = torch.tensor(gated_steps.drawn((4, 3)), requires_grad=True)
        outputs = layer(x, training=True)
        if is_assigned:
            for weight in layer.non_trainable_weights:
                weight.assign(-1 - weight)
        (found,) = torch.autograd.grad(
            (outputs**3).sum(), x, create_graph=order == 2
        )
        if order == 2:
            (found,) = torch.autograd.grad((found**2).sum(), x)
        results.append(found.numpy())
    assert np.array_equal(*results)


@pytest.mark.jax
@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps",
            2,
        ),
        (
            {"use_ema": True, "ema_overwrite_frequency": 3},
            "ema_overwrite_frequency",
            3,
        ),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_optimizer_that_would_lose_the_state_is_an_error(
    arguments, name, value, is_wrapped
):
    optimizer = keras.optimizers.SGD(gated_steps.RATE, **arguments)
    if is_wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    message = (
        f"`{name}` must be None on Keras's JAX backend where a layer has a "
        "`gradient_momentum`: the optimizer would lose what the layer "
        "remembers. Make the layers with gradient_momentum=None. Received: "
        f"{name}={value}."
    )
    # Keras adds lines around it.
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        gated_steps.trained(optimizer)
    gated_steps.trained(
        keras.optimizers.SGD(
            gated_steps.RATE, **{"gradient_accumulation_steps": 2}
        ),
        arguments={"gradient_momentum": None},
    )


def by_hand(is_keras):
    """A network trained by a loop of one's own, on JAX."""
    import jax

    model = gated_steps.network()
    optimizer = keras.optimizers.SGD(gated_steps.RATE)
    optimizer.build(model.trainable_variables)

    def loss_of(trained, rest, x, y):
        outputs, rest = model.stateless_call(trained, rest, x, training=True)
        return ops.mean((outputs - y) ** 2), rest

    @jax.jit
    def step(trained, rest, state, x, y):
        gradients, rest = jax.grad(loss_of, has_aux=True)(trained, rest, x, y)
        if is_keras:
            trained, state = optimizer.stateless_apply(
                state, gradients, trained
            )
        else:
            trained = [
                value + gradient
                if variable.overwrite_with_gradient
                else value - gated_steps.RATE * gradient
                for variable, value, gradient in zip(
                    model.trainable_variables, trained, gradients, strict=True
                )
            ]
        return trained, rest, state

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    values = [[each.value for each in group] for group in groups]
    x, y = gated_steps.data()
    for begin in range(0, len(x), 2):
        part = slice(begin, begin + 2)
        values = step(*values, x[part], y[part])
    for variables, final in zip(groups, values, strict=True):
        for variable, value in zip(variables, final, strict=True):
            variable.assign(value)
    return gated_steps.weights_of(model)


@pytest.mark.jax
@pytest.mark.parametrize("is_keras", [False, True])
def test_a_loop_of_ones_own_on_jax(is_keras):
    expected, actual = gated_steps.trained(), by_hand(is_keras)
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, 1e-5)


@pytest.mark.jax
def test_jax_maps_over_a_step(rng):
    import jax

    layer = gated_steps.made((4, 3), dtype="float64")
    values, state = (
        [each.value for each in group]
        for group in (layer.trainable_variables, layer.non_trainable_variables)
    )
    batches = rng.normal(size=(5, 4, 3))

    def changes(x):
        def total(values):
            outputs, _ = layer.stateless_call(values, state, x, training=True)
            return ops.sum(outputs**3)

        return jax.grad(total)(values)

    mapped = jax.vmap(changes)(batches)
    for index, x in enumerate(batches):
        for one, other in zip(mapped, changes(x), strict=True):
            helpers.assert_close(one[index], other, 1e-9)


@pytest.mark.jax
def test_two_devices_of_jax_are_one():
    expected = gated_steps.trained(batch=8)
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(
            devices=keras.distribution.list_devices()[:2]
        )
    )
    try:
        actual = gated_steps.trained(batch=8)
    finally:
        keras.distribution.set_distribution(None)
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, 1e-5)


@pytest.mark.jax
def test_jax_counts_what_is_added_to_among_what_trains():
    """As docs/backends.md says."""
    layer = gated_steps.made((4, 3))
    names = [each.name for each in layer.trainable_weights]
    assert names == ["gamma", "beta", *ACCUMULATORS]
    assert all(
        each.overwrite_with_gradient == (each.name in ACCUMULATORS)
        for each in layer.trainable_weights
    )


class Cell(layers.Layer):
    """A recurrent cell with a normalization."""

    state_size = output_size = 3

    def __init__(self, norm):
        super().__init__()
        self.dense, self.norm = layers.Dense(3), norm

    def build(self, shape):
        self.dense.build((None, shape[-1] + 3))
        self.norm.build((None, 3))

    def call(self, inputs, states, training=False):
        outputs = self.dense(ops.concatenate([inputs, *states], axis=-1))
        outputs = self.norm(outputs, training=training)
        return outputs, [outputs]


@pytest.mark.parametrize("kind", ["recurrent", "distributed"])
def test_called_step_by_step_it_is_algorithm_1(kind, rng):
    """Of forty calls in a step, all corrected, the memory would explode."""
    if kind == "recurrent" and HERE == "jax":
        pytest.skip("no layer moves statistics in a loop of JAX")
    x = helpers.inputs_of(rng, (16, 40, 2))
    trained = []
    for arguments in ({}, {"gradient_momentum": None}):
        keras.utils.set_random_seed(2)
        norm = BatchRenormalization(momentum=0.5, **arguments)
        steps = (
            layers.RNN(Cell(norm))
            if kind == "recurrent"
            else layers.TimeDistributed(norm)
        )
        model = keras.Sequential(
            [keras.Input((40, 2)), steps, layers.Flatten(), layers.Dense(1)]
        )
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(x, x[:, 0, :1], epochs=3, verbose=0, shuffle=False)
        trained.append(norm)
    norm, plain = trained
    assert norm.is_gated
    assert not plain.is_gated
    for name in ("gamma", "beta", "moving_mean", "moving_variance", "step"):
        helpers.assert_close(getattr(norm, name), getattr(plain, name), 1e-6)
    for value in (norm.gradient_mean, norm.last_mean, norm.gate):
        assert not np.any(helpers.to_numpy(value))


@pytest.mark.parametrize("join", ["Concatenate", "Add", "Subtract"])
def test_of_calls_side_by_side_the_first_counts(join, rng):
    """Whichever gradient a backend computes last."""
    layer = BatchRenormalization(momentum=0.5)
    inputs = [keras.Input((3,)), keras.Input((3,))]
    joined = getattr(keras.layers, join)()([layer(each) for each in inputs])
    model = keras.Model(inputs, keras.layers.Dense(2)(joined))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = helpers.inputs_of(rng, (8, 3))
    model.train_on_batch([x, x + 10.0], np.ones((8, 2), "float32"))
    helpers.assert_close(layer.last_mean, x.mean(0), 1e-5)


def test_the_scale_of_the_loss_is_seen_by_a_layer_in_float32(rng):
    """In a network that computes in float16."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        found = []
        x = helpers.inputs_of(rng, (64, 4))
        for steps in (1_000, 4):  # until the scale grows
            keras.utils.set_random_seed(0)
            layer = BatchRenormalization(momentum=0.5, dtype="float32")
            model = keras.Sequential(
                [keras.Input((4,)), keras.layers.Dense(3), layer]
            )
            optimizer = keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.01),
                initial_scale=64.0,
                dynamic_growth_steps=steps,
            )
            model.compile(optimizer, "mse")
            model.fit(x, x[:, :3], batch_size=4, shuffle=False, verbose=0)
            found.append(helpers.to_numpy(layer.gradient_mean))
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.abs(found[0]).max() > 0
    helpers.assert_close(found[1], found[0], 1e-3)


@pytest.mark.parametrize("gate", [[1.0, 0, 16.0, 0], [0.01, 1.0, 16.0, 0]])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)]
)
@pytest.mark.parametrize("shape", [(16, 9, 8, 3), (16, 3)])
def test_in_16_bits_a_gradient_is_rounded_once(
    shape, dtype, rounding, gate, rng
):
    # What is common to all examples is subtracted.
    values = rng.normal(size=shape), 30 + rng.normal(size=shape)
    values = [ops.cast(ops.cast(each, dtype), "float64") for each in values]
    found = []
    for policy in (f"mixed_{dtype}", "float64"):
        layer = gated_steps.made(shape, dtype=policy)
        layer.step.assign(100)
        layer.gate.assign(gate)
        layer.gradient_mean.assign(np.full(3, 300.0))
        layer.gradient_agreement.assign(np.full(3, 1 / 16))
        assert layer.current_correction() == pytest.approx(float(gate[0] == 1))
        step = gated_steps.stepper(layer, 1)
        found.append(step(*([each] for each in values))[:2])
    for mine, exact in zip(*found, strict=True):
        assert np.all(abs(mine - exact) <= 1.01 * rounding * abs(exact) + 1e-3)


def test_averages_of_weights_that_swap(rng):
    """An optimizer averages what it trains; on JAX the memory is among it."""
    x = helpers.inputs_of(rng, (16, 4))
    layer = BatchRenormalization(momentum=0.5)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), layer])
    model.compile(keras.optimizers.Adam(use_ema=True), "mse")
    kept = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if keras.backend.backend() != "jax":  # whose steps hold weights
                kept.append(helpers.to_numpy(layer.last_mean))

    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=False)
    y = x[:, :3]
    model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[swap, Keep()])
    last = helpers.to_numpy(layer.last_mean)
    assert np.any(last)
    if kept:
        np.testing.assert_array_equal(last, kept[-1])


@pytest.mark.jax
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("way", ["plain", "jit", "checkpoint", "scan", "sum"])
def test_of_calls_that_are_traced_apart_the_first_counts(way, calls, rng):
    import jax

    layer = BatchRenormalization(momentum=0.5)
    layer.build((None, 3))
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(layer.trainable_variables)

    def call(trained, rest, x):
        return layer.stateless_call(trained, rest, x, training=True)

    wrapped = {"jit": jax.jit, "checkpoint": jax.checkpoint}
    call = wrapped.get(way, lambda function: function)(call)

    def loss(trained, rest, parts):
        if way == "scan":

            def body(rest, x):
                outputs, rest = call(trained, rest, x)
                return rest, (outputs**3).sum()

            rest, values = jax.lax.scan(body, rest, parts)
            return values.sum(), rest
        total = 0.0
        for x in parts:
            outputs, rest = call(trained, rest, x)
            total = total + (outputs**3).sum()
        return total, rest

    def gradients(trained, rest, parts):
        found = jax.grad(loss, has_aux=True)
        if way != "sum":
            return found(trained, rest, parts)
        sums = None
        for x in parts:
            each, rest = found(trained, rest, x[None])
            sums = each if sums is None else jax.tree.map(np.add, sums, each)
        return sums, rest

    trained = [each.value for each in layer.trainable_variables]
    rest = [each.value for each in layer.non_trainable_variables]
    slots = [each.value for each in optimizer.variables]
    names = [each.name for each in layer.trainable_variables]
    for _ in range(8):
        parts = rng.normal(2.0, 3.0, (calls, 16, 3)).astype("float32")
        changes, rest = gradients(trained, rest, parts)
        trained, slots = optimizer.stateless_apply(slots, changes, trained)
        helpers.assert_close(
            trained[names.index("last_mean")], parts[0].mean(0), 1e-5
        )


@pytest.mark.torch
def test_the_scale_of_the_loss_is_seen_under_autocast(rng):
    """In a loop of one's own that adds `model.losses`."""
    import torch

    x = torch.tensor(helpers.inputs_of(rng, (40, 4, 6), dtype="float32"))
    found = []
    for scales in ([1.0] * 40, [64.0] * 20 + [32.0] * 20):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(5),
                BatchRenormalization(momentum=0.5),
            ]
        )
        for batch, scale in zip(x, scales, strict=True):
            for variable in model.trainable_variables:
                variable.value.grad = None
            with torch.autocast("cpu", torch.float16):
                outputs = model(batch, training=True)
                loss = (outputs**2 * outputs).mean() + sum(model.losses)
            (loss * scale).backward()
        found.append(model.layers[0].kernel.value.grad / scales[-1])
    assert found[0].abs().max() > 0
    helpers.assert_close(found[1], helpers.to_numpy(found[0]), 1e-2)


@pytest.mark.jax
@pytest.mark.parametrize("is_apart", [True, False])
def test_a_call_without_a_gradient_hides_no_other(is_apart, rng):
    """Of a target network, or of a generator while a discriminator trains."""
    import jax

    layer = BatchRenormalization(momentum=0.5)
    layer.build((None, 3))
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(layer.trainable_variables)

    def loss(trained, rest, x, target):
        if not is_apart:
            unused, rest = layer.stateless_call(
                trained, rest, target, training=True
            )
            jax.lax.stop_gradient(unused)
        outputs, rest = layer.stateless_call(trained, rest, x, training=True)
        return (outputs**3).sum(), rest

    trained = [each.value for each in layer.trainable_variables]
    rest = [each.value for each in layer.non_trainable_variables]
    slots = [each.value for each in optimizer.variables]
    names = [each.name for each in layer.trainable_variables]
    for step in range(5):
        x, target = rng.normal(2.0, 3.0, (2, 16, 3)).astype("float32")
        if is_apart:
            _, rest = layer.stateless_call(trained, rest, target, training=True)
        changes, rest = jax.grad(loss, has_aux=True)(trained, rest, x, target)
        trained, slots = optimizer.stateless_apply(slots, changes, trained)
        if step:
            last = trained[names.index("last_mean")]
            helpers.assert_close(last, x.mean(0), 1e-5)


@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_of_calls_with_a_dead_channel_the_first_counts(momentum, rng):
    layer = BatchRenormalization(momentum=momentum)
    inputs = [keras.Input((3,)), keras.Input((3,))]
    joined = keras.layers.Concatenate()([layer(each) for each in inputs])
    model = keras.Model(inputs, keras.layers.Dense(2)(joined))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    layer.moving_variance.assign([0.0, 1.0, 1.0])
    for _ in range(3):
        x = helpers.inputs_of(rng, (8, 3)) * [0.0, 1.0, 1.0]
        other = x + np.array([0.0, 9.0, 9.0])
        model.train_on_batch([x, other], np.ones((8, 2)))
        helpers.assert_close(layer.last_mean, x.mean(0), 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_the_scale_of_the_loss_is_seen_where_the_optimizer_scales(policy, rng):
    """Whatever the policy of the layer, and the one that is set, are."""
    found = []
    x = helpers.inputs_of(rng, (32, 4))
    for scale in (1.0, 1024.0):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        layer = BatchRenormalization(momentum=0.5, dtype="float32")
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3), layer]
        )
        keras.config.set_dtype_policy("float32")
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=scale
        )
        model.compile(optimizer, "mse")
        model.fit(x, x[:, :3], batch_size=8, shuffle=False, verbose=0)
        found.append(helpers.to_numpy(layer.gradient_mean))
    assert np.abs(found[0]).max() > 0
    helpers.assert_close(found[1], found[0], 1e-2)
