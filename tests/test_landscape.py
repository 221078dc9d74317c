"""The loss along the gradient, in closed form; and nothing is touched."""

import gc
import re
import sys
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm._backend import tracing
from keras_renorm._landscape.objective import Objective
from keras_renorm.diagnostics import (
    discrepancy,
    effective_smoothness,
    gradient_predictiveness,
    internal_covariate_shift,
    loss_along_gradient,
)
from tests import helpers

FUNCTIONS = [
    loss_along_gradient,
    gradient_predictiveness,
    effective_smoothness,
    internal_covariate_shift,
]
STEP_SIZES = [0.003, 0.1, 0.4]
EIGENVALUES = np.array([0.5, 2.0, 7.0])


def linear_network(*widths, **arguments):
    """Matrices in a row, without biases."""
    return keras.Sequential(
        [
            # An input of float32, the default, would round what goes in.
            keras.Input((widths[0],), dtype="float64"),
            *(
                layers.Dense(width, use_bias=False, name=f"w{at}", **arguments)
                for at, width in enumerate(widths[1:])
            ),
        ]
    )


def quadratic(rng, distance):
    """A model, a batch, the Hessian of its loss and its gradient.

    The loss mean((x w - y)²) has Hessian 2 xᵀx / n; its eigenvalues are
    `EIGENVALUES`, its minimum is at the weights less `distance` along the
    eigenvectors.
    """
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    x = np.sqrt(3 / 2) * np.diag(np.sqrt(EIGENVALUES)) @ q.T
    hessian = q @ np.diag(EIGENVALUES) @ q.T
    model = linear_network(3, 1, dtype="float64")
    w = rng.normal(size=(3, 1))
    model.layers[0].kernel.assign(w)
    offset = q @ np.reshape(distance, (3, 1))
    return model, (x, x @ (w - offset)), hessian, hessian @ offset


def network(kind=BatchRenormalization, **arguments):
    """Everything that has a state of its own, and a penalty."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.05)),
            kind(momentum=0.5, **arguments),
            layers.ReLU(),
            layers.Dropout(0.5, seed=1),
            layers.ActivityRegularization(l2=0.01),
            layers.Dense(3),
        ]
    )


def batch_of(rng, examples=16):
    x = helpers.inputs_of(rng, (examples, 6))
    return x, rng.integers(0, 3, examples)


# Keras's `matmul` of float64 is one of float32 on PyTorch.
EXACT = 1e-4 if keras.backend.backend() == "torch" else 1e-11
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mean_square(y_true, y_pred):
    """In the type of its arguments; Keras's averages in float32 on JAX."""
    squares = ops.square(y_pred - y_true)
    return ops.sum(squares) / float(np.prod(squares.shape))


def values_of(variables):
    return [helpers.to_numpy(each) for each in variables]


def assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def state_of(model):
    """Every bit that a step of training can change."""
    found = values_of(model.variables)
    if model.optimizer is not None:
        found += values_of(model.optimizer.variables)
    return [value.tobytes() for value in found]


def trained(model, batch):
    """With an optimizer, and statistics, that have moved."""
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    model.train_on_batch(*batch)
    return model


def test_loss_of_a_quadratic(rng):
    model, batch, hessian, g = quadratic(rng, [1.0, -2.0, 0.5])
    line = loss_along_gradient(model, mean_square, batch, STEP_SIZES)
    slope, curvature = g.T @ g, g.T @ hessian @ g
    offset = np.linalg.solve(hessian, g)
    initial = (offset.T @ hessian @ offset).item() / 2
    expected = [
        (initial - eta * slope + eta**2 * curvature / 2).item()
        for eta in STEP_SIZES
    ]
    helpers.assert_close(line.values, expected, EXACT)
    np.testing.assert_allclose(line.initial_loss, initial, rtol=EXACT)
    np.testing.assert_allclose(
        line.gradient_norm, np.linalg.norm(g), rtol=EXACT
    )
    helpers.assert_close(
        line.relative_losses, np.array(expected) / initial, EXACT
    )
    assert line.step_sizes.tolist() == STEP_SIZES


def test_gradient_change_of_a_quadratic(rng):
    model, batch, hessian, g = quadratic(rng, [1.0, -2.0, 0.5])
    line = gradient_predictiveness(model, mean_square, batch, STEP_SIZES)
    expected = np.array(STEP_SIZES) * np.linalg.norm(hessian @ g)
    helpers.assert_close(line.values, expected, EXACT)
    np.testing.assert_allclose(
        line.gradient_norm, np.linalg.norm(g), rtol=EXACT
    )


