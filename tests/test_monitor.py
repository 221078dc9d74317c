"""`RenormMonitor` in `fit`."""

import csv
import re
import sys
import types
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    freeze_statistics,
    get_statistics,
    unfreeze_statistics,
)
from keras_renorm._step import gating
from keras_renorm.callbacks import RenormMonitor, RenormScheduler
from keras_renorm.callbacks._monitor.clock import Clock
from keras_renorm.callbacks._monitor.messages import limits_messages
from keras_renorm.callbacks._monitor.readings import (
    batch_statistic,
    has_moved,
    read_moved,
    read_state,
)
from keras_renorm.diagnostics import discrepancy
from keras_renorm.schedules import ioffe2017
from tests import helpers, networks

KINDS = [layers.BatchNormalization, BatchNormalization, BatchRenormalization]
X = helpers.inputs_of(np.random.default_rng(1), (64, 3))
NAMES = ("r", "d", "clipped", "gap", "r_max", "d_max", "correction")


def network(kind=BatchNormalization, **options):
    return keras.Sequential(
        [
            keras.Input((3,)),
            kind(name="first", momentum=0.9, **options),
            layers.Dense(4, activation="relu"),
            kind(name="second", **options),
            layers.Dense(1),
        ]
    )


def fit(
    model,
    callbacks,
    epochs=2,
    steps_per_execution=1,
    learning_rate=0.01,
    **options,
):
    # XLA compiles for long, and knows nothing of this.
    model.compile(
        keras.optimizers.SGD(learning_rate),
        "mse",
        steps_per_execution=steps_per_execution,
        jit_compile=False,
    )
    options = {"x": X, "y": X[:, :1], "batch_size": 8, **options}
    return model.fit(
        epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options
    ).history


def moving_before(x, steps, momentum=0.9):
    """Moving statistics of the first layer after some steps, in float64."""
    mean, variance = np.zeros(3), np.ones(3)
    for at in range(steps):
        batch = x[8 * (at % 8) : 8 * (at % 8) + 8].astype("float64")
        mean = momentum * mean + (1 - momentum) * batch.mean(axis=0)
        variance = momentum * variance + (1 - momentum) * batch.var(axis=0)
    return mean, variance


