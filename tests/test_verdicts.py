"""The cause that is named: networks with one thing wrong, and healthy ones."""

import functools
import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.diagnostics import discrepancy
from keras_renorm.diagnostics._report import advice
from keras_renorm.diagnostics._report.conditions import Case
from keras_renorm.diagnostics._report.measurement import Measurement
from keras_renorm.diagnostics._report.verdict import RULES, _Found, verdicts_of

ROOT = Path(__file__).parents[1]
SEEDS = [0, 1]
NAN = float("nan")
INF = float("inf")
SMALL = "batches too small"
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES.reshape(-1, 8, 8, 1) / 16).astype("float32")
LABELS = LABELS.astype("int32")


def convolutional(bn):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, use_bias=False, name="first"),
            bn(name="bn1"),
            layers.ReLU(),
            layers.Conv2D(16, 3, use_bias=False),
            bn(name="bn2"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def dense(bn):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(32, use_bias=False, name="first"),
            bn(name="bn1"),
            layers.ReLU(),
            layers.Dense(32, use_bias=False),
            bn(name="bn2"),
            layers.ReLU(),
            layers.Dense(10),
        ]
    )


def shuffled(seed, size, count):
    """Random draws."""
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(IMAGES)) for _ in range(size * count // 1797 + 1)]
    )
    return [
        (IMAGES[each], LABELS[each])
        for each in np.split(order[: size * count], count)
    ]


def one_class_each(seed, size, count):
    """Random draws of one class."""
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice(np.flatnonzero(rng.integers(10) == LABELS), size, False)
        for _ in range(count)
    ]
    return [(IMAGES[each], LABELS[each]) for each in chosen]


