"""Draws pictures of the documents that rest on no results.

    python benchmarks/pictures.py

`docs/pictures/step.png` is a diagram of a training step, for docs/design.md;
`docs/pictures/report.png` is `report.plot()` of a network that was trained in
minibatches of one class, for docs/guides/evaluates_badly.md. Needs matplotlib
and scikit-learn.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib.figure import Figure

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
TRAINING, SERVING, KEPT = "#dcebf7", "#fdebd3", "#e4f2e4"
# Name: middle, text, color.
BOXES = {
    "batch": ((0.9, 3.0), "minibatch x", TRAINING),
    "statistics": ((3.1, 3.0), "batch mean,\nbatch stddev", TRAINING),
    "normalize": (
        (5.7, 3.0),
        "(x − batch mean)\n/ batch stddev",
        TRAINING,
    ),
    "correct": ((8.2, 3.0), "× r + d", TRAINING),
    "out": ((10.5, 3.0), "× gamma + beta", TRAINING),
    "moving": ((3.1, 1.0), "moving mean,\nmoving stddev", KEPT),
    "limits": (
        (6.9, 1.75),
        "r = batch stddev / moving stddev\n"
        "d = (batch mean − moving mean) / moving stddev\n"
        "within the limits; no gradient",
        KEPT,
    ),
    "serve": (
        (7.3, 0.35),
        "serving: (x − moving mean) / moving stddev",
        SERVING,
    ),
    "served": ((10.5, 0.35), "× gamma + beta", SERVING),
}
# From, to, words beside it, where they are.
ARROWS = (
    ((1.65, 3.0), (2.3, 3.0), "", None),
    ((3.9, 3.0), (4.75, 3.0), "", None),
    ((6.65, 3.0), (7.65, 3.0), "", None),
    ((8.75, 3.0), (9.6, 3.0), "", None),
    ((3.1, 2.6), (3.1, 1.4), "moving average,\nafter the step", (2.95, 2.0)),
    ((3.9, 2.75), (4.95, 2.1), "", None),
    ((3.95, 1.15), (4.95, 1.55), "before the step", (5.75, 1.12)),
    ((8.2, 2.2), (8.2, 2.68), "", None),
    ((3.95, 0.8), (5.3, 0.4), "", None),
    ((9.3, 0.35), (9.6, 0.35), "", None),
)


def draw_step():
    """Batch statistics, moving averages, r and d, and what is served."""
    figure = Figure(figsize=(10, 3.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11.6), ylim=(-0.1, 3.5))
    axes.set_axis_off()
    for (x, y), text, color in BOXES.values():
        axes.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.5", "fc": color, "ec": "#777777"},
        )
    for start, end, text, place in ARROWS:
        axes.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333"}
        )
        if text:
            axes.text(*place, text, ha="right", va="center", fontsize=8)
    return figure


def draw_report():
    """`report.plot()` of a network trained in minibatches of one class."""
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    from keras_renorm.diagnostics import discrepancy

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    rows_of_class = [np.flatnonzero(y == label) for label in range(10)]
    rows = np.concatenate(
        [
            rng.choice(rows_of_class[each], 16)
            for each in rng.integers(10, size=600)
        ]
    )
    kernels = (
        keras.layers.Conv2D(16, 3, 1, "same", use_bias=False),
        keras.layers.Conv2D(32, 3, 2, "same", use_bias=False),
        keras.layers.Dense(64, use_bias=False),
        keras.layers.Dense(64, use_bias=False),
    )
    stack = [keras.Input((8, 8, 1))]
    for at, (kernel, name) in enumerate(
        zip(kernels, ("conv1", "conv2", "dense1", "dense2"), strict=True)
    ):
        stack += [keras.layers.Flatten()] if at == 2 else []
        stack += [
            kernel,
            keras.layers.BatchNormalization(momentum=0.95, name=f"{name}_bn"),
            keras.layers.ReLU(),
        ]
    model = keras.Sequential([*stack, keras.layers.Dense(10)], name="digits")
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(3e-3, 600)
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=50,
    )
    model.fit(x[rows], y[rows], batch_size=16, shuffle=False, verbose=0)
    shown = rows[: 40 * 16]
    report = discrepancy(
        model, (x[shown], y[shown]), batch_size=16, verbose=False
    )
    assert report.verdicts[0].cause == "batches not i.i.d.", report
    return report.plot()


if __name__ == "__main__":
    for name, draw in (("step", draw_step), ("report", draw_report)):
        draw().savefig(PICTURES / f"{name}.png", dpi=100)
