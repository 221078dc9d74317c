"""A stream: one scene after the other, none of which comes again.

Photographs of solar cells, sound or defective (elpv-dataset: Deitsch et al.
2019, arXiv:1807.02894), read from the files of the installed package. A network
is trained on monocrystalline cells, in random minibatches of 32: home. Then
come the polycrystalline ones, in scenes of 50 cells that follow each other in
the files: 32 to train, in one pass, and the others to test. Each minibatch is
of one scene. At the end the network is asked about all scenes so far, home
included.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

import keras_renorm

TITLE = "A stream of scenes"
MEASURES = {
    "auc": ("AUC, all scenes so far", "high"),
    "stream": ("AUC, the stream's scenes", "high"),
    "home": ("AUC, at home", "high"),
    "stream_loss": ("loss, the stream's scenes", "low"),
}
SETTINGS = {f"{n}": f"minibatches of {n}" for n in (2, 8)}
CONTENDERS = {
    "untrained": "as pretrained, no training",
    "bank": "no training, a bank of statistics for the stream",
    "bank_sound": "the same, of sound cells only",
    "frozen": "trained, statistics frozen",
    "frozen_bank": "trained, statistics frozen, a bank for the stream",
    "bn": "Keras's batch normalization",
    "keras_renorm": "Keras's `renorm=True`",
    "ours": "`convert`ed to `BatchRenormalization()`",
    "algorithm_1": "`convert(model, gradient_momentum=None)`",
}
UNTRAINED = ("untrained", "bank", "bank_sound")
# Where nothing is trained there is no rate to choose.
RATES = {
    name: (0.0,) if name in UNTRAINED else (1e-4, 1e-3) for name in CONTENDERS
}
SEEDS = 10
STEPS, QUICK_STEPS = 31, 2  # scenes
PRETRAINING_STEPS = 10  # for each scene
SCENE, TRAINED = 50, 32  # cells of a scene
BANK = 4  # scenes: a bank is of their cells, without labels
NEEDS = "elpv-dataset pillow"
CACHE = Path(__file__).parents[2] / ".cache" / "stream"


class Cells(NamedTuple):
    """Images (number, 50, 50, 1), and whether a cell is defective."""

    x: np.ndarray
    y: np.ndarray

    def of(self, rows):
        """Some of them."""
        return Cells(self.x[rows], self.y[rows])


@functools.lru_cache(1)
def load():
    """Monocrystalline and polycrystalline cells, in the order of the files."""
    (package,) = importlib.util.find_spec(
        "elpv_dataset"
    ).submodule_search_locations
    folder = Path(package) / "data"
    rows = [line.split() for line in (folder / "labels.csv").open()]
    x = _cached("cells", lambda: [_images(folder, rows)])[0]
    y = np.array([float(probability) > 0.5 for _, probability, _ in rows])
    kinds = np.array([kind for _, _, kind in rows])
    return [
        Cells(x[kinds == kind], y[kinds == kind].astype("int32"))
        for kind in ("mono", "poly")
    ]


def _images(folder, rows):
    """Means of 6 x 6 pixels, less their mean, over their deviation."""
    from PIL import Image

    images = []
    for name, *_ in rows:
        with Image.open(folder / name) as image:
            pixels = np.asarray(image, "float32").reshape(50, 6, 50, 6)
        images.append(pixels.mean(axis=(1, 3)))
    images = np.stack(images)[..., None]
    return (images - images.mean()) / images.std()


def _cached(name, make):
    """Arrays that took long to make; others where this file has changed."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = CACHE / f"{name}_{version}.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path, *make())
    with np.load(path) as file:
        return [file[key] for key in file.files]


class Split(NamedTuple):
    """Cells to train and to test; of the stream a pair for each scene."""

    home: Cells
    home_test: Cells
    scenes: list
    tests: list


@functools.lru_cache(2)
def split(seed, count):
    """Which cells are tested, and the order of scenes, by the seed."""
    home, stream = load()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(home.y))
    third = len(order) // 3
    scenes, tests = [], []
    for scene in rng.permutation(len(stream.y) // SCENE)[:count]:
        rows = scene * SCENE + rng.permutation(SCENE)
        scenes.append(stream.of(rows[:TRAINED]))
        tests.append(stream.of(rows[TRAINED:]))
    return Split(home.of(order[third:]), home.of(order[:third]), scenes, tests)


def make(normalization):
    """A small residual network."""
    inputs = keras.Input((50, 50, 1))

    def convolve(x, filters, width, stride):
        x = layers.Conv2D(filters, width, stride, "same", use_bias=False)(x)
        return normalization()(x)

    x = layers.ReLU()(convolve(inputs, 16, 5, 2))
    for filters in (32, 64):
        shortcut = convolve(x, filters, 1, 2)
        x = layers.ReLU()(convolve(x, filters, 3, 2))
        x = layers.Add()([convolve(x, filters, 3, 1), shortcut])
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(1)(x))