@pytest.mark.parametrize("index", range(3))
def test_smoothness_along_an_eigenvector_is_its_eigenvalue(index, rng):
    model, batch, _, _ = quadratic(rng, np.eye(3)[index])
    line = effective_smoothness(model, mean_square, batch, STEP_SIZES)
    helpers.assert_close(line.values, [EIGENVALUES[index]] * 3, EXACT)
    assert line.maximum == line.values.max()


def test_smoothness_between_eigenvectors(rng):
    model, batch, hessian, g = quadratic(rng, [1.0, -2.0, 0.1])
    line = effective_smoothness(model, mean_square, batch, STEP_SIZES)
    expected = np.linalg.norm(hessian @ g) / np.linalg.norm(g)
    helpers.assert_close(line.values, [expected] * 3, EXACT)
    assert 2 < expected < 7


def test_smoothness_is_the_largest_on_the_line():
    """For the loss w⁴ at w = 1: g = 4 w³, here 4."""
    model = linear_network(1, 1, dtype="float64", kernel_initializer="ones")
    batch = np.ones((1, 1)), np.zeros((1, 1))
    sizes = [1.0, 0.1, 0.25]
    line = effective_smoothness(
        model, lambda y, p: ops.square(ops.square(p - y)), batch, sizes
    )
    expected = [4 * (1 - (1 - 4 * eta) ** 3) / (4 * eta) for eta in sizes]
    helpers.assert_close(line.values, expected, EXACT)
    np.testing.assert_allclose(line.maximum, expected[0], rtol=EXACT)
    np.testing.assert_allclose(line.gradient_norm, 4.0, rtol=EXACT)


def linear_gradients(weights, x, y):
    """Of mean((x w_0 w_1 ... - y)²) by each of the matrices."""
    before = [x]
    for weight in weights:
        before.append(before[-1] @ weight)
    upstream = 2 * (before[-1] - y) / y.size
    gradients = []
    for weight, inputs in zip(weights[::-1], before[-2::-1], strict=True):
        gradients.insert(0, inputs.T @ upstream)
        upstream = upstream @ weight.T
    return gradients


def test_covariate_shift_of_a_linear_network(rng):
    model = linear_network(4, 3, 5, 2, dtype="float64")
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    shift = internal_covariate_shift(model, mean_square, (x, y), STEP_SIZES)
    weights = values_of(model.trainable_variables)
    gradients = linear_gradients(weights, x, y)
    values, cosines = np.empty((2, 3, 3))
    for row, eta in enumerate(STEP_SIZES):
        for i, old in enumerate(gradients):
            moved = [
                weight - eta * gradient if j < i else weight
                for j, (weight, gradient) in enumerate(
                    zip(weights, gradients, strict=True)
                )
            ]
            new = linear_gradients(moved, x, y)[i]
            values[row, i] = np.linalg.norm(old - new)
            cosines[row, i] = np.sum(old * new) / (
                np.linalg.norm(old) * np.linalg.norm(new)
            )
    assert shift.layers == ("w0", "w1", "w2")
    helpers.assert_close(shift.values, values, EXACT)
    helpers.assert_close(shift.cosines, cosines, EXACT)
    assert np.all(shift.values[:, 0] == 0)
    assert np.all(values[:, 1:] > 1e-4)


def test_layers_are_the_owners_of_weights_in_their_order():
    inner = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.TimeDistributed(layers.Dense(3, name="dense"), name="td"),
            layers.BatchNormalization(name="bn"),
        ],
        name="inner",
    )
    model = keras.Sequential(
        [
            inner,
            layers.Dense(2, name="frozen", trainable=False),
            layers.GRU(2, name="gru"),
            layers.Dense(1, name="dense"),
        ]
    )
    model.build((None, 5, 4))
    found = Objective(model, "mse", (np.zeros((1, 5, 4)), np.zeros(1)), True)
    assert found.layers() == [
        ("inner/td/dense", [0, 1]),
        ("bn", [2, 3]),
        ("gru_cell", [4, 5, 6]),
        ("dense", [7, 8]),
    ]


