"""A large image in tiles: nuclei under a microscope, and what is one.

A fluorescence micrograph of 512 x 512 pixels with the outlines that people drew
(of the 2018 Data Science Bowl, Caicedo et al. 2019), as `stardist` has it in
its wheel. Networks train on patches of
the left half, and segment the right half in tiles. With `is_tuning` they see
the upper part of the left half, and segment the lower.
"""

import functools
import importlib.util
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_renorm
from keras_renorm.diagnostics import tile_mismatch

TITLE = "Nuclei under a microscope, in tiles"
MEASURES = {
    "iou": ("IoU", "high"),
    "recalibrated": ("IoU, recalibrated on the image", "high"),
    "dim": ("IoU, half as bright", "high"),
    "dim_recalibrated": ("IoU, half as bright, recalibrated on it", "high"),
    "mismatch": ("largest difference of two tilings", "low"),
    "gap": ("IoU, training and inference apart", "low"),
}
SETTINGS = {
    "1": "minibatch of 1",
    "2": "of 2",
    "1 lamps": "of 1, a lamp each",
    "2 lamps": "of 2, a lamp each",
    "1 long": "of 1, 1,200 steps",
    "2 long": "of 2, 1,200 steps",
}
CONTENDERS = {
    "bn": "batch norm.",
    "bn 0.95": "the same, `momentum=0.95`",
    "keras_renorm": "Keras's `renorm=True`",
    "keras_renorm 0.95": "the same, `momentum=0.95`",
    "group": "group norm.",
    "instance": "instance norm.",
    "renorm": "renorm., as it comes",
    "renorm 0.95": "the same, `momentum=0.95`",
    "none": "none",
}
# One for all, tutorial 11's: no contender was tuned.
RATES = (3e-3,)
SEEDS = 5
NEEDS = "stardist"

STEPS, QUICK_STEPS, PARTS = 300, 20, 10
FILTERS = 8, 16, 32
PATCH, TILE = 48, 64
HALO = 24  # The network sees 22 pixels to each side.
LONG = 4  # times as many steps
NORMALIZATIONS = {
    "bn": layers.BatchNormalization,
    "keras_renorm": functools.partial(layers.BatchNormalization, renorm=True),
    "group": functools.partial(layers.GroupNormalization, groups=4),
    "instance": functools.partial(layers.GroupNormalization, groups=-1),
    "renorm": keras_renorm.BatchRenormalization,
    "none": functools.partial(layers.Activation, "linear"),
}


@functools.cache
def micrograph():
    """The image, from 0 to 1, and what is a nucleus: `(512, 512, 1)` each."""
    # Pillow is there where matplotlib is.
    from PIL import Image

    # Found and not imported: it would start what it segments with.
    package = importlib.util.find_spec("stardist")
    if package is None:
        raise ImportError(
            f"This needs `{NEEDS}`, for the image in its wheel: pip install "
            f"--no-deps {NEEDS}"
        )
    folder = Path(package.submodule_search_locations[0], "data", "images")
    image, mask = (
        np.asarray(Image.open(folder / f"{name}.tif"), "float32")[..., None]
        for name in ("img2d", "mask2d")
    )
    return image / 255, (mask > 0).astype("float32")


def halves(is_tuning):
    """Image and mask to train on, and those to segment."""
    image, mask = micrograph()
    if is_tuning:
        image, mask = (
            np.swapaxes(each[:, :256], 0, 1) for each in (image, mask)
        )
    middle = image.shape[1] // 2
    return (
        image[:, :middle],
        mask[:, :middle],
        image[:, middle:],
        mask[:, middle:],
    )


def lamps(count, rng):
    """A brightness for each, from a half to twice as bright."""
    return np.exp2(rng.uniform(-1, 1, (count, 1, 1, 1))).astype("float32")


