"""What training and inference do differently: figures and unchanged models."""

import dataclasses
import math
import sys

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    set_statistics,
)
from keras_renorm.diagnostics import discrepancy
from tests import helpers, networks

KINDS = [layers.BatchNormalization, BatchNormalization, BatchRenormalization]


def one_layer(layer, shape):
    return keras.Sequential([keras.Input(shape), layer])


def batches_of(rng, sizes, shape):
    """Batches whose means differ, and examples whose means do."""
    return [
        0.6 * helpers.inputs_of(rng, (size, *shape))
        + rng.normal(size=(size, *[1] * len(shape))).astype("float32")
        + np.float32(0.3 * at)
        for at, size in enumerate(sizes)
    ]


def expected_r_and_d(layer, batches):
    """By the paper's formulas, in float64; a row a batch."""
    mean, variance = (
        each.astype("float64") for each in helpers.statistics(layer)
    )
    sigma = np.sqrt(variance + layer.epsilon)
    rows = [
        batch.reshape(-1, batch.shape[-1]).astype("float64")
        for batch in batches
    ]
    r = [np.sqrt(each.var(axis=0) + layer.epsilon) / sigma for each in rows]
    d = [(each.mean(axis=0) - mean) / sigma for each in rows]
    return np.array(r), np.array(d)


def kl(mean_p, variance_p, mean_q, variance_q):
    """Kullback-Leibler divergence of two Gaussians, in nats."""
    return 0.5 * (
        np.log(variance_q / variance_p)
        + (variance_p + (mean_p - mean_q) ** 2) / variance_q
        - 1
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (4, 3, 5)])
def test_r_d_their_shares_and_divergence(kind, shape, rng):
    layer = kind(name="bn")
    model = one_layer(layer, shape)
    helpers.randomize(layer, rng)
    batches = batches_of(rng, [6, 9, 4, 8], shape)
    report = discrepancy(model, batches, r_max=1.7, d_max=0.8, verbose=False)
    (row,) = report.rows
    r, d = expected_r_and_d(layer, batches)
    for name, values in (("r", r), ("d", d)):
        expected = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
        names = ("lowest", "5%", "median", "95%", "highest")
        helpers.assert_close(
            [row[f"{name}_{each}"] for each in names], expected, 1e-5
        )
    beyond_r, beyond_d = (r > 1.7) | (r < 1 / 1.7), abs(d) > 0.8
    assert 0 < beyond_r.mean() < 1
    assert 0 < beyond_d.mean() < 1
    assert row["beyond_r"] == pytest.approx(beyond_r.mean())
    assert row["beyond_d"] == pytest.approx(beyond_d.mean())
    assert row["beyond"] == pytest.approx((beyond_r | beyond_d).mean())
    # In units of the moving statistics these are 0 and 1.
    both = kl(d, r**2, 0, 1) + kl(0, 1, d, r**2)
    assert row["jeffreys"] == pytest.approx(both.mean(), rel=1e-5)
    rows = np.concatenate(batches).reshape(-1, 5).astype("float64")
    r, d = expected_r_and_d(layer, [rows])
    both = kl(d, r**2, 0, 1) + kl(0, 1, d, r**2)
    assert row["population_jeffreys"] == pytest.approx(both.mean(), rel=1e-5)
    assert row["elements"] == np.size(rows) / 5 / 4
    assert row["examples"] == 27 / 4
    assert row["batches"] == 4


def test_limits_are_the_layers_own_or_the_papers(rng):
    layer = BatchRenormalization(r_max=2.0, d_max=0.5)
    x = helpers.inputs_of(rng, (8, 3))
    own, given = (
        discrepancy(one_layer(layer, (3,)), x, verbose=False, **limits)
        for limits in ({}, {"r_max": 4})
    )
    assert (own.layers[0].r_max, own.layers[0].d_max) == (2.0, 0.5)
    assert (given.layers[0].r_max, given.layers[0].d_max) == (4.0, 0.5)
    plain = discrepancy(one_layer(BatchNormalization(), (3,)), x, verbose=False)
    assert (plain.layers[0].r_max, plain.layers[0].d_max) == (3.0, 5.0)