def _compile(model, rate, steps_per_execution):
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.BinaryCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
    )


def _pretrained(seed, scenes):
    """Weights of a network that knows home."""

    def fit():
        keras.utils.set_random_seed(seed)
        model = make(layers.BatchNormalization)
        cells = split(seed, scenes).home
        steps = PRETRAINING_STEPS * scenes
        _compile(model, keras.optimizers.schedules.CosineDecay(3e-3, steps), 10)
        rng = np.random.default_rng([seed, 1])
        rows = np.concatenate(
            [rng.permutation(len(cells.y))[:640] for _ in range(steps)]
        )[: 32 * steps]
        model.fit(cells.x[rows], cells.y[rows], 32, shuffle=False, verbose=0)
        return model.get_weights()

    return _cached(f"pretrained_{seed}_{scenes}", fit)


class Trainer:
    """A contender, traced once for many rates and seeds."""

    def __init__(self, contender, batch_size):
        self.plain = make(layers.BatchNormalization)
        # The statistics must be those of a network that knows something.
        self.model = {
            "bn": lambda: self.plain,
            "keras_renorm": lambda: make(
                functools.partial(layers.BatchNormalization, renorm=True)
            ),
            "ours": lambda: keras_renorm.convert(self.plain),
            "algorithm_1": lambda: keras_renorm.convert(
                self.plain, gradient_momentum=None, r_max=3.0, d_max=5.0
            ),
        }.get(
            contender,
            lambda: keras_renorm.convert(
                self.plain,
                keras_renorm.BatchNormalization,
                frozen_statistics=True,
            ),
        )()
        self.initial = self.model.get_weights()
        _compile(self.model, 1e-3, TRAINED // batch_size)
        self.model.optimizer.build(self.model.trainable_variables)

    def reset(self, weights, rate):
        """Begins with pretrained weights."""
        self.plain.set_weights(weights)
        if self.model is not self.plain:
            self.model.set_weights(self.initial)
            for new, old in zip(
                self.model.layers, self.plain.layers, strict=True
            ):
                by_name = {
                    weight.name: weight.numpy() for weight in old.weights
                }
                if "moving_mean" in by_name:
                    by_name["renorm_mean"] = by_name["moving_mean"]
                    by_name["renorm_stddev"] = np.sqrt(
                        by_name["moving_variance"] + old.epsilon
                    )
                for weight in new.weights:
                    if weight.name in by_name:
                        weight.assign(by_name[weight.name])
        for variable in self.model.optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        self.model.optimizer.learning_rate = rate


# Trainings of a cell come one after the other.
_trainer = functools.lru_cache(1)(Trainer)


def train(setting, contender, rate, seed, is_tuning):
    """What the network knows at the end of the stream."""
    batch_size, found = int(setting), split(seed, STEPS)
    trainer = _trainer(contender, batch_size)
    trainer.reset(_pretrained(seed, STEPS), rate)
    model = trainer.model
    home = keras_renorm.get_statistics(trainer.plain)
    x, y = (np.concatenate(both) for both in zip(*found.scenes, strict=True))
    if "bank" in contender:
        seen = slice(BANK * TRAINED)
        rows = y[seen] == 0 if contender == "bank_sound" else slice(None)
        # In one batch: those of a scene are alike.
        keras_renorm.recalibrate(
            model, x[seen][rows], batch_size=BANK * TRAINED, verbose=False
        )
    if rate:
        model.fit(x, y, batch_size, shuffle=False, verbose=0)
    test_x, test_y = (
        np.concatenate(arrays) for arrays in zip(*found.tests, strict=True)
    )
    stream_logits = _logits(model, test_x)
    if "bank" in contender:
        keras_renorm.set_statistics(model, home)
    home_logits = _logits(model, found.home_test.x)
    logits = np.concatenate([home_logits, stream_logits])
    labels = np.concatenate([found.home_test.y, test_y])
    return {
        "auc": _auc(logits, labels),
        "stream": _auc(stream_logits, test_y),
        "home": _auc(home_logits, found.home_test.y),
        "loss": _loss(logits, labels),
        "stream_loss": _loss(stream_logits, test_y),
        "accuracy": float(((logits > 0) == labels).mean()),
    }


def _logits(model, x):
    return model.predict(x, batch_size=128, verbose=0)[:, 0].astype("float64")


def _loss(logits, labels):
    return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())


def _auc(logits, labels):
    """Share of pairs of a defective and a sound cell in the right order."""
    difference = logits[labels == 1][:, None] - logits[labels == 0]
    return float((np.sign(difference).mean() + 1) / 2)
