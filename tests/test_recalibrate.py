"""Population statistics over a dataset."""

import copy

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    diagnostics,
    get_statistics,
    recalibrate,
)
from keras_renorm.callbacks import RecalibrateStatistics, RenormMonitor
from tests import helpers, networks

KINDS = [layers.BatchNormalization, BatchNormalization, BatchRenormalization]


def first_layer(kind=BatchNormalization, sizes=(5, 3), **arguments):
    return keras.Sequential(
        [keras.Input(sizes), kind(name="bn", **arguments), layers.Dense(2)]
    )


class Sequence(keras.utils.PyDataset):
    """Batches of several sizes, with labels."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index], np.zeros(len(self.parts[index]))


class Endless(Sequence):
    num_batches = None


def dataset_of(form, x, cuts):
    """Examples in one of the forms."""
    if "tf.data" in form:
        tf = pytest.importorskip("tensorflow")
        dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x))))
        dataset = dataset.batch(5)
        if form == "tf.data":
            return dataset
        return dataset.filter(lambda x, y: True)
    parts = np.split(x, cuts)
    return {
        "list": parts,
        "generator": (part for part in parts),
        "PyDataset": Sequence(parts),
        "pairs": [(part, np.zeros(len(part))) for part in parts],
        "array": x,
    }[form]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_of_its_own_is_run(kind, is_frozen, rng):
    class Activated(kind):
        def call(self, inputs, training=None, mask=None):
            return abs(super().call(inputs, training=training, mask=mask)) + 1

    x = helpers.inputs_of(rng, (24, 4))
    results = []
    for is_by_layer in (False, True):
        layer = Activated(name="first")
        after = BatchNormalization(name="after")
        model = keras.Sequential([keras.Input((4,)), layer, after])
        layer.trainable = not is_frozen
        recalibrate(
            model,
            x,
            layer_by_layer=is_by_layer,
            batch_size=24,
            verbose=False,
        )
        results.append([*helpers.statistics(layer), *helpers.statistics(after)])
    for one, other in zip(*results, strict=True):
        helpers.assert_close(one, other, 1e-4)


@pytest.mark.parametrize("shape", [(4, 30), (4, 12, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_on_the_first_axis(kind, shape, rng):
    x = helpers.inputs_of(rng, shape, 0)
    inputs = keras.Input(batch_shape=(4, None, *shape[2:]))
    model = keras.Model(inputs, kind(axis=0)(inputs))
    parts = [(x[:, :5],), (x[:, 5:],)]
    recalibrate(model, parts, verbose=False)
    mean, variance = helpers.statistics(model.layers[-1])
    helpers.assert_close(mean, x.reshape(4, -1).mean(axis=1), 1e-5)
    helpers.assert_close(variance, x.reshape(4, -1).var(axis=1), 1e-5)
    diagnostics.discrepancy(model, parts, verbose=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_batches_does_not_matter(kind, rng):
    x = helpers.inputs_of(rng, (48, 5, 3))
    x = x + np.linspace(0, 5, 48, dtype="float32").reshape(-1, 1, 1)
    rows = x.reshape(-1, 3).astype("float64")
    for size in (2, 4, 8, 16, 48, 7):
        model = first_layer(kind)
        recalibrate(model, x, batch_size=size, verbose=False)
        mean, variance = helpers.statistics(model.layers[0])
        helpers.assert_close(mean, rows.mean(axis=0), 1e-6)
        helpers.assert_close(variance, rows.var(axis=0), 1e-6)


@pytest.mark.parametrize(
    "form",
    [
        "list",
        "generator",
        "PyDataset",
        "pairs",
        "array",
        "tf.data",
        "tf.data of unknown length",
    ],
)
def test_every_kind_of_dataset(form, rng):
    x = helpers.inputs_of(rng, (20, 5, 3))
    dataset = dataset_of(form, x, [1, 4, 12])
    model = first_layer()
    recalibrate(model, dataset, verbose=False)
    rows = x.reshape(-1, 3)
    mean, variance = helpers.statistics(model.layers[0])
    helpers.assert_close(mean, rows.mean(axis=0), 1e-5)
    helpers.assert_close(variance, rows.var(axis=0), 1e-5)


def test_steps_and_large_means(rng):
    x = (1e4 + rng.normal(size=(64, 5, 3))).astype("float32")
    model = first_layer()
    batches = [x[at : at + 8] for at in range(0, 64, 8)]
    recalibrate(model, batches, steps=3, verbose=False)
    rows = x[:24].reshape(-1, 3).astype("float64")
    variance = helpers.statistics(model.layers[0])[1]
    assert np.all(np.abs(variance / rows.var(axis=0) - 1) < 5e-5)


def test_large_images(rng):
    x = rng.normal(size=(1, 1024, 1024, 2)).astype("float32")
    model = keras.Sequential([keras.Input(x.shape[1:]), BatchNormalization()])
    recalibrate(model, x, verbose=False)
    rows = x.reshape(-1, 2).astype("float64")
    mean, variance = helpers.statistics(model.layers[0])
    np.testing.assert_allclose(mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(variance, rows.var(axis=0), rtol=1e-5)


def test_masks_count_right(rng):
    x = helpers.inputs_of(rng, (12, 6, 3))
    lengths = rng.integers(1, 7, 12)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 0
    inputs = keras.Input((6, 3))
    masked = layers.Masking()(inputs)
    model = keras.Model(inputs, BatchNormalization()(masked))
    recalibrate(model, x, batch_size=5, verbose=False)
    rows = np.concatenate([r[:n] for r, n in zip(x, lengths, strict=True)])
    mean, variance = helpers.statistics(model.layers[-1])
    helpers.assert_close(mean, rows.mean(axis=0), 1e-5)
    helpers.assert_close(variance, rows.var(axis=0), 1e-5)


def activations(model, x):
    """What goes into each normalization in inference, as rows."""
    inner = [
        keras.Model(model.inputs, layer.input)
        for layer in networks.normalizations(model)
    ]
    return [
        np.asarray(each.predict(x, verbose=0)).reshape(
            -1, each.output.shape[-1]
        )
        for each in inner
    ]


def deep(kind=BatchNormalization):
    inputs = keras.Input((4,))
    x = inputs
    for _ in range(3):
        x = layers.Dense(6, activation="relu")(x)
        x = kind()(x)
    return keras.Model(inputs, layers.Dropout(0.5)(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_is_what_inference_sees(kind, rng):
    x = helpers.inputs_of(rng, (40, 4))
    # Sorted data: batches that differ as much as they can.
    x = x[np.argsort(x[:, 0])]
    model = networks.randomize(deep(kind), rng)
    recalibrate(model, x, batch_size=5, layer_by_layer=True, verbose=False)
    for layer, rows in zip(
        networks.normalizations(model), activations(model, x), strict=True
    ):
        mean, variance = helpers.statistics(layer)
        helpers.assert_close(mean, rows.mean(axis=0), 1e-5)
        helpers.assert_close(variance, rows.var(axis=0), 1e-5)
    # One pass of the whole data as one batch is the same; of batches, not.
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    recalibrate(other, x, batch_size=40, verbose=False)
    for key, value in get_statistics(other).items():
        helpers.assert_close(value, get_statistics(model)[key], 1e-4)
    recalibrate(other, x, batch_size=5, verbose=False)
    one_pass, exact = (
        helpers.statistics(networks.normalizations(each)[-1])[0]
        for each in (other, model)
    )
    assert np.abs(one_pass - exact).max() > 0.02 * np.abs(exact).max()


def test_only_moving_statistics_change(rng):
    model = networks.sequential(
        lambda **arguments: BatchRenormalization(r_max=2.0, **arguments)
    )
    networks.normalizations(model)[0].frozen_statistics = True
    networks.normalizations(model)[1].trainable = False
    model.compile("adam", "mse")
    x = networks.data_of(model, rng, 8)
    before = {each.path: helpers.to_numpy(each) for each in model.weights}
    recalibrate(model, x, batch_size=4, verbose=False)
    for weight in model.weights:
        is_same = np.array_equal(before[weight.path], helpers.to_numpy(weight))
        assert is_same != ("moving" in weight.path), weight.path
    layer = networks.normalizations(model)[0]
    assert layer.momentum == 0.99
    assert layer.frozen_statistics
    # The layer is itself again.
    assert "call" not in vars(layer)


@pytest.mark.parametrize("network", networks.ALL)
def test_networks_of_all_kinds(network, rng):
    model = networks.randomize(network(BatchNormalization), rng)
    before = get_statistics(model)
    x = networks.data_of(model, rng, 8)
    recalibrate(model, x, batch_size=4, verbose=False)
    for key, value in get_statistics(model).items():
        assert np.all(np.isfinite(value))
        assert np.any(value != before[key]), key


def test_a_shared_layer_pools_its_calls(rng):
    model = networks.shared(BatchNormalization)
    x = networks.data_of(model, rng, 8)
    recalibrate(model, x, batch_size=3, verbose=False)
    rows = np.concatenate(x)
    layer = networks.normalizations(model)[0]
    helpers.assert_close(layer.moving_mean, rows.mean(axis=0), 1e-5)
    helpers.assert_close(layer.moving_variance, rows.var(axis=0), 1e-5)


def test_a_prior_reaches_deeper_layers_as_it_serves(rng):
    """Each layer is measured behind layers that normalize by the mixture."""
    x = helpers.inputs_of(rng, (30, 2))
    models = [
        networks.randomize(
            keras.Sequential(
                [
                    keras.Input((2,)),
                    BatchNormalization(name="first"),
                    layers.Activation("tanh"),
                    BatchNormalization(name="second"),
                ]
            ),
            np.random.default_rng(0),
        )
        for _ in range(3)
    ]
    banks = []
    for model, layer_by_layer in zip(models, (None, True, False), strict=True):
        old = get_statistics(model)
        recalibrate(
            model,
            x,
            prior_examples=70,
            layer_by_layer=layer_by_layer,
            verbose=False,
        )
        banks.append(get_statistics(model))
    between = activations(models[0], x)[1]
    helpers.assert_close(
        banks[0]["second/moving_mean"],
        0.7 * old["second/moving_mean"] + 0.3 * between.mean(axis=0),
        1e-5,
    )
    for key, value in banks[1].items():
        assert np.array_equal(banks[0][key], value)
    difference = banks[2]["second/moving_mean"] - banks[0]["second/moving_mean"]
    assert np.abs(difference).max() > 1e-2


def test_prior_examples_mix_old_and_new(rng):
    x = helpers.inputs_of(rng, (24, 3))
    model = networks.randomize(first_layer(sizes=(3,)), rng)
    old = helpers.statistics(model.layers[0])
    recalibrate(model, x, batch_size=5, prior_examples=72, verbose=False)
    # 72 / (72 + 24)
    for new, before, of_data in zip(
        helpers.statistics(model.layers[0]),
        old,
        (x.mean(axis=0), x.var(axis=0)),
        strict=True,
    ):
        helpers.assert_close(new, 0.75 * before + 0.25 * of_data, 1e-5)


def failures(x):
    nan = x.copy()
    nan[7, 0, 0] = np.nan

    def broken():
        yield x[:4]
        raise RuntimeError("disk")

    def endless():
        while True:
            yield x[:4]

    return [
        (nan, None, ValueError, "finite activations. Received: one that makes"),
        (x[:0], None, ValueError, "at least one batch. Received: dataset=<nd"),
        ([], None, ValueError, "at least one batch. Received: dataset=<list>"),
        (x, 9, ValueError, "Received: steps=9, for 5 batches"),
        (iter([x]), 2, ValueError, "Received: steps=2, for 1 batches"),
        (Endless([x]), None, ValueError, "`steps` must be given for a dataset"),
        (broken(), None, RuntimeError, "disk"),
        (x, 0, ValueError, "`steps` must be at least 1. Received: steps=0"),
        (x, 1.5, TypeError, "`steps` must be an integer. Received: steps=1.5"),
        (7, None, TypeError, "`dataset` must be arrays, a tf.data.Dataset"),
    ]


@pytest.mark.tensorflow
def test_a_tf_data_dataset_that_never_ends(rng):
    import tensorflow as tf

    x = helpers.inputs_of(rng, (20, 5, 3))
    forever = tf.data.Dataset.from_tensors(x).repeat()
    with pytest.raises(ValueError, match="`steps` must be given for a dataset"):
        recalibrate(first_layer(), forever)


@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_failures_leave_the_model_as_it_was(at, layer_by_layer, rng):
    x = helpers.inputs_of(rng, (20, 5, 3))
    dataset, steps, kind, message = failures(x)[at]
    if layer_by_layer and hasattr(dataset, "__next__"):
        kind, message = ValueError, "must be one that can be read again"
    model = networks.randomize(first_layer(), rng)
    before = get_statistics(model)
    with pytest.raises(kind, match=message):
        recalibrate(
            model,
            dataset,
            steps,
            batch_size=4,
            layer_by_layer=layer_by_layer,
            verbose=False,
        )
    for key, value in get_statistics(model).items():
        assert np.array_equal(value, before[key])
    assert "call" not in vars(model.layers[0])


def test_a_failure_in_the_second_layer_restores_the_first(rng):
    model = networks.randomize(deep(), rng)
    model.layers[3].kernel.assign(np.full((6, 6), 1e38))
    before = get_statistics(model)
    x = helpers.inputs_of(rng, (20, 4))
    with pytest.raises(ValueError, match="finite activations"):
        recalibrate(model, x, layer_by_layer=True, verbose=False)
    for key, value in get_statistics(model).items():
        assert np.array_equal(value, before[key])


def dense_pair():
    """The second layer sees what the first makes of a batch."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            BatchNormalization(name="first"),
            layers.Dense(6, activation="relu"),
            BatchNormalization(name="second"),
        ]
    )