@pytest.mark.parametrize("shape", [(5,), (4, 3, 5)])
def test_f_and_scatter_are_those_of_the_examples_means(shape, rng):
    layer = BatchNormalization()
    model = one_layer(layer, shape)
    batches = batches_of(rng, [6, 9, 4, 8], shape)
    (found,) = discrepancy(model, batches, verbose=False).layers
    means = [
        batch.reshape(len(batch), -1, 5).mean(axis=1).astype("float64")
        for batch in batches
    ]
    # One-way analysis of variance.
    whole = np.concatenate(means).mean(axis=0)
    between = sum(
        len(each) * (each.mean(axis=0) - whole) ** 2 for each in means
    ) / (4 - 1)
    within = sum(
        ((each - each.mean(axis=0)) ** 2).sum(axis=0) for each in means
    ) / (27 - 4)
    assert found.f == pytest.approx((between / within).mean(), rel=1e-4)
    # Means of batches, weighted by size; and what random draws make of them.
    rows = np.concatenate(batches).reshape(-1, 5).astype("float64")
    variance = rows.var(axis=0) + layer.epsilon
    between = sum(
        len(each) / 27 * (each.mean(axis=0) - whole) ** 2 for each in means
    ) * (4 / 3)
    expected = math.sqrt(np.mean(between / variance))
    assert found.scatter == pytest.approx(expected, rel=1e-4)
    expected = math.sqrt(np.mean(within * 4 / 27 / variance))
    assert found.scatter_expected == pytest.approx(expected, rel=1e-4)


def test_batch_noise_is_the_gap_with_the_right_statistics(rng):
    """Without what the batches' own means shift: these are one population."""
    layer = BatchNormalization(center=False, epsilon=1e-6)
    model = one_layer(layer, (5,))
    x = helpers.inputs_of(rng, (6 * 400, 5))
    layer.moving_mean.assign(x.mean(axis=0))
    layer.moving_variance.assign(x.var(axis=0))
    (found,) = discrepancy(model, x, batch_size=6, verbose=False).layers
    assert found.batch_noise == pytest.approx(found.gap, rel=5e-3)
    assert found.shift < 0.02


def test_random_draws_have_an_f_of_one(rng):
    x = helpers.inputs_of(rng, (16 * 60, 4, 4, 12))
    # An example's elements are alike, which is no likeness of a batch's.
    x += rng.normal(size=(len(x), 1, 1, 12)).astype("float32")
    model = one_layer(BatchNormalization(), (4, 4, 12))
    (found,) = discrepancy(model, x, batch_size=16, verbose=False).layers
    # 12 channels of F(59, 900): the mean has a standard deviation of 0.06.
    assert abs(found.f - 1) < 0.2
    assert found.scatter == pytest.approx(found.scatter_expected, rel=0.1)


def training_outputs(layer, batch):
    """Of batch normalization in float64, and in inference."""
    gamma, beta = (
        helpers.to_numpy(each).astype("float64")
        for each in (layer.gamma, layer.beta)
    )
    mean, variance = helpers.statistics(layer)
    rows = batch.reshape(-1, batch.shape[-1]).astype("float64")

    def normalized(mean, variance):
        return gamma * (rows - mean) / np.sqrt(variance + layer.epsilon) + beta

    return (
        normalized(rows.mean(axis=0), rows.var(axis=0)),
        normalized(mean, variance),
    )


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gaps_of_layer_and_model(kind, rng):
    layer = kind()
    model = one_layer(layer, (4, 3))
    helpers.randomize(layer, rng)
    batches = batches_of(rng, [5, 7], (4, 3))
    report = discrepancy(model, batches, verbose=False)
    trained, inferred = map(
        np.concatenate,
        zip(
            *(training_outputs(layer, batch) for batch in batches), strict=True
        ),
    )
    expected = math.sqrt(
        np.mean((trained - inferred) ** 2) / np.mean(trained**2)
    )
    assert report.layers[0].gap == pytest.approx(expected, rel=1e-5)
    assert report.gap == pytest.approx(expected, rel=1e-5)


def test_open_renormalization_has_no_gap(rng):
    layers_ = [
        BatchRenormalization(r_max=math.inf, d_max=math.inf) for _ in range(2)
    ]
    model = keras.Sequential(
        [keras.Input((3,)), layers_[0], layers.Dense(4), layers_[1]]
    )
    for layer in layers_:
        helpers.randomize(layer, rng)
    report = discrepancy(model, batches_of(rng, [8] * 3, (3,)), verbose=False)
    assert max(layer.gap for layer in report.layers) < 1e-5
    assert report.gap < 1e-5
    assert report.layers[0].shift > 0.3  # which is not hidden by that


