# %% [markdown]
# # Tuning r_max, d_max and the ramp
#
# `RenormScheduler()` needs no settings. What if others are better for your
# data? We let [Optuna](https://optuna.org) search, and then ask how much the
# answer is worth: train again with fresh seeds what was found, the default and
# batch normalization, and change one setting at a time. Minibatches hold one
# class each, as in the quickstart.
#
# Takes two minutes on two CPU cores. Needs
# `pip install ".[tutorials]"`. As a script:
# `python 09_tuning.py --trials 60 --storage study.db`. With `--storage`, trials
# are kept, and a search that was stopped goes on.

# %%
import os
from pathlib import Path

# Steps this small gain nothing from threads, and without them a run repeats.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import lesson

EPOCHS, BATCH_SIZE = 10, 16
args = lesson.options(
    "09_tuning",
    data=lesson.DATA,
    trials=24,
    steps=800,
    seeds=2,
    seed=0,
    storage=Path,
    least={"steps": EPOCHS, "seed": 0},
    notes={"seed": "of the search", "storage": "a file of trials (SQLite)"},
)

# %%
import functools

import keras
import numpy as np
import optuna
import tensorflow as tf
import tuning_report
from keras import layers
from optuna.distributions import FloatDistribution
from sklearn.model_selection import train_test_split

from keras_renorm import BatchRenormalization
from keras_renorm.callbacks import RenormScheduler
from keras_renorm.schedules import LinearRamp

steps_per_epoch = args.steps // EPOCHS
total_steps = steps_per_epoch * EPOCHS

# %% [markdown]
# ## The data, in three parts
#
# Trials are compared on a part of their own. The best of many trials looks
# better there than it is, so what we report in the end comes from a third part.

# %%
x, y = lesson.load(args.data)
x_train, x_rest, y_train, y_rest = train_test_split(
    x, y, test_size=0.4, random_state=0
)
x_tune, x_test, y_tune, y_test = train_test_split(
    x_rest, y_rest, test_size=0.5, random_state=0
)


def one_class_batches(seed):
    rng = np.random.default_rng(seed)
    rows = lesson.one_class_rows(rng, y_train, total_steps, BATCH_SIZE)
    return tf.data.Dataset.from_tensor_slices((x_train[rows], y_train[rows]))


# %% [markdown]
# ## One network for all trials
#
# The limits are weights, not code, and so is the learning rate. So one network
# is compiled, once; a trial puts fresh weights and step counters into it.


