"""`RenormScheduler` in `fit`."""

import csv
import re
import warnings

import keras
import numpy as np
import pytest

from keras_renorm import BatchRenormalization
from keras_renorm.callbacks import RenormScheduler
from keras_renorm.schedules import LinearRamp, ioffe2017
from tests import helpers


def compiled(layers):
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def fit(model, callbacks, epochs=5, examples=64, **options):
    x = np.random.default_rng(0).normal(size=(examples, 3)).astype("float32")
    return model.fit(
        x,
        x,
        batch_size=2,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        **options,
    ).history


@pytest.mark.parametrize(
    "steps_per_execution", [1, pytest.param(8, marks=helpers.SEVERAL_STEPS)]
)
def test_the_paper_scaled_to_the_run(steps_per_execution):
    layers = [BatchRenormalization(), BatchRenormalization()]
    model = compiled(layers)
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    history = fit(model, [RenormScheduler()])
    r_max, d_max = ioffe2017(5 * 32)
    for layer in layers:
        assert (layer.r_max, layer.d_max) == (r_max, d_max)
        assert layer.current_step() == 160
    steps = [32, 64, 96, 128, 160]
    assert history["r_max"] == pytest.approx([r_max(step) for step in steps])
    assert history["d_max"] == pytest.approx([d_max(step) for step in steps])


def test_steps_per_epoch_counts():
    layer = BatchRenormalization()
    fit(compiled([layer]), [RenormScheduler()], epochs=3, steps_per_epoch=10)
    assert layer.r_max == ioffe2017(30)[0]


def test_numbers_and_ramps_are_set_as_they_are():
    layer = BatchRenormalization()
    ramp = LinearRamp(0.0, 2.0, 0, 64)
    history = fit(compiled([layer]), [RenormScheduler(1.5, ramp)], epochs=2)
    assert history["r_max"] == [1.5, 1.5]
    assert history["d_max"] == [1.0, 2.0]


def test_one_limit_given_the_other_scaled():
    layer = BatchRenormalization()
    fit(compiled([layer]), [RenormScheduler(d_max=0.5)], epochs=2)
    assert layer.r_max == ioffe2017(64)[0]
    assert layer.d_max == 0.5


@pytest.mark.tensorflow
@pytest.mark.torch  # on JAX a function acts once an epoch: see below
def test_a_function_is_asked_before_every_batch():
    asked = []

    def r_max(step):
        asked.append(step)
        return 1.0 + step

    layer = BatchRenormalization()
    history = fit(compiled([layer]), [RenormScheduler(r_max, 0.0)], epochs=2)
    assert set(asked) == set(range(64))
    assert layer.r_max == 64.0
    assert history["r_max"] == [32.0, 64.0]


def test_a_function_acts_at_least_once_an_epoch():
    layer = BatchRenormalization(d_max=0.0)
    scheduler = RenormScheduler(lambda step: 2.0 if step < 32 else 4.0, 0.0)
    history = fit(compiled([layer]), [scheduler], epochs=2)
    assert history["r_max"] == [2.0, 4.0]


def test_a_schedule_of_keras_is_a_function():
    layer = BatchRenormalization()
    rises = keras.optimizers.schedules.PolynomialDecay(1.0, 32, 3.0)
    history = fit(compiled([layer]), [RenormScheduler(rises, 0.0)], epochs=3)
    assert layer.r_max == 3.0
    assert history["r_max"][1:] == [3.0, 3.0]


def test_a_layer_called_twice_a_step_gets_a_ramp_twice_as_long():
    shared, single = BatchRenormalization(), BatchRenormalization()
    inputs = keras.Input((3,))
    x = single(inputs)
    model = keras.Model(inputs, shared(x) + shared(keras.layers.Dense(3)(x)))
    model.compile("sgd", "mse")
    history = fit(model, [RenormScheduler()])
    assert single.r_max == ioffe2017(160)[0]
    assert shared.r_max == ioffe2017(320)[0]
    assert shared.current_step() == 320
    # The two stand at the same place in their ramps (to half a step).
    assert history["r_max"][0] == pytest.approx(ioffe2017(160)[0](32), abs=0.03)


@pytest.mark.tensorflow  # JAX unrolls the steps of an execution
@pytest.mark.parametrize("steps_per_execution", [20, 64])
def test_calls_are_counted_where_an_execution_ends_with_the_data(
    steps_per_execution,
):
    shared = BatchRenormalization()
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    fit(model, [RenormScheduler()])
    assert shared.r_max == ioffe2017(320)[0]


AGAIN = (
    "`RenormScheduler` scaled its ramps to this call of `fit`, and the layers "
    "have counted steps before it: their ramps were others, or are over. Where "
    "one training is many calls, give `total_steps=`, the steps of all of "
    "them; to begin anew, `layer.step.assign(0)`; to keep the limits, leave "
    "the callback out."
)