def test_batches_of_one_element_go_layer_by_layer(rng):
    x = helpers.inputs_of(rng, (40, 4))
    model = networks.randomize(dense_pair(), rng)
    recalibrate(model, x, batch_size=1, verbose=False)
    for layer, rows in zip(
        networks.normalizations(model), activations(model, x), strict=True
    ):
        mean, variance = helpers.statistics(layer)
        helpers.assert_close(mean, rows.mean(axis=0), 1e-5)
        helpers.assert_close(variance, rows.var(axis=0), 1e-5)


def test_a_last_batch_of_one_element_does_not_reach_deeper_layers(rng):
    x = helpers.inputs_of(rng, (33, 4))
    model, other = (networks.randomize(dense_pair(), rng) for _ in range(2))
    other.set_weights(model.get_weights())
    recalibrate(model, x, batch_size=16, verbose=False)
    recalibrate(other, x[:32], batch_size=16, verbose=False)
    mean, variance = helpers.statistics(model.get_layer("first"))
    helpers.assert_close(mean, x.mean(axis=0), 1e-5)
    helpers.assert_close(variance, x.var(axis=0), 1e-5)
    for one, two in zip(
        helpers.statistics(model.get_layer("second")),
        helpers.statistics(other.get_layer("second")),
        strict=True,
    ):
        helpers.assert_close(one, two, 1e-6)