@pytest.mark.filterwarnings("ignore:Limits of renormalization clip")
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_batch_that_was_trained_on(kind):
    options = {}
    limits = (3.0, 5.0)
    if kind is BatchRenormalization:
        limits = (2.0, 1.5)
        options = {"r_max": 2.0, "d_max": 1.5}
    monitor = RenormMonitor(every=3)
    fit(network(kind, **options), [monitor], epochs=2)
    rows = [row for row in monitor.rows if row["layer"] == "first"]
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15]
    shares = []
    for row in rows:
        step = row["step"] - 1
        mean, variance = moving_before(X, step)
        batch = X[8 * (step % 8) : 8 * (step % 8) + 8].astype("float64")
        sigma = np.sqrt(variance + 1e-3)
        r = np.sqrt(batch.var(axis=0) + 1e-3) / sigma
        d = (batch.mean(axis=0) - mean) / sigma
        beyond = (np.maximum(r, 1 / r) > limits[0]) | (abs(d) > limits[1])
        expected = {
            "r": np.quantile(np.maximum(r, 1 / r), 0.95),
            "r_median": np.median(r),
            "d": np.quantile(abs(d), 0.95),
            "d_median": np.median(d),
            "clipped": beyond.mean(),
            "jeffreys": np.mean((r**2 + r**-2 - 2 + d**2 * (1 + r**-2)) / 2),
        }
        found = {name: row[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
        shares.append(beyond.mean())
    if kind is BatchRenormalization:
        assert 0 < np.mean(shares) < 1
        assert (rows[0]["r_max"], rows[0]["d_max"]) == limits
        assert rows[0]["correction"] == 1.0  # limits were given


@pytest.mark.filterwarnings("ignore:Limits of renormalization clip")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_what_discrepancy_measures(kind, rng):
    options = {}
    if kind is BatchRenormalization:
        options = {"r_max": 1.2, "d_max": 0.3}
    model = networks.randomize(network(kind, **options), rng)
    batch = X[:8]
    measured = discrepancy(model, [batch], verbose=False).layers
    monitor = RenormMonitor(every=1)
    fit(model, [monitor], epochs=1, x=batch, y=batch[:, :1])
    for row, layer in zip(monitor.rows, measured, strict=True):
        assert row["layer"] == layer.name
        assert row["gap"] == pytest.approx(layer.gap, rel=2e-3)
        assert row["jeffreys"] == pytest.approx(layer.jeffreys, rel=2e-2)
        assert row["clipped"] == pytest.approx(layer.beyond)


def shut(layer, correction):
    """As if the layer had measured that batches want so much correction."""
    # So far shut by the persistence of gradients.
    persistence = 1.0
    if correction:
        odds = (1 - correction) / correction
        persistence = gating.HALF_SHUT_PERSISTENCE
        persistence *= odds ** (1 / gating.STEEPNESS)
    layer.gate.assign([1.0, 1e-3, 8.0, persistence])
    layer.step.assign(float(layer.r_max.end_step) * 2)
    assert layer.current_correction() == pytest.approx(correction, abs=1e-3)


@pytest.mark.parametrize("correction", [0.0, 0.4])
def test_a_layer_that_measures_corrects_as_far_as_it_does(correction, rng):
    """What it applies is r**g and g d, not what its limits allow."""
    model = networks.randomize(network(BatchRenormalization), rng)
    for layer in model.layers:
        if isinstance(layer, BatchRenormalization):
            shut(layer, correction)
    batch = X[:8]
    measured = discrepancy(model, [batch], verbose=False).layers
    assert [layer.correction for layer in measured] == pytest.approx(
        [correction] * 2, abs=1e-3
    )
    assert all(layer.is_gated for layer in measured)
    monitor = RenormMonitor(every=1)
    history = fit(model, [monitor], epochs=1, x=batch, y=batch[:, :1])
    assert history["renorm_correction"] == pytest.approx([correction], abs=1e-3)
    for row, layer in zip(monitor.rows, measured, strict=True):
        assert (row["r_max"], row["d_max"]) == (3.0, 5.0)
        assert row["correction"] == pytest.approx(correction, abs=1e-3)
        assert row["gap"] == pytest.approx(layer.gap, rel=2e-3)
        assert layer.gap > 0.1


def test_a_moving_average_taken_back_over_several_steps():
    values = np.array([[1.0, 4.0], [2.0, -3.0], [7.0, 0.5]])
    average = start = np.array([5.0, 5.0])
    for value in values:
        average = 0.8 * average + 0.2 * value
    weights = np.array([0.64, 0.8, 1.0])
    expected = weights @ values / weights.sum()
    found = batch_statistic(start, average, 0.8, steps=3)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("momentum", "moved", "expected"),
    [
        (0.9, (True, True), True),
        (0.9, (True, False), True),
        (0.9, (False, True), True),
        (0.9, (False, False), False),
        # 0 keeps nothing to take back, and 1 moves nothing.
        (0.0, (True, True), False),
        (1.0, (True, True), False),
    ],
)
def test_statistics_that_tell_of_the_batch(momentum, moved, expected):
    layer = BatchNormalization(momentum=0.5)
    layer.build((None, 3))
    layer.momentum = momentum
    before = read_state(layer)
    layer.moving_mean.assign(np.full(3, float(moved[0])))
    layer.moving_variance.assign(np.full(3, 1.0 + moved[1]))
    after = read_moved(layer, before)
    assert has_moved(layer, before, after) == expected


@pytest.mark.filterwarnings("ignore:Limits of renormalization clip")
def test_logs_get_the_epochs_means(tmp_path):
    path = tmp_path / "log.csv"
    monitor = RenormMonitor(every=3, per_layer=True)
    model = network(BatchRenormalization, r_max=2.0, d_max=1.0)
    history = fit(model, [monitor, keras.callbacks.CSVLogger(path)])
    epochs = [
        [row for row in monitor.rows if low < row["step"] <= low + 8]
        for low in (0, 8)
    ]
    for name in NAMES:
        means = [
            {
                layer: np.mean(
                    [row[name] for row in rows if row["layer"] == layer]
                )
                for layer in ("first", "second")
            }
            for rows in epochs
        ]
        for layer in ("first", "second"):
            assert history[f"{layer}/renorm_{name}"] == pytest.approx(
                [mean[layer] for mean in means]
            )
        assert history[f"renorm_{name}"] == pytest.approx(
            [max(mean.values()) for mean in means]
        )
    with open(path) as file:
        line = next(csv.DictReader(file))
    assert float(line["renorm_gap"]) == history["renorm_gap"][0]


def test_logs_by_default_do_not_grow_with_the_layers_nor_have_limits():
    history = fit(network(), [RenormMonitor(every=3)])
    names = {name for name in history if "renorm" in name}
    assert names == {f"renorm_{name}" for name in ("r", "d", "clipped", "gap")}


@pytest.mark.parametrize(
    ("every", "lengths", "options", "expected"),
    [
        (3, (8, 8), {}, [3, 6, 9, 12, 15]),
        # An epoch without one has one at its last step.
        (100, (5, 5), {}, [5, 10]),
        (6, (4, 4, 4), {}, [4, 6, 12]),
        # An execution of several steps is probed at its end.
        (4, (8, 8), {"stride": 4}, [4, 8, 12, 16]),
        (3, (8,), {"stride": 2}, [4, 6]),
        # The last execution of an epoch may be shorter.
        (100, (7,), {"stride": 3}, [7]),
        # A run that is resumed goes on.
        (5, (4, 4), {"first_epoch": 3}, [15, 20]),
        # An epoch of unknown length may end at any step.
        (100, (5, 3), {"is_known": False}, [-1, -2, -4, -6, -7]),
        (4, (6,), {"is_known": False}, [-1, -2, 4]),
        # Where nothing could be measured, the last step is tried.
        (3, (8,), {"has_figures": False}, [3, 6, 8]),
        # After a shorter execution they are whole again.
        (4, (5, 5), {"stride": 4}, [4, -5, 9, -10]),
    ],
)
def test_the_clock(every, lengths, options, expected):
    """Steps at which probes end; below zero those in reserve."""
    clock = Clock(every)
    stride = clock.size = options.get("stride", 1)
    probes = []
    for epoch, length in enumerate(lengths, options.get("first_epoch", 0)):
        clock.begin_epoch(epoch, length if options.get("is_known", 1) else None)
        for batch in range(0, length, stride):
            is_probed = clock.begin(batch)
            is_due = clock.end(min(stride, length - batch))
            if is_probed:
                probes.append(clock.step if is_due else -clock.step)
                if is_due:
                    clock.probed(options.get("has_figures", True))
    assert probes == expected


@pytest.mark.parametrize("every", [8, 16, 100])
def test_every_epoch_has_a_probe(every):
    monitor = RenormMonitor(every=every)
    history = fit(network(), [monitor], epochs=3)
    assert [row["step"] for row in monitor.rows[::2]] == [8, 16, 24]
    assert len(history["renorm_gap"]) == 3


def test_an_epoch_of_unknown_length_repeats_the_last_probe():
    def batches():
        for at in range(0, 64, 8):
            yield X[at : at + 8], X[at : at + 8, :1]

    class Endless(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return None

        def __getitem__(self, index):
            part = slice(8 * (index % 8), 8 * (index % 8) + 8)
            return X[part], X[part, :1]

    monitor = RenormMonitor(every=5)
    generator = (each for _ in range(10) for each in batches())
    model = network()
    model.compile("sgd", "mse", jit_compile=False)
    with warnings.catch_warnings():
        # Keras: the generator ran out, which is how its length is learnt.
        warnings.simplefilter("ignore")
        history = model.fit(
            generator, epochs=1, verbose=0, callbacks=[monitor]
        ).history
    assert [row["step"] for row in monitor.rows[::2]] == list(range(5, 81, 5))
    assert len(history["renorm_gap"]) == 1


@pytest.mark.tensorflow  # JAX: an execution of several steps unrolls them
def test_several_steps_an_execution():
    monitor = RenormMonitor(every=4)
    fit(network(), [monitor], epochs=2, steps_per_execution=4)
    rows = [row for row in monitor.rows if row["layer"] == "first"]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    mean, variance = moving_before(X, 4)
    after, _ = moving_before(X, 8)
    average = (after - 0.9**4 * mean) / (1 - 0.9**4)
    d = (average - mean) / np.sqrt(variance + 1e-3)
    assert rows[1]["d"] == pytest.approx(np.quantile(abs(d), 0.95), rel=1e-3)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("batches", "steps", "ends"),
    [
        (8, 8, [5, 8]),  # steps of the epoch, as Keras knows them
        (8, None, [5, 8]),
        (10, 8, [5, 10]),  # Keras takes whole executions while data is left
    ],
)
def test_the_last_execution_of_an_epoch_may_be_shorter(batches, steps, ends):
    def generated():
        for at in range(batches):
            part = slice(8 * (at % 8), 8 * (at % 8) + 8)
            yield X[part], X[part, :1]

    monitor = RenormMonitor(every=1)
    options = {"x": generated(), "y": None, "batch_size": None}
    fit(
        network(),
        [monitor],
        epochs=1,
        steps_per_execution=5,
        steps_per_epoch=steps,
        **options,
    )
    rows = [row for row in monitor.rows if row["layer"] == "first"]
    assert [row["step"] for row in rows] == ends
    kept = 0.9 ** (ends[1] - 5)
    mean, variance = moving_before(X, 5)
    after, _ = moving_before(X, ends[1])
    d = ((after - kept * mean) / (1 - kept) - mean) / np.sqrt(variance + 1e-3)
    assert rows[1]["d"] == pytest.approx(np.quantile(abs(d), 0.95), rel=1e-3)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "optimizer",
    [
        # It counts every second step.
        {"gradient_accumulation_steps": 2},
        {"learning_rate": 0.1},
    ],
)
def test_epochs_that_are_no_multiple_of_an_execution(optimizer):
    monitor, model = RenormMonitor(every=1), network()
    model.compile(
        keras.optimizers.SGD(**optimizer), "mse", steps_per_execution=5
    )
    model.fit(
        X, X[:, :1], batch_size=8, epochs=2, verbose=0, callbacks=[monitor]
    )
    assert [row["step"] for row in monitor.rows[::2]] == [5, 8, 13, 16]