def sorted_by_class(size):
    order = np.argsort(LABELS, kind="stable")[: 1797 // size * size]
    parts = np.split(order, len(order) // size)
    return [(IMAGES[each], LABELS[each]) for each in parts]


def compiled(model):
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def trained(network, seed, batches, kind=layers.BatchNormalization, **options):
    keras.utils.set_random_seed(seed)
    model = network(functools.partial(kind, **options))
    return fitted(compiled(model), batches)


def fitted(model, batches, **options):
    """A compiled model, after more steps."""

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    model.fit(Data(), shuffle=False, verbose=0, **options)
    return model


def converted(model, **options):
    """As `convert` is advised, compiled."""
    return compiled(keras_renorm.convert(model, **options))


@functools.cache
def healthy_weights(network, seed):
    model = trained(network, seed, shuffled(seed, 32, 300), momentum=0.95)
    return model.get_weights()


def healthy(network, seed):
    """A network, its training batches and others."""
    model = network(layers.BatchNormalization)
    model.set_weights(healthy_weights(network, seed))
    return model, shuffled(seed + 50, 32, 24)


def causes(report):
    return [verdict.cause for verdict in report.verdicts]


both = pytest.mark.parametrize("network", [convolutional, dense])
seeds = pytest.mark.parametrize("seed", SEEDS)
networks_by_seed = pytest.mark.parametrize(
    ("network", "seed"), [(convolutional, 0), (dense, 1), (convolutional, 2)]
)


@pytest.mark.slow
@both
@seeds
def test_a_healthy_network(network, seed):
    model, data = healthy(network, seed)
    compiled(model)
    for size in (32, 16):
        data = shuffled(seed + 50, size, 768 // size)
        report = discrepancy(model, data, verbose=False)
        assert causes(report) == []
        assert "\nNo discrepancy worth acting on.\n" in str(report)
    # Which is not all that is said: outputs do differ.
    assert 0.25 < report.gap < 0.5
    is_lower = report.inference["loss"] < report.training["loss"]
    scores = "the loss is lower in inference"
    assert (
        f"Outputs differ by {report.gap:.2f} of their size, as the noise of "
        "batches makes them; "
        f"{scores if is_lower else 'loss and metrics do not'}."
    ) in " ".join(str(report).split())


@pytest.mark.slow
def test_outputs_that_differ_where_nothing_says_whether_it_matters():
    model, _ = healthy(convolutional, 0)
    data = [x for x, _ in shuffled(50, 16, 48)]
    report = discrepancy(model, data, verbose=False)
    assert report.gap > 0.25
    assert causes(report) == ["training and inference differ"]
    assert report.verdicts[0].remedy.startswith(
        "Compile the model and give labels, too: loss and metrics say whether"
    )
    assert "No discrepancy worth acting on" not in str(report)


def test_losses_that_differ_though_no_layer_is_far_off(rng):
    """Two channels that are alike, and a dense layer that subtracts them."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            BatchNormalization(name="bn"),
            layers.Dense(1, name="difference"),
        ]
    )
    model.compile("sgd", "mse")
    x = rng.normal(size=(6_400, 1)) + 0.03 * rng.normal(size=(6_400, 2))
    model.get_layer("difference").kernel.assign([[5.0], [-5.0]])
    mean, variance = x.mean(axis=0), x.var(axis=0)
    set_statistics = keras_renorm.set_statistics
    set_statistics(
        model, {"bn/moving_mean": mean, "bn/moving_variance": variance}
    )
    y = model.predict(x, verbose=0) + 0.1 * rng.normal(size=(6_400, 1))
    mean[0] += 0.25 * np.sqrt(variance[0])
    set_statistics(
        model, {"bn/moving_mean": mean, "bn/moving_variance": variance}
    )
    report = discrepancy(model, (x, y), batch_size=64, verbose=False)
    (layer,) = report.layers
    assert layer.shift < 0.25
    assert report.training["loss"] < 0.05
    assert report.inference["loss"] > 1
    (verdict,) = report.verdicts
    assert verdict.cause == "training and inference differ"
    assert (
        f"loss is {report.training['loss']:.4g} in training mode and "
        f"{report.inference['loss']:.4g} in inference. No layer explains it"
    ) in verdict.reason
    # The remedy helps.
    keras_renorm.recalibrate(model, x, verbose=False)
    assert (
        causes(discrepancy(model, (x, y), batch_size=64, verbose=False)) == []
    )


def test_losses_that_differ_though_averages_are_right(rng):
    """The same, with larger weights and averages that are close."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            BatchNormalization(name="bn"),
            layers.Dense(1, name="difference"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(0.5, 400)
    model.compile(keras.optimizers.Adam(rate), "mse")
    x = rng.normal(size=(6_400, 1)) + 0.03 * rng.normal(size=(6_400, 2))
    model.get_layer("difference").kernel.assign([[40.0], [-40.0]])
    keras_renorm.recalibrate(model, x, verbose=False)
    y = model.predict(x, verbose=0) + 0.1 * rng.normal(size=(6_400, 1))
    bank = keras_renorm.get_statistics(model)
    bank["bn/moving_mean"][0] += 0.05
    keras_renorm.set_statistics(model, bank)
    report = discrepancy(model, (x, y), batch_size=64, verbose=False)
    assert report.layers[0].shift < 0.05
    assert causes(report) == ["training and inference differ"]
    # No `recalibrate`: it would find nothing.
    remedy = report.verdicts[0].remedy
    assert remedy == (
        "Larger batches, or go on training with outputs as the model serves "
        "them: `keras_renorm.convert(model, gradient_momentum=None)`. If this "
        "is not the training data, `reference=training_data` tells whether it "
        "is another domain."
    )
    # The remedy helps.
    before = report.inference["loss"]
    model = keras_renorm.convert(model, gradient_momentum=None)
    model.compile(keras.optimizers.Adam(rate), "mse")
    model.fit(x, y, batch_size=64, epochs=4, verbose=0)
    report = discrepancy(model, (x, y), batch_size=64, verbose=False)
    assert causes(report) == []
    assert report.inference["loss"] < before / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "seed", "momentum", "steps"),
    [
        (convolutional, 0, 0.99, 60),
        (convolutional, 1, 0.99, 60),
        (dense, 0, 0.99, 60),
        (dense, 1, 0.999, 300),
    ],
)
def test_averages_that_have_not_arrived(network, seed, momentum, steps):
    model = trained(network, seed, shuffled(seed, 32, steps), momentum=momentum)
    data = shuffled(seed + 50, 32, 24)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["moving averages lag"]
    # The share of the way that so many steps go.
    assert "% of the way in" in report.verdicts[0].reason
    assert report.layers[0].from_start == pytest.approx(
        1 - momentum**steps, abs=0.05
    )
    # The remedy helps.
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []


def features(rng, count, size=32):
    """Channels of several means and scales."""
    means, scales = np.array([2, -1, 0.5, 3]), np.array([1, 2, 0.5, 1.5])
    return (means + scales * rng.normal(size=(count * size, 4))).astype(
        "float32"
    )


@pytest.mark.parametrize(
    ("scale", "offset"), [(255, 0), (4, 0), (1e4, 0), (1, 100), (16, 0)]
)
def test_data_in_large_units_is_beside_no_line(scale, offset, rng):
    """All averages are near their start, seen from there."""
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    x = features(rng, 20)
    keras_renorm.recalibrate(model, x, verbose=False)
    assert causes(discrepancy(model, x, verbose=False)) == []
    other = (x * scale + offset).astype("float32")
    report = discrepancy(model, other, verbose=False)
    assert causes(report) == ["moving averages lag, or another domain"]


@pytest.mark.parametrize("scale", [0.1, 1, 255])
@pytest.mark.parametrize("steps", [1, 3, 10, 100])
def test_averages_of_few_steps_are_on_the_line(steps, scale, rng):
    layer = layers.BatchNormalization(momentum=0.99)
    model = keras.Sequential([keras.Input((4,)), layer])
    for x in np.split(scale * features(rng, steps), steps):
        model(x.astype("float32"), training=True)
    data = (scale * features(rng, 20)).astype("float32")
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["moving averages lag"]
    assert report.layers[0].from_start == pytest.approx(
        1 - 0.99**steps, rel=0.1
    )


@pytest.mark.slow
@networks_by_seed
def test_averages_of_other_weights(network, seed):
    """Weights that moved fast: only a reference tells it from a domain."""
    model, data = healthy(network, seed)
    rng = np.random.default_rng(seed)
    kernel = model.get_layer("first").kernel
    values = np.asarray(keras.ops.convert_to_numpy(kernel.value))
    kernel.assign(values + 0.5 * values.std() * rng.normal(size=values.shape))
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["moving averages lag, or another domain"]
    report = discrepancy(
        model, data, reference=shuffled(seed + 60, 32, 24), verbose=False
    )
    assert causes(report) == ["moving averages lag"]
    assert "bn1" in report.verdicts[0].layers
    # The remedy helps.
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []


DOMAINS = {
    "inverted": lambda x: 1 - x,
    "low contrast": lambda x: 0.5 * x,
    "bright": lambda x: x + 0.2,
    "loud": lambda x: 1.6 * x,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "seed", "change"),
    [
        (convolutional, 0, "inverted"),
        (convolutional, 1, "bright"),
        (convolutional, 0, "loud"),
        (dense, 0, "low contrast"),
        (dense, 1, "inverted"),
        (dense, 1, "bright"),
    ],
)
def test_another_domain(network, seed, change):
    model, data = healthy(network, seed)
    target = [(DOMAINS[change](x), y) for x, y in data]
    report = discrepancy(model, target, verbose=False)
    assert causes(report) == ["moving averages lag, or another domain"]
    report = discrepancy(
        model, target, reference=shuffled(seed + 60, 32, 24), verbose=False
    )
    assert causes(report) == ["another domain"]
    assert "prior_examples" in report.verdicts[0].remedy
    # The remedy helps.
    for options in ({}, {"prior_examples": 32}):
        keras_renorm.recalibrate(model, target, verbose=False, **options)
        report = discrepancy(compiled(model), target, verbose=False)
        assert causes(report) == []


@pytest.mark.slow
def test_another_domain_of_small_shifts():
    """Each layer is near, and the model is another one."""
    model, data = healthy(convolutional, 0)
    compiled(model)
    target = [
        ((0.7 * x + 0.3 * np.roll(x, 1, axis=2)).astype("float32"), y)
        for x, y in data
    ]
    reference = shuffled(60, 32, 24)
    report = discrepancy(model, target, verbose=False)
    assert causes(report) == ["training and inference differ"]
    report = discrepancy(model, target, reference=reference, verbose=False)
    assert max(layer.shift for layer in report.layers) < 0.25
    assert causes(report) == ["another domain"]
    remedy = report.verdicts[0].remedy
    assert remedy.startswith("`keras_renorm.recalibrate` on this data")
    # What was advised before does nothing, and this helps.
    keras_renorm.recalibrate(model, reference, verbose=False)
    report = discrepancy(model, target, reference=reference, verbose=False)
    assert causes(report) == ["another domain"]
    keras_renorm.recalibrate(model, target, verbose=False)
    report = discrepancy(model, target, reference=data, verbose=False)
    assert causes(report) == []


@pytest.mark.slow
@networks_by_seed
def test_batches_too_small(network, seed):
    model = trained(network, seed, shuffled(seed, 2, 400))
    data = shuffled(seed + 50, 2, 100)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["batches too small"]
    remedy = report.verdicts[0].remedy
    # What the benchmark found to help.
    if network is dense:
        assert "for minibatches of one to three examples, or of" in remedy
        assert "Keras's `GroupNormalization` or `LayerNormalizat" in remedy
    assert "`keras_renorm.convert(model)` puts `BatchRenormal" in remedy
    # The remedies help: larger batches, and that layer.
    model, more = healthy(network, seed)
    assert causes(discrepancy(compiled(model), more, verbose=False)) == []
    if network is convolutional:
        model = converted(network(layers.BatchNormalization), momentum=0.95)
        fitted(model, shuffled(seed, 2, 400))
        assert causes(discrepancy(model, data, verbose=False)) == []


@pytest.mark.slow
@networks_by_seed
def test_batches_of_four_and_more_are_not_too_small(network, seed):
    """Noise regularizes, and what is served is better than what trains."""
    for size in (4, 8):
        model = trained(network, seed, shuffled(seed, size, 400), momentum=0.95)
        data = shuffled(seed + 50, size, 480 // size)
        report = discrepancy(model, data, verbose=False)
        assert report.inference["loss"] < report.training["loss"]
        assert causes(report) == []
        assert "; the loss is lower in inference." in " ".join(
            str(report).split()
        )


def perceptron(bn, outputs=10, depth=2, dropout=0.0):
    blocks = [
        [
            layers.Dense(64, use_bias=False),
            bn(),
            layers.ReLU(),
            layers.Dropout(dropout),
        ]
        for _ in range(depth)
    ]
    return keras.Sequential(
        [
            keras.Input((64,)),
            *itertools.chain(*blocks),
            layers.Dense(outputs),
        ]
    )


def recurrent(bn):
    return keras.Sequential(
        [
            keras.Input((8, 8)),
            bn(),
            layers.GRU(16),
            bn(),
            layers.Dense(10),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "examples", "size", "steps"),
    [
        (perceptron, 1797, 16, 500),
        (functools.partial(perceptron, depth=6), 1797, 16, 600),
        (functools.partial(perceptron, dropout=0.5), 1797, 16, 600),
        (perceptron, 100, 8, 300),
        (functools.partial(perceptron, outputs=1), 1797, 16, 600),
        (recurrent, 1797, 32, 300),
    ],
)
def test_other_healthy_networks(network, examples, size, steps):
    model = network(functools.partial(layers.BatchNormalization, momentum=0.95))
    x = IMAGES[:examples].reshape(-1, *model.input_shape[1:])
    y = LABELS[:examples]
    compiled(model)
    if model.output_shape[-1] == 1:  # regression
        y = x @ np.linspace(-1, 1, 64, dtype="float32")[:, np.newaxis]
        model.compile("adam", "mse", metrics=["mae"])
    epochs = round(steps * size / examples)
    model.fit(x, y, batch_size=size, epochs=epochs, verbose=0)
    order = np.random.default_rng(1).permutation(examples)[: 40 * size]
    report = discrepancy(
        model, (x[order], y[order]), batch_size=size, verbose=False
    )
    assert causes(report) == []


@pytest.mark.slow
@seeds
def test_a_momentum_that_means_the_opposite(seed):
    """PyTorch's 0.1."""
    model = trained(dense, seed, shuffled(seed, 8, 300), momentum=0.1)
    data = shuffled(seed + 50, 8, 60)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["moving averages jitter"]
    (verdict,) = report.verdicts
    assert verdict.layers[0] == "bn1"
    assert (
        "`momentum` is low (it is 0.1, the share of the old value that is "
        "kept; PyTorch's 0.1 is 0.9 here)."
    ) in verdict.reason
    assert verdict.remedy.startswith(
        "Train with a higher `momentum`, 0.9 or more; for the model as it is"
    )
    # The remedies help.
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []
    model = trained(dense, seed, shuffled(seed, 8, 300), momentum=0.9)
    assert causes(discrepancy(model, data, verbose=False)) == []


@pytest.mark.slow
@pytest.mark.tensorflow  # which corrects the gradient
@networks_by_seed
def test_batches_of_one_class(network, seed):
    model = trained(network, seed, one_class_each(seed, 16, 300), momentum=0.98)
    data = one_class_each(seed + 50, 16, 60)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["batches not i.i.d."]
    assert "Shuffle" in report.verdicts[0].remedy
    # The remedies help: that layer, and shuffled data.
    other = converted(model)
    fitted(other, one_class_each(seed + 10, 16, 600))
    assert causes(discrepancy(other, data, verbose=False)) == []
    model, data = healthy(network, seed)
    assert causes(discrepancy(compiled(model), data, verbose=False)) == []


@pytest.mark.slow
def test_sorted_data():
    model = trained(convolutional, 0, sorted_by_class(32) * 4, momentum=0.95)
    report = discrepancy(model, sorted_by_class(32), verbose=False)
    assert causes(report)[0] == "batches not i.i.d."


@pytest.mark.slow
def test_renormalization_that_corrects_and_one_that_does_not():
    batches = shuffled(0, 2, 400)
    model = trained(
        dense, 0, batches, BatchRenormalization, r_max=3.0, d_max=5.0
    )
    data = shuffled(50, 2, 100)
    assert "batches too small" not in causes(
        discrepancy(model, data, verbose=False)
    )
    for layer in model.layers:
        if isinstance(layer, BatchRenormalization):
            layer.r_max, layer.d_max = 1.0, 0.0
    report = discrepancy(model, data, verbose=False)
    (verdict,) = [
        each for each in report.verdicts if each.cause == "batches too small"
    ]
    assert "in the place of r_max=1 and d_max=0 as they are" in verdict.remedy
    # The remedy helps.
    auto = dict.fromkeys(("r_max", "d_max", "gradient_momentum"), "auto")
    other = fitted(converted(model, **auto), batches)
    for layer in other.layers:
        if isinstance(layer, BatchRenormalization):
            assert 0.5 < layer.current_correction() <= 1
    assert causes(discrepancy(other, data, verbose=False)) == []


@pytest.mark.slow
@networks_by_seed
def test_statistics_never_trained(network, seed):
    model = trained(
        network,
        seed,
        shuffled(seed, 32, 100),
        BatchNormalization,
        frozen_statistics=True,
    )
    report = discrepancy(model, shuffled(seed + 50, 32, 24), verbose=False)
    assert causes(report) == ["statistics never trained"]
    assert report.verdicts[0].layers == ("bn1", "bn2")
    # The remedy helps.
    data = shuffled(seed + 50, 32, 24)
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []


@pytest.mark.slow
@networks_by_seed
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_statistics_that_one_sample_ruined(network, seed, value):
    """Of a forward pass, so that the weights are whole."""
    x = IMAGES[:32].copy()
    x[3, 4, 4] = value
    found = []
    for kind in (layers.BatchNormalization, BatchNormalization):
        model = network(kind)
        model.set_weights(healthy_weights(network, seed))
        compiled(model)(x, training=True)
        data = shuffled(seed + 50, 32, 24)
        found.append(causes(discrepancy(model, data, verbose=False)))
        # The remedy helps.
        keras_renorm.recalibrate(model, data, verbose=False)
        assert causes(discrepancy(model, data, verbose=False)) == []
    assert found == [["statistics not finite"], []]


@pytest.mark.slow
@networks_by_seed
def test_constant_channels(network, seed):
    model, data = healthy(network, seed)
    kernel = model.get_layer("first").kernel
    values = np.array(keras.ops.convert_to_numpy(kernel.value))
    values[..., [2, 5]] = 0
    kernel.assign(values)
    keras_renorm.recalibrate(model, data, verbose=False)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["constant channels"]
    assert "(bn1: 2, 5)" in report.verdicts[0].reason
    assert report.verdicts[0].layers == ("bn1",)
    # The remedy helps: initialized anew.
    rng = np.random.default_rng(seed)
    values[..., [2, 5]] = rng.normal(size=(*values.shape[:-1], 2))
    kernel.assign(values)
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []


@pytest.mark.slow
@networks_by_seed
def test_activations_that_are_small(network, seed):
    model, data = healthy(network, seed)
    kernel = model.get_layer("first").kernel
    kernel.assign(1e-3 * kernel)
    keras_renorm.recalibrate(model, data, verbose=False)
    report = discrepancy(model, data, verbose=False)
    assert causes(report) == ["constant channels"]
    # The remedy helps.
    weights = model.get_weights()
    model = network(functools.partial(layers.BatchNormalization, epsilon=1e-9))
    model.set_weights(weights)
    keras_renorm.recalibrate(model, data, verbose=False)
    assert causes(discrepancy(model, data, verbose=False)) == []


@pytest.mark.slow
@networks_by_seed
def test_one_layer_only(network, seed):
    model, data = healthy(network, seed)
    bank = keras_renorm.get_statistics(model)
    bank["bn2/moving_mean"] += 0.7 * np.sqrt(bank["bn2/moving_variance"])
    keras_renorm.set_statistics(model, bank)
    report = discrepancy(model, data, verbose=False)
    (verdict,) = report.verdicts
    assert verdict.layers == ("bn2",)
    assert verdict.reason.startswith("In 1 of 2 layers only (bn2) ")
    assert report.layers[1].shift == pytest.approx(0.7, abs=0.05)


HEALTHY = Measurement(
    name="bn",
    kind="BatchNormalization",
    channels=8,
    batches=20,
    elements=320.0,
    examples=2.0,
    momentum=0.99,
    is_frozen=False,
    is_untrained=False,
    is_broken=False,
    correction=0.0,
    is_gated=False,
    r_max=3.0,
    d_max=5.0,
    r=(0.8, 0.9, 1.0, 1.1, 1.2),
    d=(-0.2, -0.1, 0.0, 0.1, 0.2),
    beyond_r=0.0,
    beyond_d=0.0,
    beyond=0.0,
    jeffreys=0.01,
    population_jeffreys=0.0,
    gap=0.1,
    shift=0.05,
    distance=0.06,
    f=1.0,
    f_limit=2.0,
    scatter=0.1,
    scatter_expected=0.1,
    batch_noise=0.15,
    from_start=float("nan"),
    constant_channels=(),
)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, []),
        ({"shift": 0.24}, []),
        ({"shift": 0.26}, ["moving averages lag, or another domain"]),
        ({"shift": 0.26, "from_start": 0.9}, ["moving averages lag"]),
        (
            {"shift": 0.26, "from_start": 0.96},
            ["moving averages lag, or another domain"],
        ),
        ({"batch_noise": 0.34, "gap": 0.5}, ["batches too small"]),
        ({"batch_noise": 0.32, "gap": 0.5}, []),
        ({"batch_noise": 0.34, "gap": 0.1}, []),
        ({"batch_noise": 0.34, "gap": 0.5, "is_frozen": True}, []),
        ({"batch_noise": 0.34, "gap": 0.5, "f": NAN}, ["batches too small"]),
        (
            {"batch_noise": 0.34, "gap": 0.5, "f": 3.0, "scatter": 0.3},
            ["batches not i.i.d."],
        ),
        ({"scatter": 0.11, "gap": 0.3, "f": 3.0}, ["batches not i.i.d."]),
        ({"scatter": 0.09, "gap": 0.3, "f": 3.0}, []),
        ({"scatter": 0.11, "gap": 0.05, "f": 3.0}, []),
        ({"scatter": 0.5, "gap": 0.5, "f": 1.9}, []),
        ({"shift": 2.0, "is_untrained": True}, ["statistics never trained"]),
        (
            {"shift": NAN, "gap": NAN, "is_broken": True},
            ["statistics not finite"],
        ),
        (
            {"shift": 1.0, "scatter": 0.5, "gap": 1.0, "f": 3.0},
            ["batches not i.i.d.", "moving averages lag, or another domain"],
        ),
        ({"constant_channels": (3,)}, ["constant channels"]),
        # Of four examples batch normalization is best.
        ({"batch_noise": 0.34, "gap": 0.5, "examples": 3.9}, [SMALL]),
        ({"batch_noise": 0.34, "gap": 0.5, "examples": 4.0}, []),
        # A low momentum.
        ({"distance": 0.26, "momentum": 0.49}, ["moving averages jitter"]),
        ({"distance": 0.26, "momentum": 0.5}, []),
        ({"distance": 0.24, "momentum": 0.1}, []),
        ({"distance": 0.4, "momentum": 0.1, "is_frozen": True}, []),
        (
            {"distance": 0.4, "shift": 0.26, "momentum": 0.1},
            ["moving averages lag, or another domain"],
        ),
    ],
)
def test_rules(figures, expected):
    layers_ = [HEALTHY, HEALTHY._replace(name="other", **figures)]
    found = verdicts_of(layers_)
    assert [verdict.cause for verdict in found] == expected
    assert all(verdict.layers == ("other",) for verdict in found)


