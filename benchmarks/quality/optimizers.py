"""Why the optimizer matters where minibatches hold one class.

    python -m benchmarks.quality.optimizers    # three minutes on two cores

Three measurements in the middle third of runs with both optimizers and all
rates, beside the accuracy that came of them:

- how far kernels, and the offsets (beta), move in 100 steps, about as many as
  the moving statistics are averages of: kernels as a share of their norm;
- how far the true statistics (of all training images, with the weights as
  they are) move in that time, in standard deviations: the drift that
  renormalization has to correct;
- what the gradient keeps. Renormalization gives the outputs of inference, but
  its gradient goes through the batch's mean and variance as that of batch
  normalization does, and loses what all examples of a minibatch have in
  common. For the same weights, the same minibatch and the same outputs, the
  kernels' gradient is compared with that of frozen statistics, which loses
  nothing: the share of its norm that is left, for minibatches of one class
  and for i.i.d. ones.

Prints tables; writes `optimizers.json` into `--output`.
"""

import argparse
import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_renorm
from benchmarks import timing
from benchmarks.quality.batches import draw
from benchmarks.quality.experiments import RATES
from benchmarks.quality.quiet import silence
from benchmarks.quality.training import (
    Run,
    Trainer,
    accuracy,
    copy_weights,
    initial_weights,
    layer_weights,
    make_model,
    minibatches,
    task_of,
)

WINDOW = 100  # steps: 1 / (1 - momentum)
CONTENDERS = ("renorm", "group")


class _Snapshots(keras.callbacks.Callback):
    """The weights before and after some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs
        self.pairs = {epoch: [] for epoch in epochs}

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.pairs:
            self.pairs[epoch].append(layer_weights(self.model))

    def on_epoch_end(self, epoch, logs=None):
        if epoch in self.pairs:
            self.pairs[epoch].append(layer_weights(self.model))


@functools.lru_cache(2)
def _trainer(task, contender, optimizer, steps):
    return Trainer(task, contender, optimizer, steps, epochs=steps // WINDOW)


def measure(run):
    """Accuracy, and movements within a window in the middle of the run."""
    task = task_of(run)
    trainer = _trainer(run.task, run.contender, run.optimizer, run.steps)
    trainer.reset(initial_weights(run), run.rate)
    rng = np.random.default_rng([run.seed, 3])
    rows = draw(run.regime, task.train.y, run.steps, rng)
    windows = run.steps // WINDOW
    snapshots = _Snapshots(
        np.linspace(windows // 3, 2 * windows // 3, 5).astype(int).tolist()
    )
    trainer.model.fit(
        minibatches(rows, task.train),
        steps_per_epoch=WINDOW,
        epochs=windows,
        callbacks=[*trainer.callbacks, snapshots],
        verbose=0,
    )
    pairs = snapshots.pairs.values()
    result = {
        "accuracy": accuracy(trainer.model, task.test),
        "kernels": _mean([_kernels_moved(*pair) for pair in pairs]),
        "offsets": _mean([_offsets_moved(*pair) for pair in pairs]),
    }
    if run.contender != "group":
        model = make_model("bn", run.task, run.steps)
        moved = [_statistics_moved(model, task, *pair) for pair in pairs]
        result["statistics"] = _mean(moved)
        middle = list(pairs)[len(pairs) // 2][0]
        for regime in ("one_class", "iid_16"):
            kept = _gradient_kept(run, task, middle, regime)
            result[f"gradient_{regime}"] = kept
    return result


def _mean(values):
    return float(np.mean(values))


def _offsets_moved(before, after):
    """The mean distance of beta, over channels and layers."""
    return np.mean(
        [
            np.mean(np.abs(new["beta"] - old["beta"]))
            for old, new in zip(before, after, strict=True)
            if "beta" in old
        ]
    )


def _gradient_kept(run, task, weights, regime, count=20):
    """The share of the kernels' gradient that renormalization keeps."""
    unclipped = make_model("renorm", run.task, run.steps)
    frozen = make_model("renorm", run.task, run.steps)
    for model in (unclipped, frozen):
        copy_weights(weights, model)
    for layer in unclipped.layers:
        if isinstance(layer, keras_renorm.BatchRenormalization):
            layer.r_max = layer.d_max = np.inf
    keras_renorm.freeze_statistics(frozen)
    rng = np.random.default_rng([run.seed, 5])
    kept = []
    for rows in draw(regime, task.train.y, count, rng):
        x, y = task.train.x[rows], task.train.y[rows]
        # Each minibatch against the same statistics.
        copy_weights(
            [
                {name: layer[name] for name in layer if "moving" in name}
                for layer in weights
            ],
            unclipped,
        )
        ours, whole = (
            _kernel_gradients(model, x, y) for model in (unclipped, frozen)
        )
        kept.append(np.linalg.norm(ours) / np.linalg.norm(whole))
    return float(np.median(kept))


