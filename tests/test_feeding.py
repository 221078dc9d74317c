"""What reaches a model: data as `fit` reads it, and its own steps change it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    diagnostics,
    recalibrate,
)
from keras_renorm.callbacks import RecalibrateStatistics, RenormMonitor
from tests import helpers


class Net(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.bn = BatchNormalization(name="bn")
        self.dense = layers.Dense(1)

    def call(self, inputs, training=None):
        return self.dense(self.bn(inputs, training=training))


def scaled(data):
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    return keras.utils.pack_x_y_sample_weight(
        ops.cast(x, "float32") / 255.0, y, weight
    )


class Trains(Net):
    def train_step(self, *given):
        *state, (x, y) = given
        return super().train_step(*state, scaled((x, y)))


class Serves(Net):
    def predict_step(self, *given):
        *state, data = given
        return super().predict_step(*state, scaled(data))


class Evaluates(Net):
    def test_step(self, *given):
        *state, data = given
        return super().test_step(*state, scaled(data))


class Adversarial(Net):
    """It trains what it holds, and is not called itself."""

    def train_step(self, *given):
        *_, data = given
        x = keras.utils.unpack_x_y_sample_weight(data)[0]
        self.optimizer.apply(
            [ops.ones(each.shape) for each in self.dense.trainable_variables],
            self.dense.trainable_variables,
        )
        return {"loss": ops.mean(self.dense(x))}


class Picks(Net):
    def train_step(self, *given):
        *state, data = given
        return super().train_step(*state, scaled((data["x"], data["y"])))


@pytest.mark.parametrize(
    ("unpack", "size"), [(list, 2), (lambda data: [data[0], data[1]], 8)]
)
def test_examples_are_not_taken_for_inputs_and_labels(unpack, size, rng):
    class Unpacks(Net):
        def train_step(self, *given):
            *state, data = given
            x, y = unpack(data)
            return super().train_step(*state, (x, y))

    x = rng.normal(3.0, 1.0, (16, 5, 3)).astype("float32")
    model = Unpacks()
    model(x)
    recalibrate(model, x, batch_size=size, verbose=False)
    mean = helpers.statistics(model.bn)[0]
    helpers.assert_close(mean, x.mean(axis=(0, 1)), 1e-5)


@pytest.mark.parametrize("is_batches", [False, True])
def test_a_step_may_pick_parts_of_the_data(is_batches, rng):
    x = rng.integers(0, 256, (40, 3)).astype("uint8")
    data = {"x": x, "y": np.zeros((40, 1), "float32")}
    model = Picks()
    model(np.zeros((2, 3), "float32"))
    recalibrate(model, [data, data] if is_batches else data, verbose=False)
    expected = x.mean(axis=0) / 255
    helpers.assert_close(helpers.statistics(model.bn)[0], expected, 1e-5)


class Holds(Net):
    def __init__(self):
        super().__init__()
        self.unused = layers.Dense(3)

    def build(self, input_shape):
        self.bn.build(input_shape)
        self.dense.build(input_shape)


@pytest.mark.parametrize("held", [False, True])
def test_layers_alone_and_models_that_hold_more_than_they_call(held, rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = BatchNormalization()
    model.build((None, 3))
    if held:
        model = Holds()
        model(x)
    data = (x, np.zeros((40, 1), "float32"))
    recalibrate(model, data, verbose=False)
    layer = model.bn if held else model
    helpers.assert_close(helpers.statistics(layer)[0], x.mean(axis=0), 1e-5)


@pytest.mark.parametrize("labels", ["labels", "none", "batches"])
@pytest.mark.parametrize("kind", [Trains, Serves, Evaluates])
def test_steps_of_ones_own_change_the_data(kind, labels, rng):
    x = rng.integers(0, 256, (40, 3)).astype("uint8")
    y = np.zeros((40, 1), "float32")
    data = {
        "labels": (x, y),
        "none": x,
        "batches": [(x[:16], y[:16]), (x[16:], y[16:])],
    }[labels]
    model = kind()
    model(np.zeros((2, 3), "float32"))
    recalibrate(model, data, verbose=False)
    expected = x.mean(axis=0) / 255
    helpers.assert_close(helpers.statistics(model.bn)[0], expected, 1e-5)
    report = diagnostics.discrepancy(model, data, verbose=False)
    assert report.layers[0].shift < 1e-3


def test_callbacks_see_what_fit_makes_of_the_data(rng):
    x = rng.integers(0, 256, (40, 3)).astype("uint8")
    y = np.zeros((40, 1), "float32")
    model = Trains()
    model(np.zeros((2, 3), "float32"))
    model.compile("sgd", "mse")
    monitor = RenormMonitor(dataset=(x, y))
    model.fit(
        x, y, verbose=0, callbacks=[RecalibrateStatistics((x, y)), monitor]
    )
    expected = x.mean(axis=0) / 255
    helpers.assert_close(helpers.statistics(model.bn)[0], expected, 1e-5)


def test_a_step_that_trains_other_models_trains_nothing(rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = Adversarial()
    model(x)
    model.compile("sgd", "mse")
    before = helpers.to_numpy(model.dense.kernel)
    recalibrate(model, x, verbose=False)
    np.testing.assert_array_equal(helpers.to_numpy(model.dense.kernel), before)
    helpers.assert_close(helpers.statistics(model.bn)[0], x.mean(axis=0), 1e-5)


class Differentiates(keras.Model):
    """It takes a gradient where it is called, by its inputs."""

    def __init__(self):
        super().__init__()
        self.bn = BatchRenormalization(name="bn")

    def build(self, input_shape):
        self.bn.build(input_shape)

    def slope(self, inputs, training):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = self.bn(inputs, training=training) ** 2
        return tape.gradient(outputs, inputs)

    def call(self, inputs, training=None):
        return self.slope(inputs, training)


class DifferentiatesInSteps(Differentiates):
    """It takes a gradient in a step, and is not called itself."""

    def call(self, inputs, training=None):
        return self.bn(inputs, training=training)

    def train_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        self.slope(x, training=True)
        self.optimizer.apply([])


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", [Differentiates, DifferentiatesInSteps])
def test_gradients_that_a_model_takes_are_not_remembered(kind, rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = kind()
    model(x)
    model.compile("sgd", "mse")
    before = list(map(helpers.to_numpy, model.variables))
    diagnostics.discrepancy(model, x, verbose=False)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(helpers.to_numpy(new), old)


class Refuses(Net):
    """It takes some batches, or none."""

    def test_step(self, *given):
        x = keras.utils.unpack_x_y_sample_weight(given[-1])[0]
        if x.shape[0] != 8:
            raise OSError("not of eight")
        return self(x)


def test_a_step_that_does_not_take_the_data_is_named(rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = Refuses(name="model")
    model(x)
    message = (
        "^`test_step` of model=model does not take this data, which goes in "
        "as it is. OSError: not of eight$"
    )
    with pytest.warns(UserWarning, match=message):
        recalibrate(model, x, verbose=False)
    with pytest.raises(OSError, match="not of eight"):
        recalibrate(model, [x[:8], x[8:]], verbose=False)


class Predicts(Net):
    """As a task of keras-hub: its methods prepare the data."""

    def predict(self, x, batch_size=None, **arguments):
        outputs = super().predict(x / 255.0, batch_size, **arguments)
        again = super().predict(x / 255.0, batch_size, **arguments)
        return (outputs + again).argmax(-1)


@pytest.mark.parametrize("has_labels", [False, True])
def test_a_predict_of_ones_own_prepares_the_data(has_labels, rng):
    x = rng.integers(0, 256, (40, 3)).astype("uint8")
    y = np.zeros((40, 1), "float32")
    model = Predicts()
    model(np.zeros((2, 3), "float32"))
    model.compile("sgd", "mse")
    data = (x, y) if has_labels else x
    recalibrate(model, data, verbose=False)
    expected = x.mean(axis=0) / 255
    helpers.assert_close(helpers.statistics(model.bn)[0], expected, 1e-5)
    report = diagnostics.discrepancy(model, data, verbose=False)
    assert bool(report.inference) == has_labels


class Plain(Net):
    def predict(self, inputs):
        return np.argmax(super().predict(inputs), axis=-1)


def test_a_predict_that_takes_other_arguments_is_not_used(rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = Plain()
    model(x)
    recalibrate(model, x, verbose=False)
    helpers.assert_close(helpers.statistics(model.bn)[0], x.mean(axis=0), 1e-5)


class Optional(layers.Layer):
    def call(self, inputs):
        first, second = inputs
        return first if second is None else first + second

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def test_an_optional_input_may_be_none(rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    inputs = [keras.Input((3,)), keras.Input((3,), optional=True)]
    model = keras.Model(inputs, BatchNormalization()(Optional()(inputs)))
    batches = [([part, None],) for part in (x[:9], x[9:20], x[20:])]
    for data in ([x, None], ([x, None],), batches):
        recalibrate(model, data, verbose=False)
        mean = helpers.statistics(model.layers[-1])[0]
        helpers.assert_close(mean, x.mean(axis=0), 1e-5)
    curve = diagnostics.loss_along_gradient(
        model, "mse", ([x, None], x), [0.1], training=True
    )
    assert np.all(np.isfinite(curve.values))


@pytest.mark.parametrize("form", ["csr", "coo", "batches"])
def test_sparse_matrices_are_arrays(form, rng):
    sparse = pytest.importorskip("scipy.sparse")
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    matrix = sparse.csr_matrix(x)
    data = {
        "csr": matrix,
        "coo": (matrix.tocoo(), np.zeros((40, 1))),
        "batches": [matrix[:16], matrix[16:]],
    }[form]
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2), BatchNormalization()]
    )
    recalibrate(model, data, verbose=False)
    dense = helpers.to_numpy(model.layers[0](x))
    mean = helpers.statistics(model.layers[1])[0]
    helpers.assert_close(mean, dense.mean(axis=0), 1e-5)
    if form == "csr":
        diagnostics.discrepancy(model, data, steps=1, verbose=False)


@pytest.mark.parametrize("arguments", [{"run_eagerly": True}, {}])
def test_a_model_is_read_as_it_is_compiled(arguments, rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = Net()
    if keras.backend.backend() != "torch" and not arguments:
        arguments = {"steps_per_execution": 2, "jit_compile": True}
    model.compile("sgd", "mse", **arguments)
    y = np.zeros((40, 1), "float32")
    model.fit(x, y, verbose=0)
    recalibrate(model, x, batch_size=8, verbose=False)
    helpers.assert_close(helpers.statistics(model.bn)[0], x.mean(axis=0), 1e-5)
    report = diagnostics.discrepancy(model, (x, y), verbose=False)
    assert report.layers[0].batches == 2  # of 32, and all are 40
    loss = model.evaluate(x, y, verbose=0)
    assert abs(report.inference["loss"] / loss - 1) < 1e-5


def test_an_error_leaves_the_model_whole(rng):
    x = rng.normal(4.0, 1.0, (40, 3)).astype("float32")
    model = Net()
    expected = model.predict(x, verbose=0)

    def batches():
        yield x[:8]
        raise OSError("gone")

    class Broken(keras.utils.PyDataset):
        num_batches = 2

        def __getitem__(self, index):
            if index:
                raise OSError("gone")
            return (np.full((8, 3), np.nan, "float32"),)

    for data in (batches(), Broken()):
        with pytest.raises(Exception, match=r"gone|finite"):
            recalibrate(model, data, verbose=False)
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_steps_of_arrays_are_from_all_of_them(rng):
    x = np.sort(rng.normal(size=(3200, 2)), axis=0).astype("float32")
    model = keras.Sequential([keras.Input((2,)), BatchNormalization()])
    recalibrate(model, x, steps=10, verbose=False)
    mean, variance = helpers.statistics(model.layers[0])
    assert np.all(np.abs(mean) < 0.2)
    assert np.all(np.abs(variance - 1) < 0.3)
    report = diagnostics.discrepancy(model, x, steps=10, verbose=False)
    assert report.layers[0].batches == 10
    assert report.layers[0].r[-2] < 0.5  # batches of neighbors, as they lie
    assert report.layers[0].d[0] < -1.5
    assert report.layers[0].d[-1] > 1.5


def test_batches_of_like_examples_are_warned_of(rng):
    x = np.sort(rng.normal(size=(320, 2)), axis=0).astype("float32")
    parts = [BatchNormalization(name="bn"), layers.Dense(3)]
    model = keras.Sequential([keras.Input((2,)), *parts, BatchNormalization()])
    with pytest.warns(UserWarning, match=r"do not look i\.i\.d\..*\(bn;"):
        recalibrate(model, x, verbose=False)
    recalibrate(model, x, layer_by_layer=True, verbose=False)
    recalibrate(model, rng.permutation(x), verbose=False)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda model, x: recalibrate(model, x, x),
            TypeError,
            "`steps` must be an integer. Received: steps=<ndarray>. Labels "
            "belong to `dataset`: (x, y).",
        ),
        (
            lambda model, x: diagnostics.discrepancy(model, x, [1, 2]),
            TypeError,
            "`steps` must be an integer. Received: steps=<list>. Labels belong "
            "to `dataset`: (x, y).",
        ),
        (
            lambda model, x: recalibrate(model, x[0]),
            ValueError,
            "`dataset` must have a batch axis: give x[np.newaxis] for one "
            "example. Received: an array of shape (8, 8, 1), for (None, 8, 8, "
            "1) of model=net.",
        ),
    ],
)
def test_what_is_often_mistaken(call, kind, message):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), BatchNormalization()], name="net"
    )
    with helpers.raises(kind, message):
        call(model, np.zeros((4, 8, 8, 1), "float32"))


def test_data_that_may_never_end_is_warned_of(rng, monkeypatch):
    monkeypatch.setattr("keras_renorm.models._data.batches.MANY_BATCHES", 3)
    x = rng.normal(4.0, 1.0, (4, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    message = r"^`dataset` goes on after 3 batches\. If it never ends, give"
    with pytest.warns(UserWarning, match=message):
        recalibrate(model, (x for _ in range(5)), verbose=False)
    recalibrate(model, (x for _ in range(5)), 4, verbose=False)


def test_a_predict_of_ones_own_prepares_single_batches_too(rng):
    """And arrays of other sizes than the model takes: it may change them."""

    class Halving(keras.Sequential):
        def predict(self, x, **arguments):
            return super().predict(np.asarray(x)[:, ::2], **arguments)

    x = helpers.inputs_of(rng, (24, 8))
    found = []
    for data in (x, [x[:10], x[10:]], [(x[:10],), (x[10:],)]):
        layer = BatchNormalization()
        recalibrate(Halving([keras.Input((4,)), layer]), data, verbose=False)
        found.append(helpers.to_numpy(layer.moving_mean))
    for each in found:
        helpers.assert_close(each, x[:, ::2].mean(0), 1e-5)
