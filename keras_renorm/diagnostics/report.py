"""What `discrepancy` returns."""

import io
import math
from dataclasses import dataclass
from typing import Any

from keras_renorm.diagnostics.measurement import Measurement
from keras_renorm.diagnostics.verdict import VISIBLE, Verdict

HEALTHY = "No discrepancy worth acting on."
WIDTH = 100


@dataclass(frozen=True)
class Report:
    """What training and inference do differently, and why.

    `print` it for a table and the verdicts.

    Attributes:
        model: Name of the model.
        layers: A `Measurement` of each layer, in the order they are called.
        verdicts: A list of `Verdict` (cause, reason, remedy, layers), the
            gravest first; empty for a healthy model.
        gap: Root mean square of the difference of the model's outputs, over
            that of its outputs in training mode.
        training: Loss and metrics in training mode, by name; empty where
            there are no labels or the model is not compiled.
        inference: The same in inference mode.
    """

    model: str
    layers: list[Measurement]
    verdicts: list[Verdict]
    gap: float
    training: dict[str, float]
    inference: dict[str, float]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A flat dict a layer, for `pandas.DataFrame(report.rows)`."""
        marked: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            for name in verdict.layers:
                marked.setdefault(name, []).append(verdict.cause)
        return [
            {**layer.row(), "causes": "; ".join(marked.get(layer.name, []))}
            for layer in self.layers
        ]

    def __str__(self) -> str:
        lines = [self._table(), *self._model_lines(), ""]
        if not self.verdicts:
            if self.gap > VISIBLE:  # there is a verdict without scores
                lines.append(
                    f"Outputs differ by {_short(self.gap)} of their size, as "
                    "the noise of batches makes them; loss and metrics do not."
                )
            lines.append(HEALTHY)
        for at, verdict in enumerate(self.verdicts, start=1):
            lines += [
                f"{at}. {verdict.cause[0].upper()}{verdict.cause[1:]}",
                f"   {verdict.reason}",
                f"   Remedy: {verdict.remedy}",
            ]
        return "\n".join(lines)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        heads = ["layer", "r 5-95 %", "d 5-95 %", "beyond", "J", "gap"]
        heads += ["shift", "noise", "F", "constant"]
        rows = [
            [
                layer.name,
                f"{_short(layer.r[1])} {_short(layer.r[3])}",
                f"{_short(layer.d[1])} {_short(layer.d[3])}",
                f"{layer.beyond:.0%}",
                _short(layer.jeffreys),
                _short(layer.gap),
                _short(layer.shift),
                _short(layer.batch_noise),
                _short(layer.f),
                f"{len(layer.constant_channels)}/{layer.channels}",
            ]
            for layer in self.layers
        ]
        return heads, rows

    def _table(self) -> str:
        heads, rows = self._cells()
        title = f"{self.model}: training and inference"
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:  # plain columns do
            columns = zip(heads, *rows, strict=True)
            widths = [max(map(len, column)) for column in columns]
            return "\n".join(
                "  ".join(
                    cell.ljust(width)
                    for cell, width in zip(line, widths, strict=True)
                ).rstrip()
                for line in [heads, *rows]
            )
        table = Table(title=title)
        table.add_column(heads[0], overflow="fold")
        for head in heads[1:]:
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        text = io.StringIO()
        Console(file=text, width=WIDTH).print(table)
        return text.getvalue().rstrip()

    def _model_lines(self) -> list[str]:
        lines = [
            f"Outputs of the model differ by {_short(self.gap)} of their size."
        ]
        for name, value in self.training.items():
            served = self.inference.get(name, math.nan)
            lines.append(
                f"{name}: {value:.4g} in training mode, {served:.4g} in "
                "inference"
            )
        return lines

    def plot(self) -> Any:
        """Draws r, d, and the gap of each layer.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib: pip install keras-renorm[tutorials]"
            ) from error
        figure = Figure(
            figsize=(10, 2.5 + 0.3 * len(self.layers)), layout="constrained"
        )
        parts = figure.subplots(1, 3, sharey=True)
        places = range(len(self.layers))
        for axes, name in zip(parts, ("r", "d"), strict=False):
            values = [getattr(layer, name) for layer in self.layers]
            low, five, middle, most, high = zip(*values, strict=True)
            axes.hlines(places, low, high, color="#bbbbbb", lw=1)
            axes.hlines(places, five, most, color="#0072b2", lw=5)
            axes.plot(middle, places, "o", color="white", mec="black", ms=5)
        parts[0].set(xscale="log", title="r: lowest, 5 to 95 %, highest")
        parts[0].axvline(1, color="black", lw=0.7)
        parts[1].set(title="d: lowest, 5 to 95 %, highest")
        parts[1].axvline(0, color="black", lw=0.7)
        for layer, at in zip(self.layers, places, strict=True):
            for name, color, offset in (
                ("gap", "#d55e00", -0.2),
                ("shift", "#009e73", 0.0),
                ("batch_noise", "#999999", 0.2),
            ):
                parts[2].barh(
                    at + offset,
                    getattr(layer, name),
                    0.2,
                    color=color,
                    label=name if at == 0 else None,
                )
        parts[2].set(title="gap, shift, batch noise")
        figure.legend(loc="outside lower right", ncols=3)
        parts[0].set_yticks(places, [layer.name for layer in self.layers])
        parts[0].invert_yaxis()
        causes = ", ".join(each.cause for each in self.verdicts) or HEALTHY
        figure.suptitle(f"{self.model}: {causes}")
        return figure


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.2g}"
