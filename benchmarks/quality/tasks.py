"""What the networks learn: images, labels, and the same in another domain."""

import functools
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Images(NamedTuple):
    """Images from 0 to 1, shape `(n, height, width, colours)`, and labels.

    A label a pixel, 0 or 1, where images are to be segmented.
    """

    x: np.ndarray
    y: np.ndarray


class Task(NamedTuple):
    """A data set, split, and what learns it.

    `network` is an entry of `networks.NETWORKS`, and `strides` are those of
    its three convolutions, or of its three stages.

    `shifted` is what another camera would make of the test images: less
    contrast, more light, noise. `shifted_train` are the training images seen
    by it, for adaptation and fine-tuning.
    """

    train: Images
    test: Images
    shifted_train: Images
    shifted: Images
    strides: tuple[int, int, int]
    network: str = "convolutions"

    @property
    def is_segmentation(self):
        """Whether each pixel has a label."""
        return self.train.y.ndim > 1


def load(name, split_seed):
    """The task `name`; another `split_seed` splits it otherwise."""
    return _LOADERS[name](split_seed)


def _task(train, test, strides, seed):
    rng = np.random.default_rng([seed, 1])

    def shift(images):
        noise = rng.normal(0, 0.15, images.x.shape)
        return Images(
            (0.6 * images.x + 0.3 + noise).astype("float32"), images.y
        )

    return Task(train, test, shift(train), shift(test), strides)


def _split_digits(seed):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=seed
    )
    return Images(x_train, y_train), Images(x_test, y_test)


@functools.lru_cache(2)
def _digits(seed):
    """scikit-learn's digits: 1,347 + 450 real images of 8x8 pixels."""
    return _task(*_split_digits(seed), (1, 1, 2), seed)


@functools.lru_cache(2)
def _digits_dense(seed):
    """The digits, for dense layers: an element a channel and example."""
    return _digits(seed)._replace(network="dense")


@functools.lru_cache(2)
def _cluttered(seed):
    """A digit, moved, turned, faint, and a piece of another: 10x10 pixels.

    4,000 + 1,000 images. Digits and pieces of a test image come from digits
    that no training image shows.
    """
    rng = np.random.default_rng([seed, 2])
    train, test = (
        _clutter(digits, count, rng)[0]
        for digits, count in zip(
            _split_digits(seed), (4_000, 1_000), strict=True
        )
    )
    return _task(train, test, (1, 2, 2), seed)


@functools.lru_cache(2)
def _cluttered_residual(seed):
    """The same, for a residual network of 15 convolutions."""
    return _cluttered(seed)._replace(network="residual")


@functools.lru_cache(2)
def _segments(seed):
    """The same with 16x16 pixels, and which of them show the digit.

    Each image is lit by a lamp of its own. 2,000 + 400 images.
    """
    rng = np.random.default_rng([seed, 5])
    train, test = (
        Images(_lit(images.x, rng), segments)
        for images, segments in (
            _clutter(digits, count, rng, size=16)
            for digits, count in zip(
                _split_digits(seed), (2_000, 400), strict=True
            )
        )
    )
    return _task(train, test, (1, 2, 2), seed)._replace(network="unet")


def _lit(x, rng):
    """Images of other contrast and brightness, each of its own."""
    contrast = np.exp(rng.normal(0, 0.7, (len(x), 1, 1, 1)))
    light = rng.normal(0, 0.7, (len(x), 1, 1, 1))
    return (contrast * x + light).astype("float32")


def _clutter(digits, count, rng, size=10):
    """Images, and which of their pixels show the digit."""
    x = np.zeros((count, size, size, 1), "float32")
    segments = np.zeros((count, size, size), "int32")
    rows = rng.integers(len(digits.x), size=count)
    for image, segment, row in zip(x, segments, rows, strict=True):
        # A piece of 4x4 pixels, anywhere.
        piece = digits.x[rng.integers(len(digits.x))]
        top, left = rng.integers(5, size=2)
        piece = piece[top : top + 4, left : left + 4]
        top, left = rng.integers(size - 3, size=2)
        place = image[top : top + 4, left : left + 4]
        np.maximum(place, piece * rng.uniform(0.2, 0.6), out=place)
        # Leans by up to a quarter of a pixel a row: a small turn.
        lean = rng.uniform(-0.25, 0.25)
        digit = np.stack(
            [
                np.roll(line, round(lean * (index - 3.5)), axis=0)
                for index, line in enumerate(digits.x[row])
            ]
        )
        top, left = rng.integers(size - 7, size=2)
        place = image[top : top + 8, left : left + 8]
        np.maximum(place, digit * rng.uniform(0.7, 1.0), out=place)
        segment[top : top + 8, left : left + 8] = digit[..., 0] > 0.3
        image += rng.normal(0, 0.05, image.shape) + rng.uniform(0, 0.3)
    return Images(x, digits.y[rows]), segments


@functools.lru_cache(1)
def _cifar10(seed):
    """CIFAR-10 by tensorflow-datasets, which downloads it: 50,000 + 10,000.

    Its split is the published one; a seed above zero leaves the test images
    alone and holds 10,000 training images back instead.
    """
    import tensorflow_datasets as tfds

    def load_split(split):
        dataset = tfds.load("cifar10", split=split, as_supervised=True)
        x, y = dataset.batch(len(dataset)).get_single_element()
        return Images(x.numpy().astype("float32") / 255, y.numpy())

    train, test = load_split("train"), load_split("test")
    if seed:
        held_back = np.random.default_rng(seed).permutation(len(train.x))
        cut = len(train.x) // 5
        test = Images(*(array[held_back[:cut]] for array in train))
        train = Images(*(array[held_back[cut:]] for array in train))
    return _task(train, test, (2, 2, 2), seed)


_LOADERS = {
    "digits": _digits,
    "digits_dense": _digits_dense,
    "cluttered": _cluttered,
    "cluttered_residual": _cluttered_residual,
    "segments": _segments,
    "cifar10": _cifar10,
}
NAMES = tuple(_LOADERS)