@pytest.mark.parametrize(
    ("gap", "training", "inference", "differ"),
    [
        # Without loss and metrics the outputs are all there is.
        (0.24, {}, {}, False),
        (0.26, {}, {}, True),
        (0.29, {}, {}, True),
        (NAN, {}, {}, True),
        (0.49, {"loss": 0.5}, {"loss": 0.5}, False),
        (0.51, {"loss": 0.5}, {"loss": 0.5}, True),
        (0.1, {"loss": 0.018}, {"loss": 1.006}, True),
        (0.1, {"loss": 0.1}, {"loss": 0.29}, False),
        (0.1, {"loss": 0.1}, {"loss": 0.31}, True),
        (0.1, {"loss": -3.1}, {"loss": -1.0}, True),
        # It serves better than it trains: that is noise.
        (0.1, {"loss": 0.31}, {"loss": 0.1}, False),
        (0.3, {"loss": 0.026}, {"loss": 0.005}, False),
        (0.1, {"loss": -1.0}, {"loss": -3.1}, False),
        (0.1, {"loss": -0.1}, {"loss": 0.1}, True),
        (0.1, {"loss": 0.1}, {"loss": NAN}, True),
        # Shares, and what is larger.
        (0.1, {"loss": 1.0, "auc": 0.94}, {"loss": 1.0, "auc": 0.90}, False),
        (0.1, {"loss": 1.0, "auc": 0.96}, {"loss": 1.0, "auc": 0.90}, True),
        (0.1, {"loss": 1.0, "mae": 2.0}, {"loss": 1.0, "mae": 5.9}, False),
        (0.1, {"loss": 1.0, "mae": 2.0}, {"loss": 1.0, "mae": 6.1}, True),
        (0.1, {"loss": 1.0, "mae": 6.1}, {"loss": 1.0, "mae": 2.0}, True),
        (0.1, {"loss": 1.0, "r2": -0.1}, {"loss": 1.0, "r2": -0.2}, False),
        # Unknown in both.
        (0.1, {"loss": 1.0, "f1": NAN}, {"loss": 1.0, "f1": NAN}, False),
        (0.1, {"loss": 1.0, "kl": INF}, {"loss": 1.0, "kl": INF}, False),
        (0.1, {"loss": 1.0, "f1": 0.0}, {"loss": 1.0, "f1": NAN}, True),
        # It serves better: metrics and outputs differ for that.
        (0.1, {"loss": 1.0, "acc": 0.7}, {"loss": 0.4, "acc": 0.9}, False),
        (0.9, {"loss": 1.0, "acc": 0.7}, {"loss": 0.4, "acc": 0.9}, False),
        (NAN, {"loss": 1.0}, {"loss": 0.4}, True),
    ],
)
def test_a_model_that_differs_has_a_verdict(gap, training, inference, differ):
    found = verdicts_of([HEALTHY], None, gap, (training, inference))
    expected = ["training and inference differ"] if differ else []
    assert [each.cause for each in found] == expected
    # Where a layer explains it, that is said.
    shifted = HEALTHY._replace(shift=1.0)
    (found,) = verdicts_of([shifted], None, gap, (training, inference))
    assert found.cause == "moving averages lag, or another domain"
    # Channels that are constant do not.
    constant = HEALTHY._replace(constant_channels=(3,))
    found = verdicts_of([constant], None, gap, (training, inference))
    assert [each.cause for each in found] == [*expected, "constant channels"]


