"""Normalization where tensors cannot leave: in loops and conditionals."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_renorm import BatchNormalization, diagnostics, recalibrate
from keras_renorm.callbacks import RecalibrateStatistics
from tests import helpers

KINDS = [layers.BatchNormalization, BatchNormalization]


class Cell(layers.Layer):
    """A recurrent cell that normalizes its inputs and forgets its state."""

    def __init__(self, kind):
        super().__init__()
        self.bn = kind(name="bn")
        self.state_size = self.output_size = 4

    def build(self, input_shape):
        self.bn.build((None, 4))
        self.built = True

    def call(self, inputs, states, training=None):
        outputs = self.bn(inputs, training=training)
        return outputs, [outputs + 0 * states[0]]


def conditional(bn, x, training):
    return ops.cond(
        ops.max(x) < 1e6, lambda: bn(x, training=training), lambda: 2 * x
    )


def while_loop(bn, x, training):
    return ops.while_loop(
        lambda i, y: i < 1,
        lambda i, y: (i + 1, bn(y, training=training)),
        (0, x),
    )[1]


def mapped(bn, x, training):
    parts = ops.reshape(x, (4, -1, 4))
    return ops.map(lambda part: bn(part, training=training), parts)


def scanned(bn, x, training):
    parts = ops.reshape(x, (4, -1, 4))
    return ops.scan(
        lambda carry, part: (carry, bn(part, training=training)),
        ops.zeros((4, 4)),
        parts,
    )[1]


WAYS = {
    "cond": conditional,
    "while_loop": while_loop,
    "map": mapped,
    "scan": scanned,
}
# Batches of 16 are cut into as many parts.
PARTS = {"rnn": 5, "cond": 1, "while_loop": 1, "map": 4, "scan": 4}
# On PyTorch, Keras runs the first step of a recurrent layer twice.
WITH_PARTS = [
    pytest.param("rnn", marks=[pytest.mark.tensorflow, pytest.mark.jax]),
    *(way for way in PARTS if way != "rnn"),
]


class Within(keras.Model):
    """Normalization inside an operation that has graphs of its own."""

    def __init__(self, way, kind):
        super().__init__()
        self.bn = kind(name="bn")
        self.way = WAYS[way]

    def build(self, input_shape):
        self.bn.build((None, 4))
        self.built = True

    def call(self, inputs, training=None):
        return self.way(self.bn, inputs, training)


def model_and_inputs(way, kind, rng):
    if way == "rnn":
        cell = Cell(kind)
        model = keras.Sequential([keras.Input((5, 4)), layers.RNN(cell)])
        return model, cell.bn, helpers.inputs_of(rng, (32, 5, 4))
    model = Within(way, kind)
    x = helpers.inputs_of(rng, (32, 4))
    model.build((16, 4))
    return model, model.bn, x


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WITH_PARTS)
def test_statistics_are_those_of_the_data(way, kind, layer_by_layer, rng):
    model, bn, x = model_and_inputs(way, kind, rng)
    recalibrate(
        model, x, batch_size=16, layer_by_layer=layer_by_layer, verbose=False
    )
    rows = x.reshape(-1, 4).astype("float64")
    mean, variance = helpers.statistics(bn)
    helpers.assert_close(mean, rows.mean(axis=0), 1e-5)
    helpers.assert_close(variance, rows.var(axis=0), 1e-5)
    assert "call" not in vars(bn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WITH_PARTS)
def test_each_run_through_a_loop_is_a_batch(way, kind, rng):
    model, bn, x = model_and_inputs(way, kind, rng)
    before = helpers.statistics(bn)
    report = diagnostics.discrepancy(model, x, batch_size=16, verbose=False)
    (row,) = report.rows
    assert row["batches"] == 2 * PARTS[way]
    parts = 1 if way == "rnn" else PARTS[way]
    assert row["elements"] == 16 / parts
    # Training outputs are normalized, inference outputs (0, 1) leave x.
    cuts = x.reshape(2, 16, -1, 4) if way == "rnn" else x.reshape(2, -1, 1, 4)
    cuts = np.moveaxis(cuts, 2, 1).reshape(2 * PARTS[way], -1, 4)
    normalized = (cuts - cuts.mean(axis=1, keepdims=True)) / np.sqrt(
        cuts.var(axis=1, keepdims=True) + 1e-3
    )
    gap = np.sqrt(
        np.sum((normalized - cuts / np.sqrt(1.001)) ** 2)
        / np.sum(normalized**2)
    )
    helpers.assert_close(row["gap"], gap, 1e-4)
    for old, new in zip(before, helpers.statistics(bn), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_branch_that_is_not_taken_tells_nothing(rng):
    model = Within("cond", BatchNormalization)
    model.build((16, 4))
    x = helpers.inputs_of(rng, (32, 4))
    x[20] = 1e7  # the second batch takes the other branch
    recalibrate(model, x, batch_size=16, verbose=False)
    mean, _ = helpers.statistics(model.bn)
    helpers.assert_close(mean, x[:16].mean(axis=0), 1e-5)
    with pytest.raises(ValueError, match="gave none to bn"):
        recalibrate(model, x[16:], batch_size=16, verbose=False)


@pytest.mark.tensorflow  # on JAX, Keras's `fit` leaks a tracer of its own layer
def test_the_callback_reaches_a_recurrent_cell(rng):
    model, bn, x = model_and_inputs("rnn", BatchNormalization, rng)
    model.compile("sgd", "mse")
    model.fit(
        x,
        np.zeros((32, 4)),
        verbose=0,
        callbacks=[RecalibrateStatistics(x)],
    )
    rows = x.reshape(-1, 4)
    helpers.assert_close(helpers.statistics(bn)[0], rows.mean(axis=0), 1e-5)