def test_frozen_layers_have_no_gap(rng):
    class Branches(keras.Model):
        def __init__(self):
            super().__init__()
            self.inferring = BatchNormalization(name="inferring")
            self.untrainable = BatchNormalization(name="untrainable")
            self.untrainable.trainable = False
            self.frozen = BatchNormalization(
                name="frozen", frozen_statistics=True
            )
            self.moving = BatchNormalization(name="training")

        def call(self, x, training=None):
            return (
                self.inferring(x, training=False)
                + self.untrainable(x, training=training)
                + self.frozen(x, training=training)
                + self.moving(x, training=training)
            )

    model = Branches()
    x = helpers.inputs_of(rng, (12, 3))
    model(x)
    found = {
        layer.name: layer
        for layer in discrepancy(model, x, batch_size=6, verbose=False).layers
    }
    for name in ("inferring", "untrainable", "frozen"):
        assert found[name].is_frozen
        assert found[name].gap == 0
    assert not found["training"].is_frozen
    assert found["training"].gap > 0.5


def test_virtual_batches_count_as_batches(rng):
    layer = BatchNormalization(virtual_batch_size=3)
    model = one_layer(layer, (4, 2))
    helpers.randomize(layer, rng)
    batches = batches_of(rng, [7, 6], (4, 2))
    (found,) = discrepancy(model, batches, verbose=False).layers
    groups = [
        group
        for batch in batches
        for group in np.split(batch, range(3, len(batch), 3))
    ]
    r, d = expected_r_and_d(layer, groups)
    assert found.batches == 5
    assert found.r[0] == pytest.approx(r.min(), rel=1e-5)
    assert found.d[-1] == pytest.approx(d.max(), rel=1e-5)
    pairs = [training_outputs(layer, group) for group in groups]
    trained, inferred = map(np.concatenate, zip(*pairs, strict=True))
    expected = math.sqrt(np.sum((trained - inferred) ** 2) / np.sum(trained**2))
    assert found.gap == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_elements_do_not_count(kind, rng):
    x = helpers.inputs_of(rng, (12, 6, 3))
    lengths = rng.integers(1, 7, 12)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 0
    inputs = keras.Input((6, 3))
    layer = kind()
    model = keras.Model(inputs, layer(layers.Masking()(inputs)))
    helpers.randomize(layer, rng)
    (found,) = discrepancy(model, x, batch_size=4, verbose=False).layers
    parts = [
        np.concatenate([r[:n] for r, n in zip(x[at], lengths[at], strict=True)])
        for at in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    r, d = expected_r_and_d(layer, parts)
    assert found.r[0] == pytest.approx(r.min(), rel=1e-5)
    assert found.d[0] == pytest.approx(d.min(), rel=1e-5)
    assert found.elements == pytest.approx(lengths.sum() / 3)
    if kind is not BatchRenormalization:
        pairs = [training_outputs(layer, part) for part in parts]
        trained, inferred = map(np.concatenate, zip(*pairs, strict=True))
        expected = math.sqrt(
            np.sum((trained - inferred) ** 2) / np.sum(trained**2)
        )
        assert found.gap == pytest.approx(expected, rel=1e-5)


def test_virtual_batches_with_a_mask_of_channels(rng):
    """Keras makes one of inputs with channels first."""
    x = helpers.inputs_of(rng, (12, 3, 5))
    x[::4, 1] = 0
    inputs = keras.Input((3, 5))
    found = []
    for size, batch in ((2, 4), (None, 2)):
        layer = BatchNormalization(axis=1, virtual_batch_size=size)
        model = keras.Model(inputs, layer(layers.Masking()(inputs)))
        report = discrepancy(model, x, batch_size=batch, verbose=False)
        (row,) = report.layers
        found.append([*row.r, *row.d, row.gap, row.elements, report.gap])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("padding", [-1e4, np.nan])
def test_padding_in_outputs_does_not_count(padding, rng):
    x = helpers.inputs_of(rng, (12, 6, 3))
    mask = np.arange(6) < rng.integers(1, 7, 12)[:, None]
    x[~mask] = padding
    inputs, given = keras.Input((6, 3)), keras.Input((6,), dtype="bool")
    layer = BatchNormalization()
    model = keras.Model([inputs, given], layer(inputs, mask=given))
    helpers.randomize(layer, rng)
    report = discrepancy(model, [x, mask], verbose=False)
    assert report.gap == pytest.approx(report.layers[0].gap, rel=1e-5)


def test_every_call_of_a_shared_layer_meets_the_statistics_as_they_are(rng):
    model = networks.shared(
        lambda **arguments: BatchNormalization(momentum=0.5, **arguments)
    )
    layer = networks.normalizations(model)[0]
    x = batches_of(rng, [6, 6], (4,))
    # The moving average of the first call would be far from these.
    (found,) = discrepancy(model, [(tuple(x),)], verbose=False).layers
    r, d = expected_r_and_d(layer, x)
    assert found.batches == 2
    assert found.r[-1] == pytest.approx(r.max(), rel=1e-5)
    assert found.d[-1] == pytest.approx(d.max(), rel=1e-5)
    pairs = [training_outputs(layer, each) for each in x]
    trained, inferred = map(np.concatenate, zip(*pairs, strict=True))
    expected = math.sqrt(np.sum((trained - inferred) ** 2) / np.sum(trained**2))
    assert found.gap == pytest.approx(expected, rel=1e-5)


def test_calls_of_a_shared_layer_are_as_batches_of_their_own(rng):
    """Renormalization trains by the moving statistics, too."""

    def kind(**arguments):
        options = {"momentum": 0.5, "r_max": 1.2, "d_max": 0.3}
        return BatchRenormalization(**options, **arguments)

    x = batches_of(rng, [6, 6], (4,))
    model = networks.shared(kind)
    (together,) = discrepancy(model, [(tuple(x),)], verbose=False).layers
    model = one_layer(kind(name="shared_bn"), (4,))
    (apart,) = discrepancy(model, x, verbose=False).layers
    assert together.gap == pytest.approx(apart.gap, rel=1e-6)
    assert together.beyond == apart.beyond


def test_the_noise_of_a_moving_average_is_no_shift(rng):
    """Its momentum keeps few batches: it is off by 0.29, and rightly so."""
    layer = BatchNormalization(momentum=0.5)
    model = one_layer(layer, (200,))
    x = rng.normal(2.0, 3.0, size=(4 * 60, 200)).astype("float32")
    for at in range(0, 80, 4):
        layer(x[at : at + 4], training=True)
    (found,) = discrepancy(model, x[80:], batch_size=4, verbose=False).layers
    mean, variance = helpers.statistics(layer)
    d = (x[80:].mean(axis=0) - mean) / np.sqrt(variance + 1e-3)
    assert np.sqrt(np.mean(d**2)) > 0.25
    assert found.shift < 0.2


@pytest.mark.parametrize("log_r", [-0.6, 0.6])
@pytest.mark.parametrize("d", [-0.4, 0.4])
def test_shift_is_the_distance_of_both_moments_less_their_noise(log_r, d, rng):
    layer = BatchNormalization(momentum=0.9, epsilon=1e-6)
    model = one_layer(layer, (3,))
    batches = batches_of(rng, [40] * 10, (3,))
    x = np.concatenate(batches).astype("float64")
    variances = np.array(
        [each.astype("float64").var(axis=0) for each in batches]
    )
    within, whole = variances.mean(axis=0), x.var(axis=0)
    # A variance between these two is right; these are beyond either.
    nearest = within if log_r > 0 else whole
    layer.moving_variance.assign(nearest * np.exp(-2 * log_r))
    sigma = np.sqrt(helpers.statistics(layer)[1] + 1e-6)
    layer.moving_mean.assign(x.mean(axis=0) - d * sigma)
    (found,) = discrepancy(model, batches, verbose=False).layers
    between = np.var([each.mean(axis=0) for each in batches], axis=0, ddof=1)
    factor = 1 / 10 + (1 - 0.9) / (1 + 0.9)
    log_noise = variances.var(axis=0) / (4 * within**2)
    expected = np.mean(d**2 - factor * between / sigma**2) + max(
        0, np.mean(log_r**2 - factor * log_noise)
    )
    assert found.shift == pytest.approx(math.sqrt(expected), rel=1e-3)


def classifier(kind=BatchNormalization):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(
                8,
                activation="relu",
                kernel_regularizer="l2",
                activity_regularizer="l2",
            ),
            kind(name="bn"),
            layers.Dropout(0.5),
            layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(
        "adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"]
    )
    return model


