# %% [markdown]
# # Why does it evaluate badly?
#
# The loss went down in training, and the network serves nonsense. Batch
# normalization normalizes by the minibatch in training, and by moving averages
# when it serves. If the two differ, the network that was trained is not the one
# that is served. We break one network in five ways, let
# `keras_renorm.diagnostics.discrepancy` say what is wrong, do what it says, and
# look at the accuracy again. A sixth training has nothing wrong.
#
# Takes a minute and a quarter on two CPU cores (two seeds). Needs
# `pip install ".[tutorials]"`. As a script:
# `python 07_why_does_it_evaluate_badly.py --seeds 3 --output my_folder`.

# %%
import lesson

args = lesson.options(
    "07_why_does_it_evaluate_badly", data=lesson.DATA, seeds=2, steps=1_000
)

# %%
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_renorm
from keras_renorm.diagnostics import Report, discrepancy

x_train, y_train, x_val, y_val = lesson.train_and_validation(args.data)


def shuffled(rng, size, steps):  # rows of the training data, (steps, size)
    return rng.integers(len(x_train), size=(steps, size))


def one_class(rng, size, steps):
    return lesson.one_class_rows(rng, y_train, steps, size)


def batches(draw, size, steps, seed):
    rows = draw(np.random.default_rng(seed), size, steps)
    return tf.data.Dataset.from_tensor_slices((x_train[rows], y_train[rows]))


# %%
def make_network(momentum, seed):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input(x_train.shape[1:])]
    for name, layer in {
        "conv1": layers.Conv2D(16, 3, 1, "same", use_bias=False),
        "conv2": layers.Conv2D(32, 3, 2, "same", use_bias=False),
        "dense1": layers.Dense(64, use_bias=False),
        "dense2": layers.Dense(64, use_bias=False),
    }.items():
        stack += [layers.Flatten()] if name == "dense1" else []
        normalize = layers.BatchNormalization(
            momentum=momentum, name=f"{name}_bn"
        )
        stack += [layer, normalize, layers.ReLU()]
    model = keras.Sequential([*stack, layers.Dense(10)])
    return lesson.compiled(model, 1)


def train(model, draw, size, steps, seed):
    steps = min(steps, args.steps)
    lesson.compiled(model, steps)
    model.fit(batches(draw, size, steps, seed), shuffle=False, verbose=0)
    return model


def accuracy(model, images=x_val):
    return model.evaluate(images, y_val, batch_size=450, verbose=0)[1]


# %% [markdown]
# ## Look, cure, look again
#
# `discrepancy` wants minibatches as training uses them. It runs them in
# training and in inference mode, and changes nothing in the model.


# %%
class Outcome(NamedTuple):
    before: float
    report: Report
    after: float
    report_after: Report


def treat(model, measure, cure, images=x_val, measure_after=None):
    before, report = accuracy(model, images), measure(model)
    cured = cure(model)
    report_after = (measure_after or measure)(cured)
    return Outcome(before, report, accuracy(cured, images), report_after)


def report_on(draw, size, steps):
    return lambda model: discrepancy(
        model, batches(draw, size, steps, seed=99), verbose=False
    )


def recalibrated(model, images=x_train):
    keras_renorm.recalibrate(model, images, batch_size=450, verbose=False)
    return model


# %% [markdown]
# ## Five cases
#
# 1. **A short run.** `momentum=0.999` goes a quarter of the way from its start
#    in 300 steps. The weights are fine; `recalibrate` computes the statistics.
# 2. **Minibatches of one class**, as data comes that was sorted. Weights are
#    those of another task; no statistics mend them: train again, shuffled, or
#    renormalize, as in the quickstart.
# 3. **Minibatches of two.** A dense layer has two numbers a channel, and
#    normalizes them to about +1 and -1, whatever they were. Take larger ones,
#    or `convert` the fresh network, and train again.
# 4. **Darker, noisy images**: a camera at night. No labels are needed.
#    `reference=` is training data, where the averages are right.
# 5. **Trainable weights only.** `model.trainable_variables` lack the moving
#    statistics, which no gradient reaches.


