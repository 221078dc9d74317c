"""`FreezeStatistics`: the last part of `fit` with frozen statistics."""

import functools
import gc
import itertools

import keras
import numpy as np
import pytest

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.callbacks import (
    FreezeStatistics,
    RecalibrateStatistics,
    RenormMonitor,
    RenormScheduler,
)
from tests import helpers
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
    model.compile(keras.optimizers.SGD(decaying()), "mse")
    return model


def decaying(rate=0.01):
    return keras.optimizers.schedules.ExponentialDecay(rate, 20, 0.9)


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


def test_it_is_freezing_between_two_fits(data):
    model = make_model()
    fit(model, data, [FreezeStatistics(0.6)])
    other = make_model()
    fit(other, data, [], epochs=3)
    keras_renorm.freeze_statistics(other)
    fit(other, data, [], initial_epoch=3)
    for ours, expected in zip(model.weights, other.weights, strict=True):
        assert_close(np.array(ours), np.array(expected), 1e-6)


def test_a_resumed_run_is_frozen_from_its_first_step(data):
    model = make_model()
    before = fit(model, data, [], epochs=4)[-1]
    after = fit(model, data, [FreezeStatistics(0.6)], initial_epoch=4)[-1]
    np.testing.assert_array_equal(after["moving_mean"], before["moving_mean"])
    assert np.abs(after["gamma"] - before["gamma"]).max() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss rose")  # after a single step
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
    model.compile(keras.optimizers.SGD(decaying()), "mse")
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


