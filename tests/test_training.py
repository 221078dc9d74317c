"""The layers in the ways that people train."""

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization, convert
from keras_renorm.schedules import LinearRamp
from tests import helpers

RAMPS = {
    "r_max": LinearRamp(1.0, 2.0, 2, 6),
    "d_max": LinearRamp(0.0, 1.0, 2, 6),
}


def data(rng, examples=32):
    x = helpers.inputs_of(rng, (examples, 4))
    return x, (x[:, :1] * 0.3).astype("float32")


def network(seed=5):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            BatchRenormalization(momentum=0.8, **RAMPS),
            keras.layers.Dense(6, activation="tanh"),
            BatchRenormalization(momentum=0.8, **RAMPS),
            keras.layers.Dense(1),
        ]
    )


def state_of(model):
    return [helpers.to_numpy(weight) for weight in model.weights]


def assert_same(first, second, tolerance=1e-5):
    for mine, other in zip(first, second, strict=True):
        np.testing.assert_allclose(mine, other, tolerance, tolerance)


@pytest.fixture
def expected(rng):
    """Weights after eight steps of a plain `fit`."""
    model = network()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x, y = data(np.random.default_rng(1))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert model.layers[0].current_limits() == (2.0, 1.0)
    return state_of(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=helpers.COMPILED),
        pytest.param({"steps_per_execution": 4}, marks=helpers.SEVERAL_STEPS),
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_mode_of_fit_trains_the_same(options, expected):
    model = network()
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    x, y = data(np.random.default_rng(1))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert_same(state_of(model), expected)


@pytest.mark.tensorflow
@pytest.mark.parametrize("is_graph", [False, True])
def test_a_gradient_tape_loop_trains_the_same(is_graph, expected):
    import tensorflow as tf

    model = network()
    optimizer = keras.optimizers.SGD(0.05)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )

    if is_graph:
        step = tf.function(step)
    x, y = data(np.random.default_rng(1))
    for begin in range(0, 32, 4):
        step(x[begin : begin + 4], y[begin : begin + 4])
    assert_same(state_of(model), expected)


@pytest.mark.torch
def test_a_loop_of_torch_trains_the_same(expected):
    import torch

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, y = data(np.random.default_rng(1))
    for begin in range(0, 32, 4):
        optimizer.zero_grad()
        outputs = model(x[begin : begin + 4], training=True)
        target = torch.as_tensor(y[begin : begin + 4])
        torch.mean((outputs - target) ** 2).backward()
        optimizer.step()
    assert_same(state_of(model), expected)


@pytest.mark.tensorflow
def test_a_custom_train_step_trains_the_same(expected):
    import tensorflow as tf

    class Custom(keras.Model):
        def __init__(self):
            super().__init__()
            self.network = network()

        def call(self, inputs, training=None):
            return self.network(inputs, training=training)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            self.optimizer.apply_gradients(
                zip(
                    tape.gradient(loss, self.trainable_variables),
                    self.trainable_variables,
                    strict=True,
                )
            )
            return {"loss": loss}

    model = Custom()
    model.compile(keras.optimizers.SGD(0.05))
    x, y = data(np.random.default_rng(1))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert_same(state_of(model.network), expected)


def test_gradient_accumulation_counts_every_batch(rng):
    model = network()
    model.compile(
        keras.optimizers.SGD(0.05, gradient_accumulation_steps=4), "mse"
    )
    x, y = data(rng)
    model.fit(x, y, batch_size=4, verbose=0)
    layer = model.layers[0]
    assert layer.current_step() == 8
    assert layer.current_limits() == (2.0, 1.0)
    assert np.all(
        np.isfinite(np.concatenate([w.ravel() for w in state_of(model)]))
    )


def test_a_shared_layer_moves_at_each_call(rng):
    layer = BatchRenormalization(momentum=0.5, r_max=np.inf, d_max=np.inf)
    one, two = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([one, two], [layer(one), layer(two)])
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mse"])
    first, second = (rng.normal(at, 1.0, (8, 3)) for at in (2.0, -4.0))
    zeros = np.zeros((8, 3))
    model.train_on_batch([first, second], [zeros, zeros])
    # Keras decides which branch comes first.
    means = first.mean(axis=0), second.mean(axis=0)
    orders = [0.25 * a + 0.5 * b for a, b in (means, means[::-1])]
    actual = helpers.statistics(layer)[0]
    assert min(np.abs(actual - order).max() for order in orders) < 1e-5
    assert layer.current_step() == 2