@pytest.mark.parametrize(
    ("examples", "elements", "is_grouped", "row"),
    [
        (1.0, 100.0, False, advice.ANY),
        (3.9, 100.0, False, advice.ANY),
        (4.0, 100.0, False, advice.ANY),
        (1.0, 1.0, False, advice.WITHOUT_AXES),
        (3.9, 3.9, False, advice.WITHOUT_AXES),
        (4.0, 4.0, False, advice.ANY),
        (16.0, 100.0, True, advice.ANY),
        (16.0, 16.0, True, advice.WITHOUT_AXES),
    ],
)
def test_the_row_for_batches(examples, elements, is_grouped, row):
    layer = HEALTHY._replace(
        batch_noise=0.9, gap=0.9, examples=examples, elements=elements
    )
    if is_grouped:
        layer = layer._replace(f=3.0, scatter=0.5)
    scores = ({"loss": 1.0}, {"loss": 9.0})
    (verdict,) = verdicts_of([layer], scores=scores)
    assert verdict.cause == ("batches not i.i.d." if is_grouped else SMALL)
    assert (f"for {row.where}, {row.take}." in verdict.remedy) == (
        row is not advice.ANY
    )
    arguments = ""
    if not is_grouped and examples >= 4:
        # No layer learns better there than the one that it has.
        arguments = ", gradient_momentum=None"
    assert f"`keras_renorm.convert(model{arguments})`" in verdict.remedy