def test_a_shared_layer_owns_its_weights():
    shared = layers.Dense(3, name="shared")
    inner = keras.Sequential(
        [keras.Input((3,)), shared, layers.Dense(3, name="other")], name="inner"
    )
    wrapped = layers.TimeDistributed(shared, name="wrapped")
    inputs = keras.Input((2, 3))
    hidden = wrapped(shared(inputs))
    model = keras.Model(inputs, inner(hidden[:, 0]))
    found = Objective(model, "mse", (np.zeros((1, 2, 3)), np.zeros(1)), True)
    assert found.layers() == [("shared", [0, 1]), ("other", [2, 3])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
def test_each_point_is_the_training_loss_from_the_same_state(kind, rng):
    batch = batch_of(rng)
    more = {} if kind is BatchNormalization else {"r_max": 3.0, "d_max": 5.0}
    model = trained(network(kind, **more), batch)
    line = loss_along_gradient(model, LOSS, batch, STEP_SIZES)

    start = values_of(model.variables)
    count = len(model.trainable_variables)
    assert [v.trainable for v in model.variables].count(True) == count

    def losses(rate):
        model.compile(keras.optimizers.SGD(rate), LOSS)
        return model.train_on_batch(*batch)

    old = values_of(model.trainable_variables)
    initial = losses(1.0)
    g = [
        before - after
        for before, after in zip(
            old, values_of(model.trainable_variables), strict=True
        )
    ]
    expected = []
    for eta in STEP_SIZES:
        assign(model.variables, start)
        assign(
            model.trainable_variables,
            [weight - eta * each for weight, each in zip(old, g, strict=True)],
        )
        expected.append(losses(0.0))
    helpers.assert_close(line.values, expected, 1e-5)
    np.testing.assert_allclose(line.initial_loss, initial, rtol=1e-5)
    assert np.ptp(expected) > 0.01


def test_inference_mode_uses_moving_statistics(rng):
    x, y = batch_of(rng)
    model = trained(network(), (x, y))
    line = loss_along_gradient(model, LOSS, (x, y), 1e-9, training=False)
    np.testing.assert_allclose(
        line.initial_loss, model.evaluate(x, y, verbose=0), rtol=1e-5
    )
    training = loss_along_gradient(model, LOSS, (x, y), 1e-9)
    assert abs(training.initial_loss - line.initial_loss) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_training_mode_is_the_default(function, rng):
    batch = batch_of(rng)
    model = trained(network(), batch)

    def values(**arguments):
        return function(model, LOSS, batch, 0.1, **arguments).values

    assert np.array_equal(values(), values(training=True))
    assert not np.allclose(values(), values(training=False), rtol=1e-3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dropout_is_the_same_at_every_point(function, rng):
    batch = batch_of(rng)
    values = function(network(), LOSS, batch, [0.1, 0.2, 0.1]).values
    np.testing.assert_array_equal(values[0], values[2])
    assert np.any(values[0] != values[1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_changes(function, rng):
    batch = batch_of(rng)
    model = trained(network(), batch)
    before = state_of(model)
    first = function(model, LOSS, batch, STEP_SIZES).values
    assert state_of(model) == before
    np.testing.assert_array_equal(
        first, function(model, LOSS, batch, STEP_SIZES).values
    )
    model.train_on_batch(*batch)
    assert state_of(model) != before


@pytest.mark.torch
def test_modules_of_torch_keep_their_statistics(rng):
    from torch import nn

    class Wrapped(layers.Layer):
        def __init__(self, module):
            super().__init__()
            self.wrapped = layers.TorchModuleWrapper(module)

        def call(self, inputs, training=None):
            return self.wrapped(inputs, training=training)

        def compute_output_spec(self, inputs, training=None):
            return keras.KerasTensor(inputs.shape)

    module = nn.BatchNorm1d(6)
    ours = [BatchNormalization(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), Wrapped(module), *ours])
    batch = batch_of(rng)
    before = {name: each.clone() for name, each in module.named_buffers()}
    discrepancy(model, batch, verbose=False)
    for function in FUNCTIONS:
        function(model, LOSS, batch, STEP_SIZES)
    for name, each in module.named_buffers():
        np.testing.assert_array_equal(each, before[name])
    model(batch[0], training=True)
    assert module.num_batches_tracked == before["num_batches_tracked"] + 1


@pytest.mark.torch
@pytest.mark.parametrize("function", FUNCTIONS)
def test_torch_may_be_in_inference_mode(function, rng):
    import torch

    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    batch = batch_of(rng)
    expected = function(model, LOSS, batch, STEP_SIZES).values
    with torch.inference_mode():
        found = function(model, LOSS, batch, STEP_SIZES).values
        made_there = [torch.tensor(part) for part in batch]
    np.testing.assert_array_equal(found, expected)
    found = function(model, LOSS, made_there, STEP_SIZES).values
    np.testing.assert_array_equal(found, expected)


class FailsAtCall(layers.Layer):
    def __init__(self, call, error):
        super().__init__()
        self.left, self.error = call, error

    def call(self, inputs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return inputs


@pytest.fixture
def eagerly():
    """Graphs run as Python, so that a layer can fail at any point."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)
    elif keras.backend.backend() == "torch":
        yield  # there are no others
    else:
        import jax

        with jax.disable_jit():
            yield


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_when_it_fails_halfway(error, rng):
    batch = batch_of(rng)
    model = network()
    failing = keras.Sequential([*model.layers, FailsAtCall(10**9, error)])
    failing.build((None, 6))
    model = trained(failing, batch)
    before = state_of(model)
    for function in FUNCTIONS:
        for call in (1, 2, 3):
            model.layers[-1].left = call
            with pytest.raises(error):
                function(model, LOSS, batch, STEP_SIZES)
            assert model.layers[-1].left == 0
            assert state_of(model) == before
    # And what Keras remembers of the call is gone too.
    x, _ = batch
    model.layers[-1].left = -1
    assert model(x, training=True).shape == (16, 3)
    assert state_of(model) != before


class Counted(keras.Model):
    """Two inputs, two outputs, a weight of its own, no `training`."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(3, name="first")
        self.second = layers.Dense(1, name="second")
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.calls = []  # a list, in which a change is not one of the model

    def call(self, inputs):
        self.calls.append(inputs)
        hidden = self.first(inputs["a"]) * self.scale
        return [hidden, self.second(ops.concatenate([hidden, inputs["b"]], 1))]


def counted(rng):
    x = {
        "a": rng.normal(size=(8, 4)).astype("float32"),
        "b": rng.normal(size=(8, 2)).astype("float32"),
    }
    y = [rng.normal(size=(8, 3)), rng.normal(size=(8, 1))]
    model = Counted()
    model(x)
    model.calls.clear()
    return model, x, y


@pytest.mark.tensorflow
@pytest.mark.jax
@pytest.mark.parametrize("function", FUNCTIONS)
def test_subclassed_models_are_traced_once_a_graph(function, rng):
    model, x, y = counted(rng)
    function(model, ["mse", "mae"], (x, y), np.geomspace(0.001, 1, 9))
    # One with the gradient, one without.
    traced = 1 + (function is loss_along_gradient)
    assert len(model.calls) == traced
    function(model, ["mse", "mae"], (x, y), 0.1)
    assert len(model.calls) == traced


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.jax
@pytest.mark.parametrize("function", FUNCTIONS)
def test_training_between_calls_traces_nothing_anew(function, rng):
    model, x, y = counted(rng)
    model.compile("sgd", ["mse", "mae"])

    def run():
        """What the function makes of the model, and no more than it."""
        model.calls.clear()
        function(model, ["mse", "mae"], (x, y), 0.1)
        return len(model.calls)

    assert run() > 0
    for _ in range(2):
        model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0)
        assert run() == 0
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        model.train_on_batch(x, y)
        assert run() == 0
    model.stop_training = True
    assert run() == 0


def change_rate(model):
    model.layers[3].rate = 0.1


def freeze_statistics(model):
    model.layers[1].frozen_statistics = True


def freeze_layer(model):
    model.layers[0].trainable = False


def freeze_other_weights(model):
    """As many as before, of the same shapes."""
    model.layers[1].gamma.trainable = not model.layers[1].gamma.trainable
    model.layers[1].beta.trainable = not model.layers[1].beta.trainable


def change_activation(model):
    model.layers[5].activation = keras.activations.tanh


@pytest.mark.parametrize(
    "change",
    [
        change_rate,
        freeze_statistics,
        freeze_layer,
        freeze_other_weights,
        change_activation,
    ],
)
def test_a_change_of_the_model_is_seen(change, rng):
    batch = batch_of(rng)
    model, other = network(), network()
    model.layers[1].gamma.trainable = other.layers[1].gamma.trainable = False
    for each in (model, other):
        assign(
            each.layers[1].weights[1:],
            [np.full(8, 0.5), *values_of(each.layers[1].weights[2:])],
        )
    model.set_weights([helpers.to_numpy(each) for each in other.weights])
    model(batch[0])  # the first call changes a layer, the later ones do not
    before = loss_along_gradient(model, LOSS, batch, STEP_SIZES).values
    change(model)
    change(other)
    after = loss_along_gradient(model, LOSS, batch, STEP_SIZES).values
    fresh = loss_along_gradient(other, LOSS, batch, STEP_SIZES).values
    np.testing.assert_array_equal(after, fresh)
    assert np.all(before != after)


def test_a_change_of_the_loss_is_seen(rng):
    model = linear_network(3, 1)
    batch = rng.normal(size=(4, 3)), np.ones((4, 1))
    factors = [
        loss_along_gradient(
            model, lambda y, p, c=c: c * mean_square(y, p), batch, 0.1
        ).initial_loss
        for c in (1.0, 2.0, 3.0)
    ]
    np.testing.assert_allclose(
        np.array(factors) / factors[0], [1, 2, 3], rtol=1e-6
    )
    loss = keras.losses.Huber(delta=0.1)
    first = loss_along_gradient(model, loss, batch, 0.1).initial_loss
    loss._fn_kwargs = {"delta": 0.2}
    assert loss_along_gradient(model, loss, batch, 0.1).initial_loss > first


def test_graphs_do_not_keep_a_model(rng):
    model = network()
    loss_along_gradient(model, LOSS, batch_of(rng), 0.1)
    held = weakref.ref(model)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert held() is None


@pytest.mark.tensorflow
def test_in_the_scope_of_a_strategy_is_an_error(rng):
    import tensorflow as tf

    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        model = network()
        for function in FUNCTIONS:
            with pytest.raises(RuntimeError, match=r"^Losses must be measured"):
                function(model, LOSS, batch_of(rng), 0.1)
    assert loss_along_gradient(model, LOSS, batch_of(rng), 0.1).initial_loss > 0


def test_a_loss_for_each_output_with_sample_weights(rng):
    model, x, y = counted(rng)
    weights = rng.uniform(0.1, 2.0, 8), rng.uniform(0.1, 2.0, 8)
    outputs = [helpers.to_numpy(each).astype("float64") for each in model(x)]
    squares = np.mean((outputs[0] - y[0]) ** 2, axis=1)
    distances = np.mean(np.abs(outputs[1] - y[1]), axis=1)

    def initial(sample_weight):
        return loss_along_gradient(
            model, ["mse", "mae"], (x, y, sample_weight), 0.1
        ).initial_loss

    for sample_weight, first, second in (
        (None, np.ones(8), np.ones(8)),
        (weights[0], weights[0], weights[0]),
        (list(weights), *weights),
    ):
        expected = np.mean(squares * first) + np.mean(distances * second)
        np.testing.assert_allclose(initial(sample_weight), expected, rtol=1e-6)

    def together(y_true, y_pred):
        return ops.mean(ops.square(y_true[0] - y_pred[0])) + ops.mean(
            ops.abs(y_true[1] - y_pred[1])
        )

    line = loss_along_gradient(model, together, (x, y), 0.1)
    np.testing.assert_allclose(line.initial_loss, initial(None), rtol=1e-6)
    shift = internal_covariate_shift(model, together, (x, y), 0.1)
    assert shift.layers == (model.name, "first", "second")


def test_a_loss_object_with_sample_weights(rng):
    model = linear_network(3, 1)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 1))
    weight = rng.uniform(0.1, 2.0, 5)
    line = loss_along_gradient(
        model, keras.losses.MeanSquaredError(), (x, y, weight), 0.1
    )
    outputs = x @ values_of(model.weights)[0]
    expected = np.mean(weight * (outputs - y)[:, 0] ** 2)
    np.testing.assert_allclose(line.initial_loss, expected, rtol=1e-6)


def test_dict_outputs(rng):
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, {"b": layers.Dense(1)(inputs), "a": layers.Dense(2)(inputs)}
    )
    x = rng.normal(size=(5, 3)).astype("float32")
    y = {"a": np.zeros((5, 2)), "b": np.zeros((5, 1))}
    outputs = {name: helpers.to_numpy(each) for name, each in model(x).items()}
    line = loss_along_gradient(model, {"a": "mse", "b": "mae"}, (x, y), 0.1)
    expected = np.mean(outputs["a"] ** 2) + np.mean(np.abs(outputs["b"]))
    np.testing.assert_allclose(line.initial_loss, expected, rtol=1e-6)


