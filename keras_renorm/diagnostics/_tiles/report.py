"""What `tile_mismatch` returns."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from keras_renorm.diagnostics._report.drawing import pyplot
from keras_renorm.diagnostics._report.verdict import Verdict


class Difference(NamedTuple):
    """How far two predictions of the same pixels are apart.

    Of the absolute differences of an output, in its units, over all elements.

    Attributes:
        mean: The mean.
        high: What 95 % of them do not exceed.
        largest: The largest.
    """

    mean: float
    high: float
    largest: float


class TiledOutput(NamedTuple):
    """An output of a model, predicted in tiles.

    Attributes:
        name: Of the output.
        tilings: Between two tilings, the second shifted by half a tile.
        whole: Between the first tiling and the whole image at once, or `None`.
        size: The largest magnitude of the output.
        map: The largest difference of the two tilings over the channels, shape
            `(images, *sizes)`, on the grid of the output.
    """

    name: str
    tilings: Difference
    whole: Difference | None
    size: float
    map: np.ndarray


@dataclass(frozen=True, repr=False)
class TileReport:
    """What comes of predicting in tiles, and why.

    `print` it, or `plot()` it.

    Attributes:
        model: Name of the model.
        tile: Sizes of a tile, without its halo.
        halo: How far the network sees beyond a tile on each side.
        needed: How far it has to, measured: farther away nothing changes by
            more than rounding. As far as could be seen where `is_beyond`.
        is_beyond: For each axis, whether it reaches as far as could be seen or
            farther.
        outputs: A `TiledOutput` for each output that has the image's axes.
        verdicts: A list of `Verdict`, empty where tiles leave no trace.
    """

    model: str
    tile: tuple[int, ...]
    halo: tuple[int, ...]
    needed: tuple[int, ...]
    is_beyond: tuple[bool, ...]
    outputs: list[TiledOutput]
    verdicts: list[Verdict]

    @property
    def largest(self) -> float:
        """The largest difference of two tilings, of all outputs."""
        return max(each.tilings.largest for each in self.outputs)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A flat dict an output, for `pandas.DataFrame(report.rows)`."""
        return [
            {
                "output": each.name,
                **each.tilings._asdict(),
                **(
                    {}
                    if each.whole is None
                    else {
                        f"whole_{name}": value
                        for name, value in each.whole._asdict().items()
                    }
                ),
            }
            for each in self.outputs
        ]

    def __repr__(self) -> str:
        causes = ", ".join(each.cause for each in self.verdicts) or "no trace"
        return f"<TileReport of {self.model}: {causes}>"

    def __str__(self) -> str:
        needed = " x ".join(
            f"{'at least ' if is_beyond else ''}{size}"
            for size, is_beyond in zip(self.needed, self.is_beyond, strict=True)
        )
        lines = [
            f"{self.model} in tiles of {sizes_of(self.tile)}, halo "
            f"{sizes_of(self.halo)}; needed: {needed}",
            "",
        ]
        for at, verdict in enumerate(self.verdicts, start=1):
            lines.append(f"{at}. {verdict.cause[0].upper()}{verdict.cause[1:]}")
            for text in (verdict.reason, f"Remedy: {verdict.remedy}"):
                lines += textwrap.wrap(
                    text, 79, initial_indent="   ", subsequent_indent="   "
                )
        if not self.verdicts:
            lines.append("Tiles leave no trace.")
        lines.append("")
        for each in self.outputs:
            lines.append(
                f"{each.name}: two tilings differ by {_printed(each.tilings)}"
            )
            if each.whole is not None:
                lines.append(
                    f"{each.name}: tiles and the whole image differ by "
                    f"{_printed(each.whole)}"
                )
        return "\n".join(lines)

    def plot(self, index: int = 0) -> Any:
        """Draws where two tilings differ, an output beside the other.

        Args:
            index: Which of the images. Of a volume, its middle slice.

        Returns:
            The figure of matplotlib.
        """
        figure, axes = pyplot().subplots(
            1, len(self.outputs), squeeze=False, layout="constrained"
        )
        for axis, each in zip(axes[0], self.outputs, strict=True):
            values = each.map[index]
            while values.ndim > 2:
                values = values[len(values) // 2]
            drawn = axis.imshow(np.atleast_2d(values), cmap="magma", vmin=0)
            axis.set_title(f"{each.name}: difference of two tilings")
            figure.colorbar(drawn, ax=axis)
        return figure


def sizes_of(sizes: Sequence[int]) -> str:
    """Sizes along several axes, as people write them."""
    return " x ".join(map(str, sizes))


def _printed(difference: Difference) -> str:
    return (
        f"{difference.mean:.2g} in the mean, {difference.high:.2g} at 95 %, "
        f"{difference.largest:.2g} at most"
    )
