# %% [markdown]
# # Quickstart: minibatches that are not i.i.d.
#
# Batch normalization was made for minibatches drawn at random from all of the
# data. What if each holds **one class**, and what does renormalization change?
# We train a small convnet on scikit-learn's digits (1,797 real images of 8x8
# pixels), with both; i.i.d. minibatches are the reference.
#
# Takes a minute and a half on two CPU cores (nine trainings). Needs
# `pip install keras-renorm[tutorials]`; `--data mnist` downloads MNIST.
# As a script: `python 01_quickstart.py --seeds 3 --output my_folder`.

# %%
import lesson

EPOCHS, BATCH_SIZE = 15, 16
args = lesson.options("01_quickstart", data=lesson.DATA, seeds=3, steps=2_100)

# %%
import keras
import numpy as np
from keras import layers

from keras_renorm import BatchRenormalization

x_train, y_train, x_val, y_val = lesson.train_and_validation(args.data)
total_steps = args.steps // EPOCHS * EPOCHS


def one_class_batches(rng):  # rows of the training data, (steps, batch)
    return lesson.one_class_rows(rng, y_train, total_steps, BATCH_SIZE)


def iid_batches(rng):
    return rng.integers(len(x_train), size=(total_steps, BATCH_SIZE))


# %% [markdown]
# ## Training
#
# Which layer normalizes is all that differs: renormalization is a drop-in. The
# run is short, so the moving averages must follow soon: `momentum=0.95`.
#
# Renormalization corrects its outputs, and its gradients, as far as it measures
# that the minibatches need it; there is nothing to set. `corrections` only
# writes down how far that is. (`lesson.fit` is `compile`, with SGD, and `fit`.)


# %%
def train(normalization, callbacks, draw_batches, seed):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input(x_train.shape[1:])]
    for filters, strides in ((16, 1), (32, 1), (64, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            normalization(momentum=0.95),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential(stack)
    rows = draw_batches(np.random.default_rng(seed))
    batches, validation = (x_train[rows], y_train[rows]), (x_val, y_val)
    lesson.fit(model, batches, total_steps, 0.04, EPOCHS, validation, callbacks)
    return model


RENORM, BN = BatchRenormalization, layers.BatchNormalization
RUNS = {
    "BN, one class": (BN, [], one_class_batches),
    "Renorm, one class": (RENORM, [lesson.corrections()], one_class_batches),
    "BN, i.i.d.": (BN, [], iid_batches),
}
models = lesson.of_all_seeds(RUNS, args.seeds, train)
curves = lesson.histories(models, "val_accuracy")
accuracies = {name: curves[name][:, -1] for name in RUNS}
lesson.table_of_seeds(f"Accuracy after {total_steps:,} steps", accuracies)

# %% [markdown]
# ## Why batch normalization fails here
#
# In **training** it normalizes by the mean and the deviation of the minibatch:
# in one of threes, by those of threes. What comes out for an image depends on
# the 15 others of its class. In **inference** it uses moving averages over all
# classes: another function of the same weights, one that nobody trained. We can
# see it: the same network in both modes, for images of one class at a time.

# %%
of_one_class = {name: models[name] for name in list(RUNS)[:2]}
lesson.tables_by_mode(of_one_class, x_val, y_val, BATCH_SIZE)

# %% [markdown]
# ## What renormalization changes
#
#     r = batch stddev / moving stddev
#     d = (batch mean - moving mean) / moving stddev
#     y = (x - batch mean) / batch stddev * r + d
#
# So the minibatch cancels and `y` is the output of inference: training sees
# what is served. `r` and `d` wait until the moving averages know the data, and
# count as constants; and most of what the gradient of normalization takes out
# of one minibatch is replaced by what earlier ones had in common. With i.i.d.
# minibatches of many examples the correction would be 0: batch normalization.

# %%
renormalized = models["Renorm, one class"][0]
lesson.draw_runs(
    args.output / "quickstart.png",
    {
        "one class": x_train[one_class_batches(np.random.default_rng(0))[0]],
        "i.i.d.": x_train[iid_batches(np.random.default_rng(0))[0]],
    },
    curves,
    renormalized.history.history,  # how far each layer corrects as well
    total_steps,
)

# %% [markdown]
# ## Save, load, serve
#
# A `.keras` file holds what the layers have measured too. A SavedModel needs
# neither `keras_renorm` nor Keras: a fresh Python process serves it.

# %%
renormalized.save(args.output / "renormalized.keras")
loaded = keras.models.load_model(args.output / "renormalized.keras")
norm, loaded_norm = renormalized.layers[1], loaded.layers[1]
assert loaded_norm.current_correction() == norm.current_correction()
predictions = renormalized.predict(x_val, verbose=0)
np.testing.assert_array_equal(loaded.predict(x_val, verbose=0), predictions)

loaded.export(args.output / "saved_model", verbose=False)
served = lesson.predict_elsewhere(args.output / "saved_model", x_val)
np.testing.assert_allclose(served, predictions, rtol=1e-4, atol=1e-4)

# %% [markdown]
# What we claim of the digits and a run of full length. Not that such batches
# are a good idea: with i.i.d. ones of, say, 32, batch normalization is fine.

# %%
if args.is_whole:
    assert np.all(accuracies["Renorm, one class"] > 0.94)
    gain = accuracies["Renorm, one class"] - accuracies["BN, one class"]
    assert np.all(gain > 0.15)
    assert np.all(accuracies["BN, i.i.d."] > 0.98)
    lesson.say("All claims hold")

# %% [markdown]
# What to try next: renormalization with i.i.d. minibatches; `BATCH_SIZE = 2`;
# Algorithm 1 of the paper, `BatchRenormalization(gradient_momentum=None)`.
