"""An image, and the tiles that it is cut into."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import tree

from keras_renorm._checks import check_integer
from keras_renorm.diagnostics._tiles.report import sizes_of
from keras_renorm.models._layers.finding import find_layers


class Tile(NamedTuple):
    """A tile, by sizes along each axis.

    Attributes:
        starts: Where its window begins.
        begins, ends: Which pixels are taken from it.
    """

    starts: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def places(
        self, axes: Sequence[int], rank: int, ratio: Sequence[Fraction]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Of an output: where these pixels lie, in the image and the window.

        Without the axis of images.
        """
        to, of = [slice(None)] * rank, [slice(None)] * rank
        for axis, *sizes, scale in zip(axes, *self, ratio, strict=True):
            start, begin, end = (int(size * scale) for size in sizes)
            to[axis] = slice(begin, end)
            of[axis] = slice(begin - start, end - start)
        return tuple(to[1:]), tuple(of[1:])


@dataclass(frozen=True)
class Grid:
    """An image, and the windows of its tiles.

    Attributes:
        image: With a batch axis.
        axes: Those of its sizes.
        tile, halo: A size for each of them.
        is_fixed: Whether the model takes windows only.
    """

    image: np.ndarray
    axes: tuple[int, ...]
    tile: tuple[int, ...]
    halo: tuple[int, ...]
    is_fixed: bool

    @classmethod
    def of(cls, model: Any, image: Any, tile: Any, halo: Any) -> "Grid":
        """Raises for what is no image of the model, or fits no tile."""
        if not model.built:
            raise ValueError(
                "`model` must be built: call it once. Received: "
                f"model={model.name}."
            )
        inputs = tree.flatten(getattr(model, "inputs", None) or [])
        if len(inputs) > 1:
            raise ValueError(
                "`model` must have one input. Received: "
                f"{len(inputs)} of model={model.name}."
            )
        spec = inputs[0].shape if inputs else None
        is_first = _channels_first(model)
        image = _as_image(image, spec, is_first)
        axes = tuple(
            range(2, image.ndim) if is_first else range(1, image.ndim - 1)
        )
        fixed = [spec[axis] if spec else None for axis in axes]
        sizes = [image.shape[axis] for axis in axes]
        grid = cls(
            image,
            axes,
            _per_axis("tile", tile, len(axes), 1),
            _per_axis("halo", halo, len(axes), 0),
            any(
                limit not in (None, size)
                for limit, size in zip(fixed, sizes, strict=True)
            ),
        )
        for window, size, limit in zip(grid.window, sizes, fixed, strict=True):
            received = f"Received: tile={tile}, halo={halo}, a window of"
            if window > size:
                raise ValueError(
                    "A tile with its halo must lie in the image. "
                    f"{received} {window} of {size} pixels."
                )
            if limit not in (None, window):
                raise ValueError(
                    "A tile with its halo must be the input of the model, "
                    f"whose size is fixed. {received} {window} for a size of "
                    f"{limit}."
                )
        return grid

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the image."""
        return tuple(self.image.shape[axis] for axis in self.axes)

    @property
    def window(self) -> tuple[int, ...]:
        """Sizes of a tile and its halo."""
        return tuple(
            tile + 2 * halo
            for tile, halo in zip(self.tile, self.halo, strict=True)
        )

    def cut(self, starts: Sequence[int]) -> np.ndarray:
        """The window that begins here."""
        found = self.image
        for axis, start, size in zip(
            self.axes, starts, self.window, strict=True
        ):
            found = found.take(range(start, start + size), axis)
        return found

    def check_factor(self, factors: Sequence[int]) -> None:
        """Raises for sizes that the network does not divide evenly."""
        for name, sizes, times in (
            ("tile", self.tile, 2),
            ("halo", self.halo, 1),
            ("image", self.sizes, 1),
        ):
            for size, factor in zip(sizes, factors, strict=True):
                if factor > 1 and size % (times * factor):
                    raise ValueError(
                        f"The sizes of `{name}` must be multiples of "
                        f"{times * factor}, for the network divides by "
                        f"{factor}. Received: {sizes_of(sizes)}."
                    )

    def tiles(self, is_shifted: bool) -> list[Tile]:
        """All of the image, in one tiling; shifted, by half a tile."""
        of_axes = []
        for size, tile, halo, window in zip(
            self.sizes, self.tile, self.halo, self.window, strict=True
        ):
            first = max(tile // 2, 1) if is_shifted else tile
            edges = [0, *range(first, size, tile), size]
            of_axes.append(
                [
                    (min(max(begin - halo, 0), size - window), begin, end)
                    for begin, end in itertools.pairwise(edges)
                ]
            )
        return [
            Tile(*zip(*found, strict=True))
            for found in itertools.product(*of_axes)
        ]


def _as_image(image: Any, spec: Any, is_first: bool) -> np.ndarray:
    """An array, if it is what a model's input of this shape takes."""
    image = _as_array(image)
    rank = image.ndim if spec is None else len(spec)
    if image.ndim != rank or rank < 3:
        raise ValueError(
            "`image` must have the axes of the model's input: images, "
            "sizes and channels. Received: image.shape="
            f"{image.shape} for an input of {rank} axes."
        )
    if not len(image):
        raise ValueError(
            f"`image` must hold an image. Received: image.shape={image.shape}."
        )
    if not np.isfinite(image).all():
        raise ValueError(
            "`image` must be finite: one NaN is all that a tile would show."
            f" Received: {np.count_nonzero(~np.isfinite(image))} values of "
            f"{image.size} that are not."
        )
    channel = 1 if is_first else rank - 1
    if spec is not None and spec[channel] not in (None, image.shape[channel]):
        raise ValueError(
            f"`image` must have the {spec[channel]} channels of the model's "
            f"input. Received: image.shape={image.shape}."
        )
    return image


def _as_array(image: Any) -> np.ndarray:
    """Of real numbers, in a type that NumPy computes in."""
    if isinstance(image, dict) and len(image) == 1:  # of an input with a name
        (image,) = image.values()
    if keras.ops.is_tensor(image):
        image = keras.ops.convert_to_numpy(image)
    try:
        array = np.asarray(image)
    except ValueError as error:
        raise ValueError(
            "`image` must be one array; images of other sizes one after the "
            f"other. Received: image of type {type(image).__name__}: {error}"
        ) from error
    if array.dtype.name == "bfloat16":  # no type of NumPy's
        array = array.astype("float32")
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"`image` must hold real numbers. Received: dtype={array.dtype}."
        )
    return array


def _channels_first(model: Any) -> bool:
    """Where the layers of a model have their channels."""
    for layer in find_layers(model, keras.layers.Layer):
        form = getattr(layer, "data_format", None)
        if form is not None:
            return form == "channels_first"
    return keras.config.image_data_format() == "channels_first"


def _per_axis(
    name: str, value: Any, count: int, minimum: int
) -> tuple[int, ...]:
    """A size for each axis."""
    if isinstance(value, tuple | list):
        if len(value) != count:
            raise ValueError(
                f"`{name}` must be a number, or {count} of them. Received: "
                f"{name}={value!r}."
            )
        return tuple(check_integer(name, each, minimum) for each in value)
    return (check_integer(name, value, minimum),) * count