@pytest.mark.parametrize("form", [list, dict])
def test_one_loss_for_several_outputs_is_their_sum(form, rng):
    """As `compile` takes it."""
    inputs = keras.Input((3,))
    x = rng.normal(size=(5, 3)).astype("float32")
    outputs = [layers.Dense(1)(inputs), layers.Dense(1)(inputs)]
    y = [x[:, :1], 3 * x[:, 1:2]]
    weight = rng.uniform(0.5, 2.0, 5).astype("float32")
    if form is dict:
        outputs, y = ({"b": part[0], "a": part[1]} for part in (outputs, y))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    expected = model.evaluate(x, y, sample_weight=weight, verbose=0)
    for loss in ("mse", keras.losses.MeanSquaredError()):
        line = loss_along_gradient(model, loss, (x, y, weight), 0.1)
        np.testing.assert_allclose(line.initial_loss, expected[0], rtol=1e-5)


def test_one_output_and_a_list_of_one(rng):
    inputs = keras.Input((3,))
    output = layers.Dense(1)(inputs)
    x = rng.normal(size=(5, 3)).astype("float32")
    predicted = helpers.to_numpy(keras.Model(inputs, output)(x))
    expected = np.mean((x[:, :1] - predicted) ** 2)
    for outputs in (output, [output]):
        model = keras.Model(inputs, outputs)
        for y in (x[:, :1], [x[:, :1]]):
            line = loss_along_gradient(model, "mse", (x, y), 0.1)
            np.testing.assert_allclose(line.initial_loss, expected, rtol=1e-5)


