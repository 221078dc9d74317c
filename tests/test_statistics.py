"""Statistics of whole models: frozen, taken out, put back."""

import re
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
    recalibrate,
    set_statistics,
    unfreeze_statistics,
)
from keras_renorm.diagnostics import discrepancy
from keras_renorm.models._layers.finding import (
    choose_layers,
    find_layers,
    names_of,
)
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


class Block(layers.Layer):
    """Layers in it, which a custom layer makes; the first are called first."""

    def __init__(self, *parts, name):
        super().__init__(name=name)
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Network(Block, keras.Model):
    """The same, as a model."""


def bn(name):
    return BatchNormalization(name=name)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (lambda: [bn("first"), bn("last")], ["first", "last"]),
        # The one that the model itself holds is what `get_layer` finds.
        (
            lambda: [bn("bn"), Block(bn("bn"), bn("other"), name="block")],
            ["bn", "block/bn", "other"],
        ),
        (
            lambda: [
                Block(bn("bn"), name="encoder"),
                Block(Block(bn("bn"), name="block"), name="decoder"),
            ],
            ["encoder/bn", "decoder/block/bn"],
        ),
        # A layer of another class has the name, or one that holds it.
        (
            lambda: [Block(bn("norm"), layers.Dense(2, name="norm"), name="a")],
            ["a/norm:1"],
        ),
        (
            lambda: [Block(bn("a"), bn("b"), name="a")],
            ["a/a", "b"],
        ),
        # The model's own name is not in it.
        (lambda: [bn("network")], ["network"]),
        # Paths alike: numbers, but none that is a name.
        (lambda: [bn("bn"), bn("bn"), bn("bn_1")], ["bn:1", "bn:2", "bn_1"]),
        (lambda: [bn("bn"), bn("bn:1"), bn("bn")], ["bn:2", "bn:1", "bn:3"]),
        (
            lambda: [
                Block(bn("bn"), name="block"),
                Block(bn("bn"), name="block"),
            ],
            ["block/bn:1", "block/bn:2"],
        ),
        (
            lambda: [
                layers.TimeDistributed(bn("bn"), name="frames"),
                bn("bn"),
            ],
            ["frames/bn", "bn"],
        ),
    ],
)
def test_a_layer_is_called_its_name_or_its_path(parts, expected, rng):
    model = Network(*parts(), name="network")
    found = find_layers(model, BatchNormalization)
    names = names_of(model, found)
    assert sorted(names) == sorted(expected)
    # And each name means its layer.
    for name, layer in zip(names, found, strict=True):
        assert choose_layers(model, name) == [layer]


def test_numbers_that_keras_gave_stay(rng):
    earlier = [BatchNormalization().name for _ in range(2)]
    model = keras.Sequential(
        [keras.Input((3,)), *[BatchNormalization() for _ in range(4)]]
    )
    names = [layer.name for layer in model.layers]
    assert not set(earlier) & set(names)
    broken = model.layers[2]
    broken.moving_mean.assign([np.nan] * 3)
    x = helpers.inputs_of(rng, (64, 3))
    report = discrepancy(model, x, verbose=False)
    assert [layer.name for layer in report.layers] == names
    assert report.verdicts[0].layers == (broken.name,)
    assert model.get_layer(report.verdicts[0].layers[0]) is broken
    others = get_statistics(model)
    recalibrate(model, x, layers=report.verdicts[0].layers, verbose=False)
    for key, value in get_statistics(model).items():
        is_broken = key.startswith(f"{broken.name}/")
        assert np.array_equal(value, others[key]) != is_broken
    assert np.all(np.isfinite(helpers.to_numpy(broken.moving_mean)))
    converted = convert(model, layers=[row["layer"] for row in report.rows][:2])
    assert [type(layer) for layer in converted.layers] == [
        *[BatchRenormalization] * 2,
        *[BatchNormalization] * 2,
    ]


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
    assert {key.rpartition("/")[0] for key in bank} == {
        f"{part}/{name}" for part in ("left", "right") for name in names
    }
    other = networks.randomize(submodels(kind), rng)
    set_statistics(other, bank)
    assert_alike(model, other)
    # An earlier version numbered them, in the order of the model.
    networks.randomize(other, rng)
    old = {"left": ["_1", ""], "right": ["_2", "_3"]}
    numbers = [number for part in old.values() for number in part]
    renamed = {
        f"{names[0].removesuffix('_1')}{number}/{kind}": bank[f"{new}/{kind}"]
        for number, new in zip(
            numbers,
            dict.fromkeys(key.rpartition("/")[0] for key in bank),
            strict=True,
        )
        for kind in ("moving_mean", "moving_variance")
    }
    with pytest.warns(UserWarning, match="_3 -> right/.* Layers that you name"):
        set_statistics(other, renamed)
    assert_alike(model, other)