def test_a_second_fit_stays_relaxed_and_a_reset_counter_begins_anew():
    layer = BatchRenormalization()
    model = compiled([layer])
    fit(model, [RenormScheduler()])
    with pytest.warns(UserWarning, match=f"^{re.escape(AGAIN)}$"):
        assert fit(model, [RenormScheduler()])["r_max"] == [3.0] * 5
    layer.step.assign(0)
    assert fit(model, [RenormScheduler()])["r_max"][0] < 3.0


@pytest.mark.filterwarnings("ignore:`RenormScheduler` scaled its ramps")
def test_many_fits_of_one_step_each(rng):
    layer = BatchRenormalization()
    model = compiled([layer])
    x = rng.normal(size=(8, 3)).astype("float32")
    for _ in range(3):
        model.fit(x, x, verbose=0, callbacks=[RenormScheduler()])
    assert layer.r_max == ioffe2017(1)[0]


def test_a_training_of_many_fits():
    """One epoch each, as in reinforcement and active learning."""
    whole = fit(compiled([BatchRenormalization()]), [RenormScheduler()])
    layer = BatchRenormalization()
    model = compiled([layer])
    scheduler = RenormScheduler(total_steps=160)
    found = [fit(model, [scheduler], epochs=1) for _ in range(5)]
    assert [each["r_max"][0] for each in found] == whole["r_max"]
    assert [each["d_max"][0] for each in found] == whole["d_max"]
    assert layer.r_max == ioffe2017(160)[0]


@pytest.mark.tensorflow
@pytest.mark.torch  # on JAX a callback sees the layers once an epoch
def test_many_fits_stretch_the_ramp_of_a_layer_that_is_called_twice():
    shared = BatchRenormalization()
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    model.compile("sgd", "mse")
    scheduler = RenormScheduler(total_steps=160)
    before = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: before.append(
            (shared.r_max, shared.current_step())
        )
    )
    for _ in range(2):
        fit(model, [scheduler, look], epochs=1)
    # From the first batch of the second run on.
    second = [ramp for ramp, step in before[32:]]
    assert second == [ioffe2017(320)[0]] * 32


@pytest.mark.parametrize(
    ("epochs", "initial_epochs", "warns"),
    [
        # A loop of one epoch each, with one callback or with new ones.
        ([1, 1, 1], [0, 0, 0], True),
        ([1, 2, 3], [0, 1, 2], True),
        # A run that is resumed.
        ([2, 4], [0, 2], True),
        # A first epoch, then all: the ramps close once more.
        ([1, 10], [0, 0], True),
        ([3], [0], False),
    ],
)
@pytest.mark.parametrize("is_one", [True, False])
def test_runs_that_scale_other_ramps_are_warned_of_once(
    epochs, initial_epochs, warns, is_one
):
    model, scheduler = compiled([BatchRenormalization()]), RenormScheduler()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for count, first in zip(epochs, initial_epochs, strict=True):
            callback = scheduler if is_one else RenormScheduler()
            fit(model, [callback], epochs=count, initial_epoch=first)
    messages = [str(each.message) for each in found]
    fresh = 1 if is_one else len(epochs) - 1
    assert messages.count(AGAIN) == (fresh if warns else 0)


def test_a_run_that_is_resumed_is_not_warned_of(tmp_path):
    path = tmp_path / "model.keras"

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.save(path)
                raise InterruptedError

    shared = BatchRenormalization()
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    model.compile("sgd", "mse")
    with pytest.raises(InterruptedError):
        fit(model, [RenormScheduler(), Stop()])
    model = keras.models.load_model(path)
    (layer,) = (
        each for each in model.layers if isinstance(each, BatchRenormalization)
    )
    found = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: found.append(layer.r_max)
    )
    # Warnings are errors here.
    history = fit(model, [RenormScheduler(), look], initial_epoch=2)
    # Stretched from the first batch on, before calls are counted.
    assert found == [ioffe2017(320)[0]] * 3
    r_max = ioffe2017(160)[0]
    assert history["r_max"] == pytest.approx([r_max(s) for s in (96, 128, 160)])