def test_targets_without_an_axis_do_not_broadcast(rng):
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, activation="sigmoid")]
    )
    x = rng.normal(size=(6, 3)).astype("float32")
    y = rng.integers(0, 2, 6)
    for loss in (
        "binary_crossentropy",
        keras.losses.BinaryCrossentropy(),
        lambda y_true, y_pred: keras.losses.binary_crossentropy(y_true, y_pred),
    ):
        p = helpers.to_numpy(model(x))[:, 0].astype("float64")
        expected = -np.mean(np.log(np.where(y == 1, p, 1 - p)))
        line = loss_along_gradient(model, loss, (x, y), 0.1)
        np.testing.assert_allclose(line.initial_loss, expected, rtol=1e-5)


def test_targets_without_an_axis_have_a_weight_each(rng):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    x = rng.normal(size=(6, 3)).astype("float32")
    y, weight = rng.normal(size=6), np.arange(6.0)
    line = loss_along_gradient(
        model,
        lambda y_true, y_pred: ops.mean((y_true - y_pred) ** 2, axis=-1),
        (x, y, weight),
        0.1,
    )
    error = helpers.to_numpy(model(x))[:, 0].astype("float64") - y
    np.testing.assert_allclose(
        line.initial_loss, np.mean(weight * error**2), rtol=1e-5
    )


