"""How the figures of `networks.py` look, in its table and in the documents."""

import numpy as np

# Examples a step and the size of an image, in training.
NETWORKS = {
    "ResNet50": (16, 64),
    "MobileNetV2": (16, 96),
    "EfficientNetB0": (8, 96),
}
BASELINE = "Keras BN"
RIVAL = "Keras renorm"
FLOOR = "no normalization"
FOLDED = "folded"
SHUT = "our renorm, gate shut"
# Those of `documents.py` for what is there too.
COLORS = {
    BASELINE: "#d55e00",
    RIVAL: "#cc79a7",
    "our BN": "#e69f00",
    "our renorm": "#56b4e9",
    "our renorm, corrected": "#0072b2",
    SHUT: "#332288",
    "group norm.": "#999999",
    FOLDED: "#009e73",
    FLOOR: "#dddddd",
}


def table_rows(networks, has_range=True):
    """The table: head, then a list of cells for each network and row."""
    names = _contenders(networks)
    yield ["network", "what", "Keras BN, ms", *names[1:]]
    order = ("inference", "training", "share", "first")
    for network, rows in networks.items():
        batch_size, size = NETWORKS[network]
        for row in sorted(
            rows, key=lambda row: (order.index(row.split()[0].strip(",")), row)
        ):
            cells = [
                _ratio(rows[row].get(name), has_range) for name in names[1:]
            ]
            label = (
                row.removeprefix("inference, ")
                if "predict" in row
                else row
                if row[0] == "i"
                else f"{row}, {batch_size} x {size} px"
            )
            yield [
                network,
                label,
                f"{rows[row][BASELINE]['milliseconds']:.0f}",
                *cells,
            ]


def device_rows(networks):
    """The table of `networks_jax.py`: head, then a list of cells a row."""
    of_rows = {name: network["rows"] for name, network in networks.items()}
    names = _contenders(of_rows)
    yield ["network", "what", "Keras BN, ms", *names[1:]]
    for name, network in networks.items():
        for row, values in network["rows"].items():
            yield [
                name,
                row,
                f"{values[BASELINE]['milliseconds']:.2f}",
                *(_ratio(values.get(each), False) for each in names[1:]),
            ]


def _contenders(networks):
    """Those that any row has, in the order of the picture."""
    found = {
        name
        for rows in networks.values()
        for values in rows.values()
        for name in values
    }
    return [name for name in COLORS if name in found]


def _ratio(value, has_range):
    if value is None:
        return ""
    text = f"{value['median']:.2f}"
    if has_range:
        text += f" ({value['min']:.2f}-{value['max']:.2f})"
    return text


def draw(networks, path):
    """`picture`, as a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    picture(plt, networks).savefig(path, dpi=110)


def picture(plt, networks):
    """A panel for each row, a group of bars for each network."""
    rows = [
        row
        for row in (
            "inference, batch 1",
            "inference, batch 16",
            "training step",
            "first train_on_batch",
        )
        if row in next(iter(networks.values()))
    ]
    figure, places = plt.subplots(
        len(rows), 1, figsize=(10, 2.6 * len(rows)), layout="constrained"
    )
    width = 0.85 / len(COLORS)
    for axes, row in zip(places, rows, strict=True):
        for at, (name, color) in enumerate(COLORS.items()):
            found = [
                (place, rows_of[row][name])
                for place, rows_of in enumerate(networks.values())
                if name in rows_of[row]
            ]
            if not found:
                continue
            low, middle, high = (
                np.array([value[key] for _, value in found])
                for key in ("min", "median", "max")
            )
            axes.bar(
                [place + at * width for place, _ in found],
                middle,
                width,
                yerr=(middle - low, high - middle),
                color=color,
                error_kw={"lw": 0.7, "ecolor": "#666666"},
                label=name,
            )
        axes.axhline(1, color="#999999", lw=0.7)
        axes.set_xticks(np.arange(len(networks)) + 0.36, list(networks))
        axes.set(title=row, ylabel="Keras BN = 1")
        axes.set_ylim(bottom=0)
    named = {
        name: bars
        for axes in places
        for bars, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(),
        named.keys(),
        ncols=4,
        fontsize=8,
        loc="outside upper center",
    )
    return figure