def test_a_prior_is_weighed_against_the_examples_that_count(rng):
    x = helpers.inputs_of(rng, (33, 4))
    model = networks.randomize(dense_pair(), rng)
    old = [helpers.statistics(each) for each in networks.normalizations(model)]
    weights = model.get_weights()
    recalibrate(model, x, batch_size=16, verbose=False)
    new = [helpers.statistics(each) for each in networks.normalizations(model)]
    model.set_weights(weights)
    recalibrate(
        model,
        x,
        batch_size=16,
        prior_examples=8,
        layer_by_layer=False,
        verbose=False,
    )
    # The last batch is of one example, which only the first layer counts.
    for at, count in enumerate((33, 32)):
        mixed = helpers.statistics(networks.normalizations(model)[at])
        for one, before, after in zip(mixed, old[at], new[at], strict=True):
            expected = (8 * before + count * after) / (8 + count)
            helpers.assert_close(one, expected, 1e-5)


@pytest.mark.parametrize(
    ("is_read_once", "layer_by_layer"), [(True, None), (False, False)]
)
def test_batches_of_one_element_in_one_pass(is_read_once, layer_by_layer, rng):
    x = helpers.inputs_of(rng, (8, 4))
    model = networks.randomize(dense_pair(), rng)
    before = get_statistics(model)
    batches = [(x[at : at + 1],) for at in range(8)]
    message = (
        "`dataset` must hold batches of two elements a channel or more, or be "
        "read with layer_by_layer=True, which needs data that can be read "
        "again. Received: one element a channel, normalized by itself, before "
        "second."
    )
    with helpers.raises(ValueError, message):
        recalibrate(
            model,
            iter(batches) if is_read_once else batches,
            layer_by_layer=layer_by_layer,
            verbose=False,
        )
    for key, value in get_statistics(model).items():
        np.testing.assert_array_equal(value, before[key])