def _kernel_gradients(model, x, y):
    """Of all convolutions, as one vector."""
    kernels = [
        layer.kernel
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    with tf.GradientTape() as tape:
        loss = keras.ops.mean(
            keras.losses.sparse_categorical_crossentropy(
                y, model(x, training=True), from_logits=True
            )
        )
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    return np.concatenate([np.ravel(gradient) for gradient in gradients])


def _kernels_moved(before, after):
    """Distance over norm, the mean of the layers that have a kernel."""
    return np.mean(
        [
            np.linalg.norm(new["kernel"] - old["kernel"])
            / np.linalg.norm(old["kernel"])
            for old, new in zip(before, after, strict=True)
            if "kernel" in old
        ]
    )


def _statistics_moved(model, task, before, after):
    """Of the means, in standard deviations: over channels and layers."""
    old, new = (
        _population(model, task, weights) for weights in (before, after)
    )
    return np.mean(
        [
            np.mean(np.abs(new_mean - mean) / np.sqrt(variance + 1e-3))
            for (mean, variance), (new_mean, _) in zip(old, new, strict=True)
        ]
    )


def _population(model, task, weights):
    """Mean and variance of what each layer normalizes in inference."""
    copy_weights(weights, model)
    try:
        keras_renorm.recalibrate(
            model,
            task.train.x,
            batch_size=len(task.train.x),
            verbose=False,
        )
    except ValueError:  # diverged
        return [(np.full(1, np.nan), np.full(1, np.nan))]
    return [
        (layer["moving_mean"], layer["moving_variance"])
        for layer in layer_weights(model)
        if "moving_mean" in layer
    ]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=Path("output/quality/optimizers")
    )
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1 or args.steps < 15 * WINDOW:
        parser.error(
            "--seeds and --jobs must be at least 1, --steps at least "
            f"{15 * WINDOW}. Received: {args.seeds}, {args.jobs}, {args.steps}."
        )
    return args


def main():
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    cells = [
        (contender, optimizer, rate)
        for contender in CONTENDERS
        for optimizer in ("sgd", "adam")
        for rate in RATES[optimizer]
    ]
    runs = [
        Run("digits", "one_class", *cell, args.steps, seed)
        for cell in cells
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(
        args.jobs, mp_context=get_context("spawn"), initializer=silence
    ) as pool:
        results = list(track(pool.map(measure, runs), total=len(runs)))
    rows = []
    for index, (contender, optimizer, rate) in enumerate(cells):
        found = results[index * args.seeds : (index + 1) * args.seeds]
        rows.append(
            {
                "contender": contender,
                "optimizer": optimizer,
                "rate": rate,
                **{
                    name: [result[name] for result in found]
                    for name in found[0]
                },
            }
        )
    print_table(rows)
    timing.write(
        args.output / "optimizers.json",
        {
            "machine": timing.machine(),
            "steps": args.steps,
            "seeds": args.seeds,
            "rows": [
                {name: _finite(value) for name, value in row.items()}
                for row in rows
            ],
        },
    )


def _finite(value):
    """What diverged is null: JSON has no NaN."""
    if isinstance(value, list):
        return [each if np.isfinite(each) else None for each in value]
    return value


def print_table(rows):
    table = Table(
        title=f"Movement in {WINDOW} steps, share of the gradient that is kept"
    )
    shown = {
        "accuracy": "accuracy",
        "kernels": "kernels",
        "offsets": "beta",
        "statistics": "means, σ",
        "gradient_one_class": "kept, 1 class",
        "gradient_iid_16": "kept, i.i.d.",
    }
    for name in ("", "optimizer", "rate", *shown.values()):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["contender"],
            row["optimizer"],
            f"{row['rate']:g}",
            *(
                f"{np.mean(row[name]):.3f}" if name in row else ""
                for name in shown
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
