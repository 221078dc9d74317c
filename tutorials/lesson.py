"""What every lesson needs and none is about.

Options of the command line, data, progress, tables and pictures. Import it
before TensorFlow, whose messages it turns off.
"""

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow writes some messages before it knows that level.
_stderr, _nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 2)
try:
    import tensorflow as tf
finally:
    os.dup2(_stderr, 2)
    os.close(_nowhere)

import matplotlib as mpl
import numpy as np
from absl import logging as absl_logging
from matplotlib.figure import Figure
from rich import progress
from rich.console import Console
from rich.table import Table

absl_logging.set_verbosity(absl_logging.ERROR)
tf.get_logger().setLevel(logging.ERROR)

IN_NOTEBOOK = "ipykernel" in sys.modules
# Plain text in a notebook too: it is small, and every site can show it.
console = Console(
    force_jupyter=False,
    force_terminal=False if IN_NOTEBOOK else None,
    width=100 if IN_NOTEBOOK else None,
)

# Of people who see red and green alike, too (Okabe and Ito).
ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#009e73"
GREY, PINK, YELLOW, SKY = "#767676", "#cc79a7", "#e69f00", "#56b4e9"

# --- Options


_HELP = {
    "seeds": "runs of each kind",
    "steps": "of a training; claims are checked from the default on",
    "epochs": "of a training",
    "output": "folder of what is written",
}


def options(name, *, least=None, notes=None, **defaults):
    """The options of the command line; in a notebook the defaults.

    Args:
        name: Of the lesson; its folder is `output/NAME`.
        least: `{option: the least that it may be}`; others may be 1.
        notes: `{option: what it is}`, for `--help`.
        **defaults: A number; a tuple of choices, the default first; or a type,
            of an option that is None where it is not given.

    Returns:
        The options as attributes. `output` is a folder that exists, and
        `is_whole` says whether the lesson's claims are about this run: its own
        data, and no training shorter than the default. `fail` ends the
        program with a message.
    """
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    defaults["output"] = Path("output") / name
    for option, default in defaults.items():
        given = {"default": default, "type": type(default)}
        if isinstance(default, type):
            given = {"type": default}
        if isinstance(default, tuple):
            given = {"default": default[0], "choices": default}
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            help={**_HELP, **(notes or {})}.get(option, " "),
            **given,
        )
    # A notebook's arguments are the kernel's. Change the defaults there.
    words = os.environ.get("LESSON_OPTIONS", "").split()
    args = parser.parse_args(words if IN_NOTEBOOK else None)
    for option, value in vars(args).items():
        bound = (least or {}).get(option, 1)
        if isinstance(value, int) and value < bound:
            option = option.replace("_", "-")
            parser.error(
                f"--{option} must be at least {bound}. Received: {value}."
            )
    args.output.mkdir(parents=True, exist_ok=True)
    args.is_whole = all(
        _is_long_enough(getattr(args, option), default)
        for option, default in defaults.items()
        if option in ("data", "scale", "steps", "epochs", "trials")
    )
    args.fail = parser.error
    return args


def _is_long_enough(value, default):
    if isinstance(default, tuple):
        return value == default[0]
    return value is None if isinstance(default, type) else value >= default


# --- Data

DATA = ("digits", "mnist")


def load(name="digits"):
    """Images, of values from 0 to 1, and labels; MNIST is downloaded."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return (x / 16).astype("float32").reshape(-1, 8, 8, 1), y
    x, y = downloaded("mnist", "train")
    return x.astype("float32") / 255, y


def downloaded(name, split):
    """Images and labels of a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    dataset = tfds.load(name, split=split, as_supervised=True)
    x, y = dataset.batch(len(dataset)).get_single_element()
    return x.numpy(), y.numpy()


def train_and_validation(name="digits"):
    """Training images and labels, validation images and labels.

    A quarter of the digits is for validation; of MNIST its test images.
    """
    from sklearn.model_selection import train_test_split

    x, y = load(name)
    if name == "digits":
        x, x_val, y, y_val = train_test_split(
            x, y, test_size=0.25, stratify=y, random_state=0
        )
        return x, y, x_val, y_val
    x_val, y_val = downloaded(name, "test")
    return x, y, x_val.astype("float32") / 255, y_val


def one_class_rows(rng, labels, steps, size):
    """Rows of the data, `(steps, size)`; one class a step."""
    rows_of_class = [np.flatnonzero(labels == each) for each in set(labels)]
    classes = rng.integers(len(rows_of_class), size=steps)
    return np.stack([rng.choice(rows_of_class[each], size) for each in classes])