def test_one_layer_takes_batches_of_one_element(rng):
    x = helpers.inputs_of(rng, (20, 3))
    model = first_layer(sizes=(3,))
    recalibrate(model, ((x[at : at + 1],) for at in range(20)), verbose=False)
    mean, variance = helpers.statistics(model.layers[0])
    helpers.assert_close(mean, x.mean(axis=0), 1e-5)
    helpers.assert_close(variance, x.var(axis=0), 1e-5)


def test_other_errors(rng):
    plain = keras.Sequential([keras.Input((2,)), layers.Dense(1)], name="mlp")
    x = np.zeros((4, 2), "float32")
    with pytest.raises(ValueError, match="model=mlp, which has none"):
        recalibrate(plain, x)
    with pytest.raises(ValueError, match="Received: prior_examples=-1"):
        recalibrate(first_layer(sizes=(2,)), x, prior_examples=-1)


def test_a_list_of_one_batch_is_no_list_of_inputs(rng):
    x = helpers.inputs_of(rng, (6, 5, 3))
    model = first_layer()
    recalibrate(model, [(x, np.zeros(6))])
    helpers.assert_close(
        get_statistics(model)["bn/moving_mean"], x.mean(axis=(0, 1)), 1e-5
    )


def test_all_batches_may_be_asked_for(rng):
    x = helpers.inputs_of(rng, (20, 5, 3))
    model = first_layer()
    recalibrate(model, x, steps=4, batch_size=5)
    helpers.assert_close(
        get_statistics(model)["bn/moving_mean"], x.mean(axis=(0, 1)), 1e-5
    )