# %%
def trained(momentum, draw, size, steps, seed):
    return train(make_network(momentum, seed), draw, size, steps, seed)


def a_short_run(seed, healthy):
    model = trained(0.999, shuffled, 32, 300, seed)
    return treat(model, report_on(shuffled, 32, 40), recalibrated)


def one_class_a_batch(seed, healthy):
    model = trained(0.95, one_class, 16, 600, seed)
    return treat(
        model,
        report_on(one_class, 16, 40),
        lambda _: trained(0.95, shuffled, 16, 600, seed),
        measure_after=report_on(shuffled, 16, 40),  # what it is trained on
    )


def two_images_a_batch(seed, healthy):
    model = trained(0.99, shuffled, 2, 1_000, seed)

    def cure(_):
        fresh = keras_renorm.convert(make_network(0.99, seed))
        return train(fresh, shuffled, 2, 1_000, seed)

    return treat(model, report_on(shuffled, 2, 200), cure)


def at_night(images):
    noise = np.random.default_rng(0).normal(0, 0.05, images.shape)
    return (0.3 * images + noise).astype("float32")


def darker_images(seed, healthy):
    model = keras.models.clone_model(healthy)
    model.set_weights(healthy.get_weights())
    night = at_night(x_train)  # of which we use no label
    rows = np.random.default_rng(99).permutation(len(night))[:1_280]
    day = batches(shuffled, 32, 40, seed=99)
    return treat(
        lesson.compiled(model, 1),
        lambda model: discrepancy(
            model, night[rows], reference=day, verbose=False
        ),
        lambda model: recalibrated(model, night),
        images=at_night(x_val),
    )


def trainable_weights_only(seed, healthy):
    model = make_network(0.95, seed)
    for new, old in zip(
        model.trainable_variables, healthy.trainable_variables, strict=True
    ):
        new.assign(old)
    return treat(model, report_on(shuffled, 32, 40), recalibrated)


CASES = {
    "a short run": a_short_run,
    "one class a batch": one_class_a_batch,
    "two images a batch": two_images_a_batch,
    "darker, noisy images": darker_images,
    "trainable weights only": trainable_weights_only,
}
outcomes = {name: [] for name in CASES}
healthy_reports, healthy_accuracies = [], []
for seed in lesson.track(range(args.seeds)):
    healthy = trained(0.95, shuffled, 32, 300, seed)  # nothing is wrong
    healthy_accuracies.append(accuracy(healthy))
    healthy_reports.append(report_on(shuffled, 32, 40)(healthy))
    for name, run in CASES.items():
        outcomes[name].append(run(seed, healthy))

# %% [markdown]
# ## The reports
#
# `r` and `d` compare the statistics of a minibatch with the moving ones,
# `noise` is how far training is from inference because minibatches are few
# examples.

# %%
shown = outcomes["two images a batch"][0].report
lesson.say(str(shown))
lesson.save(shown.plot(), args.output / "report.png")

# %%
for name, runs in outcomes.items():
    lesson.say(f"--- {name}", *runs[0].report.verdicts, sep="\n")
lesson.say("--- nothing wrong", lesson.causes(healthy_reports), sep="\n")


# %%
results = {
    f"{name}\n{lesson.causes(run.report for run in runs)}": (
        [run.before for run in runs],
        [run.after for run in runs],
    )
    for name, runs in outcomes.items()
}
found = f"nothing wrong\n{lesson.causes(healthy_reports)}"
results[found] = healthy_accuracies, healthy_accuracies
picture = args.output / "why_does_it_evaluate_badly.png"
lesson.show_cures(results, picture)

# %% [markdown]
# ## What we claim of the digits and trainings of full length
#
# Cause and remedy are named first, the remedy helps, and no verdict is left.

# %%
if args.is_whole:
    lesson.check_cures(outcomes)
    assert not any(report.verdicts for report in healthy_reports)
    assert min(healthy_accuracies) > 0.96
    lesson.say("All claims hold")

# %% [markdown]
# What to try next: minibatches of 4 and 8; `pandas.DataFrame(shown.rows)`.