def passes(rng, groups, size, steps):
    """Rows, `(steps, size)`: passes over each group, in batches of a group."""
    drawn = []
    while sum(map(len, drawn)) < steps:
        whole = [
            rng.permutation(rows)[: len(rows) // size * size] for rows in groups
        ]
        batches = np.concatenate(whole).reshape(-1, size)
        drawn.append(rng.permutation(batches))
    return np.concatenate(drawn)[:steps]


def few_of_each_class(rng, labels, count):
    """Rows to train on, a list for each class; and the other rows."""
    rows = []
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        rows.append(of_class[: min(count, len(of_class) // 2)])
    return rows, np.setdiff1d(np.arange(len(labels)), np.concatenate(rows))


def shuffled(x, y, seed, size=32):
    """An endless dataset of minibatches."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    return dataset.shuffle(10_000, seed=seed).batch(size).repeat()


def photographs(name, classes, size=96, most=1000):
    """Images, of values from -1 to 1, and labels, of the first classes."""
    import tensorflow_datasets as tfds

    dataset = tfds.load(name, split="train", shuffle_files=True)
    dataset = dataset.filter(lambda row: row["label"] < classes).take(most)
    rows = dataset.map(
        lambda row: (
            tf.image.resize(row["image"], (size, size)) / 127.5 - 1,
            row["label"],
        )
    )
    x, y = zip(*rows.as_numpy_iterator(), strict=True)
    return np.stack(x), np.array(y)


# --- Training


def compiled(model, steps):
    """The classifier, compiled: Adam, and a rate that falls to zero."""
    import keras

    decay = keras.optimizers.schedules.CosineDecay(3e-3, steps)
    model.compile(
        keras.optimizers.Adam(decay),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Steps this small cost less than going back to Python after each.
        steps_per_execution=min(50, steps),
    )
    return model


def of_all_seeds(runs, seeds, train):
    """What `train(*run, seed)` gives: `{name: a result for each seed}`.

    The runs of a seed come one after the other, then those of the next.
    """
    found = {name: [] for name in runs}
    for seed, name in track(
        [(at, name) for at in range(seeds) for name in runs]
    ):
        found[name].append(train(*runs[name], seed))
    return found


def track(items, description="Training"):
    """The items, with a bar of how many are done."""
    return progress.track(
        items, description, console=console, disable=IN_NOTEBOOK
    )


def fit(model, batches, steps, rate, epochs=1, validation=None, callbacks=()):
    """Compiles and trains a classifier; its history.

    SGD with momentum 0.9, and a rate that falls from `rate` to zero. `batches`
    are a dataset, or arrays `(steps, batch, ...)` of examples and labels;
    `steps` minibatches are in all epochs together.
    """
    import keras

    steps_per_epoch = steps // epochs
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(rate, steps), momentum=0.9
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Steps this small cost less than going back to Python after each.
        # A divisor, or an epoch would take more steps than it has.
        steps_per_execution=max(
            count for count in range(1, 151) if steps_per_epoch % count == 0
        ),
    )
    if isinstance(batches, tuple):
        batches = tf.data.Dataset.from_tensor_slices(batches)
    return model.fit(
        batches.prefetch(tf.data.AUTOTUNE),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        validation_data=validation,
        validation_batch_size=450,
        callbacks=list(callbacks),
        shuffle=False,  # the batches are drawn already
        verbose=0,
    ).history


def state_of(model):
    """Moving means and variances, and gammas, of all normalization layers."""
    import keras

    kind = keras.layers.BatchNormalization
    found = [layer for layer in model.layers if isinstance(layer, kind)]
    return [
        np.concatenate(
            [keras.ops.convert_to_numpy(getattr(each, name)) for each in found]
        )
        for name in ("moving_mean", "moving_variance", "gamma")
    ]


def moved(before, after):
    """How far means went, in standard deviations, and gammas: the largest."""
    stddev = np.sqrt(before[1] + 1e-3)
    return (
        np.max(np.abs(after[0] - before[0]) / stddev),
        np.max(np.abs(after[2] - before[2])),
    )


_ELSEWHERE = """
import sys
import numpy as np

saved, inputs, outputs = sys.argv[1:]
if saved.endswith(".keras"):
    import keras
    loaded = keras.saving.load_model(saved)
    predict = loaded.predict_on_batch
else:
    import tensorflow as tf
    loaded = tf.saved_model.load(saved)
    predict = loaded.serve
np.save(outputs, predict(np.load(inputs)))
assert "keras_renorm" not in sys.modules
"""


def predict_elsewhere(saved, x):
    """Outputs of a saved network, of a Python that has no keras_renorm."""
    inputs, outputs = (saved.with_name(f"{each}.npy") for each in "xy")
    np.save(inputs, x)
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *map(str, (saved, inputs, outputs))],
        stderr=subprocess.PIPE,  # TensorFlow's messages
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return np.load(outputs)


def runtimes():
    """`{format of export: (ending of its files, function of path and x)}`.

    Of what is installed.
    """

    def is_installed(*names):
        return all(importlib.util.find_spec(name) for name in names)

    import keras

    found = {"tf_saved_model": ("", _run_saved_model)}
    documented = keras.Model.export.__doc__
    if is_installed("ai_edge_litert") and "litert" in documented:
        found["litert"] = (".tflite", _run_litert)
    if is_installed("onnxruntime", "tf2onnx"):
        found["onnx"] = (".onnx", _run_onnx)
    return found


def _run_saved_model(path, x):
    loaded = tf.saved_model.load(path)
    return loaded.serve(x).numpy()


def _run_litert(path, x):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    (given,) = interpreter.get_input_details()
    (made,) = interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(made["index"])


def _run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    return session.run(None, {given.name: x})[0]


# --- Words


def say(*words, sep=" "):
    """Prints, without a meaning for brackets."""
    text = sep.join(map(str, words))
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def numbers(values, form=".3f"):
    """Numbers as the text of a cell."""
    return " ".join(f"{value:{form}}" for value in values)


def spread(values, form=".3f"):
    """The lowest and the highest, as the text of a cell."""
    return f"{min(values):{form}}-{max(values):{form}}"


def table(title, heads, rows):
    """Prints a table, its first column to the left; `None` is a rule."""
    found = Table(heads[0], title=title, title_justify="left")
    for head in heads[1:]:
        found.add_column(head, justify="right")
    for row in rows:
        if row is None:
            found.add_section()
        else:
            found.add_row(*map(str, row))
    console.print(found)


def table_of_seeds(title, results, head="training"):
    """A table of `{name: a number for each seed}`."""
    table(
        title,
        (head, "mean", "min-max", "each seed"),
        [
            (name, f"{np.mean(values):.3f}", spread(values), numbers(values))
            for name, values in results.items()
        ],
    )


def table_of_columns(title, columns, head="training", form=".3f"):
    """A table of `{column: {row: a number for each seed}}`."""
    table(
        title,
        (head, *columns),
        [
            (row, *(numbers(each[row], form) for each in columns.values()))
            for row in next(iter(columns.values()))
        ],
    )


_RECALIBRATE = "`keras_renorm.recalibrate(model, training_data)`"
_CORRECT = "`BatchRenormalization()`"
_THIS_DATA = "`keras_renorm.recalibrate` on this data"
_CURES = {  # cause, words of the remedy, gain of accuracy
    "a short run": ("moving averages lag", _RECALIBRATE, 0.1),
    "one class a batch": ("batches not i.i.d.", "Shuffle the data", 0.5),
    # What two images teach differs by two points with the last digit of a sum.
    "two images a batch": ("batches too small", _CORRECT, 0.01),
    "darker, noisy images": ("another domain", _THIS_DATA, 0.1),
    "trainable weights only": ("statistics never trained", _RECALIBRATE, 0.05),
}


def check_cures(outcomes):
    """What we claim of `{case: an outcome for each seed}` must hold."""
    for name, (cause, remedy, gain) in _CURES.items():
        for run in outcomes[name]:
            verdict = run.report.verdicts[0]
            assert verdict.cause == cause, (name, run.report.verdicts)
            assert remedy in verdict.remedy, (name, verdict)
            assert run.after > run.before + gain, (name, run)
            assert not run.report_after.verdicts, (name, run.report_after)


def causes(reports):
    """The gravest cause of each report; one where they agree."""
    named = [[each.cause for each in report.verdicts] for report in reports]
    return ", ".join(dict.fromkeys((*of, "nothing")[0] for of in named))


# --- Pictures


mpl.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
)


def figure(width, height):
    """An empty picture, of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(picture, path):
    """Writes a picture; a notebook shows it, small."""
    picture.savefig(path, dpi=150)
    if not IN_NOTEBOOK:
        say(f"The picture is in {path}")
        return
    from io import BytesIO

    from IPython.display import Image, display

    small = BytesIO()
    picture.savefig(small, dpi=75)
    display(Image(small.getvalue()))


def figure_with_strips(width, height, strips, ratios):
    """A picture and its panels, below a row for each of `{title: images}`."""
    picture = figure(width, height)
    grid = picture.add_gridspec(
        len(strips) + 1,
        len(ratios),
        height_ratios=(*[1] * len(strips), 8),
        width_ratios=ratios,
    )
    for row, (title, images) in enumerate(strips.items()):
        axes = picture.add_subplot(grid[row, :])
        framed = [np.pad(each, ((1, 1), (1, 1), (0, 0))) for each in images]
        axes.imshow(np.hstack(framed), cmap="Greys")
        axes.set_ylabel(title, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    panels = [picture.add_subplot(grid[-1, at]) for at in range(len(ratios))]
    return picture, panels


def lines(axes, x, results, colors):
    """A line for each seed of `{name: lines}`, each name in its color."""
    for name, runs in results.items():
        for at, values in enumerate(runs):
            label = None if at else name
            axes.plot(x, values, color=colors[name], lw=1.5, label=label)


def band(axes, x, values, color, label):
    """The mean of `(x, runs)` as a line, in a band from lowest to highest."""
    low, high = values.min(axis=1), values.max(axis=1)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(x, values.mean(axis=1), "o-", color=color, ms=4, label=label)
    axes.grid(axis="y", alpha=0.3)


def bar(axes, at, values, color, label=None, width=0.8, across=False):
    """A bar for the mean, and a dot for each seed."""
    draw = axes.barh if across else axes.bar
    draw(at, np.mean(values), width, color=color, alpha=0.55, label=label)
    dots = [values, [at] * len(values)]
    axes.plot(*(dots if across else dots[::-1]), "o", color=color, ms=5)


def bars(axes, results, colors, across=True):
    """A bar for each of `{name: a number for each seed}`, with its name."""
    for at, (name, values) in enumerate(results.items()):
        bar(axes, at, values, colors[name], across=across)
    if across:
        axes.set_yticks(range(len(results)), list(results))
        axes.invert_yaxis()
    else:
        axes.set_xticks(range(len(results)), list(results))


def show_cures(results, path):
    """Table and picture of `{case: (before, after)}`, each of all seeds."""
    table(
        "Validation accuracy",
        ("case, diagnosis", "before", "after the cure"),
        [(name, *map(spread, of)) for name, of in results.items()],
    )
    picture = figure(9, 5)
    axes = picture.subplots()
    for at, values in enumerate(results.values()):
        for which, (label, color) in enumerate(
            (("before the cure", ORANGE), ("after the cure", BLUE))
        ):
            place = at - 0.2 + 0.4 * which
            label = None if at else label
            bar(axes, place, values[which], color, label, 0.36, across=True)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(title="A dot for each seed", xlabel="accuracy", xlim=(0, 1.02))
    legend(axes, ncols=2)
    save(picture, path)


def groups(axes, results, colors):
    """Groups of bars beside each other, of `{group: {name: of seeds}}`."""
    places = []
    for group, of_group in enumerate(results.values()):
        first = group * (len(of_group) + 1)
        for at, (name, values) in enumerate(of_group.items()):
            label = None if group else name
            bar(axes, first + at, values, colors[at], label)
        places.append(first + (len(of_group) - 1) / 2)
    axes.set_xticks(places, list(results))


def draw_recipes(path, shuffled, one_class):
    """Accuracy, and what moved: `{recipe: (seeds, accuracy and distances)}`."""
    colors = ORANGE, YELLOW, SKY, BLUE
    picture = figure(11, 4.4)
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    for axes, shown in (
        (left, {"shuffled": (shuffled, 0), "one class": (one_class, 0)}),
        (right, {"means, in stddev": (one_class, 1), "gamma": (one_class, 2)}),
    ):
        of_groups = {
            title: {recipe: values[:, at] for recipe, values in of.items()}
            for title, (of, at) in shown.items()
        }
        groups(axes, of_groups, colors)
    left.set(title="A dot for each seed", ylabel="accuracy", ylim=(0, 1.02))
    right.set(title="What moved (one class)", ylabel="distance")
    legend_of_all(left)
    save(picture, path)


def draw_adaptation(path, strips, counts, curves, before, near):
    """Accuracy by number of images, and after images of one class.

    Args:
        path: Of the picture.
        strips: `{domain: images}`.
        counts: Numbers of images.
        curves: `{target: {prior: (counts, runs)}}`.
        before: `{target: accuracy}`, not adapted.
        near: `{how it was adapted: accuracies on that class}`.
    """
    colors = ORANGE, BLUE, GREEN
    ratios = (*[1] * len(curves), 0.8)
    picture, panels = figure_with_strips(13, 7, strips, ratios)
    for axes, (target, of_target) in zip(panels, curves.items(), strict=False):
        for color, (prior, values) in zip(
            colors, of_target.items(), strict=True
        ):
            band(axes, counts, values, color, f"prior {prior}")
        start = before[target]
        axes.axhline(start, color="black", ls=":", label="not adapted")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts[::2], counts[::2])
        axes.set(title=target, xlabel="target images", ylabel="accuracy")
        axes.set_ylim(0, 1)
    legend_of_all(panels[0])
    bars(panels[-1], near, dict(zip(near, (GREY, *colors), strict=True)))
    title = f"{next(iter(curves))}, adapted to one class"
    panels[-1].set(title=title, xlabel="accuracy on that class", xlim=(0, 1))
    save(picture, path)


def legend(axes, **arguments):
    """A legend below the panel, where it hides nothing."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
        **arguments,
    )


def legend_of_all(axes, ncols=4):
    """A legend below the whole picture, of what one panel shows."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
    )
