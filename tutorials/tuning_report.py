"""What `09_tuning.py` found: tables, a picture, a file, and advice."""

import json
import math

import keras
import lesson
import numpy as np
import optuna

COMPLETE, PRUNED = DONE = (
    optuna.trial.TrialState.COMPLETE,
    optuna.trial.TrialState.PRUNED,
)


class Pruning(keras.callbacks.Callback):
    """Reports to a trial, and stops it where it is hopeless."""

    def __init__(self, trial):
        super().__init__()
        self.trial = trial
        self.is_pruned = False

    def on_epoch_end(self, epoch, logs=None):
        self.trial.report(logs["val_accuracy"], epoch)
        if self.trial.should_prune():
            self.is_pruned = self.model.stop_training = True


def compiled(model, steps_per_epoch):
    """The model, compiled once for all trials."""
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Steps this small cost less than going back to Python after each.
        steps_per_execution=steps_per_epoch,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, batches, rate, epochs, data, callbacks):
    """Accuracy on `data` after each epoch, with the optimizer as new."""
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    history = model.fit(
        batches,
        epochs=epochs,
        steps_per_epoch=len(batches) // epochs,
        validation_data=data,
        validation_batch_size=len(data[0]),
        callbacks=[*callbacks, falling(rate, epochs)],
        shuffle=False,  # the batches are drawn already
        verbose=0,
    )
    return history.history["val_accuracy"]


def falling(rate, epochs):
    """A learning rate that falls to zero, by epoch."""
    return keras.callbacks.LearningRateScheduler(
        lambda epoch: rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    )


def open_study(name, storage, seed, warmup, first):
    """A study that maximizes, and how many trials it has already.

    A trial below the median of the others is given up, after `warmup` reports.
    The first trial is `first`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        study_name=name,
        storage=storage and f"sqlite:///{storage.absolute()}",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=warmup
        ),
    )
    trials_before = len(study.get_trials(states=DONE))
    # A sampler that goes on must not draw the same points again.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + trials_before, n_startup_trials=8
    )
    study.enqueue_trial(first, skip_if_exists=True)
    return study, trials_before


def importances(study, seed):
    """The share of the variance that a setting explains; of few, nothing."""
    completed = study.get_trials(states=[COMPLETE])
    if len({trial.value for trial in completed}) <= 3:
        return {}
    return optuna.importance.get_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed),
    )


def spread(values):
    """The standard deviation of a few seeds."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _mean_and_spread(values):
    return f"{values.mean():.3f} ± {spread(values):.3f}"


def tables(accuracies, sensitivity, importances, best):
    """Prints what was compared, and what one change does."""
    lesson.table(
        "Accuracy on the third part, fresh seeds",
        ("training", "mean ± s. d.", "min-max"),
        [
            (name, _mean_and_spread(values), lesson.spread(values))
            for name, values in accuracies.items()
        ],
    )
    reference = accuracies["best settings"]
    lesson.table(
        "One change to the best",
        ("setting", "best", "changed to", "accuracy", "change", "importance"),
        [
            (
                name,
                f"{best[name]:.3g}",
                f"{value:.3g}",
                _mean_and_spread(values),
                f"{values.mean() - reference.mean():+.3f}",
                f"{importances[name]:.2f}" if name in importances else "",
            )
            for name, value, values in sensitivity
        ],
    )


def advice(accuracies, sensitivity):
    """Whether to take what was found, from the figures."""
    reference = accuracies["best settings"]
    default = accuracies["default, best rate"]
    seeds = len(reference)
    # Two means of few seeds: the error of their difference.
    noise = 2 * np.hypot(spread(reference), spread(default)) / np.sqrt(seeds)
    gain = float(reference.mean() - default.mean())
    worst = {}
    for name, _, values in sensitivity:
        loss = float(reference.mean() - values.mean())
        worst[name] = max(loss, worst.get(name, -1.0))
    order = sorted(worst, key=worst.get, reverse=True)
    if gain > noise > 0:
        text = (
            f"The settings found are {gain:.3f} better than the default, which "
            f"is more than the noise of {seeds} seeds ({noise:.3f}): take "
            "them, and confirm them with more seeds."
        )
    else:
        text = (
            f"The settings found differ from the default by {gain:+.3f}, "
            f"within the noise of {seeds} seeds ({noise:.3f}): keep "
            "`RenormScheduler()`."
        )
    return text + (
        f" Most is lost by a wrong {order[0]} (up to {worst[order[0]]:.3f}), "
        f"then {order[1]} ({worst[order[1]]:.3f}); least by {order[-1]} "
        f"({worst[order[-1]]:.3f})."
    )


def write(path, study, accuracies, sensitivity, others):
    """All figures as JSON."""
    pruned = study.get_trials(states=[PRUNED])
    results = {
        **others,
        "trials": len(study.trials),
        "pruned": len(pruned),
        "accuracies": {
            name: values.tolist() for name, values in accuracies.items()
        },
        "sensitivity": [
            {"setting": name, "value": value, "accuracies": values.tolist()}
            for name, value, values in sensitivity
        ],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def draw(path, study, sensitivity, importances, reference):
    """The search, importances, and what one change does."""
    picture = lesson.figure(13, 4.4)
    search, shares, changes = picture.subplots(1, 3, width_ratios=(1.2, 1, 1.2))
    for state, style, label in (
        (COMPLETE, "o", "complete"),
        (PRUNED, "x", "given up"),
    ):
        trials = study.get_trials(states=[state])
        last = [
            trial.intermediate_values[max(trial.intermediate_values)]
            for trial in trials
        ]
        numbers = [trial.number for trial in trials]
        search.plot(numbers, last, style, label=label)
    search.set(xlabel="trial", ylabel="last accuracy", title="The search")
    lesson.legend(search, ncols=2)
    shares.barh(list(importances)[::-1], list(importances.values())[::-1])
    shares.set(xlabel="share of the variance", title="Importance (fANOVA)")
    rows = [f"{name} {value:.3g}" for name, value, _ in sensitivity]
    for row, (_, _, values) in enumerate(sensitivity):
        changes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
    changes.axvline(reference.mean(), color="black", lw=0.8)
    changes.set_yticks(range(len(rows)), rows)
    changes.invert_yaxis()
    changes.set(xlabel="accuracy", title="One change to the best (line)")
    lesson.save(picture, path)
