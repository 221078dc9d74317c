# %% [markdown]
# # Quickstart: minibatches that are not random draws
#
# Batch normalization was made for minibatches drawn at random from all of the
# data. What if each holds **one class**, as it does where a minibatch is one
# patient, one user or one scene? We train a small convnet on scikit-learn's
# digits (1,797 real images of 8x8 pixels) in such minibatches, with Keras's
# `BatchNormalization` and with `BatchRenormalization`. Minibatches drawn at
# random are the reference.
#
# Takes about a minute on two CPU cores (nine trainings). Needs
# `pip install ".[tutorials]"`. As a script:
# `python 01_quickstart.py --seeds 3 --output my_folder`.

# %%
import argparse
import math
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_renorm
from keras_renorm.diagnostics import discrepancy

EPOCHS, BATCH_SIZE, STEPS = 15, 16, 1_500
parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
parser.add_argument("--steps", type=int, default=STEPS, help="of a training")
parser.add_argument("--output", type=Path, default="output/01_quickstart")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
args.output.mkdir(parents=True, exist_ok=True)
epoch_steps = args.steps // EPOCHS

# %%
x, y = load_digits(return_X_y=True)
x_train, x_val, y_train, y_val = train_test_split(
    x.reshape(-1, 8, 8, 1) / 16, y, test_size=450, stratify=y, random_state=0
)


def one_class_batches(rng):  # rows of the training data, (steps, batch)
    classes = rng.integers(10, size=epoch_steps * EPOCHS)
    rows = [np.flatnonzero(y_train == each) for each in range(10)]
    return np.stack([rng.choice(rows[each], BATCH_SIZE) for each in classes])


def random_batches(rng):
    return rng.integers(len(x_train), size=(epoch_steps * EPOCHS, BATCH_SIZE))


# %% [markdown]
# ## Training
#
# The layer that normalizes is all that differs. `BatchRenormalization` takes
# the same place and needs no settings: it measures how far its minibatches are
# from random ones, and corrects its outputs and its gradients that far.


# %%
def train(normalization, draw_batches, seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(x_train.shape[1:])], name="digits")
    for number, filters in enumerate((32, 64), start=1):
        model.add(layers.Conv2D(filters, 3, use_bias=False))
        model.add(normalization(name=f"norm{number}"))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10, activation="softmax"))
    model.compile(
        keras.optimizers.Adam(3e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Steps this small cost less than going back to Python after each.
        steps_per_execution=math.gcd(50, epoch_steps),
    )
    rows = draw_batches(np.random.default_rng(seed))
    model.fit(
        tf.data.Dataset.from_tensor_slices((x_train[rows], y_train[rows])),
        epochs=EPOCHS,
        steps_per_epoch=epoch_steps,
        validation_data=(x_val, y_val),
        validation_batch_size=450,
        shuffle=False,  # the batches are drawn already
        verbose=0,
    )
    return model


BN, RENORM = layers.BatchNormalization, keras_renorm.BatchRenormalization
RUNS = {
    "BatchNormalization, one class": (BN, one_class_batches),
    "BatchRenormalization, one class": (RENORM, one_class_batches),
    "BatchNormalization, random": (BN, random_batches),
}
models, curves = {}, {}
print(f"Validation accuracy after {epoch_steps * EPOCHS:,} steps, by seed:")
for name, run in RUNS.items():
    models[name] = [train(*run, seed) for seed in range(args.seeds)]
    histories = [model.history.history for model in models[name]]
    curves[name] = np.array([each["val_accuracy"] for each in histories])
    print(f"{name:32}", *(f"{each:.3f}" for each in curves[name][:, -1]))

# %% [markdown]
# ## Why batch normalization fails here
#
# In **training** it normalizes by the mean and the deviation of the minibatch:
# in one of threes, by those of threes. In **inference** it uses moving averages
# over all classes: another function of the same weights, one that nobody
# trained. `discrepancy` runs the network in both modes and says so.

# %%
rows = one_class_batches(np.random.default_rng(0))[:100].ravel()
broken, renormalized, _ = (of_seeds[0] for of_seeds in models.values())
for model in (broken, renormalized):
    batches = x_train[rows], y_train[rows]
    print(discrepancy(model, batches, batch_size=BATCH_SIZE, verbose=False))
    print()
norms = [each for each in renormalized.layers if isinstance(each, RENORM)]
for norm in norms:
    print(f"{norm.name} corrects {norm.current_correction():.2f} (from 0 to 1)")

# %% [markdown]
# ## What renormalization changes
#
#     r = batch stddev / moving stddev
#     d = (batch mean - moving mean) / moving stddev
#     y = (x - batch mean) / batch stddev * r + d
#
# So the minibatch cancels and `y` is the output of inference: training sees
# what is served. `r` and `d` wait until the moving averages know the data. Most
# of what the gradient of normalization subtracts for one minibatch is replaced
# by what earlier ones had in common. With random minibatches of many examples
# the layer corrects nothing: it is batch normalization.

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="tight")
for name, color in zip(RUNS, ("#d55e00", "#0072b2", "#767676"), strict=True):
    steps = epoch_steps * np.arange(1, EPOCHS + 1)
    axes.plot(steps, curves[name].T, color=color)
    axes.plot([], [], color=color, label=name)
axes.set(xlabel="training step", ylabel="validation accuracy", ylim=(0, 1.02))
axes.set_title("A line for each seed")
axes.legend()
figure.savefig(args.output / "quickstart.png", dpi=100)

# %% [markdown]
# ## Save, and take it out again
#
# A `.keras` file holds what the layers have measured too. `revert` puts Keras's
# own layers back, with the same outputs: that file needs no `keras_renorm`.

# %%
renormalized.save(args.output / "renormalized.keras")
loaded = keras.models.load_model(args.output / "renormalized.keras")
predictions = renormalized.predict(x_val, verbose=0)
np.testing.assert_array_equal(loaded.predict(x_val, verbose=0), predictions)

plain = keras_renorm.revert(renormalized)
plain.save(args.output / "plain.keras")
outputs = plain.predict(x_val, verbose=0)
np.testing.assert_allclose(outputs, predictions, rtol=0, atol=1e-5)

# %% [markdown]
# Our claims, for a run of full length. Such batches are not a good idea: if you
# can shuffle, shuffle.

# %%
if args.steps >= STEPS:
    batch, renorm, reference = (each[:, -1] for each in curves.values())
    assert np.all(renorm > 0.9)
    assert np.all(renorm - batch > 0.15)
    assert np.all(reference > 0.95)
    print("All claims hold")

# %% [markdown]
# What to try next: renormalization with random minibatches; `BATCH_SIZE = 2`;
# Algorithm 1 of the paper, `BatchRenormalization(gradient_momentum=None)`.