def test_a_length_that_is_unknown_needs_total_steps(rng):
    def batches(count=8):
        for _ in range(count):
            x = rng.normal(size=(8, 3)).astype("float32")
            yield x, x

    shared = BatchRenormalization()
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    model.compile("sgd", "mse")
    options = {"verbose": 0, "shuffle": False}
    with pytest.raises(ValueError, match="or `total_steps`, or `r_max` and"):
        model.fit(batches(), callbacks=[RenormScheduler()], **options)
    scheduler = RenormScheduler(total_steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras: the data ran out
        model.fit(batches(), callbacks=[scheduler], **options)
    assert shared.r_max == ioffe2017(200)[0]
    model.fit(
        batches(100),
        epochs=2,
        steps_per_epoch=10,
        callbacks=[RenormScheduler(total_steps=50)],
        **options,
    )
    assert shared.r_max == ioffe2017(100)[0]


def test_total_steps_are_for_the_ramp_that_is_scaled():
    layer = BatchRenormalization()
    scheduler = RenormScheduler(d_max=1.0, total_steps=1_000)
    fit(compiled([layer]), [scheduler], epochs=1)
    assert (layer.r_max, layer.d_max) == (ioffe2017(1_000)[0], 1.0)


@pytest.mark.slow
def test_a_scheduler_of_a_second_fit_measures_anew():
    layer = BatchRenormalization()
    model, scheduler = compiled([layer]), RenormScheduler()
    fit(model, [scheduler])
    assert layer.r_max == ioffe2017(160)[0]
    with pytest.warns(UserWarning, match="scaled its ramps"):
        fit(model, [scheduler])
    assert layer.r_max == ioffe2017(160)[0]


@pytest.mark.filterwarnings("ignore:`build..` was called on layer")
def test_a_layer_that_nobody_calls_gets_its_limits():
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = (BatchRenormalization() for _ in "ab")

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    model = Network()
    model.compile("sgd", "mse")
    history = fit(model, [RenormScheduler()])
    assert not model.unused.built
    assert model.unused.r_max == model.norm.r_max == ioffe2017(160)[0]
    assert history["r_max"][-1] == 3.0


def test_a_second_fit_asks_a_function_anew():
    layer = BatchRenormalization()
    model = compiled([layer])
    scheduler = RenormScheduler(lambda step: 2.0, 0.0)
    fit(model, [scheduler], epochs=1)
    layer.r_max = 9.0
    fit(model, [scheduler], epochs=1)
    assert layer.r_max == 2.0


def test_logs_hold_the_largest_limits_of_all_layers():
    layers = [BatchRenormalization(), BatchRenormalization(trainable=False)]
    ramp = LinearRamp(1.0, 3.0, 0, 64)
    history = fit(compiled(layers), [RenormScheduler(ramp, 0.0)], epochs=2)
    assert layers[1].current_limits() == (1.0, 0.0)
    assert history["r_max"] == [2.0, 3.0]


def test_a_run_without_epochs_changes_no_step():
    layer = BatchRenormalization()
    fit(compiled([layer]), [RenormScheduler()], epochs=0)
    assert layer.current_step() == 0


def test_a_model_that_is_built_by_fit():
    layer = BatchRenormalization()
    model = keras.Sequential([layer, keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    assert len(fit(model, [RenormScheduler()])["r_max"]) == 5
    assert layer.r_max == ioffe2017(160)[0]


def test_layers_inside_custom_layers_are_found():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = BatchRenormalization()

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    block = Block()
    model = compiled([keras.layers.Dense(3), block])
    fit(model, [RenormScheduler()])
    assert block.norm.r_max == ioffe2017(160)[0]


def test_loggers_behind_it_write_the_limits(tmp_path):
    model = compiled([BatchRenormalization()])
    path = tmp_path / "log.csv"
    fit(model, [RenormScheduler(), keras.callbacks.CSVLogger(path)])
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert float(rows[-1]["r_max"]) == 3.0
    assert float(rows[-1]["d_max"]) == 5.0


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False])
def test_backup_and_restore_resumes_where_the_run_stood(is_first, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    def run(*callbacks):
        keras.utils.set_random_seed(7)
        layer = BatchRenormalization(momentum=0.9)
        model = compiled([layer, keras.layers.Dense(3)])
        history = fit(model, list(callbacks), shuffle=False)
        return layer, model, history

    def callbacks(name):
        pair = [
            RenormScheduler(),
            keras.callbacks.BackupAndRestore(tmp_path / name),
        ]
        return pair if is_first else pair[::-1]

    layer, model, history = run(*callbacks("whole"))
    with pytest.raises(InterruptedError):
        run(*callbacks("halves"), Stop())
    resumed, resumed_model, rest = run(*callbacks("halves"))
    assert rest["r_max"] == history["r_max"][2:]
    assert rest["d_max"] == history["d_max"][2:]
    assert resumed.current_step() == layer.current_step() == 160
    for mine, other in zip(resumed_model.weights, model.weights, strict=True):
        np.testing.assert_allclose(
            helpers.to_numpy(mine), helpers.to_numpy(other), 1e-6, 1e-6
        )