# %%
def make_network():
    stack = [keras.Input(x_train.shape[1:])]
    for filters, strides in ((16, 1), (32, 1), (64, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            BatchRenormalization(momentum=0.95),  # a short run
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential(stack)


model = tuning_report.compiled(make_network(), steps_per_epoch)


def train(scheduler, learning_rate, seed, data, callbacks=()):
    """Accuracy on `data` after each epoch; the network is trained anew."""
    keras.utils.set_random_seed(seed)
    model.set_weights(make_network().get_weights())
    batches, callbacks = one_class_batches(seed), [scheduler, *callbacks]
    return tuning_report.fit(
        model, batches, learning_rate, EPOCHS, data, callbacks
    )


# %% [markdown]
# ## The settings
#
# The ramp begins and ends at shares of the run, so that what is found carries
# over to longer ones. It never ends before it begins, whatever is proposed.

# %%
SPACE = {
    "r_max": FloatDistribution(1.1, 20.0, log=True),
    "d_max": FloatDistribution(0.2, 40.0, log=True),
    "begin": FloatDistribution(0.0, 0.4),
    "length": FloatDistribution(0.0, 0.5),
    "learning_rate": FloatDistribution(0.003, 0.1, log=True),
}
# About what `RenormScheduler()` does: what is found is not worse on its data.
DEFAULT_RATE = 0.03
PAPER = {"r_max": 3.0, "d_max": 5.0, "begin": 0.04, "length": 0.2}
PAPER["learning_rate"] = DEFAULT_RATE


def make_scheduler(settings):
    begin = round(settings["begin"] * total_steps)
    end = begin + round(settings["length"] * total_steps)
    return RenormScheduler(
        r_max=LinearRamp(1.0, settings["r_max"], begin, end),
        d_max=LinearRamp(0.0, settings["d_max"], begin, end),
    )


# %% [markdown]
# ## The search
#
# Each trial has its own seed: with one for all, the search would find what
# suits that seed. A trial below the median is given up; not before half of it
# is over, since a late ramp looks bad until it opens.


# %%
def objective(trial):
    settings = {
        name: trial.suggest_float(name, space.low, space.high, log=space.log)
        for name, space in SPACE.items()
    }
    pruning = tuning_report.Pruning(trial)
    rate, seed = settings["learning_rate"], 1_000 * (args.seed + 1)
    data = x_tune, y_tune
    scheduler = make_scheduler(settings)
    found = train(scheduler, rate, seed + trial.number, data, [pruning])
    if pruning.is_pruned:
        raise optuna.TrialPruned
    return found[-1]


# Trials of other lengths or data are not comparable: another study.
name = f"{args.data}, {total_steps} steps, seed {args.seed}"
study, trials_before = tuning_report.open_study(
    name, args.storage, args.seed, warmup=EPOCHS // 2, first=PAPER
)
for _ in lesson.track(range(trials_before, args.trials), "Search"):
    study.optimize(objective, n_trials=1)
best = study.best_params

# %% [markdown]
# ## What it is worth
#
# Fresh seeds, and images that no trial was judged by. `r_max=1` and `d_max=0`
# are plain batch normalization.

# %%
rate = best["learning_rate"]
CONTENDERS = {
    "best settings": (lambda: make_scheduler(best), rate),
    "default, best rate": (RenormScheduler, rate),
    f"default, rate {DEFAULT_RATE}": (RenormScheduler, DEFAULT_RATE),
    "batch norm., best rate": (
        lambda: RenormScheduler(r_max=1.0, d_max=0.0),
        rate,
    ),
}


def on_test(scheduler, rate):
    """Final accuracies on the third part, one for each fresh seed."""
    data = x_test, y_test
    seeds = range(args.seeds)
    return np.array([train(scheduler(), rate, at, data)[-1] for at in seeds])


accuracies = {
    name: on_test(*CONTENDERS[name])
    for name in lesson.track(list(CONTENDERS), "Fresh seeds")
}

# %% [markdown]
# ## How sensitive is it?
#
# Asked twice: by a fit to the trials (functional ANOVA), and by one change.

# %%
CHANGES = {  # lower, higher
    "r_max": (1.5, 10.0),
    "d_max": (1.0, 25.0),
    "begin": (0.0, 0.4),
    "length": (0.0, 0.5),
    "learning_rate": (rate / 3, rate * 3),
}
changes = [(name, value) for name, of in CHANGES.items() for value in of]
sensitivity = []
for name, value in lesson.track(changes, "One change"):
    settings = {**best, name: value}
    scheduler = functools.partial(make_scheduler, settings)
    found = on_test(scheduler, settings["learning_rate"])
    sensitivity.append((name, value, found))

importances = tuning_report.importances(study, args.seed)
tuning_report.tables(accuracies, sensitivity, importances, best)

# %%
advice = tuning_report.advice(accuracies, sensitivity)
lesson.say(advice)
others = {"data": args.data, "steps": total_steps, "advice": advice}
others |= {"best": best, "importances": importances}
file = args.output / "tuning.json"
tuning_report.write(file, study, accuracies, sensitivity, others)
reference = accuracies["best settings"]
picture = args.output / "tuning.png"
tuning_report.draw(picture, study, sensitivity, importances, reference)

# %%
if args.is_whole:  # we claim that it is far better, tuned or not
    batch_normalized = accuracies["batch norm., best rate"].mean()
    assert reference.mean() > batch_normalized + 0.15
    assert accuracies["default, best rate"].mean() > batch_normalized + 0.1
    lesson.say("All claims hold")

# %% [markdown]
# What to try next: `--steps 3000 --trials 60`; `--seed 1`, another search.