def labelled(rng, size=20):
    x = helpers.inputs_of(rng, (size, 3))
    return x, (x[:, 0] > x[:, 1]).astype("int32"), rng.uniform(0.5, 2, size)


@pytest.mark.parametrize("is_trained", [False, True])
def test_scores_in_inference_are_those_of_evaluate(is_trained, rng):
    model = classifier()
    data = labelled(rng)
    if is_trained:
        model.fit(*data[:2], verbose=0)
    report = discrepancy(model, data, batch_size=8, verbose=False)
    expected = model.evaluate(
        *data[:2],
        sample_weight=data[2],
        batch_size=8,
        verbose=0,
        return_dict=True,
    )
    assert list(report.inference) == list(report.training)
    assert report.inference == pytest.approx(expected, rel=1e-5)
    assert report.training["loss"] != report.inference["loss"]


def test_a_metric_of_several_values(rng):
    class Sums(keras.metrics.Metric):
        def __init__(self):
            super().__init__()
            self.total = self.add_weight(initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.total.assign_add(keras.ops.sum(y_pred[:, 0]))

        def result(self):
            return {"once": self.total + 0.0, "twice": 2.0 * self.total}

    model = one_layer(BatchNormalization(), (3,))
    model.compile("sgd", "mse", metrics=[Sums()])
    x = helpers.inputs_of(rng, (20, 3))
    report = discrepancy(model, (x, x), verbose=False)
    expected = model.evaluate(x, x, verbose=0, return_dict=True)
    assert report.inference == pytest.approx(expected, rel=1e-5)


def test_a_metric_that_a_call_updates_is_left_out(rng):
    class Watched(layers.Layer):
        def __init__(self):
            super().__init__()
            self.activity = keras.metrics.Mean(name="activity")

        def call(self, inputs):
            self.activity.update_state(inputs)
            return inputs

    model = keras.Sequential(
        [keras.Input((3,)), BatchNormalization(), Watched()]
    )
    model.compile("sgd", "mse", metrics=["mae"])
    x = helpers.inputs_of(rng, (20, 3))
    report = discrepancy(model, (x, x), batch_size=8, verbose=False)
    assert set(report.training) == set(report.inference) == {"loss", "mae"}


def test_scores_in_training_mode(rng):
    layer = BatchNormalization()
    model = one_layer(layer, (3,))
    model.compile("sgd", "mse", metrics=["mae"])
    helpers.randomize(layer, rng)
    batches = [(x, np.zeros_like(x)) for x in batches_of(rng, [6, 6], (3,))]
    report = discrepancy(model, batches, verbose=False)
    trained, inferred = map(
        np.concatenate,
        zip(*(training_outputs(layer, x) for x, _ in batches), strict=True),
    )
    for scores, outputs in (
        (report.training, trained),
        (report.inference, inferred),
    ):
        expected = {"loss": np.mean(outputs**2), "mae": np.mean(abs(outputs))}
        assert scores == pytest.approx(expected, rel=1e-5)
    unlabelled = discrepancy(model, [x for x, _ in batches], verbose=False)
    assert unlabelled.training == unlabelled.inference == {}


def everything(model):
    """All state of a model, by value."""
    variables = list(model.variables)
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    if getattr(model, "compiled", False):
        variables += model.metrics_variables
    return {
        f"{at} {each.path}": helpers.to_numpy(each)
        for at, each in enumerate(variables)
    }


def assert_unchanged(model, before):
    after = everything(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    for layer in networks.normalizations(model):
        assert "call" not in vars(layer)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
@pytest.mark.parametrize("network", networks.ALL)
def test_nothing_changes_in_networks_of_all_kinds(network, kind, rng):
    model = networks.randomize(network(kind), rng)
    before = everything(model)
    x = networks.data_of(model, rng, 8)
    report = discrepancy(model, x, batch_size=4, verbose=False)
    assert_unchanged(model, before)
    assert len(report.layers) == len(networks.normalizations(model))
    trains = [layer for layer in report.layers if not layer.is_frozen]
    assert all(layer.gap > 0 for layer in trains)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_in_a_compiled_model(kind, rng):
    model = classifier(kind)
    data = labelled(rng)
    model.fit(*data[:2], sample_weight=data[2], verbose=0, epochs=2)
    before = everything(model)
    assert any("seed" in key for key in before)
    assert any("momentum" in key for key in before)  # the optimizer's
    discrepancy(model, data, batch_size=8, verbose=False)
    assert_unchanged(model, before)

    def broken():
        yield tuple(each[:8] for each in data)
        raise KeyboardInterrupt

    huge = data[0].copy()
    huge[15] = 1e30  # whose square overflows
    for dataset, kind_of_error in (
        (broken(), KeyboardInterrupt),
        ((huge, *data[1:]), ValueError),
        ((data[0][:, :2], *data[1:]), ValueError),
    ):
        with pytest.raises(kind_of_error):
            discrepancy(model, dataset, batch_size=8, verbose=False)
        assert_unchanged(model, before)


def test_what_stood_in_the_place_of_call_stands_there_again(rng):
    layer = BatchNormalization()
    model = one_layer(layer, (3,))
    mine = layer.call
    layer.call = mine
    discrepancy(model, helpers.inputs_of(rng, (8, 3)), verbose=False)
    assert vars(layer)["call"] is mine


@pytest.mark.skipif(
    not networks.HAS_RENORM, reason="Keras has no renorm before 3.14"
)
def test_keras_layers_with_renorm(rng):
    layer = layers.BatchNormalization(renorm=True)
    model = one_layer(layer, (3,))
    before = everything(model)
    x = helpers.inputs_of(rng, (64, 3))
    (found,) = discrepancy(model, x, batch_size=8, verbose=False).layers
    assert_unchanged(model, before)
    # Unclipped, against the same statistics: no gap but epsilon's, which
    # Keras adds at another place.
    assert found.gap < 1e-3
    assert found.is_untrained


def test_quantiles_of_many_batches_rest_on_some(rng, monkeypatch):
    monkeypatch.setattr(
        "keras_renorm.diagnostics._report.record.KEPT_BATCHES", 8
    )
    layer = BatchNormalization()
    x = helpers.inputs_of(rng, (4 * 50, 3))
    x[:, 0] += np.linspace(0, 20, len(x), dtype="float32")
    (found,) = discrepancy(
        one_layer(layer, (3,)), x, batch_size=4, verbose=False
    ).layers
    r, d = expected_r_and_d(layer, np.split(x, 50))
    # All: lowest and highest. Every eighth: the rest.
    assert found.d[0] == pytest.approx(d.min(), rel=1e-5)
    assert found.d[-1] == pytest.approx(d.max(), rel=1e-5)
    assert found.d[2] == pytest.approx(np.median(d[::8]), rel=1e-5)
    assert found.r[3] == pytest.approx(np.quantile(r[::8], 0.95), rel=1e-5)


def test_one_batch_and_one_example_a_batch(rng):
    x = helpers.inputs_of(rng, (6, 4, 3))
    model = one_layer(BatchNormalization(), (4, 3))
    (single,) = discrepancy(model, x, batch_size=6, verbose=False).layers
    assert math.isnan(single.f)
    assert single.scatter == pytest.approx(single.scatter_expected)
    (tiny,) = discrepancy(model, x, batch_size=1, verbose=False).layers
    assert math.isnan(tiny.f)
    assert math.isnan(tiny.scatter_expected)
    assert tiny.scatter > 0


def trained_report(rng):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            BatchNormalization(name="first"),
            layers.Dense(4),
            BatchNormalization(name="second"),
        ],
        name="network",
    )
    model.compile("sgd", "mse")
    x = helpers.inputs_of(rng, (64, 3))
    return discrepancy(model, (x, x @ np.ones((3, 4))), verbose=False)