@pytest.mark.filterwarnings("ignore:Limits of renormalization clip")
def test_training_is_the_same_with_and_without_it():
    def weights(callbacks):
        keras.utils.set_random_seed(5)
        model = network(BatchRenormalization, r_max=2.0, d_max=1.0)
        fit(model, callbacks)
        return [helpers.to_numpy(each) for each in model.weights]

    monitor = RenormMonitor(every=1, dataset=X)
    for mine, other in zip(weights([monitor]), weights([]), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_layers_that_stand_still_are_left_out():
    model = network()
    model.get_layer("second").frozen_statistics = True
    monitor = RenormMonitor(every=2, per_layer=True)
    history = fit(model, [monitor])
    assert {row["layer"] for row in monitor.rows} == {"first"}
    assert "first/renorm_gap" in history
    # Where nothing can be measured, an epoch has the same names.
    model.get_layer("first").trainable = False
    monitor = RenormMonitor(every=2, per_layer=True)
    history = fit(model, [monitor])
    assert monitor.rows == []
    names = {name for name in history if "renorm" in name}
    assert names == {f"renorm_{name}" for name in ("r", "d", "clipped", "gap")}
    assert np.isnan(history["renorm_gap"]).all()


def test_a_model_that_is_built_by_fit():
    model = keras.Sequential([BatchNormalization(name="bn"), layers.Dense(1)])
    history = fit(model, [RenormMonitor(every=2, per_layer=True)])
    assert len(history["bn/renorm_gap"]) == 2


def test_a_second_run_of_a_model_continues():
    monitor = RenormMonitor(every=3)
    model = network()
    fit(model, [monitor], epochs=2)
    fit(model, [monitor], epochs=3, initial_epoch=2)
    fit(model, [monitor], epochs=1)
    steps = [row["step"] for row in monitor.rows if row["layer"] == "first"]
    assert steps == list(range(3, 33, 3))
    fit(network(), [monitor], epochs=1)  # another model begins anew
    assert [row["step"] for row in monitor.rows[::2]] == [3, 6]


def test_a_run_that_is_resumed_counts_the_epochs_before_it():
    monitor = RenormMonitor(every=5)
    fit(network(), [monitor], epochs=4, initial_epoch=2)
    assert [row["step"] for row in monitor.rows[::2]] == [20, 25, 30]


@pytest.mark.tensorflow
@pytest.mark.parametrize("every", [3, 100])
def test_epochs_of_unknown_length_have_the_names_of_the_first(every, tmp_path):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(8)
    data = data.filter(lambda x, y: True)
    monitor = RenormMonitor(every=every)
    model = network(BatchRenormalization, r_max=9.0, d_max=9.0)
    model.compile("sgd", "mse")
    path = tmp_path / "log.csv"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras: the data ran out
        history = model.fit(
            data,
            epochs=3,
            verbose=0,
            shuffle=False,
            callbacks=[monitor, keras.callbacks.CSVLogger(path)],
        ).history
    steps = [row["step"] for row in monitor.rows[::2]]
    # The last power of two, where no other probe came.
    assert steps == (list(range(3, 25, 3)) if every == 3 else [8, 16, 24])
    with open(path) as file:
        lines = list(csv.DictReader(file))
    for name in NAMES:
        assert len(history[f"renorm_{name}"]) == 3
        assert [float(line[f"renorm_{name}"]) for line in lines] == (
            history[f"renorm_{name}"]
        )


def test_epochs_that_measure_nothing_have_the_names_of_the_first():
    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            freeze = freeze_statistics if epoch == 1 else unfreeze_statistics
            if epoch:
                freeze(self.model)
                self.model.make_train_function(force=True)

    monitor = RenormMonitor(every=3, per_layer=True)
    history = fit(network(), [Freeze(), monitor], epochs=3)
    for name in ("renorm_gap", "second/renorm_gap"):
        assert np.isnan(history[name]).tolist() == [False, True, False]
    assert monitor.rows[-1]["step"] == 24


def test_a_layer_that_is_not_finite_is_not_hidden():
    x = X.copy()
    x[:, 0] = np.nan
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.BatchNormalization(name="broken"),
            layers.Lambda(lambda x: keras.ops.nan_to_num(x)),
            layers.BatchNormalization(name="whole"),
            layers.Dense(1),
        ]
    )
    history = fit(model, [RenormMonitor(every=2, per_layer=True)], x=x)
    assert np.isnan(history["renorm_gap"]).all()
    assert np.isfinite(history["whole/renorm_gap"]).all()


