"""`keras.remat` and `keras.RematScope`: a step is as it is without."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import BatchNormalization, BatchRenormalization
from tests import helpers

RENORM = {"momentum": 0.5, "r_max": 2.0, "d_max": 2.0}


def raises_within(message):
    """Expects the error of a layer, to which Keras adds where it arose."""
    return pytest.raises(NotImplementedError, match=re.escape(message))


@keras.saving.register_keras_serializable(package="tests.recomputation")
class Block(layers.Layer):
    """A dense layer and a normalization, maybe recomputed."""

    def __init__(self, norm, is_recomputed, wrap=lambda function: function):
        super().__init__()
        self.dense = layers.Dense(4)
        self.norm = norm
        self.is_recomputed = is_recomputed
        self.wrap = wrap

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((None, 4))

    def call(self, inputs, training=False):
        function = self.wrap(
            lambda x: self.norm(
                keras.ops.tanh(self.dense(x)), training=training
            )
        )
        if self.is_recomputed:
            function = keras.remat(function)
        return function(inputs)


class Around(layers.Layer):
    """A function of a block and of its normalization, maybe recomputed."""

    def __init__(self, block, function, is_recomputed):
        super().__init__()
        self.block = block
        self.function = function
        self.is_recomputed = is_recomputed

    def build(self, input_shape):
        self.block.build(input_shape)

    def call(self, inputs, training=False):
        def function(x):
            return self.function(self.block, x, training)

        if self.is_recomputed:
            function = keras.remat(function)
        return function(inputs)


def one_block(norm, is_recomputed):
    return keras.Sequential(
        [keras.Input((4,)), Block(norm, is_recomputed), layers.Dense(1)]
    )


def one_block_for_two_inputs(norm, is_recomputed):
    """The gradient gets to the one that was called first first."""
    block, dense = Block(norm, is_recomputed), layers.Dense(1)
    inputs = keras.Input((4,))
    other = layers.Rescaling(-2.0, 1.0)(inputs)
    first, second = block(inputs), block(other)
    outputs = dense(second) - dense(layers.Rescaling(0.1)(first))
    return keras.Model(inputs, outputs)


def a_layer_called_twice(norm, is_recomputed):
    def function(block, x, training):
        return block.norm(block(x, training=training) ** 2, training=training)

    block = Block(norm, False)
    return keras.Sequential(
        [
            keras.Input((4,)),
            Around(block, function, is_recomputed),
            layers.Dense(1),
        ]
    )


def one_in_another(norm, is_recomputed):
    def function(block, x, training):
        return block(2 * block(x, training=training), training=training)

    block = Block(norm, is_recomputed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            Around(block, function, is_recomputed),
            layers.Dense(1),
        ]
    )


def trained(network, norm, is_recomputed, rng, **compile_arguments):
    """The weights after four steps."""
    keras.utils.set_random_seed(0)
    model = network(norm, is_recomputed)
    model.compile(keras.optimizers.SGD(0.01), "mse", **compile_arguments)
    x = helpers.inputs_of(rng, (32, 4))
    model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
    return model.get_weights()


def compare(network, make, **compile_arguments):
    expected, actual = (
        trained(
            network,
            make(),
            is_recomputed,
            np.random.default_rng(0),
            **compile_arguments,
        )
        for is_recomputed in (False, True)
    )
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)


@pytest.mark.tensorflow
@pytest.mark.torch
@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize(
    "network",
    [one_block, one_in_another, a_layer_called_twice, one_block_for_two_inputs],
)
def test_a_recomputed_step_is_the_same(network, is_eager):
    compare(
        network, lambda: BatchRenormalization(**RENORM), run_eagerly=is_eager
    )


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: BatchNormalization(momentum=0.5), {}),
        (
            lambda: BatchRenormalization(**RENORM, gradient_momentum=0.9),
            {"run_eagerly": True},
        ),
        (lambda: BatchRenormalization(**RENORM), {"jit_compile": True}),
        (
            lambda: BatchRenormalization(**RENORM, gradient_momentum=0.9),
            {"jit_compile": False},
        ),
    ],
)
def test_a_recomputed_step_of_any_kind_is_the_same(make, arguments):
    compare(one_block, make, **arguments)


@pytest.mark.tensorflow
def test_a_second_gradient_of_a_recomputed_call_is_the_same(rng):
    import tensorflow as tf

    norm = BatchRenormalization(**RENORM)
    block = Block(norm, True)
    inputs = tf.constant(helpers.inputs_of(rng, (6, 4)))
    block.build(inputs.shape)
    with tf.GradientTape(persistent=True) as tape:
        first = tf.reduce_sum(block(inputs, training=True) ** 3)
        second = tf.reduce_sum(block(-inputs, training=True) ** 3)
    kernel = block.dense.kernel.value
    expected = tape.gradient(first, kernel)
    tape.gradient(second, kernel)
    helpers.assert_close(tape.gradient(first, kernel), expected, 1e-6)
    assert norm.current_step() == 2


@pytest.mark.parametrize("training", [True, False])
def test_a_scope_leaves_the_layer_as_it_is(training, rng):
    """It keeps no more than its inputs for the gradient."""
    inputs = helpers.inputs_of(rng, (6, 4))
    upstream = rng.normal(size=(6, 4)).astype("float32")
    results = []
    for mode in (None, "full"):
        with keras.RematScope(mode):
            layer = BatchRenormalization(**RENORM)
        layer.build((None, 4))
        results.append(
            helpers.gradients(layer, inputs, upstream, training=training)
        )
        results[-1] += tuple(layer.get_weights())
        assert layer.current_step() == training
    for one, other in zip(*map(keras.tree.flatten, results), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.tensorflow
@pytest.mark.torch
def test_a_model_in_a_scope_is_the_same(rng):
    """Keras wraps each layer of it, and the model. Eagerly: in a graph its
    own layers fail in a scope."""

    def network(norm, is_recomputed):
        with keras.RematScope("full" if is_recomputed else None):
            inputs = keras.Input((4,))
            outputs = layers.Dense(4)(inputs)
            outputs = type(norm).from_config(norm.get_config())(outputs)
            return keras.Model(inputs, layers.Dense(1)(outputs))

    compare(network, lambda: BatchRenormalization(**RENORM), run_eagerly=True)


@pytest.mark.jax
def test_jax_recomputes_no_step_that_moves_statistics(rng):
    with raises_within(
        "A layer that moves its statistics must not be called in "
        "`keras.remat` on Keras's JAX backend, where nothing but outputs can "
        "leave it. Call the layer between two such functions, make the state "
        "an output by `stateless_call`, or freeze its statistics.",
    ):
        trained(one_block, BatchNormalization(), True, rng)
    compare(one_block, lambda: BatchNormalization(frozen_statistics=True))


@pytest.mark.tensorflow
@pytest.mark.parametrize("is_eager", [False, True])
def test_a_graph_of_its_own_that_is_recomputed(is_eager, rng):
    import tensorflow as tf

    def network(norm, is_recomputed):
        block = Block(norm, is_recomputed, tf.function)
        return keras.Sequential([keras.Input((4,)), block, layers.Dense(1)])

    with raises_within(
        "A layer that moves its statistics must not be in a "
        "`tf.function` that `keras.remat` calls: both passes would move "
        "them. Make one of what is around `keras.remat`.",
    ):
        trained(network, BatchNormalization(), True, rng, run_eagerly=is_eager)


@pytest.mark.tensorflow
def test_the_scale_of_the_loss_is_not_seen_in_a_recomputed_call(rng):
    norm = BatchRenormalization(
        **RENORM, gradient_momentum=0.9, dtype="mixed_float16"
    )
    with raises_within(
        "`gradient_momentum` must be None in `keras.remat` under a "
        "float16 policy: the second pass does not see by what the loss is "
        "multiplied. Received: gradient_momentum=0.9.",
    ):
        trained(one_block, norm, True, rng)


@pytest.mark.tensorflow
def test_by_default_such_a_call_is_algorithm_1(rng):
    norm = BatchRenormalization(momentum=0.5, dtype="mixed_float16")
    trained(one_block, norm, True, rng)
    for value in (norm.gradient_mean, norm.last_mean, norm.gate):
        assert not np.any(helpers.to_numpy(value))
    assert norm.current_step() > 0


@pytest.mark.torch
def test_reentrant_recomputation(rng):
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = BatchNormalization()
    layer.build((6, 4))
    inputs = torch.tensor(helpers.inputs_of(rng, (6, 4)), requires_grad=True)
    with raises_within(
        "`use_reentrant` must be False where a layer moves its statistics: "
        "its second call would not be known. Received: use_reentrant=True."
    ):
        checkpoint(
            lambda x: layer(x, training=True), inputs, use_reentrant=True
        )


@pytest.mark.torch
def test_blocks_that_are_recomputed_one_after_the_other(rng):
    import torch
    from torch.utils.checkpoint import checkpoint_sequential

    found = []
    x = helpers.inputs_of(rng, (6, 4))
    for is_recomputed in (False, True):
        norms = [BatchRenormalization(momentum=0.5) for _ in range(2)]
        for norm in norms:
            norm.build((None, 4))
        blocks = [lambda x, norm=norm: norm(x, training=True) for norm in norms]
        outputs = torch.tensor(x, requires_grad=True)
        if is_recomputed:
            outputs = checkpoint_sequential(
                blocks, 2, outputs, use_reentrant=False
            )
        else:
            for block in blocks:
                outputs = block(outputs)
        (outputs**3).sum().backward()
        found.append([helpers.to_numpy(w) for n in norms for w in n.weights])
    for one, other in zip(*found, strict=True):
        helpers.assert_close(one, other, 1e-5)


@pytest.mark.jax
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_momentum": None}], ids=str
)
def test_jax_recomputes_what_hands_out_its_state(arguments, is_masked, rng):
    import jax

    layer = BatchRenormalization(momentum=0.5, **arguments)
    layer.build((None, 5, 4))
    layer.limit_values.assign([[2.0, 2.0], [1.0, 1.0]])
    mask = np.arange(5) < np.array([5, 3, 2, 5, 4, 1])[:, None]
    x = helpers.inputs_of(rng, (6, 5, 4))

    def called(trained, rest, x):
        return layer.stateless_call(
            trained, rest, x, training=True, mask=mask if is_masked else None
        )

    def found(function):
        def loss(trained, rest, x):
            outputs, state = function(trained, rest, x)
            return (outputs**3).mean(), state

        return jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))(
            [each.value for each in layer.trainable_variables],
            [each.value for each in layer.non_trainable_variables],
            x,
        )

    for one, other in zip(
        jax.tree.leaves(found(called)),
        jax.tree.leaves(found(jax.checkpoint(called))),
        strict=True,
    ):
        helpers.assert_close(one, other, 1e-5)