def test_the_report_as_text(rng):
    report = trained_report(rng)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 79
    unwrapped = " ".join(text.split())
    at = 0
    for part in (
        "network: training and inference",
        "1. Statistics never trained",
        report.verdicts[0].reason,
        f"Remedy: {report.verdicts[0].remedy}",
        f"loss: {report.training['loss']:.4g} in training mode, "
        f"{report.inference['loss']:.4g} in inference",
        "layer r 5-95 % d 5-95 % beyond J gap shift noise F",
        f"{report.layers[1].gap:.2f}",
        "r, d: scale and offset",
    ):
        at = unwrapped.index(part, at)
    assert "layers with the largest gap" not in text
    assert repr(report) == (
        "<Report of network, 2 layers: statistics never trained>"
    )


def test_the_worst_layers_are_printed_and_all_are_in_the_table(rng):
    report = trained_report(rng)
    layer = report.layers[0]._replace(
        r=(0.0, -1234.0, 1.0, 1e9, 2.0),
        d=(0.0, -1234.0, 0.0, 56.7, 0.0),
        beyond=1.0,
        jeffreys=float("inf"),
        shift=float("nan"),
        batch_noise=12.34,
        f=-5e3,
    )
    gaps = (0.1, 0.7, float("nan"), 0.3, 0.6, 0.2, 0.4)
    report = dataclasses.replace(
        report,
        layers=[
            layer._replace(name=f"a_model/with_a_long_name/{at}", gap=gap)
            for at, gap in enumerate(gaps)
        ],
    )
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 79
    at = lines.index("The 5 layers with the largest gap:")
    # Whole names, above the figures where there is no room beside them.
    assert lines[at + 1] == "layer"
    assert lines[at + 2].split()[-2:] == ["noise", "F"]
    assert lines[at + 3 : at + 13 : 2] == [
        f"a_model/with_a_long_name/{number}" for number in (2, 1, 4, 6, 3)
    ]
    assert "<-999 >999" in lines[at + 4]
    assert "<-999 57" in lines[at + 4]
    assert lines[-1] == "All 7 layers: `print(report.table())`."
    head, *rows = report.table().splitlines()
    assert head.split()[-2:] == ["F", "constant"]
    assert [row.split()[0] for row in rows] == [
        f"a_model/with_a_long_name/{at}" for at in range(7)
    ]
    assert {row.split()[-1] for row in rows} == {"0/3"}


