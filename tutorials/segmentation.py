"""Segmentation: data made on the spot, how well it is done, how it is shown."""

import functools

import lesson
import numpy as np

CLASSES = 3


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


def tile_rows(mismatches):
    """A row for each normalization: what tiles do to its predictions."""
    for name, report in mismatches.items():
        (output,) = report.outputs
        yield (
            name,
            f"{output.tilings.mean:.2g}",
            f"{output.tilings.largest:.2g}",
            ", ".join(each.cause for each in report.verdicts) or "nothing",
        )


def check_tiles(mismatches):
    """Seams are of group normalization alone."""
    for name, report in mismatches.items():
        causes = [each.cause for each in report.verdicts]
        if name == "group norm":
            assert causes == ["normalization by tile"], causes
            assert report.largest > 0.1, report
        else:
            assert causes == [], (name, report)


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