RENORM = HEALTHY._replace(kind="BatchRenormalization", correction=1.0)
GATED = RENORM._replace(is_gated=True)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"kind": "BatchNormalization", "is_gated": False},
            "`keras_renorm.convert(model)` puts `BatchRenormalization()` in "
            "the place of these layers.",
        ),
        (
            {"is_gated": False, "r_max": 1.0},
            "Let `BatchRenormalization` measure how far to correct, in the "
            "place of r_max=1 and d_max=5 as they are now: "
            '`keras_renorm.convert(model, r_max="auto", d_max="auto", '
            'gradient_momentum="auto")`.',
        ),
        # What the layer does already is no advice.
        (
            {"correction": 0.42},
            "No setting: these layers measure how far to correct, and do it "
            "(0.42 of the way).",
        ),
        (
            {"d_max": 0.0},
            "Train for longer: limits, now r_max=3 and d_max=0, are not yet "
            "open.",
        ),
    ],
)
def test_what_layers_do_already_is_not_advised(figures, said):
    layer = GATED._replace(batch_noise=0.9, gap=0.9, **figures)
    (verdict,) = verdicts_of([layer])
    assert verdict.cause == SMALL
    assert verdict.remedy.endswith(f"replicas; or else: {said}")
    (verdict,) = verdicts_of([layer._replace(f=3.0, scatter=0.5)])
    assert verdict.remedy.endswith(f"; where that cannot be: {said}")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (HEALTHY, "`keras_renorm.convert(model, gradient_momentum=None)`"),
        (GATED, "`keras_renorm.convert(model, gradient_momentum=None)`"),
        (RENORM, "open limits (`layer.r_max`, `layer.d_max`)"),
    ],
)
def test_training_with_what_is_served(layer, said):
    said = f"go on training with outputs as the model serves them: {said}."
    (verdict,) = verdicts_of([layer], gap=0.9)
    assert verdict.cause == "training and inference differ"
    assert said in verdict.remedy
    layer = layer._replace(batch_noise=0.9, gap=0.9, examples=16.0)
    scores = ({"loss": 1.0}, {"loss": 9.0})
    (verdict,) = verdicts_of([layer], scores=scores)
    assert verdict.remedy.endswith(f"over replicas; or {said}")