@pytest.mark.tensorflow
def test_an_overflowing_step_of_loss_scaling_changes_no_statistics(rng):
    layer = BatchRenormalization(
        dtype="mixed_float16", r_max=3.0, d_max=5.0, momentum=0.5
    )
    model = keras.Sequential([keras.Input((3,)), layer])
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=1024.0
    )
    model.compile(optimizer, "mse")
    x = rng.normal(size=(8, 3)).astype("float32")
    model.train_on_batch(x, x)
    before = state_of(model)
    # Beyond float16: infinite in the layer.
    model.train_on_batch(x * 1e6, x)
    after = state_of(model)
    for weight, old, new in zip(model.weights, before, after, strict=True):
        if weight.name != "step":
            assert np.array_equal(old, new), weight.path
    assert float(optimizer.dynamic_scale) == 512.0
    model.train_on_batch(x, x)
    assert not np.array_equal(state_of(model)[2], after[2])


@pytest.mark.tensorflow
def test_a_training_step_sees_the_statistics_of_before_in_any_graph(rng):
    # TensorFlow may order a second read of a variable after its assignment.
    import tensorflow as tf

    layer = BatchRenormalization(r_max=np.inf, d_max=np.inf, momentum=0.5)
    layer.build((None, 3))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(layer(x, training=True)))
        return loss, tape.gradient(loss, x)

    for _ in range(30):
        x = tf.constant(helpers.inputs_of(rng, (8, 3)))
        expected = tf.reduce_sum(tf.sin(layer(x)))
        loss, _ = step(x)
        helpers.assert_close(loss, expected, 1e-4)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