def test_the_report_in_a_notebook(rng):
    report = trained_report(rng)
    report = dataclasses.replace(report, model="a<b")
    text = report._repr_html_()
    assert "a&lt;b: training and inference" in text
    assert "<li><b>statistics never trained</b>: " in text
    for layer in report.layers:
        assert f"<tr><td>{layer.name}</td>" in text
    assert "No discrepancy" not in text
    healthy = dataclasses.replace(report, verdicts=[])
    assert "<p>No discrepancy worth acting on.</p>" in healthy._repr_html_()
    assert "<li>" not in healthy._repr_html_()


def test_the_report_as_rows(rng):
    rows = trained_report(rng).rows
    assert [row["layer"] for row in rows] == ["first", "second"]
    assert rows[0]["causes"] == "statistics never trained"
    assert all(np.ndim(value) == 0 for row in rows for value in row.values())


def test_the_report_as_a_picture(rng, tmp_path, monkeypatch):
    report = trained_report(rng)
    figure = report.plot()
    figure.savefig(tmp_path / "report.png")
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["first", "second"]
    bars = figure.axes[2].patches
    widths = [bar.get_width() for bar in bars]
    assert report.layers[1].gap in widths
    # Three bars a layer, in this order around its place.
    for at, layer in enumerate(report.layers):
        for offset, figure in (
            (-0.2, layer.gap),
            (0.0, layer.shift),
            (0.2, layer.batch_noise),
        ):
            assert any(
                bar.get_width() == figure
                and bar.get_y() + bar.get_height() / 2
                == pytest.approx(at + offset)
                for bar in bars
            )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"r_max": 0.5}, ValueError, "`r_max` must be at least 1. Received: r"),
        ({"d_max": -1}, ValueError, "`d_max` must be at least 0. Received: d"),
        ({"d_max": "x"}, TypeError, "`d_max` must be a number. Received: d"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1. Received: s"),
        ({"steps": 9}, ValueError, "Received: steps=9, for 1 batches."),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1."),
        ({"dataset": 7}, TypeError, "`dataset` must be arrays, a tf.data"),
        ({"reference": 7}, TypeError, "`dataset` must be arrays, a tf.data"),
        ({"dataset": []}, ValueError, "`dataset` must hold at least one batch"),
        (
            {"dataset": np.full((4, 3), np.nan)},
            ValueError,
            "`dataset` must make finite activations. Received: one that makes "
            "the batch statistics of bn NaN or infinite.",
        ),
    ],
)
def test_errors(arguments, kind, message, rng):
    model = one_layer(BatchNormalization(name="bn"), (3,))
    arguments = {"dataset": helpers.inputs_of(rng, (8, 3)), **arguments}
    before = everything(model)
    with pytest.raises(kind, match=f".*{message}"):
        discrepancy(model, **arguments, verbose=False)
    assert_unchanged(model, before)