def test_lookups_and_masks(rng):
    """A table's gradient is sparse; padding is no part of the loss."""
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(9, 2, mask_zero=True),
            layers.Dense(1, use_bias=False),
        ]
    )
    table, kernel = values_of(model.trainable_variables)
    x = np.array([[3, 5, 0, 0], [5, 8, 1, 0]])
    line = gradient_predictiveness(model, "mse", (x, np.zeros((2, 4, 1))), 0.1)
    rows, w = table.astype("float64"), kernel.astype("float64")

    def gradients(rows, w):
        seen = x[x > 0]
        error = 2 * (rows[seen] @ w) / len(seen)
        d_rows = np.zeros_like(rows)
        np.add.at(d_rows, seen, error @ w.T)
        return d_rows, rows[seen].T @ error

    here = gradients(rows, w)
    there = gradients(rows - 0.1 * here[0], w - 0.1 * here[1])
    expected = np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(here, there, strict=True))
    )
    np.testing.assert_allclose(line.values, [expected], rtol=1e-4)


@pytest.mark.tensorflow
@pytest.mark.jax  # on PyTorch, Keras's `matmul` computes in float32
def test_float64_is_kept(rng):
    """A difference that float32 cannot tell."""
    model, batch, _, g = quadratic(rng, [1.0, -2.0, 0.5])
    line = loss_along_gradient(model, mean_square, batch, 1e-11)
    np.testing.assert_allclose(
        (line.initial_loss - line.values[0]) / 1e-11, np.sum(g**2), rtol=1e-3
    )