class TestFreezing:
    KINDS = (BatchNormalization, BatchRenormalization)

    @staticmethod
    def subclassed(layer):
        class Network(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def call(self, inputs, training=None):
                return self.layer(inputs, training=training)

        return Network()

    @classmethod
    def models(cls, layer):
        """Name to model; each holds the layer in another nesting."""
        inputs = keras.Input((4,))
        base = keras.Model(inputs, layer(inputs))
        outer = keras.Input((4,))
        return {
            "sequential": lambda: keras.Sequential([keras.Input((4,)), layer]),
            "functional": lambda: base,
            "nested": lambda: keras.Sequential([keras.Input((4,)), base]),
            "training=False": lambda: keras.Model(
                outer, base(outer, training=False)
            ),
            "training=True": lambda: keras.Model(
                outer, base(outer, training=True)
            ),
            "subclassed": lambda: cls.subclassed(layer),
        }

    NESTINGS = (
        "sequential",
        "functional",
        "nested",
        "training=False",
        "training=True",
        "subclassed",
    )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("nesting", NESTINGS)
    def test_frozen_statistics_stand_and_gamma_and_beta_train(
        self, kind, nesting, rng
    ):
        layer = kind(frozen_statistics=True)
        model = self.models(layer)[nesting]()
        self.check(model, layer, rng, trains=True)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("nesting", NESTINGS)
    def test_an_untrainable_layer_stands(self, kind, nesting, rng):
        layer = kind(trainable=False)
        model = self.models(layer)[nesting]()
        self.check(model, layer, rng, trains=False)

    @staticmethod
    def check(model, layer, rng, trains):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = helpers.inputs_of(rng, (16, 4))
        if not layer.built:
            model(x)
        helpers.randomize(layer, rng)
        before = state_of(layer)
        inference = helpers.to_numpy(model(x, training=False))
        training = helpers.to_numpy(model(x, training=True))
        assert np.array_equal(inference, training)
        model.fit(x, np.zeros_like(x), batch_size=4, verbose=0)
        for weight, old, new in zip(
            layer.weights, before, state_of(layer), strict=True
        ):
            moved = not np.array_equal(old, new)
            learns = weight in helpers.learned([weight]) and weight.trainable
            assert moved == (trains and learns), weight.path

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_attribute_acts_at_the_next_compile(self, kind, rng):
        layer = kind()
        model = keras.Sequential([keras.Input((4,)), layer])
        x = helpers.inputs_of(rng, (8, 4))
        for frozen in (False, True, False):
            layer.frozen_statistics = frozen
            model.compile(keras.optimizers.SGD(0.1), "mse")
            before = helpers.statistics(layer)
            model.train_on_batch(x, x)
            same = np.array_equal(before, helpers.statistics(layer))
            assert same == frozen

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("nesting", NESTINGS[:-1])
    @pytest.mark.parametrize("how", ["frozen_statistics", "trainable"])
    def test_freezing_is_saved(self, kind, nesting, how, rng, tmp_path):
        arguments = {how: how == "frozen_statistics"}
        model = self.models(kind(name="norm", **arguments))[nesting]()
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        (layer,) = [
            layer
            for layer in again._flatten_layers()
            if isinstance(layer, kind)
        ]
        assert layer.frozen_statistics == (how == "frozen_statistics")
        assert layer.trainable == (how == "frozen_statistics")
        self.check(again, layer, rng, trains=how == "frozen_statistics")

    def test_gradients_with_frozen_statistics(self, rng):
        layer = BatchRenormalization(frozen_statistics=True, dtype="float64")
        shape = (6, 3)
        layer.build(shape)
        helpers.randomize(layer, rng)
        x = helpers.inputs_of(rng, shape, dtype="float64")
        upstream = rng.normal(size=shape)
        gamma = helpers.to_numpy(layer.gamma)
        mean, variance = helpers.statistics(layer)
        sigma = np.sqrt(variance + layer.epsilon)
        _, d_inputs, (d_gamma, d_beta, *_) = helpers.gradients(
            layer, x, upstream
        )
        helpers.assert_close(d_inputs, upstream * gamma / sigma, 1e-12)
        helpers.assert_close(
            d_gamma, (upstream * (x - mean) / sigma).sum(0), 1e-12
        )
        helpers.assert_close(d_beta, upstream.sum(0), 1e-12)


@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
class TestMomentum:
    """As an attribute: at once, or from the next compile on."""

    def network(self, kind):
        return keras.Sequential(
            [keras.Input((3,)), kind(name="bn"), keras.layers.Dense(1)]
        )

    def step(self, model, rng):
        """The share of the old statistics that a step keeps."""
        layer = model.layers[0]
        x = helpers.inputs_of(rng, (8, 3))
        layer.moving_mean.assign(np.zeros(3))
        model.fit(x, x[:, :1], verbose=0)
        return 1 - helpers.to_numpy(layer.moving_mean) / x.mean(0)

    def test_set_before_compile(self, kind, rng):
        model = self.network(kind)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.75
        model.compile("sgd", "mse")
        np.testing.assert_allclose(self.step(model, rng), 0.75, 1e-5)
        copy = keras.models.clone_model(model)
        assert copy.layers[0].momentum == 0.75

    @pytest.mark.tensorflow
    @pytest.mark.jax
    def test_set_after_a_graph_was_made(self, kind, rng):
        model = self.network(kind)
        model.compile("sgd", "mse")
        self.step(model, rng)
        with pytest.warns(
            UserWarning,
            match="^`momentum` takes effect when the model is compiled next: "
            "graphs that were made before have the old momentum.$",
        ) as caught:
            model.layers[0].momentum = 0.5
        assert caught[0].filename == __file__
        np.testing.assert_allclose(self.step(model, rng), 0.99, 1e-5)
        model.compile("sgd", "mse")
        np.testing.assert_allclose(self.step(model, rng), 0.5, 1e-5)

    def test_set_eagerly(self, kind, rng):
        layer = kind()
        x = helpers.inputs_of(rng, (8, 3))
        layer.build(x.shape)
        for momentum in np.linspace(0.0, 1.0, 5):
            layer.momentum = momentum
            layer.moving_mean.assign(np.zeros(3))
            layer(x, training=True)
            helpers.assert_close(
                layer.moving_mean, (1 - momentum) * x.mean(0), 1e-6
            )

    @pytest.mark.tensorflow
    def test_eager_layers_of_any_momentum_share_a_graph(
        self, kind, rng, monkeypatch
    ):
        import tensorflow as tf

        x = helpers.inputs_of(rng, (8, 3))
        layer = kind()
        layer(x, training=True)

        def refuse(*arguments, **options):
            raise AssertionError("a graph is made")

        monkeypatch.setattr(tf, "function", refuse)
        layer.momentum = 0.123456
        layer(x, training=True)
        kind(momentum=0.654321)(x, training=True)


@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
def test_a_momentum_of_pytorch_is_warned_of_once(kind, tmp_path):
    with pytest.warns(
        UserWarning,
        match="^`momentum` is the share of the old moving statistics that is "
        "kept: with 0.1 they are those of the last batch or two. What "
        "PyTorch calls momentum=0.1 is momentum=0.9 here.$",
    ) as caught:
        layer = kind(momentum=0.1)
    assert [each.filename for each in caught] == [__file__]
    # None of these.
    kind(momentum=0.0)
    model = keras.Sequential([keras.Input((2,)), layer])
    keras.models.clone_model(model)
    convert(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].momentum == 0.1


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
def test_ragged_sequences_are_as_padded_ones_under_a_mask(kind, rng):
    import tensorflow as tf

    lengths = [3, 0, 5, 2]
    values = helpers.inputs_of(rng, (sum(lengths), 4))
    ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
    mask = np.arange(5) < np.array(lengths)[:, None]
    found = []
    for inputs, given in ((ragged, None), (ragged.to_tensor(), mask)):
        layer = kind(momentum=0.5)
        layer.build((None, None, 4))
        with tf.GradientTape() as tape:
            outputs = layer(inputs, training=True, mask=given)
            loss = tf.reduce_sum(
                outputs.flat_values**3
                if given is None
                else tf.boolean_mask(outputs, given) ** 3
            )
        gradients = tape.gradient(loss, layer.trainable_variables)
        found.append([*gradients, *layer.weights])
    assert isinstance(layer(ragged), tf.RaggedTensor)
    for one, other in zip(*found, strict=True):
        helpers.assert_close(one, helpers.to_numpy(other), 1e-5)
