"""`FreezeStatistics`: the last part of `fit` with frozen statistics."""

import itertools

import keras
import numpy as np
import pytest

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.callbacks import FreezeStatistics, RenormScheduler
from tests.helpers import assert_close


def make_model(layer=None):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6),
            BatchRenormalization(momentum=0.8) if layer is None else layer,
            keras.layers.ReLU(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


@pytest.fixture
def data(rng):
    return rng.normal(3, 2, (32, 4)), rng.normal(size=(32, 1))


class Record(keras.callbacks.Callback):
    """The normalization layer's weights after each epoch."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_end(self, epoch, logs=None):
        layer = self.model.layers[1]
        self.values.append({w.name: np.array(w) for w in layer.weights})


def fit(model, data, callbacks, epochs=5, **arguments):
    record = Record()
    model.fit(
        *data,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, record],
        **arguments,
    )
    return record.values


def test_statistics_stand_for_the_last_part_and_all_else_trains(data):
    values = fit(make_model(), data, [RenormScheduler(), FreezeStatistics(0.4)])
    for name in ("moving_mean", "moving_variance"):
        moves = [
            np.abs(new[name] - old[name]).min() > 0
            for old, new in itertools.pairwise(values)
        ]
        assert moves == [True, False, False, False]
    for name in ("gamma", "beta"):
        assert all(
            np.abs(new[name] - old[name]).max() > 0
            for old, new in itertools.pairwise(values)
        )
    assert [int(value["step"]) for value in values] == [4, 8, 8, 8, 8]


def test_it_is_freezing_and_compiling_between_two_fits(data):
    model = make_model()
    fit(model, data, [FreezeStatistics(0.6)])
    other = make_model()
    fit(other, data, [], epochs=3)
    keras_renorm.freeze_statistics(other)
    other.compile(other.optimizer, "mse")
    fit(other, data, [], initial_epoch=3)
    for ours, expected in zip(model.weights, other.weights, strict=True):
        assert_close(np.array(ours), np.array(expected), 1e-6)


def test_a_resumed_run_is_frozen_from_its_first_step(data):
    model = make_model()
    before = fit(model, data, [], epochs=4)[-1]
    after = fit(model, data, [FreezeStatistics(0.6)], initial_epoch=4)[-1]
    np.testing.assert_array_equal(after["moving_mean"], before["moving_mean"])
    assert np.abs(after["gamma"] - before["gamma"]).max() > 0


@pytest.mark.parametrize(
    ("begin", "epochs", "moving"),
    # 0.58 * 100 is less than 58 in floating point; 0.8 * 12 is 9.6.
    [(0.8, 12, 9), (0.58, 100, 58), (0.5, 2, 1), (0.99, 2, 1)],
)
def test_the_part_begins_with_an_epoch(begin, epochs, moving, data):
    x, y = data
    callback = FreezeStatistics(begin)
    values = fit(make_model(), (x[:8], y[:8]), [callback], epochs=epochs)
    assert int(values[-1]["step"]) == moving


def test_layers_are_put_back_when_fit_ends(data):
    standing = BatchNormalization(frozen_statistics=True)
    standing.build((None, 6))
    standing.moving_mean.assign(np.ones(6))
    model = keras.Sequential([make_model(), keras.layers.Dense(6), standing])
    model.compile("sgd", "mse")
    moving = model.layers[0].layers[1]
    x, _ = data
    model.fit(
        x,
        np.zeros((32, 6)),
        8,
        epochs=2,
        verbose=0,
        callbacks=[FreezeStatistics(0.5)],
    )
    assert not moving.frozen_statistics
    assert standing.frozen_statistics
    # And a second fit, without it, moves them again.
    before = np.array(moving.moving_mean)
    model.fit(x, np.zeros((32, 6)), 8, verbose=0)
    assert np.abs(np.array(moving.moving_mean) - before).min() > 0


def test_a_run_after_one_that_failed_begins_unfrozen(data):
    class Failure(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("a full disk")

    model, callback = make_model(), FreezeStatistics(0.5)
    with pytest.raises(RuntimeError, match="a full disk"):
        fit(model, data, [callback, Failure()], epochs=2)
    assert model.layers[1].frozen_statistics
    values = fit(model, data, [callback], epochs=2)
    assert [int(value["step"]) for value in values] == [8, 8]


@pytest.mark.parametrize(
    ("begin", "error", "message"),
    [
        ("late", TypeError, "`begin` must be a number. Received: begin='late'"),
        (1, ValueError, "`begin` must be greater than 0 and less than 1."),
        (0.0, ValueError, "Received: begin=0.0."),
    ],
)
def test_a_share_that_is_none(begin, error, message):
    with pytest.raises(error, match=message):
        FreezeStatistics(begin)


def test_models_that_cannot_be_frozen(data):
    for layer in (keras.layers.BatchNormalization(), keras.layers.ReLU()):
        model = make_model(layer)
        with pytest.raises(ValueError, match="of keras_renorm only"):
            fit(model, data, [FreezeStatistics()])
        # It is known before the first step.
        assert int(model.optimizer.iterations) == 0


def test_one_epoch_has_no_last_part(data):
    with pytest.raises(
        ValueError, match=r"at least 1 / begin.* epochs=1, begin=0.8"
    ):
        fit(make_model(), data, [FreezeStatistics()], epochs=1)
