"""Which jobs there are, and how a summary looks: tables, and a picture.

Imports no other module: `benchmarks/documents.py` runs it by its path.
"""

import re
from pathlib import Path


def job_names(folders):
    """The modules in some folders that are jobs: they have a title."""
    return sorted(
        path.stem
        for folder in folders
        for path in Path(folder).glob("*.py")
        if re.search(r"^TITLE = ", path.read_text("utf-8"), re.MULTILINE)
    )


def markdown(summary, with_rates=False):
    """Lines: a table for each measure, and on what it was measured."""
    cells = {
        (cell["setting"], cell["contender"]): cell for cell in summary["cells"]
    }
    settings = _present(summary, "setting")
    contenders = _present(summary, "contender")
    lines = []
    for measure, (label, best) in summary["measures"].items():
        means = {key: cell["mean"][measure] for key, cell in cells.items()}
        largest = max((abs(mean) for mean in means.values()), default=0)
        digits = 3 if largest < 10 else 1
        choose = max if best == "high" else min

        def entry(key, measure=measure, digits=digits, choose=choose):
            if key not in cells:
                return ""
            cell = cells[key]
            mean = cell["mean"][measure]
            column = [
                other["mean"][measure]
                for (setting, _), other in cells.items()
                if setting == key[0]
            ]
            text = f"{mean:.{digits}f} ± {cell['spread'][measure]:.{digits}f}"
            return f"**{text}**" if mean == choose(column) else text

        lines += _table(
            f"{label} ({best} is good)", entry, settings, contenders
        )
    if with_rates:
        lines += _table(
            "Learning rates chosen",
            lambda key: f"{cells[key]['rate']:g}" if key in cells else "",
            settings,
            contenders,
        )
    counts = sorted({cell["seeds"] for cell in summary["cells"]})
    seeds = " or ".join(map(str, counts))
    return [
        *lines,
        f"Mean ± standard deviation, the best of a column in bold; seeds: "
        f"{seeds}. {'; '.join(summary['machines'])}.",
    ]


def _present(summary, what):
    """Name -> label, of those that were trained."""
    found = {cell[what] for cell in summary["cells"]}
    labels = summary[f"{what}s"]
    return {name: labels[name] for name in labels if name in found}


def _table(head, entry, settings, contenders):
    lines = [
        [head, *settings.values()],
        ["---", *["---:"] * len(settings)],
        *(
            [label, *(entry((setting, contender)) for setting in settings)]
            for contender, label in contenders.items()
        ),
    ]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def picture(plt, summary):
    """A panel a measure, a row a setting, a dot a contender."""
    settings = _present(summary, "setting")
    contenders = _present(summary, "contender")
    measures = summary["measures"]
    figure, panels = plt.subplots(
        1,
        len(measures),
        figsize=(3 + 3.2 * len(measures), 1.8 + 0.55 * len(settings)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    places = {name: at for at, name in enumerate(settings)}
    for axes, (measure, (label, _)) in zip(
        panels.flat, measures.items(), strict=True
    ):
        for at, (name, title) in enumerate(contenders.items()):
            found = [c for c in summary["cells"] if c["contender"] == name]
            shift = 0.8 * ((at + 0.5) / len(contenders) - 0.5)
            axes.errorbar(
                [cell["mean"][measure] for cell in found],
                [places[cell["setting"]] + shift for cell in found],
                xerr=[cell["spread"][measure] for cell in found],
                fmt="o",
                markersize=4,
                label=title,
            )
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.4)
    axes = panels.flat[0]
    axes.set_yticks(range(len(settings)), settings.values())
    axes.set_ylim(len(settings) - 0.5, -0.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, fontsize=8
    )
    return figure
