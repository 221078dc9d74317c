"""Statistics of whole models: frozen, taken out, put back."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    freeze_statistics,
    get_statistics,
    set_statistics,
    unfreeze_statistics,
)
from keras_renorm.models.finding import unique_names
from tests import helpers, networks

KINDS = [layers.BatchNormalization, BatchNormalization, BatchRenormalization]


@pytest.mark.parametrize("network", networks.ALL)
def test_frozen_statistics_stand_while_the_rest_trains(network, rng):
    model = networks.randomize(network(BatchRenormalization), rng)
    x = networks.data_of(model, rng, 8)
    target = keras.tree.map_structure(
        np.zeros_like, model.predict(x, verbose=0)
    )
    freeze_statistics(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = get_statistics(model)
    weights = [helpers.to_numpy(each) for each in model.trainable_weights]
    model.fit(x, target, batch_size=4, verbose=0)
    for key, value in get_statistics(model).items():
        assert np.array_equal(value, before[key]), key
    assert any(
        not np.array_equal(old, helpers.to_numpy(new))
        for old, new in zip(weights, model.trainable_weights, strict=True)
    )
    unfreeze_statistics(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, target, batch_size=4, verbose=0)
    after = get_statistics(model)
    moved = [key for key in before if np.any(after[key] != before[key])]
    frozen = [
        layer for layer in networks.normalizations(model) if not layer.trainable
    ]
    assert len(moved) == len(before) - 2 * len(frozen)


def test_freezing_statistics_that_were_never_trained_warns(rng):
    model = networks.sequential(BatchNormalization)
    networks.normalizations(model)[0].moving_mean.assign(np.ones(3))
    with pytest.warns(UserWarning, match="variance 1: layers last. Load"):
        freeze_statistics(model)
    networks.randomize(model, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_statistics(model)


def test_freezing_names_kerass_own_layers():
    model = networks.sequential(layers.BatchNormalization)
    message = (
        "^`model` must have batch normalization of keras_renorm only; "
        "`keras_renorm.convert` makes it. Received: model=network, which has "
        "Keras's own layers bn, last.$"
    )
    for function in (freeze_statistics, unfreeze_statistics):
        with pytest.raises(ValueError, match=message):
            function(model)
    plain = keras.Sequential([keras.Input((2,)), layers.Dense(1)], name="mlp")
    with pytest.raises(ValueError, match="model=mlp, which has none at all"):
        freeze_statistics(plain)
    mixed = convert(model)
    assert not any(
        layer.frozen_statistics for layer in networks.normalizations(mixed)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", networks.ALL)
def test_a_bank_goes_into_another_model_and_back(kind, network, rng, tmp_path):
    model = networks.randomize(network(kind), rng)
    x = networks.data_of(model, rng)
    expected = networks.outputs_of(model, x)
    bank = get_statistics(model)
    assert len(bank) == 2 * len(networks.normalizations(model))
    np.savez(tmp_path / "bank.npz", **bank)
    networks.randomize(model, rng)
    # gamma and beta are others now.
    assert not np.array_equal(networks.outputs_of(model, x)[0], expected[0])
    with np.load(tmp_path / "bank.npz") as loaded:
        set_statistics(model, loaded)
    for key, value in get_statistics(model).items():
        assert np.array_equal(value, bank[key])


def test_a_bank_is_a_copy_and_survives_conversion(rng):
    model = networks.randomize(networks.nested(layers.BatchNormalization), rng)
    bank = get_statistics(model)
    converted = convert(model)
    assert get_statistics(converted).keys() == bank.keys()
    for value in bank.values():
        value += 1
    for key, value in get_statistics(model).items():
        assert np.all(value != bank[key])


def test_a_variance_of_zero_is_a_variance(rng):
    model = networks.randomize(networks.sequential(BatchNormalization), rng)
    bank = get_statistics(model)
    bank["last/moving_variance"] = np.zeros(4)
    set_statistics(model, bank)
    assert np.all(get_statistics(model)["last/moving_variance"] == 0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["first", "last"], ["first", "last"]),
        (["bn", "bn", "bn"], ["bn", "bn_1", "bn_2"]),
        # A number is free only if no layer has it.
        (["bn", "bn", "bn_1", "bn"], ["bn", "bn_2", "bn_1", "bn_3"]),
        (["bn_1", "bn_1", "bn"], ["bn_1", "bn_1_1", "bn"]),
        # Those that Keras gave: counted within the model, in their order.
        (
            ["batch_normalization_9", "batch_normalization_12"],
            ["batch_normalization", "batch_normalization_1"],
        ),
        (
            ["batch_normalization_2", "batch_normalization", "bn"],
            ["batch_normalization_1", "batch_normalization", "bn"],
        ),
        (
            ["batch_normalization_3", "batch_renormalization_5"],
            ["batch_normalization", "batch_renormalization"],
        ),
        # Two submodels from two files.
        (
            ["batch_normalization", "batch_normalization_1"] * 2,
            [
                "batch_normalization",
                "batch_normalization_1",
                "batch_normalization_2",
                "batch_normalization_3",
            ],
        ),
        # What somebody chose is not counted.
        (["stem_batch_normalization_7"], ["stem_batch_normalization_7"]),
    ],
)
def test_names_of_layers(names, expected):
    assert unique_names(names) == expected
    assert unique_names(expected) == expected


def submodels(kind):
    """Two of them, as from two files: their layers have the same names."""
    parts = []
    for name in ("left", "right"):
        keras.utils.clear_session()
        parts.append(
            keras.Sequential(
                [keras.Input((3,)), kind(), layers.Dense(3), kind()], name=name
            )
        )
    inputs = keras.Input((3,))
    return keras.Model(inputs, parts[1](parts[0](inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_submodels_whose_layers_have_the_same_names(kind, rng):
    model = networks.randomize(submodels(kind), rng)
    names = [layer.name for layer in networks.normalizations(model)]
    assert len(set(names)) == 2
    bank = get_statistics(model)
    assert len(bank) == 8
    other = networks.randomize(submodels(kind), rng)
    set_statistics(other, bank)
    for old, new in zip(
        networks.normalizations(model),
        networks.normalizations(other),
        strict=True,
    ):
        np.testing.assert_array_equal(
            helpers.statistics(old), helpers.statistics(new)
        )


def test_a_bank_fits_whatever_else_the_session_made(rng):
    def network():
        return keras.Sequential(
            [
                keras.Input((3,)),
                BatchNormalization(),
                layers.Dense(3),
                BatchNormalization(),
            ]
        )

    model = networks.randomize(network(), rng)
    later = network()
    assert later.layers[0].name == "batch_normalization_2"
    bank = get_statistics(model)
    set_statistics(later, bank)
    for key, value in get_statistics(later).items():
        np.testing.assert_array_equal(value, bank[key])
    # A bank of an older version has the names of its session.
    old = {
        key.replace("normalization/", "normalization_7/").replace(
            "normalization_1/", "normalization_8/"
        ): value + 1
        for key, value in bank.items()
    }
    assert len(old.keys() - bank.keys()) == 4
    set_statistics(later, old)
    for key, value in get_statistics(later).items():
        np.testing.assert_array_equal(value, bank[key] + 1)


def test_bad_banks_change_nothing(rng):
    model = networks.randomize(networks.sequential(BatchNormalization), rng)
    bank = get_statistics(model)
    other = get_statistics(networks.nested(BatchNormalization))
    bad = [
        (other, "must be those of the same architecture. Received: 4 arrays"),
        ({**bank, "more": np.zeros(1)}, r"missing \[\], unknown \['more'\]"),
        (
            {**bank, "last/moving_mean": np.zeros(5)},
            r"last/moving_mean of shape \(5,\), for \(4,\)",
        ),
        (
            {**bank, "last/moving_variance": -np.ones(4)},
            "must be finite, and variances not negative. Received: last/mov",
        ),
        (
            {**bank, "last/moving_mean": np.full(4, np.nan)},
            "must be finite, and variances not negative",
        ),
    ]
    for statistics, message in bad:
        with pytest.raises(ValueError, match=message):
            set_statistics(model, statistics)
    for key, value in get_statistics(model).items():
        assert np.array_equal(value, bank[key])
    unbuilt = keras.Sequential([BatchNormalization(name="bn")], name="late")
    with pytest.raises(
        ValueError, match="Received: model=late, with the layers bn not built"
    ):
        get_statistics(unbuilt)