def patches(image, mask, count, rng):
    """Anywhere in the image, turned and mirrored."""
    found = []
    for _ in range(count):
        top, left = (rng.integers(size - PATCH + 1) for size in image.shape[:2])
        turns, flip = rng.integers(4), rng.choice([-1, 1])
        found.append(
            [
                np.rot90(
                    each[top : top + PATCH, left : left + PATCH][:, ::flip],
                    turns,
                )
                for each in (image, mask)
            ]
        )
    return tuple(map(np.stack, zip(*found, strict=True)))


def windows(image, size):
    """Tiles without a halo: `(count, size, size, 1)`."""
    rows, columns = (each // size for each in image.shape[:2])
    cut = image.reshape(rows, size, columns, size, 1).swapaxes(1, 2)
    return cut.reshape(-1, size, size, 1)


def under_lamps(image, rng):
    """Each tile under a lamp of its own."""
    fields = [each // TILE for each in image.shape[:2]]
    brightness = lamps(np.prod(fields), rng).reshape(*fields, 1)
    return image * np.repeat(np.repeat(brightness, TILE, 0), TILE, 1)


def unet(contender):
    """Down to a quarter of the size, and up with ways across."""
    kind, _, momentum = contender.partition(" ")
    arguments = {"momentum": float(momentum)} if momentum else {}

    def block(x, filters):
        for _ in range(2):
            x = layers.Conv2D(
                filters, 3, padding="same", use_bias=contender == "none"
            )(x)
            x = layers.ReLU()(NORMALIZATIONS[kind](**arguments)(x))
        return x

    x = inputs = keras.Input((None, None, 1))
    across = []
    for filters in FILTERS:
        x = block(layers.MaxPooling2D()(x) if across else x, filters)
        across.append(x)
    for filters, other in zip(FILTERS[-2::-1], across[-2::-1], strict=True):
        x = layers.Concatenate()([layers.UpSampling2D()(x), other])
        x = block(x, filters)
    outputs = layers.Conv2D(1, 1, activation="sigmoid")(x)
    return keras.Model(inputs, outputs)


@functools.lru_cache(2 * len(CONTENDERS))
def compiled(contender):
    """A network that many trainings share: tracing takes as long as one."""
    model = unet(contender)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer,
        keras.losses.BinaryCrossentropy(),
        jit_compile=False,  # which would compile for longer than it trains
        steps_per_execution=STEPS // PARTS,
    )
    return model


def initialize(model, contender, seed):
    """Weights of a new network, and an optimizer that knows nothing."""
    keras.utils.set_random_seed(seed)
    model.set_weights(unet(contender).get_weights())
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))


def fit(model, image, mask, batch_size, rate, has_lamps, is_long, rng):
    """`STEPS` steps, or `LONG` times as many, at a rate that falls to zero."""
    parts = PARTS * LONG if is_long else PARTS
    for part in range(parts):
        model.optimizer.learning_rate = (
            rate * (1 + np.cos(np.pi * part / parts)) / 2
        )
        count = batch_size * STEPS // PARTS
        x, y = patches(image, mask, count, rng)
        x = x * lamps(count, rng) if has_lamps else x
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)


def predict_in_tiles(model, image):
    """Windows of one size that lie inside the image; the halo is cut off."""
    window, whole = TILE + 2 * HALO, np.zeros_like(image)
    for i in range(0, image.shape[0], TILE):
        for j in range(0, image.shape[1], TILE):
            top = min(max(i - HALO, 0), image.shape[0] - window)
            left = min(max(j - HALO, 0), image.shape[1] - window)
            part = image[None, top : top + window, left : left + window]
            found = model.predict_on_batch(part)[0]
            taken = found[i - top :, j - left :][:TILE, :TILE]
            whole[i : i + TILE, j : j + TILE] = taken
    return whole


def iou(found, truth):
    """Intersection over union of what is a nucleus."""
    found, truth = np.asarray(found) > 0.5, truth > 0.5
    return float((found & truth).sum() / max((found | truth).sum(), 1))