@pytest.mark.parametrize("is_one", [True, False])
def test_a_run_after_one_that_failed_begins_unfrozen(is_one, data):
    class Failure(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("a full disk")

    model, callback = make_model(), FreezeStatistics(0.5)
    with pytest.raises(RuntimeError, match="a full disk"):
        fit(model, data, [callback, Failure()], epochs=2)
    assert model.layers[1].uses_moving_statistics
    assert model.layers[1].statistics_stand  # its name before
    if not is_one:
        callback = FreezeStatistics(0.5)
    values = fit(model, data, [callback], epochs=2)
    assert [int(value["step"]) for value in values] == [8, 8]


def test_a_failed_run_can_be_unfrozen_by_hand(data):
    class Failure(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("a full disk")

    model = make_model()
    with pytest.raises(RuntimeError, match="a full disk"):
        fit(model, data, [FreezeStatistics(0.5), Failure()], epochs=2)
    keras_renorm.unfreeze_statistics(model)
    assert [int(value["step"]) for value in fit(model, data, [], 1)] == [8]


def around(part):
    """A model that holds another."""
    return keras.Sequential([keras.Input((4,)), part, keras.layers.Dense(1)])


class Pair(keras.Model):
    """Trains a model in a step of its own, which the model's own one is not."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def call(self, x, training=None):
        return self.part(x, training=training)


HOLDERS = {
    # What was fitted, of what is frozen.
    "itself": lambda part: part,
    "a model around it": around,
    "a model around that": lambda part: around(around(part)),
    "a model of its layers": lambda part: keras.Model(
        part.inputs[0], part.layers[-1].output
    ),
    "a class of its own": Pair,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("is_eager", [True, False])
def test_freezing_acts_at_once_in_what_was_fitted(holder, is_eager, data):
    part = make_model()
    layer = part.layers[1]
    model = HOLDERS[holder](part)
    model.compile("sgd", "mse", run_eagerly=is_eager)

    def moved():
        before = np.array(layer.moving_mean)
        model.fit(*data, batch_size=8, verbose=0)
        return np.abs(np.array(layer.moving_mean) - before).max() > 0

    assert moved()
    keras_renorm.freeze_statistics(part)
    assert not moved()
    keras_renorm.unfreeze_statistics(part)
    assert moved()
    keras_renorm.freeze_statistics(part, layers=layer.name)
    assert not moved()


def test_freezing_acts_whatever_holds_the_step_and_hides_the_model(data):
    model = make_model()
    fit(model, data, [], epochs=1)
    traced = model.train_function  # as a traceback may hold it
    gc.freeze()
    try:
        keras_renorm.freeze_statistics(model)
    finally:
        gc.unfreeze()
    before = np.array(model.layers[1].moving_mean)
    fit(model, data, [], epochs=1)
    assert np.array_equal(np.array(model.layers[1].moving_mean), before)
    assert model.train_function is not traced


def test_converting_a_part_in_place_acts_at_once(data):
    """The fitted model runs the new layer, its validation as well."""
    part = make_model(keras.layers.BatchNormalization(momentum=0.5))
    model = around(part)
    model.compile("sgd", "mse")
    model.fit(*data, batch_size=8, verbose=0, validation_data=data)
    model.predict(data[0], verbose=0)
    if keras.backend.backend() == "jax":
        said = f"Compile {model.name} before the next training: on Keras's jax"
        with pytest.warns(UserWarning, match=said):
            keras_renorm.convert(part, in_place=True)
        model.compile("sgd", "mse")
    else:
        keras_renorm.convert(part, in_place=True)
    model.fit(*data, batch_size=8, verbose=0, validation_data=data)
    assert int(part.layers[1].step) == 4
    assert_close(model.predict(data[0], verbose=0), model(data[0]), 1e-5)


@pytest.mark.jax
@pytest.mark.parametrize(
    "forget",
    [
        functools.partial(keras_renorm.revert, in_place=True),
        functools.partial(
            keras_renorm.convert, in_place=True, gradient_momentum=None
        ),
    ],
)
def test_an_optimizer_must_know_that_layers_forget(forget, data):
    """What a layer remembers is the optimizer's: it would miss it, too."""
    model = make_model()
    fit(model, data, [], epochs=1)
    with pytest.warns(UserWarning, match=r"Compile .* remember gradients\.$"):
        forget(model)
    model.compile("sgd", "mse")
    fit(model, data, [], epochs=1)


@pytest.mark.tensorflow
@pytest.mark.jax
def test_freezing_what_is_frozen_traces_nothing_anew(data):
    traces = []

    class Counting(BatchRenormalization):
        def call(self, inputs, training=None, mask=None):
            traces.append(1)
            return super().call(inputs, training=training, mask=mask)

    model = make_model(Counting())
    other = make_model(Counting())
    for each in (model, other):
        fit(each, data, [], epochs=1)
    keras_renorm.freeze_statistics(model)
    fit(model, data, [], epochs=1)
    before = len(traces)
    keras_renorm.freeze_statistics(model)
    for each in (model, other):
        fit(each, data, [], epochs=1)
    assert len(traces) == before


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("frequency", ["epoch", 3])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_checkpoint_of_the_last_part_is_as_the_user_configured(
    is_frozen, frequency, is_first, data, tmp_path
):
    x, _ = data
    layer = BatchRenormalization(momentum=0.8, frozen_statistics=is_frozen)
    layer.build((None, 6))
    layer.moving_mean.assign(np.ones(6))
    model = make_model(layer)
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "last.keras", save_freq=frequency
    )
    others = [
        RenormScheduler(),
        RenormMonitor(every=2),
        RecalibrateStatistics(x),
        FreezeStatistics(0.5),
    ]
    callbacks = [checkpoint, *others] if is_first else [*others, checkpoint]
    fit(model, data, callbacks, epochs=2)
    loaded = keras.saving.load_model(tmp_path / "last.keras")
    restored = loaded.layers[1]
    assert restored.get_config() == layer.get_config()
    assert restored.frozen_statistics == is_frozen
    assert "call" not in vars(restored)
    # Trained on, with and without the callback: it moves as configured.
    for callbacks, epochs in (([], 1), ([FreezeStatistics(0.5)], 2)):
        before = np.array(restored.moving_mean)
        fit(loaded, data, callbacks, epochs=epochs)
        moved = np.abs(np.array(restored.moving_mean) - before).min() > 0
        assert moved == (not is_frozen)


def test_a_run_that_is_taken_up_in_the_last_part_ends_unfrozen(data, tmp_path):
    class Interruption(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 4:
                raise KeyboardInterrupt

    def callbacks():
        return [
            RenormScheduler(),
            keras.callbacks.BackupAndRestore(tmp_path),
            FreezeStatistics(0.6),
        ]

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), data, [*callbacks(), Interruption()])
    resumed, whole = make_model(), make_model()
    assert len(fit(resumed, data, callbacks())) == 1  # the fifth epoch
    assert int(resumed.layers[1].step) == 12  # those of three
    assert not resumed.layers[1].uses_moving_statistics
    fit(whole, data, callbacks())
    for ours, expected in zip(resumed.weights, whole.weights, strict=True):
        assert_close(np.array(ours), np.array(expected), 1e-6)


def test_a_copy_made_in_the_last_part_is_not_frozen(data):
    class Copies(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            copies.append(keras.models.clone_model(self.model))
            copies.append(keras_renorm.convert(self.model))

    copies = []
    fit(make_model(), data, [FreezeStatistics(0.5), Copies()], epochs=2)
    assert len(copies) == 4
    assert not any(copy.layers[1].uses_moving_statistics for copy in copies)


class Rates(keras.callbacks.Callback):
    """Sets the learning rate of each epoch."""

    def __init__(self, rates):
        super().__init__()
        self.rates = rates

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = self.rates[epoch]


@pytest.mark.parametrize(
    ("rates", "warns"),
    [
        ([0.01, 0.01], True),
        ([0.001, 0.01], True),  # it is warm, no more
        ([0.01, 0.009], False),
    ],
)
def test_freezing_at_a_rate_that_has_not_decayed_warns(rates, warns, data):
    model = make_model()
    model.compile(keras.optimizers.SGD(rates[0]), "mse")
    # After it in the list: what holds is the rate that the epoch trains with.
    callbacks = [FreezeStatistics(0.5), Rates(rates)]
    if not warns:
        fit(model, data, callbacks, epochs=2)
        return
    message = (
        "^`FreezeStatistics` freezes the statistics while the learning rate is "
        r"as high as it ever was in this run \(0.01\). Weights that move so "
        "fast leave them, which can destroy a trained network: let the rate "
        "decay before, as `keras.optimizers.schedules.CosineDecay` does.$"
    )
    with pytest.warns(UserWarning, match=message) as found:
        fit(model, data, callbacks, epochs=2)
    assert [each.category for each in found].count(UserWarning) == 1


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras is older"
)
@pytest.mark.filterwarnings("ignore:The loss rose")
def test_optimizers_of_several_learning_rates(data):
    rates = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.01))
    rates[".*kernel"] = keras.optimizers.SGD(0.001)
    model = make_model()
    model.compile(keras.optimizers.MultiOptimizer(rates), "mse")
    values = fit(model, data, [FreezeStatistics(0.5)], epochs=2)
    assert [int(value["step"]) for value in values] == [4, 4]