def test_what_is_not_finite_is_returned():
    model = linear_network(1, 1, dtype="float32", kernel_initializer="ones")
    batch = np.ones((1, 1)), np.zeros((1, 1))

    def loss(y_true, y_pred):
        return ops.exp(ops.square(y_pred))

    assert loss_along_gradient(model, loss, batch, [0.1, 9.0]).values[1] == (
        np.inf
    )
    assert not np.isfinite(
        gradient_predictiveness(model, loss, batch, [0.1, 9.0]).values[1]
    )
    for sizes in ([9.0, 0.1], [0.1, 9.0]):
        line = effective_smoothness(model, loss, batch, sizes)
        assert not np.isfinite(line.maximum)


def test_float16_overflows_to_values_that_are_not_finite():
    model = linear_network(
        2, 2, 1, dtype="mixed_float16", kernel_initializer="ones"
    )
    batch = np.full((4, 2), 100.0), np.full((4, 1), 1000.0)
    line = loss_along_gradient(
        model, lambda y, p: 1e6 * (y - p) ** 2, batch, 0.1
    )
    assert np.isfinite(line.initial_loss)
    assert not np.isfinite(line.gradient_norm)
    assert not np.isfinite(line.values[0])


def test_where_the_gradient_is_zero():
    model = linear_network(2, 2, 1, kernel_initializer="zeros")
    batch = np.ones((4, 2)), np.ones((4, 1))
    assert np.isnan(effective_smoothness(model, "mse", batch, 0.1).maximum)
    shift = internal_covariate_shift(model, "mse", batch, 0.1)
    assert shift.values.tolist() == [[0.0, 0.0]]
    assert np.all(np.isnan(shift.cosines))


def test_gradients_are_dense_and_zero_where_nothing_depends():
    def function(weights, rows):
        return ops.sum(ops.take(weights[0], rows, axis=0) * 2.0)

    weights = [ops.ones((3, 2)), ops.ones((2,))]
    _, graph = tracing.value_and_gradients(function)
    value, (table, unused) = graph(weights, ops.convert_to_tensor([2, 0, 2]))
    assert float(value) == 12.0
    assert not getattr(table, "is_sparse", hasattr(table, "indices"))
    assert helpers.to_numpy(table).tolist() == [[2, 2], [0, 0], [4, 4]]
    assert helpers.to_numpy(unused).tolist() == [0, 0]