def assert_alike(model, other):
    for old, new in zip(
        networks.normalizations(model),
        networks.normalizations(other),
        strict=True,
    ):
        np.testing.assert_array_equal(
            helpers.statistics(old), helpers.statistics(new)
        )


def numbered_network(count=3):
    """A network with the names that Keras gives, and one that it does not."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            *[BatchNormalization() for _ in range(count)],
            BatchNormalization(name="head"),
        ]
    )


@pytest.mark.parametrize("first", [0, 2, 7])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_bank_of_another_session_is_matched_by_order(first, is_sorted, rng):
    """An earlier version counted from 0 on, whatever the session made."""
    BatchNormalization()
    model = networks.randomize(numbered_network(12), rng)
    bank = get_statistics(model)
    assert "batch_normalization_12/moving_mean" in bank
    numbers = range(first, first + 12)
    other = {
        f"{new}/{kind}": bank[f"batch_normalization_{old}/{kind}"]
        for old, new in enumerate(
            [
                f"batch_normalization_{number}".removesuffix("_0")
                for number in numbers
            ],
            start=1,
        )
        for kind in ("moving_mean", "moving_variance")
    }
    other |= {key: value for key, value in bank.items() if "head" in key}
    if is_sorted:  # as files of other kinds are
        other = dict(sorted(other.items()))
    networks.randomize(model, rng)
    with pytest.warns(UserWarning, match="are matched by order") as found:
        set_statistics(model, other)
    assert "head" not in str(found[0].message)
    for key, value in get_statistics(model).items():
        np.testing.assert_array_equal(value, bank[key])


def test_what_is_matched_by_order_is_said(rng):
    model = networks.randomize(numbered_network(), rng)
    bank = get_statistics(model)
    later = numbered_network()
    message = (
        "Statistics are matched by order, for their names are those of another "
        "session, of an earlier version or of a part: batch_normalization -> "
        "batch_normalization_3, batch_normalization_1 -> "
        "batch_normalization_4, batch_normalization_2 -> "
        "batch_normalization_5. Layers that you name are matched by name."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        set_statistics(later, bank)
    assert_alike(model, later)
    # By name, nothing is to be said.
    set_statistics(model, bank)


def test_a_bank_is_a_path_too(rng, tmp_path):
    model = networks.randomize(numbered_network(), rng)
    bank = get_statistics(model)
    for path in (tmp_path / "night.npz", str(tmp_path / "day.npz")):
        np.savez(path, **bank)
        networks.randomize(model, rng)
        set_statistics(model, path)
        for key, value in get_statistics(model).items():
            np.testing.assert_array_equal(value, bank[key])
    np.save(tmp_path / "mean.npy", bank["head/moving_mean"])
    model.save_weights(tmp_path / "net.weights.h5")
    for name in ("mean.npy", "net.weights.h5"):
        with helpers.raises(
            ValueError,
            "`statistics` must be the path of a file of `np.savez` with what "
            "`get_statistics` returns. Received: statistics="
            f"'{tmp_path / name}', another kind of file.",
        ):
            set_statistics(model, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        set_statistics(model, tmp_path / "dusk.npz")
    with helpers.raises(
        TypeError,
        "`statistics` must be what `get_statistics` returns, or the path of a "
        "file of `np.savez` with it. Received: an object of type list.",
    ):
        set_statistics(model, model.get_weights())


@pytest.mark.parametrize("is_whole", [False, True])
def test_statistics_of_some_layers(is_whole, rng):
    model = networks.randomize(networks.nested(BatchNormalization), rng)
    first, *others = networks.normalizations(model)
    before = get_statistics(model)
    part = get_statistics(model, layers=first)
    assert part.keys() < before.keys()
    assert len(part) == 2
    networks.randomize(model, rng)
    after = get_statistics(model)
    set_statistics(model, before if is_whole else part, layers=[first.name])
    for key, value in get_statistics(model).items():
        expected = before if key in part else after
        np.testing.assert_array_equal(value, expected[key])
    assert others
    with pytest.raises(ValueError, match=r"same architecture\. Received: 2 a"):
        set_statistics(model, part)


@pytest.mark.filterwarnings("ignore:Statistics are matched by order")
@pytest.mark.parametrize("part", ["left", "right"])
def test_a_bank_of_a_part_goes_into_the_whole_and_back(part, rng):
    """In the model the path of a layer is longer, and the order another."""

    def network():
        halves = [
            keras.Sequential(
                [
                    keras.Input((3,)),
                    keras.Sequential([keras.Input((3,)), bn("bn"), bn("last")]),
                    keras.Sequential([keras.Input((3,)), bn("bn")]),
                    bn(f"{name}_bn"),
                ],
                name=name,
            )
            for name in ("left", "right")
        ]
        return networks.randomize(
            keras.Sequential([keras.Input((3,)), *halves]), rng
        )

    model, other = network(), network()
    mine, others = model.get_layer(part), other.get_layer(part)
    before = get_statistics(other)
    set_statistics(other, get_statistics(mine), layers=part)
    assert_alike(mine, others)
    for key, value in get_statistics(other).items():
        is_part = any(
            np.array_equal(value, each)
            for each in get_statistics(mine).values()
        )
        assert np.array_equal(value, before[key]) != is_part
    networks.randomize(others, rng)
    set_statistics(others, get_statistics(model, layers=part))
    assert_alike(mine, others)
    networks.randomize(others, rng)
    set_statistics(other, get_statistics(model), layers=part)
    assert_alike(mine, others)


@pytest.mark.filterwarnings("ignore:`build..` was called")
def test_layers_that_are_never_called_are_left_out(rng):
    class Holder(keras.Model):
        def __init__(self):
            super().__init__(name="holder")
            self.used, self.unused = bn("used"), bn("unused")

        def call(self, x, training=None):
            return self.used(x, training=training)

    model = Holder()
    with pytest.raises(ValueError, match="layers used, unused not built"):
        get_statistics(model)
    x = helpers.inputs_of(rng, (8, 3))
    model(x, training=True)
    message = (
        "^Layers that the model never called are left out: unused, not built.$"
    )
    with pytest.warns(UserWarning, match=message):
        bank = get_statistics(model)
    assert {key.split("/")[0] for key in bank} == {"used"}
    with pytest.warns(UserWarning, match=message):
        set_statistics(model, {key: value + 1 for key, value in bank.items()})
    np.testing.assert_array_equal(
        helpers.to_numpy(model.used.moving_mean), bank["used/moving_mean"] + 1
    )
    freeze_statistics(model)  # here it does not matter
    for function in (recalibrate, discrepancy):
        with pytest.warns(UserWarning, match=message):
            function(model, x, verbose=False)
    with pytest.raises(ValueError, match="with the layers unused not built"):
        get_statistics(model, layers="unused")


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
