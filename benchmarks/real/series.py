"""Classification of time series, in small minibatches.

The data are those that aeon ships, read from the files of the installed
package; aeon itself is not imported. The networks are those that it offers
(Wang et al. 2017, Ismail Fawaz et al. 2020), of half the filters. Series of
unequal length are padded at their end, and every normalization and the pooling
are given the mask.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

import keras_renorm
from benchmarks.quality.decay import Cosine

TITLE = "Time series, in small minibatches"
MEASURES = {
    "accuracy": ("test accuracy", "high"),
    "recalibrated": ("test accuracy after `recalibrate`", "high"),
    "loss": ("test loss", "low"),
}
SETTINGS = {
    **{f"fcn_JapaneseVowels_{n}": f"vowels, FCN, {n}" for n in (2, 4, 16)},
    **{f"fcn_ItalyPowerDemand_{n}": f"power, FCN, {n}" for n in (2, 4, 16)},
    "inception_ArrowHead_2": "arrows, Inception, 2",
}
CONTENDERS = {
    "bn": "Keras's batch normalization",
    "keras_renorm": "Keras's `renorm=True`",
    "ours": "`BatchRenormalization()`",
}
RATES = (1e-3, 3e-3)
SEEDS = 10
STEPS, QUICK_STEPS = 800, 20
NEEDS = "aeon"


class Series(NamedTuple):
    """Padded with zeros: (number, steps, channels), and classes from 0 on."""

    x: np.ndarray
    y: np.ndarray


def read(path):
    """Of a file of aeon's: a list of arrays (steps, channels), and labels."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = [line.strip().lower() for line in lines].index("@data") + 1
    series, labels = [], []
    for line in lines[start:]:
        *channels, label = line.split(":")
        series.append(
            np.array([c.split(",") for c in channels], "float32").transpose()
        )
        labels.append(label.strip())
    return series, labels


@functools.lru_cache(2)
def load(name, split_seed=None):
    """Training and test series: aeon's split, or a drawn one as large."""
    (package,) = importlib.util.find_spec("aeon").submodule_search_locations
    folder = Path(package) / "datasets" / "data" / name
    parts = [read(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    series = [each for part in parts for each in part[0]]
    _, y = np.unique(
        [each for part in parts for each in part[1]], return_inverse=True
    )
    order, count = np.arange(len(y)), len(parts[0][1])
    if split_seed is not None:
        order = np.random.default_rng(split_seed).permutation(len(y))
    known = np.concatenate([series[row] for row in order[:count]])
    mean, stddev = known.mean(axis=0), known.std(axis=0)
    x = np.zeros((len(y), max(map(len, series)), len(mean)), "float32")
    for row, each in enumerate(series):
        x[row, : len(each)] = (each - mean) / stddev
    return [Series(x[rows], y[rows]) for rows in (order[:count], order[count:])]


def _convolution(filters, width):
    return layers.Conv1D(filters, width, padding="same", use_bias=False)


def fcn(x, normalize):
    """Three convolutions."""
    for filters, width in ((64, 8), (128, 5), (64, 3)):
        x = layers.ReLU()(normalize(_convolution(filters, width)(x)))
    return x


def inception(x, normalize):
    """Six modules of four branches, with a shortcut for each three."""
    shortcut = x
    for depth in range(6):
        narrow = _convolution(16, 1)(x) if depth else x
        pooled = layers.MaxPooling1D(3, 1, padding="same")(x)
        branches = [_convolution(16, width)(narrow) for width in (40, 20, 10)]
        x = layers.Concatenate()([*branches, _convolution(16, 1)(pooled)])
        x = layers.ReLU()(normalize(x))
        if depth % 3 == 2:
            shortcut = normalize(_convolution(64, 1)(shortcut))
            x = shortcut = layers.ReLU()(layers.Add()([x, shortcut]))
    return x


NETWORKS = {"fcn": fcn, "inception": inception}


def make(network, shape, classes, contender, has_mask):
    """A network, normalized by a contender."""
    inputs = keras.Input(shape)
    mask = None
    if has_mask:
        mask = ops.any(ops.not_equal(inputs, 0.0), axis=-1)

    def normalize(x):
        layer = layers.BatchNormalization(renorm=contender == "keras_renorm")
        x = layer(x, mask=mask)
        # Convolutions must not read what normalization makes of padding.
        return x * ops.cast(mask, x.dtype)[..., None] if has_mask else x

    x = NETWORKS[network](inputs, normalize)
    x = layers.GlobalAveragePooling1D()(x, mask=mask)
    model = keras.Model(inputs, layers.Dense(classes)(x))
    return keras_renorm.convert(model) if contender == "ours" else model


class Trainer:
    """A compiled network, traced once for many rates and seeds."""

    def __init__(self, network, shape, classes, contender, has_mask, steps):
        self.make = functools.partial(
            make, network, shape, classes, contender, has_mask
        )
        self.model = self.make()
        # What infers as the model does, and can be recalibrated.
        self.plain = self.model
        if contender == "keras_renorm":
            self.plain = keras_renorm.convert(
                self.model, keras_renorm.BatchNormalization
            )
        self.steps = steps
        self.decay = Cosine(steps)
        self.model.compile(
            keras.optimizers.Adam(self.decay),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=max(1, steps // 10),
        )
        self.model.optimizer.build(self.model.trainable_variables)

    def fit(self, train, rate, seed, batch_size):
        """Trains from new weights, on minibatches drawn without replacement."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        self.decay.rate.assign(rate)
        for variable in self.model.optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        rng = np.random.default_rng(seed)
        total = self.steps * batch_size
        epochs = -(-total // len(train.y))
        rows = np.concatenate(
            [rng.permutation(len(train.y)) for _ in range(epochs)]
        )[:total]
        self.model.fit(
            train.x[rows], train.y[rows], batch_size, shuffle=False, verbose=0
        )

    def recalibrate(self, x):
        """Of `plain`, which gets the weights of the model.

        In random order: the files of some sets are sorted by class.
        """
        for new, old in zip(self.plain.layers, self.model.layers, strict=True):
            by_name = {weight.name: weight for weight in old.weights}
            for weight in new.weights:
                weight.assign(by_name[weight.name])
        x = np.random.default_rng(0).permutation(x)
        keras_renorm.recalibrate(self.plain, x, verbose=False)


# Trainings of a cell come one after the other, and differ in rate and seed.
_trainer = functools.lru_cache(1)(Trainer)


def train(setting, contender, rate, seed, is_tuning):
    """Accuracy and loss on the test series."""
    network, name, batch_size = setting.split("_")
    known, test = load(name, seed if is_tuning else None)
    trainer = _trainer(
        network,
        known.x.shape[1:],
        int(known.y.max()) + 1,
        contender,
        name == "JapaneseVowels",
        STEPS,
    )
    trainer.fit(known, rate, seed, int(batch_size))
    accuracy, loss = _scores(trainer.model, test)
    trainer.recalibrate(known.x)
    recalibrated, _ = _scores(trainer.plain, test)
    return {"accuracy": accuracy, "recalibrated": recalibrated, "loss": loss}


def _scores(model, test):
    """Accuracy and cross-entropy."""
    logits = model.predict(test.x, batch_size=256, verbose=0)
    logits = logits.astype("float64")
    logits -= logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    losses = log_sums - logits[np.arange(len(test.y)), test.y]
    return float((logits.argmax(axis=1) == test.y).mean()), float(losses.mean())
