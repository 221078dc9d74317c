"""Segmentation: network, data, how well it is done, how it is shown."""

import functools
import importlib.util
from pathlib import Path

import keras
import lesson
import numpy as np
from keras import layers

CLASSES = 3
FILTERS = 8, 16, 32
# Sizes of a patch, a tile and a halo, and what `Encoder` is made with: two
# stages see less far than three.
LARGE = {
    "image": (64, 64, 24, {}),
    "volume": (24, 24, 8, {"filters": FILTERS[:2], "rank": 3}),
}


def of_rank(name, rank):
    """A layer for images or volumes."""
    return getattr(layers, f"{name}{rank}D")


def convolution(filters, rank):
    return of_rank("Conv", rank)(filters, 3, padding="same", use_bias=False)


class Encoder(keras.Model):
    """Subclassed: it makes its own layers."""

    def __init__(self, normalization, filters=FILTERS, rank=2):
        super().__init__(name="encoder")
        self.filters, self.rank = filters, rank
        self.stages = [
            [[convolution(count, rank), normalization()] for _ in range(2)]
            for count in filters
        ]
        self.halve = of_rank("MaxPooling", rank)()

    def call(self, x, training=None):
        features = []
        for stage in self.stages:
            x = self.halve(x) if features else x
            for convolve, normalize in stage:
                x = keras.ops.relu(normalize(convolve(x), training=training))
            features.append(x)
        return features


def unet(encoder, normalization, channels=3, classes=CLASSES):
    rank = encoder.rank
    inputs = keras.Input((*[None] * rank, channels))
    *across, up = encoder(inputs)
    for filters in encoder.filters[-2::-1]:
        up = of_rank("UpSampling", rank)()(up)
        up = layers.Concatenate()([up, across.pop()])
        for _ in range(2):
            up = layers.ReLU()(normalization()(convolution(filters, rank)(up)))
    outputs = of_rank("Conv", rank)(classes, 1)(up)
    return keras.Model(inputs, outputs, name="unet")


def shapes(count, rng, size=32):
    """Images `(count, size, size, 3)`, and the class of each pixel."""
    rows, columns = np.mgrid[:size, :size]
    images = rng.normal(0, 0.15, (count, size, size, 3))
    classes = np.zeros((count, size, size), "int32")
    for image, truth in zip(images, classes, strict=True):
        for kind in rng.permutation([1, 2]):
            top, left = rng.integers(6, size - 6, 2)
            down, across = np.abs(rows - top), np.abs(columns - left)
            far = np.hypot(down, across) if kind == 1 else down + across
            inside = far <= rng.integers(4, 9)
            image[inside] += rng.uniform(0.3, 0.8, 3)
            truth[inside] = kind
        image[:] = rng.uniform(0.4, 1.6) * image + rng.uniform(-1, 1)
    return images.astype("float32"), classes