def as_trained(model, x, batch_size):
    """Predictions by the statistics of minibatches; nothing is learned."""
    parts = []
    for at in range(0, len(x), batch_size):
        with keras.StatelessScope():
            found = model(x[at : at + batch_size], training=True)
        parts.append(keras.ops.convert_to_numpy(found))
    return np.concatenate(parts)


def recalibrated(model, contender, image):
    """The model with the statistics of the image, where it keeps any."""
    if contender in ("group", "instance", "none"):
        return model
    if "keras_renorm" in contender:
        # `recalibrate` takes no such layer. A plain one infers the same.
        plain = compiled("bn")
        for old, new in zip(model.layers, plain.layers, strict=True):
            values = {each.name: each for each in old.weights}
            for weight in new.weights:
                weight.assign(values[weight.name])
        model = plain
    keras_renorm.recalibrate(
        model, windows(image, TILE), batch_size=8, verbose=False
    )
    return model


def seams(model, image):
    """How much the prediction depends on the tiles."""
    return tile_mismatch(
        model, image[None], TILE, HALO, whole=False, verbose=False
    )


def trained(setting, contender, rate, seed, is_tuning):
    """The network of one training."""
    image, mask, *_ = halves(is_tuning)
    model = compiled(contender)
    initialize(model, contender, seed)
    rng = np.random.default_rng([seed, 1])
    has_lamps, is_long = "lamps" in setting, "long" in setting
    fit(model, image, mask, int(setting[0]), rate, has_lamps, is_long, rng)
    return model


def train(setting, contender, rate, seed, is_tuning):
    """One training, and what it is worth on the other half."""
    model = trained(setting, contender, rate, seed, is_tuning)
    *_, image, mask = halves(is_tuning)
    if "lamps" in setting:
        image = under_lamps(image, np.random.default_rng([seed, 2]))
    x, y = patches(image, mask, 32, np.random.default_rng([seed, 3]))
    inferred = np.concatenate([model(each[None]) for each in x])
    by_batch = as_trained(model, x, int(setting[0]))
    result = {
        "gap": abs(iou(by_batch, y) - iou(inferred, y)),
        "mismatch": seams(model, image).largest,
    }
    for name, dimmed in (("iou", image), ("dim", image / 2)):
        result[name] = iou(predict_in_tiles(model, dimmed), mask)
    for name, dimmed in (
        ("recalibrated", image),
        ("dim_recalibrated", image / 2),
    ):
        found = predict_in_tiles(recalibrated(model, contender, dimmed), dimmed)
        result[name] = iou(found, mask)
    return result


DRAWN = {
    "group": "group norm.",
    "instance": "instance norm.",
    "renorm 0.95": "renormalization",
}


def draw(folder):
    """`seams.png`: predictions in tiles, and where two tilings differ."""
    from matplotlib.figure import Figure

    _, _, image, mask = halves(is_tuning=False)
    columns = {"image, and nuclei": (image, mask)}
    for contender, title in DRAWN.items():
        model = trained("1", contender, RATES[0], 0, is_tuning=False)
        report = seams(model, image)
        columns[title] = (
            predict_in_tiles(model, image),
            report.outputs[0].map[0],
        )
    figure = Figure(figsize=(9.5, 4.7), layout="constrained")
    panels = figure.subplots(2, len(columns))
    for above, below, (title, pair) in zip(
        *panels, columns.items(), strict=True
    ):
        above.set_title(title, fontsize=10)
        for axes, values in zip((above, below), pair, strict=True):
            shown = axes.imshow(
                np.squeeze(values)[: 4 * TILE], cmap="magma", vmin=0, vmax=1
            )
            axes.set_axis_off()
    for axes in panels[1, 1:]:
        axes.images[0].set_clim(0, 0.3)
    figure.colorbar(
        shown, ax=panels[1], label="difference of two tilings", aspect=12
    )
    figure.savefig(Path(folder) / "seams.png", dpi=110)
