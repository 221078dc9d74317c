"""Writes what the documents take from results: tables and pictures.

    python benchmarks/documents.py

In README.md and docs/ a line `<!-- results: NAME -->` begins a part that
this file writes, up to `<!-- end -->`; `PARTS` has the names. Run it after
results in benchmarks/results, or the rows of `advice.py`, have changed.
`tests/test_documents.py` fails where it was forgotten. Needs matplotlib.
"""

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"

NOT_RUN = ["Not run yet."]
REGIMES = {
    "one_class": "one class",
    "two_classes": "two classes",
    "iid_1": "1 example",
    **{f"iid_{size}": f"{size}" for size in (2, 3, 4, 8, 16, 32, 64, 128)},
    "sorted": "sorted by class",
}
CONTENDERS = {
    "bn": "batch norm.",
    "bn_frozen_late": "batch norm., frozen late",
    "keras_renorm": "Keras's `renorm=True`",
    "group": "group norm.",
    "renorm": "renorm.",
    "renorm_frozen_late": "renorm., frozen late",
    "renorm_corrected": "renorm., corrected gradient",
    "gated": "renorm., as it comes",
}
COLUMNS = {
    "sgd": "SGD",
    "sgd_constant": "SGD, constant rate",
    "sgd_rest_0.1": "SGD, all but kernels / 10",
    "adam": "Adam",
    "adam_rest_10": "Adam, all but kernels × 10",
    "adam_epsilon_0.1": "Adam, `epsilon=0.1`",
    "fine_tuning_4": "minibatches of 4",
    "fine_tuning_2": "of 2",
}
TASKS = {
    "digits": "Digits",
    "cluttered": "Cluttered digits",
    "digits_dense": "Digits, dense layers",
}
# What the picture shows: label, color, marker.
DRAWN = {
    "bn": ("batch normalization", "#d55e00", "o"),
    "group": ("group normalization", "#999999", "s"),
    "renorm": ("Algorithm 1 (Ioffe 2017)", "#56b4e9", "^"),
    "renorm_corrected": ("Algorithm 1, gradient corrected", "#009e73", "v"),
    "gated": ("BatchRenormalization()", "#0072b2", "D"),
}
DRAWN_REGIMES = {
    "one_class": "16 of one class",
    "iid_1": "1 image",
    "iid_2": "2 images",
    "iid_4": "4 images",
    "iid_16": "16 images",
}
DRAWN_TASKS = ("digits", "cluttered")


def read(name):
    """The results in a file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head, rows):
    """The lines of a table, whose first column alone is of words."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def machine_of(results):
    """On what results were measured, as a sentence."""
    machine = results["machine"]
    key = machine.get("backend", "jax" if "device" in machine else "tensorflow")
    where = f"an {machine.get('device')}"
    if machine.get("device", "cpu") == "cpu":
        where = f"{machine['cores']} cores of an {machine['processor']}"
    name = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}[key]
    backend = f"{name} {machine[key]}"
    return (
        f"Measured on {where}, {backend}, Keras {machine['keras']}, "
        f"{machine['date']}."
    )


def accuracies(cells):
    """Regime -> contender -> cell, of what was trained by the defaults."""
    found = {}
    for cell in cells:
        if cell["metric"] == "accuracy":
            found.setdefault(cell["regime"], {})[cell["contender"]] = cell
    return found


def entry(cell, best):
    """Mean and standard deviation, the best of a row in bold."""
    if cell is None:
        return ""
    text = f"{cell['mean']:.3f} ± {cell['spread']:.3f}"
    return f"**{text}**" if cell["mean"] == best else text


def regimes(task):
    """A line a regime, a column a contender."""

    def part():
        experiments = read("quality/summary.json")["experiments"]
        if f"regimes_{task}" not in experiments:
            return NOT_RUN
        found = accuracies(experiments[f"regimes_{task}"]["cells"])
        unknown = sorted(found.keys() - REGIMES.keys())
        if unknown:
            raise ValueError(
                "`REGIMES` must have a label for every regime of the results. "
                f"Received: results of {unknown}."
            )
        names = [
            name
            for name in CONTENDERS
            if any(name in cells for cells in found.values())
        ]
        rows = []
        for regime, label in REGIMES.items():
            cells = found.get(regime)
            if cells is None:
                continue
            best = max(cells[name]["mean"] for name in names if name in cells)
            rows.append(
                [label, *(entry(cells.get(name), best) for name in names)]
            )
        head = ["a minibatch holds", *(CONTENDERS[name] for name in names)]
        return table(head, rows)

    return part