def test_models_without_normalization_and_unreached_layers(rng):
    x = helpers.inputs_of(rng, (8, 3))
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(1)], name="mlp")
    with pytest.raises(ValueError, match="model=mlp, which has none"):
        discrepancy(plain, x)
    with pytest.raises(ValueError, match="with the layers bn not built"):
        discrepancy(keras.Sequential([BatchNormalization(name="bn")]), x)
    inputs = keras.Input((4, 3))
    bn = BatchNormalization(name="bn")
    masked = keras.Model(inputs, bn(layers.Masking()(inputs)))
    with pytest.raises(ValueError, match="8 batches that gave none to bn"):
        discrepancy(masked, [np.zeros((1, 4, 3))] * 8, verbose=False)


def test_progress_is_shown(rng, capsys):
    model = one_layer(BatchNormalization(), (3,))
    discrepancy(model, helpers.inputs_of(rng, (20, 3)), batch_size=5)
    assert "4/4" in capsys.readouterr().out


def test_statistics_that_are_not_finite_are_reported(rng):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.BatchNormalization(name="bad"),
            layers.Dense(2),
            layers.BatchNormalization(name="good", momentum=0.5),
        ]
    )
    x = helpers.inputs_of(rng, (64, 3))
    for _ in range(20):
        model(x, training=True)
    model.layers[0].moving_mean.assign([0.0, np.nan, 0.0])
    report = discrepancy(model, x, verbose=False)
    assert [(each.cause, each.layers) for each in report.verdicts] == [
        ("statistics not finite", ("bad",))
    ]
    assert "bad" in str(report)
    model.layers[0].moving_mean.assign([0.0, 0.0, 0.0])
    bank = {
        "bad/moving_mean": np.zeros(3),
        "bad/moving_variance": np.ones(3),
        "good/moving_mean": np.zeros(2),
        "good/moving_variance": np.ones(2),
    }
    set_statistics(model, bank)
    report = discrepancy(model, x, verbose=False)
    assert [(each.cause, each.layers) for each in report.verdicts] == [
        ("statistics never trained", ("bad", "good"))
    ]


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid", "masked"])
def test_scores_are_of_what_keras_notes_on_outputs(outputs, rng):
    """A mask; the logits of probabilities, of which float32 is soon 0 or 1."""
    if outputs == "masked":
        inputs = keras.Input((7, 4))
        x = layers.Dense(1)(BatchNormalization()(layers.Masking()(inputs)))
        loss, y = "mse", rng.normal(size=(40, 7, 1))
    else:
        inputs = keras.Input((4,))
        units = 3 if outputs == "softmax" else 1
        dense = layers.Dense(
            units,
            kernel_initializer=keras.initializers.RandomNormal(0, 60),
            activation=outputs,
        )
        x = dense(BatchNormalization()(inputs))
        loss = {
            "softmax": "sparse_categorical_crossentropy",
            "sigmoid": "binary_crossentropy",
        }[outputs]
        y = rng.integers(max(units, 2), size=(40, 1))
    model = keras.Model(inputs, x)
    model.compile("sgd", loss)
    x = helpers.inputs_of(rng, (40, *model.input_shape[1:]))
    if outputs == "masked":
        x[:, 3:] = 0.0
    expected = model.evaluate(x, y, verbose=0)
    report = discrepancy(model, (x, y), verbose=False)
    assert report.inference["loss"] == pytest.approx(expected, rel=1e-5)