def test_how_far_layers_correct_is_a_range():
    layer = GATED._replace(batch_noise=0.9, gap=0.9)
    found = [layer._replace(correction=each) for each in (0.8, 0.31, 0.5)]
    (verdict,) = verdicts_of(found)
    assert "(0.31 to 0.80 of the way)" in verdict.remedy


@pytest.mark.parametrize(
    ("examples", "gap", "loss", "causes_"),
    [
        # Training mode, inference; what has learned in spite of the noise.
        (2.0, 0.9, (1.7, 1.2), [SMALL]),
        (2.0, 0.9, (0.3, 0.11), [SMALL]),
        (2.0, 0.9, (0.3, 0.09), []),
        (2.0, 0.9, (0.2, 0.034), []),
        (2.0, 0.9, (0.2, NAN), [SMALL]),
        # From four examples on, where it serves worse.
        (16.0, 0.9, (0.2, 0.19), []),
        (16.0, 0.9, (0.2, 0.034), []),
        (16.0, 0.9, (0.2, 0.21), [SMALL]),
        (16.0, 0.3, (0.2, 0.21), []),
        (16.0, 0.3, (0.2, 0.7), [SMALL]),
        (16.0, 0.9, None, ["training and inference differ"]),
    ],
)
def test_noise_that_does_no_harm(examples, gap, loss, causes_):
    layer = HEALTHY._replace(batch_noise=0.4, gap=0.4, examples=examples)
    scores = ({}, {})
    if loss is not None:
        scores = tuple({"loss": each, "accuracy": each / 2} for each in loss)
    found = verdicts_of([layer], gap=gap, scores=scores)
    assert [each.cause for each in found] == causes_