def lines_of(name, column):
    """An experiment as it is in `tables.md`: a line a contender."""

    def part():
        experiment = read("quality/summary.json")["experiments"].get(name)
        if experiment is None:
            return NOT_RUN
        columns = dict.fromkeys(cell[column] for cell in experiment["cells"])
        grid = {}
        for cell in experiment["cells"]:
            grid.setdefault(cell["label"], {})[cell[column]] = cell
        best = {
            key: max(
                cells[key]["mean"] for cells in grid.values() if key in cells
            )
            for key in columns
        }
        return table(
            ["", *(COLUMNS.get(key, key) for key in columns)],
            [
                [label, *(entry(cells.get(key), best[key]) for key in columns)]
                for label, cells in grid.items()
            ],
        )

    return part


def advice():
    """The rows of `_report/advice.py`, as sentences."""
    # By path: the package would start TensorFlow.
    path = ROOT / "keras_renorm" / "diagnostics" / "_report" / "advice.py"
    rows = runpy.run_path(str(path))["ROWS"]
    first, *others = rows
    return [
        f"**Take {first.take}**, for {first.where}. Two exceptions:",
        "",
        *(
            f"- {row.where.capitalize()}: {row.take.replace(': ', '; ')}."
            for row in others
        ),
    ]


OURS = ("our BN", "our renorm", "our renorm, corrected")


def speed():
    """A training step in a graph, by input."""
    results = read("speed_cpu.json")
    names = (
        "Keras 3 renorm",
        "Keras 2 BN",
        *OURS,
        _networks_report()["SHUT"],
        "floor",
    )
    rows = []
    for case in results["cases"]:
        if _kind(case) == ("training step", "graph", "float32"):
            ratios = case["ratios"]
            rows.append(
                [
                    case["label"],
                    f"{ratios['Keras 3 BN']['milliseconds']:.1f}",
                    *(f"{ratios[name]['median']:.2f}" for name in names),
                ]
            )
    return [
        *table(["input", "Keras 3 BN, ms", *names], rows),
        "",
        machine_of(results),
    ]


def speed_elsewhere():
    """The range over all inputs, for other modes and types."""
    results = read("speed_cpu.json")
    found = {}
    for case in results["cases"]:
        if not case["group"].startswith("growth"):
            found.setdefault(_kind(case), []).append(case["ratios"])
    rows = []
    for (group, mode, dtype), cases in found.items():
        ranges = []
        for name in ("Keras 2 BN", *OURS):
            ratios = [case[name]["median"] for case in cases]
            ranges.append(f"{min(ratios):.2f} – {max(ratios):.2f}")
        rows.append([f"{group}, {mode}, {dtype}", str(len(cases)), *ranges])
    network = results["resnet20"]
    rows.append(
        [
            "a ResNet-20 step through `fit`, batch 32",
            "1",
            "",
            *(
                f"{network[name]['median']:.2f} "
                f"({network[name]['min']:.2f} – {network[name]['max']:.2f})"
                for name in OURS
            ),
        ]
    )
    head = ["what", "inputs", "Keras 2 BN", *OURS]
    shares = results["callbacks"]
    return [
        *table(head, rows),
        "",
        f"`RenormScheduler()` takes "
        f"{shares['RenormScheduler()']['share_of_a_step']:.2%} of a step; with "
        "a function that changes the limits at every step, "
        f"{shares['RenormScheduler(function)']['share_of_a_step']:.0%}.",
    ]


def _kind(case):
    return case["group"], case["mode"], case["dtype"]


def replicas():
    """A step on two replicas."""
    results = read("replicas_cpu.json")
    names = (
        "Keras BN, synchronized",
        "our BN",
        "our BN, synchronized",
        "our renorm, synchronized",
    )
    rows = [
        [label, *(f"{ratios[name]['median']:.2f}" for name in names)]
        for label, ratios in results["cases"].items()
    ]
    return [*table(["input", *names], rows), "", machine_of(results)]


def fold():
    """Inference of whole networks."""
    results = read("fold_cpu.json")
    rows = [
        [
            label,
            f"{ratios['Keras']['milliseconds']:.0f}",
            *(f"{ratios[k]['median']:.2f}" for k in ("converted", "folded")),
        ]
        for label, ratios in results["cases"].items()
    ]
    head = ["network", "Keras, ms", "converted", "folded"]
    return [*table(head, rows), "", machine_of(results)]