def test_a_py_dataset_that_never_ends_needs_steps(rng):
    class Endless(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return None

        def __getitem__(self, index):
            return np.full((2, 5, 3), index, "float32")

    with pytest.raises(
        ValueError,
        match=r"^`steps` must be given for a dataset that never ends\. "
        r"Received: steps=None\.$",
    ):
        recalibrate(first_layer(), Endless())
    model = first_layer()
    recalibrate(model, Endless(), steps=5)
    assert np.all(get_statistics(model)["bn/moving_mean"] == 2)


def test_progress_is_shown(rng, capsys):
    recalibrate(first_layer(), helpers.inputs_of(rng, (20, 5, 3)), batch_size=5)
    assert "4/4" in capsys.readouterr().out


def trained(callbacks, validation):
    """Data, and the history of a run with callbacks."""
    keras.utils.set_random_seed(3)
    x = helpers.inputs_of(np.random.default_rng(0), (32, 3))
    y = x[:, :1]
    model = keras.Sequential(
        [
            keras.Input((3,)),
            BatchNormalization(name="bn"),
            layers.Dense(8, activation="relu"),
            BatchNormalization(name="deep"),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=2,
        verbose=0,
        shuffle=False,
        validation_data=(x, y) if validation else None,
        callbacks=callbacks(x),
    )
    return x, y, history.history


@pytest.mark.slow
@pytest.mark.tensorflow
def test_one_model_many_times_gives_no_warning_of_traces(rng, caplog):
    import tensorflow as tf

    x = helpers.inputs_of(rng, (12, 5, 3))
    model = first_layer()
    tf.get_logger().addHandler(caplog.handler)
    try:
        for count in range(1, len(x)):
            for layer_by_layer in (False, True):
                recalibrate(
                    model,
                    x[:count],
                    layer_by_layer=layer_by_layer,
                    verbose=False,
                )
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("validation", [False, True])
def test_the_callback_runs_before_validation_and_checkpoints(
    validation, rng, tmp_path
):
    path = tmp_path / "model.keras"

    def callbacks(x):
        return [
            RecalibrateStatistics(x, batch_size=8),
            keras.callbacks.ModelCheckpoint(path),
        ]

    x, y, history = trained(callbacks, validation)
    saved = keras.saving.load_model(path)
    mean, variance = helpers.statistics(saved.layers[0])
    helpers.assert_close(mean, x.mean(axis=0), 1e-5)
    helpers.assert_close(variance, x.var(axis=0), 1e-5)
    again = keras.models.clone_model(saved)
    again.set_weights(saved.get_weights())
    recalibrate(again, x, batch_size=8, verbose=False)
    for key, value in get_statistics(again).items():
        helpers.assert_close(get_statistics(saved)[key], value, 1e-5)
    if validation:
        loss = saved.evaluate(x, y, verbose=0)
        assert abs(loss / history["val_loss"][-1] - 1) < 1e-4


@pytest.mark.tensorflow
@pytest.mark.torch
def test_the_callback_behind_averaged_weights(rng, tmp_path):
    """What is saved has the averaged weights, and their statistics."""
    path = tmp_path / "model.keras"

    def callbacks(x):
        return [
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            RecalibrateStatistics(x, batch_size=8),
            keras.callbacks.ModelCheckpoint(path),
        ]

    keras.utils.set_random_seed(3)
    x = helpers.inputs_of(rng, (32, 3))
    model = deep_regression()
    model.compile(
        keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.9), "mse"
    )
    model.fit(
        x, x[:, :1], batch_size=8, epochs=2, verbose=0, callbacks=callbacks(x)
    )
    saved = keras.saving.load_model(path)
    again = keras.models.clone_model(saved)
    again.set_weights(saved.get_weights())
    recalibrate(again, x, batch_size=8, verbose=False)
    for key, value in get_statistics(again).items():
        helpers.assert_close(get_statistics(saved)[key], value, 1e-5)


def deep_regression():
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(8, activation="relu"),
            BatchNormalization(),
            layers.Dense(1),
        ]
    )