UNUSED = (
    "`RenormMonitor` leaves out layers that the first batch did not reach: "
    "unused."
)


@pytest.mark.filterwarnings("ignore:`build..` was called on layer")
@pytest.mark.parametrize("is_built", [False, True])
def test_a_layer_that_nobody_calls_is_left_out_and_named_once(is_built):
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = BatchNormalization(name="used")
            self.late = BatchNormalization(name="late")
            self.unused = BatchNormalization(name="unused")
            self.head = layers.Dense(1)

        def call(self, inputs, training=None):
            x = self.bn(inputs, training=training)
            return self.head(self.late(x, training=training))

    model, monitor = Network(), RenormMonitor(every=1, per_layer=True)
    if is_built:
        model.bn.build((None, 3))
    with pytest.warns(UserWarning, match=f"^{re.escape(UNUSED)}$"):
        history = fit(model, [monitor])
    fit(model, [monitor])  # warnings are errors here
    assert len(history["used/renorm_gap"]) == 2
    assert {row["layer"] for row in monitor.rows} == {"used", "late"}


def test_a_distiller_has_a_teacher_that_stands_still():
    teacher, student = network(), network()
    model = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation()
    )
    model.compile("sgd", "mse", jit_compile=False)
    monitor = RenormMonitor(every=2, layers=student)
    history = model.fit(
        X, X[:, :1], epochs=2, verbose=0, callbacks=[monitor]
    ).history
    assert len(history["renorm_gap"]) == 2
    assert len({row["layer"] for row in monitor.rows}) == 2


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("second", {"second"}),
        (["first"], {"first"}),
        (lambda layer: layer.momentum == 0.9, {"first"}),
    ],
)
def test_layers_may_be_chosen(chosen, expected):
    monitor = RenormMonitor(every=2, layers=chosen)
    fit(network(), [monitor])
    assert {row["layer"] for row in monitor.rows} == expected
    with pytest.raises(ValueError, match="`layers` must be layers of the mod"):
        fit(network(), [RenormMonitor(layers="third")])