def networks():
    """Whole networks of `keras.applications`."""
    results = read("networks_cpu.json")
    head, *rows = _networks_report()["table_rows"](
        results["networks"], has_range=False
    )
    return [*table(head, rows), "", machine_of(results)]


def gpu_layer():
    """A layer on a GPU."""
    return _on_jax("speed_jax_gpu.json", OURS[:2])


def jax_layer():
    """A layer on JAX, on a CPU."""
    return _on_jax("speed_jax_cpu.json", OURS)


def _on_jax(path, ours):
    results = read(path)
    names = ("Keras 3 renorm", *ours)
    rows = []
    for case in results["cases"]:
        ratios = case["ratios"]
        rows.append(
            [
                f"{case['what']}, {case['dtype']}, {case['label']}",
                f"{ratios['Keras 3 BN']['milliseconds']:.3f}",
                f"{ratios['Keras 3 BN']['bandwidth']:.0%}",
                *(f"{ratios[name]['median']:.2f}" for name in names),
                f"{ratios['our renorm']['bandwidth']:.0%}",
            ]
        )
    head = ["what", "Keras 3 BN, ms", "of copying", *names, "of copying"]
    return [*table(head, rows), "", machine_of(results)]


def pytorch():
    """Layers and networks on PyTorch."""
    results = read("speed_torch_cpu.json")
    names = list(results["cases"][0]["ratios"])[1:]
    rows = [
        [
            f"{case['what']}, {case['dtype']}, {case['label']}",
            f"{case['ratios']['Keras 3 BN']['milliseconds']:.2f}",
            *(
                f"{case['ratios'][name]['median']:.2f}"
                if name in case["ratios"]
                else ""
                for name in names
            ),
        ]
        for case in results["cases"]
    ]
    head = ["what", "Keras 3 BN, ms", *names]
    return [*table(head, rows), "", machine_of(results)]


def gpu_networks():
    """Whole networks on a GPU."""
    results = read("networks_jax_gpu.json")
    head, *rows = _networks_report()["device_rows"](results["networks"])
    return [*table(head, rows), "", machine_of(results)]


def _networks_report():
    # By path: tests import this file alone.
    return runpy.run_path(str(Path(__file__).with_name("networks_report.py")))


def monitor():
    """What `RenormMonitor` takes."""
    results = read("monitor_cpu.json")
    rows = [
        [
            label,
            f"{found['milliseconds_a_step']:.1f}",
            f"{found['share_of_its_own_time']:.2%}",
        ]
        for label, found in results["networks"].items()
    ]
    head = ["network", "a step, ms", f"the monitor, every={results['every']}"]
    return [*table(head, rows), "", machine_of(results)]


# By path: tests import this file alone.
REAL = runpy.run_path(str(Path(__file__).parent / "real" / "report.py"))


def real_job(name):
    """Tables of a job of `benchmarks/real`."""

    def part():
        path = f"real/{name}.json"
        if not (RESULTS / path).exists():
            return NOT_RUN
        return REAL["markdown"](read(path))

    return part


PARTS = {
    **{
        f"real {name}": real_job(name)
        for name in REAL["job_names"]([Path(__file__).parent / "real"])
    },
    "advice": advice,
    "digits": regimes("digits"),
    "cluttered": regimes("cluttered"),
    "dense": regimes("digits_dense"),
    "residual": regimes("cluttered_residual"),
    "segments": lines_of("segments", "optimizer"),
    "optimizers": lines_of("optimizers_digits", "optimizer"),
    "fine-tuning": lines_of("fine_tuning_digits", "regime"),
    "speed": speed,
    "speed elsewhere": speed_elsewhere,
    "replicas": replicas,
    "fold": fold,
    "networks": networks,
    "JAX": jax_layer,
    "GPU": gpu_layer,
    "PyTorch": pytorch,
    "networks on a GPU": gpu_networks,
    "monitor": monitor,
}


