"""What may hold batches, and what is refused, by all that read data."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import BatchNormalization, diagnostics, recalibrate
from keras_renorm.callbacks import RecalibrateStatistics, RenormMonitor
from tests import helpers

READERS = {
    "recalibrate": lambda model, data: recalibrate(model, data, verbose=False),
    "discrepancy": lambda model, data: diagnostics.discrepancy(
        model, data, verbose=False
    ),
    "RecalibrateStatistics": lambda model, data: fitted(
        model, RecalibrateStatistics(data)
    ),
    "RenormMonitor": lambda model, data: fitted(
        model, RenormMonitor(dataset=data)
    ),
}


def fitted(model, callback):
    model.compile("sgd", "mse")
    shape = [3 if size is None else size for size in model.inputs[0].shape[1:]]
    x = np.random.default_rng(0).normal(size=(4, *shape))
    y = np.zeros((4, *model(x).shape[1:]))
    model.fit(x, y, verbose=0, callbacks=[callback])


def network(shape=(4,)):
    return keras.Sequential(
        [keras.Input(shape), BatchNormalization(name="bn"), layers.Dense(1)],
        name="network",
    )


class Subclassed(keras.Model):
    """A model whose inputs are known by no one but its layers."""

    def __init__(self):
        super().__init__(name="subclassed")
        self.bn = BatchNormalization(name="bn")

    def call(self, inputs, training=None):
        return self.bn(inputs, training=training)


def examples(rng, count=40):
    """Inputs near 2.8, and labels that are far from them."""
    x = rng.normal(2.8, 1.0, (count, 4)).astype("float32")
    return x, np.full((count, 1), 100.0, "float32")


def labelled(x, y):
    """Inputs with labels, in the forms that `fit` knows."""
    import pandas
    import tensorflow as tf

    frame, labels = pandas.DataFrame(x), pandas.DataFrame(y, columns=["y"])
    one_hot = pandas.DataFrame(
        np.eye(4, dtype="float32")[np.arange(len(x)) % 4]
    )
    return {
        "frame": frame,
        "frames": (frame, labels),
        "frame and series": (frame, labels["y"]),
        "frame and labels as wide": (frame, one_hot),
        "array and series": (x, labels["y"]),
        "tensors of TensorFlow": (tf.constant(x), tf.constant(y)),
        "no labels": (x, None),
        "no weights": (x, y, None),
        "weights without labels": (x, None, y[:, 0]),
        "batches of frames": [(frame[:9], labels[:9]), (frame[9:], labels[9:])],
        "lists as batches": [[x[:9], y[:9]], [x[9:], y[9:]]],
    }


FORMS = [
    "frame",
    "frames",
    "frame and series",
    "frame and labels as wide",
    "array and series",
    "tensors of TensorFlow",
    "no labels",
    "no weights",
    "weights without labels",
    "batches of frames",
    "lists as batches",
]


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_not_inputs(form, rng):
    x, y = examples(rng)
    model = network()
    recalibrate(model, labelled(x, y)[form], verbose=False)
    mean, variance = helpers.statistics(model.layers[0])
    helpers.assert_close(mean, x.mean(axis=0), 1e-5)
    helpers.assert_close(variance, x.var(axis=0), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_comparisons_read_the_same_forms(form, rng):
    x, y = examples(rng)
    data = labelled(x, y)[form]
    report = diagnostics.discrepancy(network(), data, verbose=False)
    (row,) = report.rows
    assert row["examples"] * row["batches"] == 40
    report = diagnostics.discrepancy(network(), data, steps=1, verbose=False)
    assert report.layers[0].batches == 1


def test_a_series_is_a_column(rng):
    import pandas

    x = rng.normal(5.0, 2.0, 40).astype("float32")
    model = Subclassed()
    model(x[:, np.newaxis])
    recalibrate(model, pandas.Series(x), verbose=False)
    helpers.assert_close(helpers.statistics(model.bn)[0], [x.mean()], 1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_a_list_of_inputs_and_labels_is_refused(reader, rng):
    x, y = examples(rng, 4)
    message = (
        "`dataset` must be a tuple where it is inputs and labels, (x, y), and "
        "hold tuples where it is a list of batches, [(x,), (x,)]. Received: a "
        "list of arrays of shapes [(4, 4), (4, 1)]."
    )
    with helpers.raises(ValueError, message):
        READERS[reader](network(), [x, y])


def test_a_list_of_three_or_of_other_ranks_is_refused(rng):
    x, y = examples(rng, 4)
    for data in ([x, y, y[:, 0]], [x, y, x], [x, np.zeros(3)]):
        with pytest.raises(ValueError, match="must be a tuple where it is"):
            recalibrate(network(), data, verbose=False)


@pytest.mark.parametrize("reader", ["recalibrate", "discrepancy"])
def test_channels_of_another_number_are_refused(reader, rng):
    wide = rng.normal(size=(4, 5, 5, 3)).astype("float32")
    narrow = np.full((4, 6, 6, 1), 9.0, "float32")
    model = network((None, None, 3))
    before = helpers.statistics(model.layers[0])
    message = (
        "`dataset` must give inputs of the model's shapes. Received: a batch "
        "of shape (4, 6, 6, 1), for (None, None, None, 3) of model=network."
    )
    with helpers.raises(ValueError, message):
        READERS[reader](model, [(wide,), (narrow,)])
    for old, new in zip(
        before, helpers.statistics(model.layers[0]), strict=True
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.tensorflow  # JAX has a graph for each shape, and Keras's check
@pytest.mark.parametrize("reader", ["recalibrate", "discrepancy"])
def test_a_layer_checks_the_channels_that_a_graph_does_not_know(reader, rng):
    model = Subclassed()
    batches = [rng.normal(size=(4, n, n, 3)) for n in (5, 6)]
    model(batches[0])
    message = (
        "`dataset` must give each layer its channels. Received: 1 for the 3 "
        "of 'bn'."
    )
    with helpers.raises(ValueError, message):
        READERS[reader](model, [*batches, np.full((3, 7, 7, 1), 9.0)])
    np.testing.assert_array_equal(helpers.statistics(model.bn)[0], np.zeros(3))


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_functions_of_the_landscape_check_the_channels(kind, rng):
    model = network() if kind == "functional" else Subclassed()
    x = rng.normal(size=(8, 4)).astype("float32")
    y = np.zeros(model(x).shape, "float32")
    sizes = [0.1]
    # Of several lengths: the graph is then for any.
    for count in (8, 7, 6):
        diagnostics.gradient_predictiveness(
            model, "mse", (x[:count], y[:count]), sizes
        )
    message = {
        "functional": "^`batch` must give inputs of the model's shapes. "
        r"Received: a batch of shape \(8, 1\), for \(None, 4\) of "
        "model=network.$",
        # Keras's own.
        "subclassed": r"received input with shape \(8, 1\)",
    }[kind]
    with pytest.raises(ValueError, match=message):
        diagnostics.gradient_predictiveness(model, "mse", (x[:, :1], y), sizes)


def test_as_many_inputs_as_the_model_has(rng):
    x, y = examples(rng, 4)
    message = (
        "`dataset` must give as many arrays of inputs as the model has. "
        "Received: 2 for 1 of model=network."
    )
    with helpers.raises(ValueError, message):
        recalibrate(network(), ((x, x), y), verbose=False)


def test_inputs_by_name_may_be_in_any_order(rng):
    inputs = {
        "b": keras.Input((3,), name="b"),
        "a": keras.Input((2,), name="a"),
    }
    model = keras.Model(
        inputs,
        BatchNormalization()(layers.Concatenate()([inputs["a"], inputs["b"]])),
    )
    a, b = rng.normal(1.0, size=(20, 2)), rng.normal(5.0, size=(20, 3))
    recalibrate(model, {"b": b, "a": a}, verbose=False)
    helpers.assert_close(
        helpers.statistics(model.layers[-1])[0],
        np.concatenate([a, b], axis=1).mean(axis=0),
        1e-5,
    )


@pytest.mark.parametrize(
    ("dataset", "received"),
    [
        ("abc", "<str>"),
        (None, "<NoneType>"),
        ({"a": [1.0, 2.0]}, "<dict>"),
        (3.0, "<float>"),
        ((), "<tuple>"),
    ],
)
def test_what_holds_no_batches(dataset, received):
    message = (
        "`dataset` must be arrays, a tf.data.Dataset, a PyDataset or an "
        f"iterable of batches. Received: dataset={received}."
    )
    with helpers.raises(TypeError, message):
        recalibrate(network(), dataset, verbose=False)


def test_batches_that_are_no_arrays():
    message = (
        "`dataset` must give batches of arrays: x, (x, y) or (x, y, "
        "sample_weight). Received: a batch of <float>."
    )
    with helpers.raises(TypeError, message):
        recalibrate(network(), [1.0, 2.0], verbose=False)


@pytest.mark.parametrize(
    ("others", "received"),
    [
        (([1.0] * 4,), "(array(s), <list>)"),
        ((None, None, None), "(array(s), <NoneType>, <NoneType>, <NoneType>)"),
    ],
)
def test_labels_that_are_no_arrays(others, received, rng):
    message = (
        "`dataset` must be x, (x, y) or (x, y, sample_weight), of arrays, "
        f"where it is a tuple. Received: {received}."
    )
    with helpers.raises(TypeError, message):
        recalibrate(network(), (examples(rng, 4)[0], *others), verbose=False)


@pytest.mark.parametrize("reader", [recalibrate, diagnostics.discrepancy])
@pytest.mark.parametrize("kind", ["dicts", "tuples"])
def test_two_batches_for_a_model_of_two_inputs(kind, reader, rng):
    inputs = [keras.Input((4,), name="a"), keras.Input((3,), name="b")]
    x = layers.Concatenate()(inputs)
    model = keras.Model(inputs, BatchNormalization(momentum=0.5)(x))
    batches = [(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)))] * 2
    if kind == "dicts":
        batches = [{"a": a, "b": b} for a, b in batches]
    else:
        batches = [(pair,) for pair in batches]
    reader(model, batches, verbose=False)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "kind", [BatchNormalization, layers.BatchNormalization]
)
def test_ragged_batches(kind, rng):
    import tensorflow as tf

    lengths = rng.integers(1, 6, 24)
    values = helpers.inputs_of(rng, (int(lengths.sum()), 4))
    ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
    dataset = tf.data.Dataset.from_tensor_slices(ragged).batch(6)
    inputs = keras.Input((None, 4), ragged=True)
    layer = kind(momentum=0.5)
    model = keras.Model(inputs, layer(inputs))
    recalibrate(model, dataset, verbose=False)
    helpers.assert_close(layer.moving_mean, values.mean(0), 1e-5)
    helpers.assert_close(layer.moving_variance, values.var(0), 1e-5)
    report = diagnostics.discrepancy(model, dataset, verbose=False)
    assert 0 < report.rows[0]["gap"] < 1