def test_every_text_finds_its_figures():
    layer = HEALTHY._replace(shift=1.0, from_start=0.5, constant_channels=(3,))
    found = _Found(Case([layer], None, 0.9, ({}, {}), True), [layer])
    for rule in RULES:
        for text in (rule.reason, rule.remedy):
            assert "{" not in text.format_map(found)


def test_what_is_advised_is_what_the_benchmark_found():
    summary = json.loads(
        (ROOT / "benchmarks/results/quality/summary.json").read_text()
    )
    cells = {
        (cell["task"], cell["regime"], cell["contender"]): cell
        for experiment, found in summary["experiments"].items()
        if experiment.startswith("regimes")
        for cell in found["cells"]
    }
    for row in advice.ROWS:
        evidence = [each for each in row.evidence if each in cells]
        assert evidence or not row.evidence, row.where
        for task, regime, contender in evidence:
            taken = cells[task, regime, contender]
            for other in ("bn", "renorm", "group", "gated"):
                for late in ("", "_frozen_late", "_corrected"):
                    rival = cells.get((task, regime, other + late))
                    if rival is not None:
                        # A point is what rates chosen on few seeds leave open.
                        slack = max(taken["spread"], 0.01)
                        assert rival["mean"] <= taken["mean"] + slack, (
                            row.where,
                            other + late,
                        )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(x, training=training)


@pytest.mark.parametrize("is_nested", [False, True])
def test_convert_is_advised_as_it_works(is_nested, rng):
    data = np.repeat(rng.normal(size=(40, 1, 1)), 4, axis=1)
    data = (data + 0.1 * rng.normal(size=(40, 4, 3))).reshape(160, 3)

    def remedy(model):
        report = discrepancy(model, data, batch_size=4, verbose=False)
        (verdict,) = [
            each
            for each in report.verdicts
            if each.cause == "batches not i.i.d."
        ]
        return verdict.remedy

    model = Subclassed()
    if is_nested:
        model = keras.Sequential([keras.Input((3,)), model])
    model(data)
    assert "`keras_renorm.convert(model, in_place=True)`" in remedy(model)
    with pytest.raises(ValueError, match="must"):
        keras_renorm.convert(model)
    keras_renorm.convert(model, in_place=True)
    inner = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((3,)), inner])
    assert "`keras_renorm.convert(model)` puts" in remedy(model)
    keras_renorm.convert(model)