def documents():
    """README and every page."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def written(text):
    """The text of a document, with its parts as the results have them."""

    def part(match):
        lines = PARTS[match[1]]()
        return "\n".join(
            [match[0].split("\n")[0], "", *lines, "", "<!-- end -->"]
        )

    return re.sub(
        r"^<!-- results: (.+?) -->\n.*?^<!-- end -->",
        part,
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


def mean_accuracies():
    """Task -> regime -> contender -> mean and spread."""
    experiments = read("quality/summary.json")["experiments"]
    picture = {}
    for task in DRAWN_TASKS:
        found = accuracies(experiments[f"regimes_{task}"]["cells"])
        picture[task] = {
            regime: {
                name: [round(cell["mean"], 4), round(cell["spread"], 4)]
                for name, cell in found.get(regime, {}).items()
                if name in DRAWN
            }
            for regime in DRAWN_REGIMES
        }
    return picture


def draw_accuracies(plt, shown):
    """A panel a task, a row a regime, a dot a contender."""
    names = [
        name
        for name in DRAWN
        if any(
            name in cells
            for by_regime in shown.values()
            for cells in by_regime.values()
        )
    ]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(9.5, 3.6), sharey=True, layout="constrained"
    )
    for axes, (task, by_regime) in zip(panels, shown.items(), strict=True):
        for place, cells in enumerate(by_regime.values()):
            axes.axhspan(
                place - 0.5,
                place + 0.5,
                color="#f4f4f4" if place % 2 else "white",
            )
            for at, name in enumerate(names):
                if name not in cells:
                    continue
                mean, spread = cells[name]
                _, color, marker = DRAWN[name]
                axes.errorbar(
                    mean,
                    place + 0.18 * (at - (len(names) - 1) / 2),
                    xerr=spread,
                    fmt=marker,
                    color=color,
                    markersize=6,
                )
        axes.set_title(TASKS[task], fontsize=11)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("test accuracy")
        axes.grid(axis="x", alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(DRAWN_REGIMES)), DRAWN_REGIMES.values())
    panels[0].set_ylim(len(DRAWN_REGIMES) - 0.5, -0.5)
    panels[0].set_ylabel("a minibatch holds")
    figure.legend(
        handles=[
            plt.Line2D([], [], color=color, marker=marker, ls="", label=label)
            for label, color, marker in (DRAWN[name] for name in names)
        ],
        loc="outside upper center",
        ncols=min(len(names), 4),
        frameon=False,
        fontsize=9,
    )
    return figure


def step_ratios():
    """Input -> layer -> a training step's time over Keras's."""
    shut = _networks_report()["SHUT"]
    return {
        case["label"]: {
            name: round(case["ratios"][name]["median"], 3)
            for name in ("Keras 3 renorm", *OURS, shut, "floor")
        }
        for case in read("speed_cpu.json")["cases"]
        if _kind(case) == ("training step", "graph", "float32")
    }


def draw_speed(plt, shown):
    """A group of bars an input."""
    figure, axes = plt.subplots(figsize=(9.5, 3.4), layout="constrained")
    report = _networks_report()
    colors = {
        "Keras 3 renorm": report["COLORS"][report["RIVAL"]],
        **{name: report["COLORS"][name] for name in (*OURS, report["SHUT"])},
        "floor": report["COLORS"][report["FLOOR"]],
    }
    width = 0.8 / len(colors)
    for at, (name, color) in enumerate(colors.items()):
        axes.bar(
            [
                place + width * (at + 0.5 - len(colors) / 2)
                for place in range(len(shown))
            ],
            [ratios[name] for ratios in shown.values()],
            0.95 * width,
            color=color,
            label=name,
        )
    axes.axhline(1, color="black", lw=0.8)
    labels = [label.replace(" ", "\n") for label in shown]
    axes.set_xticks(range(len(shown)), labels, fontsize=8)
    axes.set_ylabel("time of a training step\n(Keras's layer is 1)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


DRAWINGS = {
    "does_it_help": (mean_accuracies, draw_accuracies),
    "speed": (step_ratios, draw_speed),
    "networks": (
        lambda: read("networks_cpu.json")["networks"],
        lambda plt, shown: _networks_report()["picture"](plt, shown),
    ),
}


def draw():
    """The pictures; what each shows is in its metadata, too."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    PICTURES.mkdir(exist_ok=True)
    for name, (values, picture) in DRAWINGS.items():
        shown = values()
        figure = picture(plt, shown)
        figure.savefig(
            PICTURES / f"{name}.png",
            dpi=110,
            metadata={"Description": json.dumps(shown)},
        )
        plt.close(figure)


def main():
    """Writes all of it."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        path.write_text(written(text), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