class Losses(keras.callbacks.Callback):
    """Gives the epochs these losses."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def on_epoch_end(self, epoch, logs=None):
        logs["loss"] = self.losses[epoch]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, 0.5, 0.2, 0.29, 0.1], None),
        ([1.0, 0.5, 0.2, 0.31, 0.4], "loss rose from 0.2 to 0.31 after"),
        # It rose by 0.5 before, too.
        ([0.5, 1.0, 0.2, 0.69, 0.1], None),
        ([0.5, 1.0, 0.2, 0.71, 0.1], "loss rose from 0.2 to 0.71 after"),
        ([-1.0, -3.0, -4.0, -2.1, -4.0], None),
        ([-1.0, -3.0, -4.0, -1.9, -4.0], "loss rose from -4 to -1.9 after"),
        (
            [1.0, 0.5, 0.2, np.nan, np.nan],
            "loss rose from 0.2 to nan after",
        ),
        ([1.0, 0.5, np.nan, 0.2, 7.0], None),
    ],
)
def test_a_loss_that_rises_after_the_freezing_warns(losses, message, data):
    callbacks = [Losses(losses), FreezeStatistics(0.6)]
    if message is None:
        fit(make_model(), data, callbacks)
        return
    with pytest.warns(UserWarning, match=message) as found:
        fit(make_model(), data, callbacks)
    assert [each.category for each in found].count(UserWarning) == 1


def test_a_run_that_ends_before_the_last_part_says_so(data):
    stopping = keras.callbacks.EarlyStopping("loss", patience=1, mode="min")
    callbacks = [Losses([1.0, 2.0, 3.0, 4.0, 5.0]), stopping]
    message = (
        "^`FreezeStatistics` froze nothing: `fit` ended before epoch 4 of 5, "
        "with which the last part begins. To freeze after early stopping, "
        "`keras_renorm.freeze_statistics` and `fit` once more.$"
    )
    with pytest.warns(UserWarning, match=message):
        values = fit(make_model(), data, [*callbacks, FreezeStatistics(0.6)])
    assert len(values) == 2


@pytest.mark.tensorflow
@pytest.mark.jax
def test_layers_that_were_frozen_before_are_not_traced_again(data):
    traces = []

    class Counting(BatchRenormalization):
        def call(self, inputs, training=None, mask=None):
            traces.append(1)
            return super().call(inputs, training=training, mask=mask)

    model = make_model(Counting(frozen_statistics=True))
    model.layers[1].moving_mean.assign(np.ones(6))
    fit(model, data, [], epochs=1)
    before = len(traces)
    fit(model, data, [FreezeStatistics(0.4)])
    assert len(traces) == before


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


def test_what_a_model_never_calls_need_not_be_ours(data):
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization(name="norm")
            self.unused = keras.layers.BatchNormalization(name="unused")

        def build(self, shape):
            self.norm.build(shape)

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    model = make_model(Block())
    keras_renorm.convert(
        model, in_place=True, layers=lambda layer: layer.built, momentum=0.5
    )
    before, *_, last = fit(model, data, [FreezeStatistics()])[-3:]
    assert not np.array_equal(before["moving_mean"], last["moving_mean"])
    keras_renorm.freeze_statistics(model)
    assert model.layers[1].norm.frozen_statistics
    keras_renorm.unfreeze_statistics(model)
    assert not model.layers[1].norm.frozen_statistics
    assert type(model.layers[1].unused) is keras.layers.BatchNormalization


def test_one_epoch_has_no_last_part(data):
    with pytest.raises(
        ValueError, match=r"at least 1 / begin.* epochs=1, begin=0.8"
    ):
        fit(make_model(), data, [FreezeStatistics()], epochs=1)


@pytest.mark.parametrize("is_first", [True, False])
def test_frozen_statistics_stay_where_fit_also_recalibrates(is_first, data):
    x, _ = data
    model = make_model()
    callbacks = [FreezeStatistics(0.5), RecalibrateStatistics(x)]
    means = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            means.append(helpers.to_numpy(model.layers[1].moving_mean))

    callbacks = callbacks if is_first else callbacks[::-1]
    fit(model, data, [*callbacks, Note()], epochs=4)
    last = helpers.to_numpy(model.layers[1].moving_mean)
    np.testing.assert_array_equal(last, means[-1])
    np.testing.assert_array_equal(last, means[-2])