@functools.cache
def pets(split, size=64):
    """Photographs; animal (0), background (1) and outline (2)."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def shrink(example):
        image, mask = example["image"], example["segmentation_mask"]
        mask = tf.image.resize(mask, (size, size), method="nearest")[..., 0]
        mask = tf.clip_by_value(tf.cast(mask, "int32") - 1, 0, CLASSES - 1)
        return tf.image.resize(image, (size, size)) / 127.5 - 1, mask

    dataset = tfds.load("oxford_iiit_pet", split=split).map(shrink)
    pair = dataset.batch(len(dataset)).get_single_element()
    return tuple(each.numpy() for each in pair)


def load(name, seed):
    """Images and classes to train on, and others to judge by."""
    if name == "pets":
        return *pets("train"), *pets("test[:500]")
    rng = np.random.default_rng(seed)
    return *shapes(600, rng), *shapes(200, rng)


def mean_iou(found, truth):
    """The mean over the classes of intersection over union."""
    pairs = [(found == each, truth == each) for each in range(CLASSES)]
    return np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs])


def rows(scores, reports):
    """A row for each normalization, of ranges over the seeds."""
    for name, values in scores.items():
        found = reports.get(name, [])
        gaps = [report.gap for report in found]
        yield (
            name,
            lesson.spread(values),
            lesson.spread(gaps, ".2f") if gaps else "-",
            ", ".join(sorted(_causes(found))) or ("nothing" if found else "-"),
        )


def large(kind):
    """Image and mask of a half to train on, and of one to predict.

    Image from 0 to 1, `(*sizes, 1)`; mask of 0 and 1, `sizes`.
    """
    package = importlib.util.find_spec("stardist")
    if kind == "volume":
        image, mask = blobs((48, 96, 48), 60)
    elif package is None:
        lesson.say("A made image: `stardist`, which has a real one, is missing")
        image, mask = blobs((512, 512), 200)
    else:
        # Nuclei and their outlines, of the 2018 Data Science Bowl (Caicedo et
        # al. 2019). The package is found and not imported.
        from PIL import Image

        folder = Path(*package.submodule_search_locations, "data", "images")
        image, mask = (
            np.asarray(Image.open(folder / f"{name}.tif"), "float32")
            for name in ("img2d", "mask2d")
        )
        image, mask = image / 255, mask > 0
    pair = image[..., None], mask.astype("int32")
    return zip(*(np.split(each, 2, axis=1) for each in pair), strict=True)


def blobs(sizes, count):
    """Balls of other sizes and brightness in noise."""
    rng = np.random.default_rng(0)
    places = np.stack(np.mgrid[tuple(map(slice, sizes))], axis=-1)
    image, mask = rng.normal(0.2, 0.1, sizes), np.zeros(sizes, bool)
    for _ in range(count):
        distance = places - rng.uniform(0, sizes)
        inside = (distance**2).sum(-1) < rng.uniform(4, 9) ** 2
        image[inside] += rng.uniform(0.1, 0.6)
        mask |= inside
    return image.astype("float32"), mask


def patches(image, mask, size, count):
    """Anywhere in an image or volume."""
    rng = np.random.default_rng(0)
    starts = rng.integers(
        np.subtract(mask.shape, size) + 1, size=(count, mask.ndim)
    )
    places = [tuple(slice(at, at + size) for at in each) for each in starts]
    return tuple(
        np.stack([of[each] for each in places]) for of in (image, mask)
    )


def cut(image, size):
    """All of an image or volume, in pieces of one size."""
    pieces = [image]
    for axis in range(image.ndim - 1):
        count = image.shape[axis] // size
        pieces = [
            part for each in pieces for part in np.split(each, count, axis)
        ]
    return np.stack(pieces)


def iou(found, truth):
    """Intersection over union of what is a nucleus."""
    found, truth = found[..., 1] > 0.5, truth > 0
    return (found & truth).sum() / max((found | truth).sum(), 1)


def tile_rows(in_tiles, truth, mismatches):
    """A row for each normalization: predictions in tiles, and their seams."""
    for name, found in in_tiles.items():
        scores = [f"{iou(each, truth):.2f}" for each in found]
        largest = f"{mismatches[name].largest:.2g}"
        yield name, *(*scores, "-")[:2], largest


def draw_tiles(path, image, truth, in_tiles, mismatches):
    """Image, predictions in tiles, and where two tilings differ."""
    shown = {"image": (image[..., 0], truth)}
    for name, found in in_tiles.items():
        shown[name] = found[0][..., 1], mismatches[name].outputs[0].map[0]
    figure = lesson.figure(2.2 * len(shown), 4.8)
    columns = figure.subplots(2, len(shown)).T
    for axes, (name, pair) in zip(columns, shown.items(), strict=True):
        for panel, values in zip(axes, pair, strict=True):
            if values.ndim == 3:  # of a volume, a slice
                values = values[len(values) // 2]
            panel.imshow(values[:256], cmap="magma", vmin=0)
            panel.set_axis_off()
        axes[0].set_title(name)
    lesson.save(figure, path)


def check_tiles(mismatches):
    """Seams are of group and instance normalization alone."""
    for name, report in mismatches.items():
        causes = [each.cause for each in report.verdicts]
        if name in ("group norm", "instance norm"):
            assert causes == ["normalization by tile"], causes
            assert report.largest > 0.05, report
        else:
            assert (causes, report.largest) == ([], 0), (name, report)


def _causes(reports):
    return {each.cause for report in reports for each in report.verdicts}


def draw(path, columns):
    """Classes as colors, a column for each of `{name: images}`."""
    count = len(next(iter(columns.values())))
    figure = lesson.figure(2 * len(columns), 2 * count)
    parts = figure.subplots(count, len(columns))
    for column, (name, images) in enumerate(columns.items()):
        parts[0, column].set_title(name, fontsize=7)
        for axes, classes in zip(parts[:, column], images, strict=True):
            axes.imshow(classes, vmin=0, vmax=CLASSES - 1)
            axes.set_axis_off()
    lesson.save(figure, path)


def check(scores, reports):
    """What we claim must hold."""
    mean = {name: np.mean(values) for name, values in scores.items()}
    for name in ("Algorithm 1", "renorm"):
        # From the start, each seed; tuned, on the whole.
        assert min(scores[name]) > max(scores["Keras BN"]) + 0.03, scores
        assert mean[f"tuned: {name}"] > mean["tuned: Keras BN"] + 0.03, scores
        assert mean[f"tuned: {name}"] > mean[name] + 0.1, scores
    assert mean["group norm"] > mean["Keras BN"] + 0.05, scores
    for name, found in reports.items():
        gaps = [report.gap for report in found]
        if name.endswith("Keras BN"):
            assert min(gaps) > 0.15, (name, gaps)
            assert "batches too small" in _causes(found), (name, found)
        else:
            assert max(gaps) < 0.05, (name, gaps)
            assert "batches too small" not in _causes(found), (name, found)
