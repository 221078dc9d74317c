"""The report of `discrepancy`."""

import html
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_renorm.diagnostics._report.conditions import VISIBLE
from keras_renorm.diagnostics._report.measurement import Measurement
from keras_renorm.diagnostics._report.verdict import Verdict

HEALTHY = "No discrepancy worth acting on."
# Of the printed report: columns, and layers in its table.
WIDTH = 79
WORST = 5
# Heads of the table that is printed, and of the others.
SHOWN = ("r 5-95 %", "d 5-95 %", "beyond", "J", "gap", "shift", "noise", "F")
LEGEND = (
    "r, d: scale and offset of a batch against the moving statistics. "
    "beyond: share of r and d outside the limits. J: divergence of the two "
    "distributions. gap: how far training outputs are from what is served, of "
    "their size. shift: how far moving statistics are from those of the data, "
    "in standard deviations. noise: the gap that the size of batches makes. "
    "F: 1 where batches are random draws."
)


@dataclass(frozen=True, repr=False)
class Report:
    """How training and inference differ, and why.

    `print` it for the verdicts, loss and metrics, and the layers whose
    outputs differ most; `table()` has all layers.

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

    @property
    def _causes(self) -> str:
        return ", ".join(verdict.cause for verdict in self.verdicts) or HEALTHY

    def __repr__(self) -> str:
        count = len(self.layers)
        return f"<Report of {self.model}, {count} layers: {self._causes}>"

    def __str__(self) -> str:
        lines = [f"{self.model}: training and inference", ""]
        for at, verdict in enumerate(self.verdicts, start=1):
            lines.append(f"{at}. {verdict.cause[0].upper()}{verdict.cause[1:]}")
            lines += _wrapped(verdict.reason, "   ")
            lines += _wrapped(f"Remedy: {verdict.remedy}", "   ")
        if not self.verdicts:
            lines.append(HEALTHY)
        lines.append("")
        for line in self._model_lines():
            lines += _wrapped(line)
        worst = sorted(self.layers, key=_gap, reverse=True)[:WORST]
        if len(worst) < len(self.layers):
            lines += ["", f"The {WORST} layers with the largest gap:"]
        else:
            lines.append("")
        lines += [_printed(_cells(worst, SHOWN)), *_wrapped(LEGEND)]
        if len(worst) < len(self.layers):
            lines.append(
                f"All {len(self.layers)} layers: `print(report.table())`."
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for notebooks, with all layers."""
        head, *rows = _cells(self.layers)
        verdicts = "".join(
            f"<li><b>{html.escape(verdict.cause)}</b>: "
            f"{html.escape(verdict.reason)}<br>Remedy: "
            f"{html.escape(verdict.remedy)}</li>"
            for verdict in self.verdicts
        )
        lines = [HEALTHY] if not self.verdicts else []
        return "".join(
            [
                f"<h4>{html.escape(self.model)}: training and inference</h4>",
                f"<ol>{verdicts}</ol>" if verdicts else "",
                *(
                    f"<p>{html.escape(line)}</p>"
                    for line in [*lines, *self._model_lines()]
                ),
                f"<table><tr>{_html_cells('th', head)}</tr>",
                *(f"<tr>{_html_cells('td', row)}</tr>" for row in rows),
                f"</table><p>{html.escape(LEGEND)}</p>",
            ]
        )

    def table(self) -> str:
        """All layers, a line each, as wide as it takes; for `print`."""
        return _columns(_cells(self.layers))

    def _model_lines(self) -> list[str]:
        lines = [
            f"Outputs of the model differ by {_short(self.gap)} of their size."
        ]
        if not self.verdicts and self.gap > VISIBLE:
            # There is a verdict without scores.
            scores = "loss and metrics do not"
            if self.inference["loss"] < self.training["loss"]:
                scores = "the loss is lower in inference"
            lines = [
                f"Outputs differ by {_short(self.gap)} of their size, as the "
                f"noise of batches makes them; {scores}."
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
                "`plot` needs matplotlib: pip install matplotlib"
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
        parts[0].set(title="r: lowest, 5 to 95 %, highest")
        # With base 10, less than a decade has labels that overlap.
        parts[0].set_xscale("log", base=2)
        parts[0].xaxis.set_major_formatter("{x:g}")
        parts[0].axvline(1, color="black", lw=0.7)
        parts[1].set(title="d: lowest, 5 to 95 %, highest")
        parts[1].axvline(0, color="black", lw=0.7)
        for name, color, offset in (
            ("gap", "#d55e00", -0.2),
            ("shift", "#009e73", 0.0),
            ("batch_noise", "#999999", 0.2),
        ):
            values = [getattr(layer, name) for layer in self.layers]
            at = [place + offset for place in places]
            parts[2].barh(at, values, 0.2, color=color, label=name)
        parts[2].set(title="gap, shift, batch noise")
        figure.legend(loc="outside lower right", ncols=3)
        parts[0].set_yticks(places, [layer.name for layer in self.layers])
        parts[0].invert_yaxis()
        figure.suptitle(f"{self.model}: {self._causes}")
        return figure


def _gap(layer: Measurement) -> float:
    """The gap; NaN is the largest."""
    return math.inf if math.isnan(layer.gap) else layer.gap


def _cells(
    layers: Sequence[Measurement], heads: Sequence[str] | None = None
) -> list[list[str]]:
    """The lines of a table, the first its heads; of some columns, or of all."""
    lines = [
        {
            "r 5-95 %": f"{_short(layer.r[1])} {_short(layer.r[3])}",
            "d 5-95 %": f"{_short(layer.d[1])} {_short(layer.d[3])}",
            "beyond": f"{layer.beyond:.0%}",
            "J": _short(layer.jeffreys),
            "gap": _short(layer.gap),
            "shift": _short(layer.shift),
            "noise": _short(layer.batch_noise),
            "F": _short(layer.f),
            "constant": f"{len(layer.constant_channels)}/{layer.channels}",
        }
        for layer in layers
    ]
    heads = list(lines[0]) if heads is None else list(heads)
    return [
        ["layer", *heads],
        *(
            [layer.name, *(line[head] for head in heads)]
            for layer, line in zip(layers, lines, strict=True)
        ),
    ]


def _printed(lines: list[list[str]]) -> str:
    """`_columns` in the width of a page: whole names, above where too long."""
    table = _columns(lines)
    if table.index("\n") <= WIDTH:
        return table
    under = _columns([["", *cells] for _, *cells in lines]).split("\n")
    names = [name for name, *_ in lines]
    return "\n".join(
        itertools.chain.from_iterable(zip(names, under, strict=True))
    )


def _columns(lines: list[list[str]]) -> str:
    """Cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in lines
    )


def _html_cells(tag: str, cells: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        # Names of layers stay whole.
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short(value: float) -> str:
    """In five characters at most."""
    if math.isnan(value):
        return "-"
    if abs(value) > 999:
        return ">999" if value > 0 else "<-999"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