class Unmasked(layers.BatchNormalization):
    """As detection code freezes it: its `call` takes inputs, nothing else."""

    def call(self, inputs):
        return super().call(inputs, training=False)


@pytest.mark.parametrize("dataset", [None, X])
def test_a_call_of_inputs_alone(dataset):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            Unmasked(name="still"),
            BatchNormalization(name="bn"),
            layers.Dense(1),
        ]
    )
    monitor = RenormMonitor(every=2, dataset=dataset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`dataset` could not be compared")
        history = fit(model, [monitor])
    assert np.isfinite(history["renorm_gap"]).all()
    assert {row["layer"] for row in monitor.rows} == {"bn"}


def test_data_that_cannot_be_compared_ends_no_run():
    x = X.copy()
    x[3] = np.nan
    model, monitor = network(), RenormMonitor(every=2, dataset=x)
    message = "`dataset` could not be compared: `dataset` must make finite acti"
    with pytest.warns(UserWarning, match=message):
        history = fit(model, [monitor])
    assert len(history["loss"]) == 2
    fit(model, [monitor], epochs=1)  # warnings are errors here


def test_layers_of_one_name_are_told_apart():
    """Two submodels from two files; one of them serves other inputs."""
    parts = [
        keras.Sequential(
            [keras.Input((3,)), BatchNormalization(name="bn", momentum=0.9)],
            name=name,
        )
        for name in ("near", "far")
    ]
    parts[0].layers[0].moving_mean.assign(X.mean(axis=0))
    parts[0].layers[0].moving_variance.assign(X.var(axis=0))
    parts[1].layers[0].moving_mean.assign(X.mean(axis=0) + 1000)
    inputs = keras.Input((3,))
    outputs = layers.Dense(1)(layers.Add()([part(inputs) for part in parts]))
    model = keras.Model(inputs, outputs)
    monitor = RenormMonitor(every=8, per_layer=True)
    history = fit(model, [monitor], epochs=1, learning_rate=0.0)
    gaps = {row["layer"]: row["gap"] for row in monitor.rows}
    assert gaps.keys() == {"near/bn", "far/bn"}
    assert min(gaps.values()) < 1
    assert max(gaps.values()) > 50
    assert history["renorm_gap"] == [max(gaps.values())]
    assert {name for name in history if name.endswith("/renorm_gap")} == {
        "near/bn/renorm_gap",
        "far/bn/renorm_gap",
    }
    report = discrepancy(model, X, verbose=False)
    assert {layer.name for layer in report.layers} == gaps.keys()
    keys = get_statistics(model)
    assert {key.rpartition("/")[0] for key in keys} == gaps.keys()
    # And the same layer has the same name in each of them.
    shifts = {layer.name: layer.shift for layer in report.layers}
    assert max(shifts, key=shifts.get) == max(gaps, key=gaps.get)


def test_limits_that_never_relaxed():
    message = (
        "Limits of renormalization never relaxed in this run: r_max is 1 and "
        "d_max is 0 still, in layers first, second. They would from step 5,000 "
        "on. That is plain batch normalization; `RenormScheduler()` scales the "
        "ramps to the run."
    )
    r_max, d_max = ioffe2017()
    model = network(BatchRenormalization, r_max=r_max, d_max=d_max)
    monitor = RenormMonitor(every=3)
    with pytest.warns(UserWarning, match=re.escape(message)) as found:
        fit(model, [monitor])
    assert [each.category for each in found].count(UserWarning) == 1
    # Once in its life, and not where they did; warnings are errors here.
    fit(model, [monitor])
    model = network(BatchRenormalization)
    fit(model, [RenormScheduler(), RenormMonitor(every=3)], epochs=8)


def test_limits_that_never_relaxed_of_layers_that_measure():
    message = (
        "in layers second. They would from step 300 on. That is plain batch "
        "normalization; with a lower `momentum` they relax sooner."
    )
    model = network(BatchRenormalization)
    with pytest.warns(UserWarning, match=re.escape(message)):
        fit(model, [RenormMonitor(every=3)], epochs=8)


@pytest.mark.parametrize(
    ("correction", "is_gated", "remedy"),
    [
        (1.0, False, "Raise r_max and d_max, or see `keras_renorm.diagnos"),
        (0.6, True, ": training and inference stay apart. See `keras_reno"),
        # It finds batches good: that is no fault.
        (0.4, True, None),
        (0.0, True, None),
    ],
)
def test_limits_that_clip_matter_where_the_layer_corrects(
    correction, is_gated, remedy
):
    layer = BatchRenormalization(**({} if is_gated else {"r_max": 2.0}))
    layer.build((None, 3))
    layer.step.assign(2.0 * max(layer.r_max.end_step, layer.d_max.end_step))
    row = {"layer": "bn", "clipped": 0.9, "correction": correction}
    messages = limits_messages({"bn": layer}, [row])
    if remedy is None:
        assert messages == {}
    else:
        assert remedy in messages["clipped"]
    # Of a layer that stood still nothing is known.
    assert limits_messages({"bn": layer}, []) == {}


def test_limits_that_clip_too_much():
    model = network(BatchRenormalization, r_max=1.01, d_max=0.01)
    monitor = RenormMonitor(every=3)
    message = "Limits of renormalization clip 100%"
    with pytest.warns(UserWarning, match=message):
        fit(model, [monitor])
    fit(model, [monitor])


@pytest.mark.slow
@pytest.mark.parametrize("is_sorted", [True, False])
def test_batches_that_are_no_random_draws(is_sorted, rng):
    x = helpers.inputs_of(rng, (160, 3))
    if is_sorted:
        x = x[np.argsort(x[:, 0])]
    batches = [x[at : at + 8] for at in range(0, 160, 8)]
    monitor = RenormMonitor(every=100, dataset=batches)
    run = {"model": network(), "callbacks": [monitor], "x": x, "y": x[:, :1]}
    if not is_sorted:
        fit(**run)
        return
    message = (
        r"Batches of `dataset` do not look i.i.d.: their means vary [\d.]+"
    )
    with pytest.warns(UserWarning, match=message) as found:
        fit(**run)
    assert [each.category for each in found].count(UserWarning) == 1


def test_tensorboard_gets_each_probe(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, tag, data, step):
            written.append((tag, data, step))

        def flush(self):
            written.append("flush")

    module = types.ModuleType("tensorboard.summary")
    module.Writer = Writer
    monkeypatch.setitem(
        sys.modules, "tensorboard", types.ModuleType("tensorboard")
    )
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    monitor = RenormMonitor(every=4, log_dir=tmp_path)
    fit(network(), [monitor], epochs=1)
    assert written[-1] == "flush"
    gaps = [each for each in written[:-1] if each[0] == "first/renorm_gap"]
    assert gaps == [
        ("first/renorm_gap", row["gap"], row["step"])
        for row in monitor.rows
        if row["layer"] == "first"
    ]


def test_without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    message = (
        "`log_dir` needs tensorboard, which TensorFlow does not install: pip "
        "install tensorboard. Received: log_dir='logs'."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        RenormMonitor(log_dir="logs")


def test_errors():
    with pytest.raises(ValueError, match=r"`every` must be at least 1\. Rec"):
        RenormMonitor(every=0)
    with pytest.raises(TypeError, match=r"`every` must be an integer\. Rec"):
        RenormMonitor(every=2.5)
    with pytest.raises(TypeError, match=r"`per_layer` must be True or False\."):
        RenormMonitor(per_layer=1)
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(1)], name="mlp")
    with pytest.raises(ValueError, match="model=mlp, which has none"):
        fit(plain, [RenormMonitor()])
    if networks.HAS_RENORM:
        model = network(layers.BatchNormalization, renorm=True)
        with pytest.raises(ValueError, match="Received: layers first, second"):
            fit(model, [RenormMonitor()])