def test_the_callback_says_at_once_that_data_must_be_repeatable(rng):
    x = helpers.inputs_of(rng, (20, 5, 3))
    message = (
        "`dataset` must be one that can be read again, for it is read after "
        "each epoch; or never end, with `steps`. Received: "
        "dataset=<generator>, steps=None."
    )
    with helpers.raises(ValueError, message):
        RecalibrateStatistics(part for part in [x])


def test_the_callback_takes_a_generator_that_never_ends(rng):
    x = helpers.inputs_of(rng, (20, 5, 3))

    def forever():
        while True:
            yield (x,)

    model = first_layer()
    model.compile("sgd", "mse")
    callback = RecalibrateStatistics(forever(), steps=2)
    y = np.zeros((20, 5, 2))
    model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
    helpers.assert_close(
        helpers.statistics(model.layers[0])[0],
        x.reshape(-1, 3).mean(axis=0),
        1e-5,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"steps": 1.5}, "`steps` must be an integer"),
        ({"prior_examples": -1}, "`prior_examples` must be finite"),
        ({"layer_by_layer": 1}, "`layer_by_layer` must be True or False"),
    ],
)
def test_the_callback_checks_before_the_first_epoch(arguments, message, rng):
    x = helpers.inputs_of(rng, (20, 5, 3))
    model = first_layer()
    model.compile("sgd", "mse")
    before = model.get_weights()
    callback = RecalibrateStatistics(x, **arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        model.fit(x, np.zeros((20, 5, 2)), verbose=0, callbacks=[callback])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("kind", [RecalibrateStatistics, RenormMonitor])
def test_copies_of_a_callback_share_the_data(kind, rng):
    tf = pytest.importorskip("tensorflow")
    x = helpers.inputs_of(rng, (20, 3))
    data = tf.data.Dataset.from_tensor_slices(x).batch(5)
    callback = kind(dataset=data)
    callbacks = copy.deepcopy([callback, callback])
    assert callbacks[0] is callbacks[1] is not callback
    assert callbacks[0].dataset is data
    assert all(
        value == vars(callbacks[0])[name]
        for name, value in vars(callback).items()
        if type(value).__eq__ is not object.__eq__
    )
    model = first_layer(sizes=(3,))
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((20, 2)), verbose=0, callbacks=[callbacks[0]])
    if kind is RenormMonitor:
        assert callbacks[0].rows
        assert not callback.rows
    else:
        helpers.assert_close(
            helpers.statistics(model.layers[0])[0], x.mean(axis=0), 1e-5
        )


