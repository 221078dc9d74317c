"""Whether the prediction of a pixel depends on the tile that it lies in."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import keras
import numpy as np

from keras_renorm._checks import check_boolean, check_integer, check_model, warn
from keras_renorm.diagnostics._report.verdict import Verdict
from keras_renorm.diagnostics._tiles.grid import Grid, Tile
from keras_renorm.diagnostics._tiles.network import Network
from keras_renorm.diagnostics._tiles.report import (
    Difference,
    TiledOutput,
    TileReport,
    sizes_of,
)
from keras_renorm.models._layers.finding import find_layers, names_of

BY_TILE = "normalization by tile"
POOLED = "a layer sees the whole tile"
HALO = "the halo is too small"
UNKNOWN = "the cause is not known"

# What differs by less, of the largest output, is rounding.
ROUNDING = {"bfloat16": 3e-2, "float16": 3e-3}
ROUNDING_ELSE = 1e-4


def tile_mismatch(
    model: keras.Model,
    image: Any,
    tile: int | Sequence[int],
    halo: int | Sequence[int],
    *,
    batch_size: int = 8,
    whole: bool = True,
    verbose: int | bool = True,
) -> TileReport:
    """Measures how much a prediction depends on the tile that it lies in.

    Images too large for memory are predicted in tiles: the network sees a tile
    with a halo around it, and of what it predicts the halo is cut off. Where a
    layer normalizes by the statistics of what it sees (group or instance
    normalization), each tile is another image to it, and seams appear. Batch
    normalization and renormalization infer by statistics that are the same
    everywhere.

    The image is predicted in two tilings, the second shifted by half a tile, in
    inference; at the image's own edges the window lies inside. Which layers see
    a whole tile, and how far the others reach, is measured, by changing one
    half of their inputs. Nothing in the model changes.

    Args:
        model: A built model with one input, of images or volumes, and one
            output or several with the same axes, maybe on coarser or finer
            grids. Channels first or last, as its layers have them.
        image: Array `(images, *sizes, channels)`, or channels first; most often
            one image.
        tile: Size of a tile without its halo, in pixels of the input, > 0; one
            for each axis, or one for all. Multiples of two times the factor by
            which the network divides sizes.
        halo: What the network sees around a tile on each side, >= 0, likewise;
            multiples of that factor. A `UserWarning` if it needs more: padding
            then takes the place of the image, whatever the normalization.
        batch_size: Windows at once.
        whole: Whether to predict the whole image at once too (default). It has
            to fit into memory, and the model has to take it.
        verbose: Whether to show a progress bar.

    Returns:
        A `TileReport`: `print` it; `report.outputs`, `report.verdicts` (cause,
        reason, remedy, layers), `report.rows`, `report.plot()`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the image or what the model makes of it is not finite; if
            the image is empty, has not the axes of the model's input, a window
            (a tile and its halo) is larger than the image or no input of the
            model, sizes are no multiples of the factor by which the network
            divides, or no output has the image's axes.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((None, None, 1)),
    ...     keras.layers.Conv2D(4, 3, padding="same"),
    ...     keras.layers.GroupNormalization(2, name="group"),
    ... ])
    >>> image = np.random.default_rng(0).normal(size=(1, 64, 64, 1))
    >>> report = tile_mismatch(model, image, tile=16, halo=8, verbose=False)
    >>> [(verdict.cause, verdict.layers) for verdict in report.verdicts]
    [('normalization by tile', ('group',))]
    >>> report.needed
    (1, 1)

    References:
        Buglakova et al. 2025, arXiv:2503.19545 (tiling artifacts and the
        normalization that makes them).
    """
    check_model(model)
    batch_size = check_integer("batch_size", batch_size, 1)
    whole = check_boolean("whole", whole)
    grid = Grid.of(model, image, tile, halo)
    middle = [
        (size - window) // 2
        for size, window in zip(grid.sizes, grid.window, strict=True)
    ]
    network = Network(model, grid.cut(middle)[:1], grid.axes)
    grid.check_factor(network.factor)
    needed, is_beyond = network.reach()
    tilings = [grid.tiles(is_shifted) for is_shifted in (False, True)]
    bar = keras.utils.Progbar(
        len(grid.image)
        * sum(-(-len(tiling) // batch_size) for tiling in tilings),
        verbose=int(bool(verbose)),
        unit_name="batch",
    )
    first, second = (
        _in_tiles(network, grid, tiling, batch_size, bar) for tiling in tilings
    )
    outputs = _compared(
        network.names,
        first,
        second,
        _of_whole(network, grid) if whole and not grid.is_fixed else None,
        1 if grid.axes[0] == 2 else -1,
    )
    verdicts = _verdicts(
        model, grid, outputs, network.seeing, needed, is_beyond
    )
    for verdict in verdicts:
        if verdict.cause == HALO:
            warn(f"{verdict.reason} {verdict.remedy}")
    return TileReport(
        model.name,
        grid.tile,
        grid.halo,
        needed,
        is_beyond,
        outputs,
        verdicts,
    )


def _in_tiles(
    network: Network,
    grid: Grid,
    tiles: list[Tile],
    batch_size: int,
    bar: Any,
) -> list[np.ndarray]:
    """Predictions of the image, put together of tiles."""
    results: list[np.ndarray] = []
    for index in range(len(grid.image)):
        for at in range(0, len(tiles), batch_size):
            part = tiles[at : at + batch_size]
            # Of one size always: another one may be rounded otherwise.
            filled = part + part[:1] * (batch_size - len(part))
            outputs = network.predict(
                np.stack([grid.cut(each.starts)[index] for each in filled])
            )
            if not results:
                results = [
                    _canvas(grid, *each)
                    for each in zip(outputs, network.ratios, strict=True)
                ]
            for result, output, ratio in zip(
                results, outputs, network.ratios, strict=True
            ):
                for tile, window in zip(part, output, strict=False):
                    to, of = tile.places(grid.axes, output.ndim, ratio)
                    result[index][to] = window[of]
            bar.add(1)
    return results


def _of_whole(network: Network, grid: Grid) -> list[np.ndarray]:
    try:
        return network.predict(grid.image)
    except Exception as error:
        raise ValueError(
            "`whole` must be False where the model does not take the whole "
            f"image. Received: whole=True, an image of {sizes_of(grid.sizes)}, "
            f"of which the model says: {error}"
        ) from error


def _canvas(
    grid: Grid, output: np.ndarray, ratio: Sequence[Fraction]
) -> np.ndarray:
    shape = list(output.shape)
    shape[0] = len(grid.image)
    for axis, size, scale in zip(grid.axes, grid.sizes, ratio, strict=True):
        shape[axis] = int(size * scale)
    return np.zeros(shape, output.dtype)


def _compared(
    names: Sequence[str],
    first: list[np.ndarray],
    second: list[np.ndarray],
    whole: list[np.ndarray] | None,
    channel: int,
) -> list[TiledOutput]:
    found = []
    for index, name in enumerate(names):
        if not np.isfinite(first[index]).all():
            raise ValueError(
                "The outputs of `model` must be finite. Received: a "
                f"prediction of {name!r} that is not."
            )
        difference = np.abs(first[index] - second[index])
        found.append(
            TiledOutput(
                name,
                _difference(difference),
                None
                if whole is None
                else _difference(np.abs(first[index] - whole[index])),
                float(np.abs(first[index]).max(initial=0)),
                difference.max(axis=channel),
            )
        )
    return found


def _difference(values: np.ndarray) -> Difference:
    values = values.astype("float64")
    return Difference(
        float(values.mean()),
        float(np.quantile(values, 0.95)),
        float(values.max()),
    )


def _verdicts(
    model: Any,
    grid: Grid,
    outputs: Sequence[TiledOutput],
    seeing: Sequence[Any],
    needed: Sequence[int],
    is_beyond: Sequence[bool],
) -> list[Verdict]:
    """What makes the difference, if there is one."""
    by_halo = _of_short_halo(grid, needed, is_beyond)
    seen = _seen(outputs, _rounding(model))
    if not seen:
        return by_halo
    found = _of_layers(model, seen, seeing) + by_halo
    return found or [
        Verdict(
            UNKNOWN,
            f"{seen} No layer was found that sees a whole tile.",
            "Look at `report.plot()`: differences along a line are of "
            "tiles, others may be of a layer that draws random numbers.",
            (),
        )
    ]


def _of_short_halo(
    grid: Grid, needed: Sequence[int], is_beyond: Sequence[bool]
) -> list[Verdict]:
    short = [
        # A window as large as the image has no other padding than the image.
        window < size and (halo < need or beyond)
        for window, size, halo, need, beyond in zip(
            grid.window, grid.sizes, grid.halo, needed, is_beyond, strict=True
        )
    ]
    if not any(short):
        return []
    reaches = "at least " * any(is_beyond) + sizes_of(needed)
    return [
        Verdict(
            HALO,
            f"The network sees {reaches} pixels to each side, the halo has "
            f"{sizes_of(grid.halo)}: at the edges of tiles it sees padding "
            "in the place of the image.",
            f"Give halo={max(needed)} or more, in multiples of what the "
            "network divides by.",
            (),
        )
    ]


def _seen(outputs: Sequence[TiledOutput], limit: float) -> str:
    """By how much predictions differ, in words; none, if it is rounding."""
    for name, between in (
        ("tilings", "two tilings"),
        # Tiles that are all alike differ from the whole only.
        ("whole", "tiles and the whole image"),
    ):
        largest = [
            found.largest
            for each in outputs
            if (found := getattr(each, name)) is not None
            and found.largest > limit * each.size
        ]
        if largest:
            return (
                "The prediction of a pixel differs by up to "
                f"{max(largest):.2g} between {between}."
            )
    return ""


def _of_layers(model: Any, seen: str, seeing: Sequence[Any]) -> list[Verdict]:
    normalizing = tuple(names_of(model, filter(_normalizes, seeing)))
    others = tuple(names_of(model, itertools.filterfalse(_normalizes, seeing)))
    found = []
    if normalizing:
        found.append(
            Verdict(
                BY_TILE,
                f"{seen} These layers normalize by the statistics of the tile "
                f"that they see: {', '.join(normalizing)}.",
                "Train with `keras_renorm.BatchRenormalization()` in their "
                "place, whose statistics are the same in each tile, and "
                "`keras_renorm.recalibrate` it on the tiles of the image. Or "
                "predict the whole image at once.",
                normalizing,
            )
        )
    if others:
        found.append(
            Verdict(
                POOLED,
                f"{seen} These layers see the whole tile: {', '.join(others)}.",
                "Predict the whole image at once, or in tiles as large as "
                "memory allows; or train without global pooling and attention.",
                others,
            )
        )
    return found


def _normalizes(layer: Any) -> bool:
    """By its class, or its name, as of layers that people write."""
    known = (
        keras.layers.BatchNormalization,
        keras.layers.GroupNormalization,
        keras.layers.LayerNormalization,
    )
    return isinstance(layer, known) or "norm" in type(layer).__name__.lower()


def _rounding(model: Any) -> float:
    """By the coarsest type that a layer computes in."""
    return max(
        ROUNDING.get(layer.compute_dtype, ROUNDING_ELSE)
        for layer in find_layers(model, keras.layers.Layer)
    )