def test_another_backend_is_an_error(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    message = (
        "The backend of Keras must be TensorFlow, JAX or PyTorch. "
        "Received: openvino."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        tracing.value_and_gradients(ops.sum)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_plots(function, rng):
    model = linear_network(3, 4, 1)
    batch = rng.normal(size=(4, 3)), np.ones((4, 1))
    result = function(model, "mse", batch, STEP_SIZES)
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert result.plot(ax) is ax.figure
    drawn = [line.get_ydata() for line in ax.lines]
    if function is internal_covariate_shift:
        assert [text.get_text() for text in ax.get_xticklabels()] == [
            "w0",
            "w1",
        ]
        np.testing.assert_array_equal(drawn, result.values)
    else:
        np.testing.assert_array_equal(drawn[0], result.values)
        np.testing.assert_array_equal(
            ax.lines[0].get_xdata(), result.step_sizes
        )
    assert result.plot() is not ax.figure
    pyplot.close("all")


def test_a_plot_without_matplotlib(monkeypatch, rng):
    model = linear_network(3, 1)
    batch = rng.normal(size=(4, 3)), np.ones((4, 1))
    line = loss_along_gradient(model, "mse", batch, 0.1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = "`plot` needs matplotlib: pip install matplotlib"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        line.plot()


def test_a_step_size_is_any_number():
    model = linear_network(3, 1)
    for size in (np.array(0.1), np.float32(0.1), 0.1):
        line = loss_along_gradient(model, "mse", BATCH, size)
        assert line.step_sizes == pytest.approx([0.1])


BATCH = np.ones((2, 3)), np.ones((2, 1))
RULE = "`step_sizes` must be positive and finite, and at least one. Received: "
KIND = "`step_sizes` must be a number or a sequence of numbers. Received: "
PARTS = "`batch` must be (x, y) or (x, y, sample_weight). Received: "


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_sizes": []}, ValueError, RULE + "step_sizes=[]."),
        ({"step_sizes": 0.0}, ValueError, RULE + "step_sizes=0.0."),
        ({"step_sizes": [1, -1]}, ValueError, RULE + "step_sizes=[1, -1]."),
        (
            {"step_sizes": [float("nan")]},
            ValueError,
            RULE + "step_sizes=[nan].",
        ),
        (
            {"step_sizes": [float("inf")]},
            ValueError,
            RULE + "step_sizes=[inf].",
        ),
        ({"step_sizes": "1"}, TypeError, KIND + "step_sizes='1'."),
        ({"step_sizes": None}, TypeError, KIND + "step_sizes=None."),
        ({"step_sizes": ["1"]}, TypeError, KIND + "step_sizes=['1']."),
        (
            {"training": 1},
            TypeError,
            "`training` must be True or False. Received: training=1.",
        ),
        ({"batch": BATCH[0]}, TypeError, PARTS + "batch=<ndarray>."),
        ({"batch": BATCH[:1]}, ValueError, PARTS + "1 parts."),
        (
            {"loss": None},
            TypeError,
            "`loss` must be a Keras loss, its name or a function, or a list "
            "or dict of them. Received: loss=None.",
        ),
        (
            {"loss": "msee"},
            ValueError,
            "`loss` must be the name of a Keras loss. Received: loss='msee'.",
        ),
        (
            {"loss": ["mse", "mse"]},
            ValueError,
            "`loss` must have one loss for each output of the model and each "
            "target. Received: losses [0, 1], targets ['one'], outputs "
            "['one'].",
        ),
        (
            {"loss": keras.losses.MeanSquaredError(reduction="none")},
            ValueError,
            "`loss` must give one number. Received: a loss of shape (2,).",
        ),
        (
            {"model": "m"},
            TypeError,
            "`model` must be a Keras model. Received: model='m'.",
        ),
        (
            {"model": keras.Sequential([layers.Dense(1)], name="m")},
            ValueError,
            "`model` must be built: call it on data, or give it an `Input`. "
            "Received: model=m.",
        ),
        (
            {
                "model": keras.Sequential(
                    [keras.Input((3,)), layers.ReLU()], name="m"
                )
            },
            ValueError,
            "`model` must have trainable weights. Received: model=m, which "
            "has none.",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {
        "model": linear_network(3, 1),
        "loss": "mse",
        "batch": BATCH,
        "step_sizes": 0.1,
        **arguments,
    }
    # JAX adds a line to what is raised while it traces.
    pattern = rf"^{re.escape(message)}(\n|$)"
    for function in FUNCTIONS:
        with pytest.raises(error, match=pattern):
            function(**given)


def test_dropout_without_a_seed_is_the_same_at_every_point(rng):
    x = helpers.inputs_of(rng, (32, 4))
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(16), layers.Dropout(0.5)]
    )
    line = loss_along_gradient(
        model, mean_square, (x, np.zeros((32, 16))), [1e-6] * 3
    )
    np.testing.assert_allclose(line.values, line.initial_loss, rtol=1e-4)


def test_weights_of_labels_are_the_same_at_every_point(rng):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(1)(x))
    batch = (
        rng.integers(0, 9, (20, 5)),
        rng.normal(size=(20, 5, 1)).astype("float32"),
        rng.uniform(0.5, 1.0, (20, 5)).astype("float32"),
    )
    line = loss_along_gradient(model, "mse", batch, [1e-6] * 3)
    np.testing.assert_allclose(line.values, line.initial_loss, rtol=1e-4)


@pytest.mark.tensorflow
def test_many_models_give_no_warning_of_traces(rng, caplog):
    import tensorflow as tf

    x = helpers.inputs_of(rng, (6, 3))
    tf.get_logger().addHandler(caplog.handler)
    try:
        for _ in range(6):
            model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
            loss_along_gradient(model, "mse", (x, x[:, :1]), 0.1)
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert "retracing" not in caplog.text