def test_the_callback_without_normalization(rng):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)], name="mlp")
    model.compile("sgd", "mse")
    x = np.zeros((4, 2), "float32")
    with pytest.raises(ValueError, match="model=mlp, which has none"):
        model.fit(x, x[:, :1], verbose=0, callbacks=[RecalibrateStatistics(x)])


@pytest.mark.skipif(
    not networks.HAS_RENORM, reason="Keras has no renorm before 3.14"
)
def test_keras_layers_with_renorm_are_to_be_converted():
    model = keras.Sequential(
        [keras.Input((2,)), layers.BatchNormalization(name="bn", renorm=True)]
    )
    with pytest.raises(
        ValueError,
        match=r"^`model` must have no Keras layer with `renorm=True`, whose "
        r"moving statistics follow from others; `keras_renorm.convert` it. "
        r"Received: layers bn.$",
    ):
        recalibrate(model, np.ones((4, 2), "float32"))


class Assigning(layers.Layer):
    """A layer that counts its calls and draws numbers, in inference too."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), trainable=False)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs):
        self.calls.assign(self.calls + 1)
        noise = keras.random.normal((1,), seed=self.seed)
        return inputs + 0.0 * noise


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_what_is_assigned_in_inference_stays(layer_by_layer, rng):
    x = rng.normal(size=(16, 5, 3)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((5, 3), batch_size=8),
            Assigning(),
            layers.LSTM(2, stateful=True, return_sequences=True),
            BatchNormalization(name="bn"),
        ]
    )
    model.predict(x, batch_size=8, verbose=0)
    before = {
        variable.path: helpers.to_numpy(variable)
        for variable in model.variables
    }
    recalibrate(
        model, x, batch_size=8, layer_by_layer=layer_by_layer, verbose=False
    )
    changed = [
        variable.name
        for variable in model.variables
        if not np.array_equal(helpers.to_numpy(variable), before[variable.path])
    ]
    assert changed == ["moving_mean", "moving_variance"]


@pytest.mark.parametrize("kind", ["end", "overwritten", "before", "after"])
def test_statistics_are_those_of_the_weights_that_fit_leaves(kind, rng):
    x = helpers.inputs_of(rng, (32, 3)) / 5
    keras.utils.set_random_seed(3)
    model = deep_regression()
    frequency = 3 if kind == "overwritten" else None
    optimizer = keras.optimizers.SGD(
        0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=frequency
    )
    model.compile(optimizer, "mse")
    callbacks = [RecalibrateStatistics(x)]
    if kind in ("before", "after"):
        at = int(kind == "after")
        callbacks.insert(at, keras.callbacks.SwapEMAWeights())
    y = x[:, :1]
    model.fit(
        x,
        y,
        epochs=2,
        batch_size=8,
        verbose=0,
        validation_data=(x, y),
        callbacks=callbacks,
    )
    hidden = helpers.to_numpy(model.layers[0](x)).mean(axis=0)
    mean = helpers.statistics(model.layers[1])[0]
    helpers.assert_close(mean, hidden, 1e-5)


def test_the_callback_leaves_frozen_layers_unless_they_are_named(rng):
    x = rng.normal(4.0, 1.0, (32, 3)).astype("float32")
    for chosen, moved in ((None, [1]), ("first", [0]), (["first"], [0])):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                BatchNormalization(name="first", frozen_statistics=True),
                BatchNormalization(name="second", momentum=1.0),
                BatchNormalization(name="third", trainable=False),
                layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse")
        callback = RecalibrateStatistics(x, layers=chosen)
        model.fit(x, x[:, :1], verbose=0, callbacks=[callback])
        assert moved == [
            at
            for at, layer in enumerate(model.layers[:3])
            if np.any(helpers.statistics(layer)[0])
        ]


def test_data_that_is_not_finite_ends_no_fit(rng):
    x = rng.normal(4.0, 1.0, (32, 3)).astype("float32")
    bad = x.copy()
    bad[3] = np.nan
    model = keras.Sequential(
        [keras.Input((3,)), BatchNormalization(name="bn"), layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="^Statistics were not recalibrated"):
        history = model.fit(
            x,
            x[:, :1],
            epochs=2,
            verbose=0,
            callbacks=[RecalibrateStatistics(bad)],
        )
    assert len(history.history["loss"]) == 2


def test_layers_that_data_does_not_reach_are_left_out(rng):
    x = rng.normal(4.0, 1.0, (32, 3)).astype("float32")

    class Heads(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = BatchNormalization(name="bn")
            self.auxiliary = BatchNormalization(name="auxiliary")

        def call(self, inputs, training=None):
            outputs = self.bn(inputs, training=training)
            if training is not None and not training:
                return outputs
            return outputs + self.auxiliary(inputs, training=training)

    model = Heads()
    model(x, training=None)
    message = (
        "Layers that no element of `dataset` reached are left out: auxiliary."
    )
    for layer_by_layer in (False, True):
        with pytest.warns(UserWarning, match=message):
            recalibrate(model, x, layer_by_layer=layer_by_layer, verbose=False)
        helpers.assert_close(
            helpers.statistics(model.bn)[0], x.mean(axis=0), 1e-5
        )
        assert not np.any(helpers.statistics(model.auxiliary)[0])
    with pytest.raises(ValueError, match="must reach batch normalization"):
        recalibrate(model, x, layers="auxiliary", verbose=False)


@pytest.mark.parametrize("name", ["recalibrate", "discrepancy"])
def test_a_loop_over_batches_traces_once(name, rng):
    traces = []

    class Traced(layers.Layer):
        def call(self, inputs):
            traces.append(1)
            return inputs

    x = rng.normal(4.0, 1.0, (32, 3)).astype("float32")
    model = keras.Sequential(
        [keras.Input((3,)), Traced(), BatchNormalization(), layers.Dense(1)]
    )
    model.run_eagerly = False
    functions = {
        "recalibrate": recalibrate,
        "discrepancy": diagnostics.discrepancy,
    }
    functions[name](model, x, verbose=False)
    if keras.backend.backend() != "tensorflow":
        return  # there are no graphs to keep
    count = len(traces)
    for _ in range(3):
        functions[name](model, x + 1, verbose=False)
        assert len(traces) == count
    assert np.allclose(helpers.statistics(model.layers[1])[0], 0) == (
        name == "discrepancy"
    )
    model.layers[1].epsilon = 0.1
    functions[name](model, x, verbose=False)
    assert len(traces) > count


def test_a_layer_without_a_mask_argument_is_watched(rng):
    class Frozen(keras.layers.BatchNormalization):
        def call(self, inputs):
            return super().call(inputs, training=False)

    x = rng.normal(4.0, 1.0, (32, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), Frozen(), Frozen()])
    recalibrate(model, x, layer_by_layer=True, verbose=False)
    helpers.assert_close(
        helpers.statistics(model.layers[0])[0], x.mean(axis=0), 1e-5
    )
    report = diagnostics.discrepancy(model, x, verbose=False)
    assert [row.gap for row in report.layers] == [0.0, 0.0]


@pytest.mark.parametrize(
    "parent", [keras.layers.BatchNormalization, BatchRenormalization]
)
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_what_a_class_hands_to_its_parent_is_measured(
    layer_by_layer, parent, rng
):
    class OfGraphs(parent):  # values of nodes, and which of them count
        def build(self, shapes):
            super().build(shapes[0])
            self.input_spec = None

        def compute_output_shape(self, shapes):
            return shapes[0]

        def call(self, inputs, training=None):
            nodes, counted = inputs
            return super().call(
                keras.ops.square(nodes), training=training, mask=counted > 0
            )

    nodes, counted = keras.Input((3,)), keras.Input(())
    layer = OfGraphs()
    outputs = keras.layers.BatchNormalization()(layer([nodes, counted]))
    model = keras.Model([nodes, counted], outputs)
    x = rng.normal(2.0, 1.0, (32, 3)).astype("float32")
    data = [x, (np.arange(32) < 24).astype("float32")]
    recalibrate(model, data, layer_by_layer=layer_by_layer, verbose=False)
    squares = x[:24].astype("float64") ** 2
    mean, variance = helpers.statistics(layer)
    helpers.assert_close(mean, squares.mean(axis=0), 1e-5)
    helpers.assert_close(variance, squares.var(axis=0), 1e-5)
    report = diagnostics.discrepancy(model, data, verbose=False)
    assert all(row.gap < 1e-5 for row in report.layers)
    assert type(layer) is OfGraphs