class Fragile(keras.Model):
    """Subclassed: no graph of Keras says what it takes."""

    def __init__(self):
        super().__init__()
        self.bn = BatchNormalization()
        self.dense = layers.Dense(1)

    def call(self, inputs, training=None):
        return self.dense(self.bn(inputs, training=training))


@pytest.mark.parametrize("is_first", [True, False])
def test_after_an_error_reports_are_as_before(is_first, rng):
    x = helpers.inputs_of(rng, (32, 4))
    model, other = Fragile(), Fragile()
    for each in (model, other):
        each(x)
    other.set_weights(model.get_weights())
    expected = discrepancy(model, x, verbose=False).rows
    failing = other if is_first else model
    with pytest.raises(ValueError, match=r"ndim=3|unknown TensorShape"):
        discrepancy(failing, [x[:, None]], verbose=False)
    rows = discrepancy(failing, x, verbose=False).rows
    for row, known in zip(rows, expected, strict=True):
        names = row.keys() - {"layer"}
        assert {n: row[n] for n in names} == {n: known[n] for n in names}


def test_weights_of_labels_stay_as_they_are(rng):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(1)(BatchNormalization()(x)))
    model.compile("sgd", "mse")
    x = rng.integers(0, 9, (20, 5))
    y = keras.ops.convert_to_tensor(rng.normal(size=(20, 5, 1)), "float32")
    weights = keras.ops.convert_to_tensor(
        rng.uniform(0.5, 1.0, (20, 5)), "float32"
    )
    before = np.array(helpers.to_numpy(weights))
    expected = model.evaluate(x, y, sample_weight=before, verbose=0)
    for _ in range(2):
        report = discrepancy(model, [(x, y, weights)], verbose=False)
        assert report.inference["loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(helpers.to_numpy(weights), before)


def test_a_loss_of_ones_own_is_told_the_mode(rng):
    class Model(keras.Sequential):
        def compute_loss(self, *arguments, training=True, **named):
            loss = super().compute_loss(*arguments, training=training, **named)
            return loss + (1e6 if training else 0.0)

    model = Model([keras.Input((4,)), BatchNormalization(), layers.Dense(1)])
    model.compile("sgd", "mse")
    x = helpers.inputs_of(rng, (32, 4))
    report = discrepancy(model, (x, x[:, :1]), verbose=False)
    assert report.training["loss"] > 1e6 > report.inference["loss"]