RENORM = {"r_max": 2.0, "d_max": 1.0, "correction": 0.5}


def test_rows_are_drawn():
    rows = [
        {
            "step": step,
            "layer": name,
            "gap": 0.1 * step,
            "r": 1.5,
            "d": 0.2,
            **(RENORM if name == "renorm" else {}),
        }
        for step in (1, 3)
        for name in ("bn", "renorm")
    ]
    monitor = RenormMonitor()
    monitor.rows = rows
    figure = monitor.plot()
    gap, r, d, correction = figure.axes
    drawn = [
        [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines]
        for ax in (gap, r, d)
    ]
    assert drawn == [
        [(1, 3, 0.1, 0.1 * 3)] * 2,
        [(1, 3, 1.5, 1.5), (1, 3, 1.5, 1.5), (1, 3, 2, 2)],
        [(1, 3, 0.2, 0.2), (1, 3, 0.2, 0.2), (1, 3, 1, 1)],
    ]
    assert correction.get_ylabel() == "correction"
    plain, renorm = correction.lines
    assert np.isnan(plain.get_ydata()).all()
    assert renorm.get_ydata().tolist() == [0.5, 0.5]
    monitor.rows = [row for row in rows if row["layer"] == "bn"]
    assert len(monitor.plot().axes) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["bn", "renorm"]
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close("all")