@pytest.mark.parametrize(
    ("on_the_way", "of", "cause"),
    [
        (1, 1, "moving averages lag"),
        (1, 2, "moving averages lag"),
        (1, 3, "moving averages lag, or another domain"),
        (2, 3, "moving averages lag"),
        (0, 2, "moving averages lag, or another domain"),
    ],
)
def test_averages_lag_if_half_of_the_layers_are_on_the_way(
    on_the_way, of, cause
):
    found = verdicts_of(
        [
            HEALTHY._replace(
                name=str(at),
                shift=1.0,
                from_start=0.5 if at < on_the_way else NAN,
            )
            for at in range(of)
        ]
    )
    assert [each.cause for each in found] == [cause]


@pytest.mark.parametrize(
    ("momentum", "said"),
    [
        (0.99, "in training a lower `momentum`, more steps"),
        (0.9, "in training more steps"),
        (0.5, "in training more steps"),
        (
            0.0,
            "in training a higher `momentum` (it is 0, the share of the old "
            "value that is kept), more steps",
        ),
        (
            0.1,
            "in training a higher `momentum` (it is 0.1, the share of the old "
            "value that is kept; PyTorch's 0.1 is 0.9 here), more steps",
        ),
    ],
)
@pytest.mark.parametrize("on_reference", [None, 0.9])
def test_averages_that_are_off_want_another_momentum(
    momentum, said, on_reference
):
    layer = HEALTHY._replace(shift=1.0, momentum=momentum)
    references = None
    if on_reference:
        references = [layer._replace(shift=on_reference)]
    (found,) = verdicts_of([layer], references)
    assert said in found.remedy


def test_where_one_average_jitters_the_others_do():
    low = HEALTHY._replace(momentum=0.1, distance=0.4)
    far = low._replace(name="far", shift=0.3)
    scores = ({"loss": 0.26, "acc": 0.93}, {"loss": 0.44, "acc": 0.85})
    found = verdicts_of([low, far], scores=scores)
    assert [(each.cause, each.layers) for each in found] == [
        ("moving averages jitter", ("bn", "far"))
    ]
    (found,) = verdicts_of([far], scores=scores)
    assert found.cause == "moving averages lag, or another domain"
    # A reference tells.
    references = [low, far._replace(shift=0.1)]
    found = verdicts_of([low, far], references, scores=scores)
    assert [(each.cause, each.layers) for each in found] == [
        ("another domain", ("far",)),
        ("moving averages jitter", ("bn",)),
    ]
    # What they explain is not batches of eight that are too small.
    noisy = low._replace(batch_noise=0.4, gap=0.4, examples=8.0)
    (found,) = verdicts_of([noisy], scores=scores)
    assert found.cause == "moving averages jitter"


def test_noise_matters_more_where_the_outputs_show_it():
    noisy = HEALTHY._replace(batch_noise=0.2, gap=0.2)
    same = ({"loss": 1.0}, {"loss": 1.0})
    assert verdicts_of([noisy], gap=0.49, scores=same) == []
    (found,) = verdicts_of([noisy], gap=0.51)
    assert found.cause == "batches too small"
    # But not where something else explains them.
    shifted = HEALTHY._replace(name="shifted", shift=1.0)
    (found,) = verdicts_of([noisy, shifted], gap=0.51)
    assert found.layers == ("shifted",)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        # Small shifts in many layers, which the reference does not have.
        ((0.09, 0.07, 0.11), (0.02, 0.03, 0.04), ("one", "two", "three")),
        ((0.15, 0.12, 0.04), (0.05, 0.06, 0.04), ("one",)),
        # The reference has them: the averages lag.
        ((0.09, 0.07, 0.11), (0.09, 0.06, 0.1), None),
        # No averages are far off.
        ((0.04, 0.04, 0.04), (0.0, 0.0, 0.0), None),
    ],
)
def test_small_shifts_add_up(here, there, expected):
    names = ("one", "two", "three")
    on_data, on_reference = (
        [
            HEALTHY._replace(name=name, shift=shift)
            for name, shift in zip(names, shifts, strict=True)
        ]
        for shifts in (here, there)
    )
    scores = ({"loss": 0.7, "accuracy": 0.8}, {"loss": 0.93, "accuracy": 0.7})
    (found,) = verdicts_of(on_data, on_reference, 0.3, scores)
    if expected is None:
        assert found.cause == "training and inference differ"
        recalibrates = "recalibrate(model, training_data)" in found.remedy
        assert recalibrates == (max(there) > 0.05)
        assert "reference" not in found.remedy
    else:
        assert (found.cause, found.layers) == ("another domain", expected)
        assert "`keras_renorm.recalibrate` on this data" in found.remedy
    # Without a reference nothing tells.
    (found,) = verdicts_of(on_data, None, 0.3, scores)
    assert found.cause == "training and inference differ"
    assert "`reference=training_data` tells" in found.remedy
    # And where the model is the same, they do not matter.
    assert verdicts_of(on_data, on_reference) == []


def test_a_reference_is_asked_layer_by_layer():
    names = ("one", "two", "three")
    on_data = [
        HEALTHY._replace(name=name, shift=shift)
        for name, shift in zip(names, (0.8, 0.9, 0.1), strict=True)
    ]
    on_reference = [
        HEALTHY._replace(name=name, shift=shift)
        for name, shift in zip(names, (0.1, 0.7, 0.7), strict=True)
    ]
    found = verdicts_of(on_data, on_reference)
    assert [(each.cause, each.layers) for each in found] == [
        ("another domain", ("one",)),
        ("moving averages lag", ("two",)),
    ]
    assert "0.80 standard deviations (one)" in found[0].reason
    assert "0.10 from those of the reference" in found[0].reason
