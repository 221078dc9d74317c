# %% [markdown]
# # Fine-tuning: which recipe freezes what?
#
# A pretrained network has moving statistics that were gathered over a lot of
# data. Fine-tuned in minibatches of two, they are worth keeping. A convnet
# learns the digits 0 to 4, and is then fine-tuned to tell 5 to 9 from 20 images
# each, by four recipes:
#
# 1. **everything trained**: nothing is frozen;
# 2. **`base(x, training=False)`**, the recipe of many tutorials;
# 3. **`trainable = False`** on each normalization layer, gamma and beta too;
# 4. **`freeze_statistics`**: gamma and beta train, the statistics stay.
#
# Each twice: with shuffled minibatches, and with minibatches of one class.
# Takes about a minute and a half on two CPU cores (48 fine-tunings). Needs `pip
# install ".[tutorials]"`. As a script: `python 04_fine_tuning.py
# --seeds 3 --output my_folder`.

# %%
import lesson

CLASSES, BATCH_SIZE, EXAMPLES_PER_CLASS = 5, 2, 20
RATES = (0.003, 0.01)
args = lesson.options(
    "04_fine_tuning",
    data=("digits", "cats_vs_dogs", "stanford_dogs"),
    weights=("imagenet", "none"),
    seeds=3,
    steps=500,
    notes={"weights": "of MobileNetV2, for photographs"},
)

# %%
import itertools

import keras
import numpy as np
from keras import layers

import keras_renorm

# %% [markdown]
# `--data cats_vs_dogs` and `--data stanford_dogs` download photographs (of the
# 120 breeds we take five) and MobileNetV2; that takes a GPU or patience.

# %%
if args.data == "digits":
    x, y = lesson.load()
    x_old, y_old = x[y < CLASSES], y[y < CLASSES]
    x_new, y_new = x[y >= CLASSES], y[y >= CLASSES] - CLASSES
else:
    x_new, y_new = lesson.photographs(args.data, CLASSES)


def with_head(base, **call_arguments):
    inputs = keras.Input(base.input_shape[1:])
    features = base(inputs, **call_arguments)
    return keras.Model(inputs, layers.Dense(CLASSES)(features))


def pretrained(seed):  # with Keras's own layers
    if args.data != "digits":
        weights = None if args.weights == "none" else "imagenet"
        shape, kind = x_new.shape[1:], keras.applications.MobileNetV2
        return kind(
            input_shape=shape, include_top=False, pooling="avg", weights=weights
        )
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 1))]
    for filters, strides in ((16, 1), (32, 1), (64, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    base = keras.Sequential([*stack, layers.GlobalAveragePooling2D()])
    batches = lesson.shuffled(x_old, y_old, seed)
    lesson.fit(with_head(base), batches, 350, 0.05)
    return base


# %% [markdown]
# For each seed 20 images of each class are drawn to learn from.


# %%
def one_class_batches(rng, rows_of_class):  # rows: (steps, batch)
    return lesson.passes(rng, rows_of_class, BATCH_SIZE, args.steps)


def shuffled_batches(rng, rows_of_class):
    rows = [np.concatenate(rows_of_class)]
    return lesson.passes(rng, rows, BATCH_SIZE, args.steps)


# %% [markdown]
# ## Four recipes
#
# Each takes the pretrained network and gives a model to train. The last is two
# lines of keras_renorm: `convert` puts our layers in the place of Keras's (same
# outputs, same weights), and `freeze_statistics` keeps their statistics.


# %%
def copy_of(base):
    copy = keras.models.clone_model(base)
    copy.set_weights(base.get_weights())
    return copy


def train_everything(base, **call_arguments):
    base = copy_of(base)
    return base, with_head(base, **call_arguments)


def call_in_inference_mode(base):
    return train_everything(base, training=False)


def freeze_layers(base):
    base, model = train_everything(base)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = False
    return base, model


def freeze_statistics(base):
    base = keras_renorm.convert(base, to=keras_renorm.BatchNormalization)
    keras_renorm.freeze_statistics(base)
    return base, with_head(base)


RECIPES = {
    "everything trained": train_everything,
    "base(x, training=False)": call_in_inference_mode,
    "trainable = False": freeze_layers,
    "freeze_statistics": freeze_statistics,
}
ORDERS = {"shuffled": shuffled_batches, "one class": one_class_batches}

# %% [markdown]
# Each recipe is shown with the better of two learning rates. `lesson.moved` is
# how far means moved, in the standard deviations that they had, and gamma.

# %%
# By order, recipe, rate: accuracy, and what moved, of each seed.
results = {key: [] for key in itertools.product(ORDERS, RECIPES, RATES)}
for seed in lesson.track(range(args.seeds)):
    base = pretrained(seed)
    rows_of_class, validation = lesson.few_of_each_class(
        np.random.default_rng(seed), y_new, EXAMPLES_PER_CLASS
    )
    for order, recipe, rate in results:
        rows = ORDERS[order](np.random.default_rng(seed), rows_of_class)
        keras.utils.set_random_seed(seed)  # the same head for all
        tuned, model = RECIPES[recipe](base)
        before = lesson.state_of(tuned)
        batches = x_new[rows], y_new[rows]
        lesson.fit(model, batches, args.steps, rate)
        _, accuracy = model.evaluate(
            x_new[validation], y_new[validation], batch_size=256, verbose=0
        )
        found = accuracy, *lesson.moved(before, lesson.state_of(tuned))
        results[order, recipe, rate].append(found)
results = {key: np.array(values) for key, values in results.items()}


def best(order, recipe):
    """The better rate of a recipe, and its results: a row for each seed."""
    found = {rate: results[order, recipe, rate] for rate in RATES}
    rate = max(found, key=lambda rate: found[rate][:, 0].mean())
    return rate, found[rate]


for order in ORDERS:
    found = {recipe: best(order, recipe) for recipe in RECIPES}
    lesson.table(
        f"Minibatches of {BATCH_SIZE}, {order}; the largest that moved",
        ("recipe", "rate", "accuracy", "means, in stddev", "gamma"),
        [
            (
                recipe,
                rate,
                lesson.numbers(of[:, 0]),
                *of[:, 1:].max(axis=0).round(2),
            )
            for recipe, (rate, of) in found.items()
        ],
    )

# %% [markdown]
# Two recipes kept the statistics. `base(x, training=False)` is not one of them:
# Keras 3 hands the `training` flag of `fit` on to the layers inside (Keras
# 3.15.1; look at "means" for yours). `trainable = False` did not train gamma.
#
# With **shuffled** minibatches freezing costs some points. With those of **one
# class**, what is not frozen normalizes each image by another of its class: a
# network that is not served.

# %%
of_one_class = {recipe: best("one class", recipe)[1] for recipe in RECIPES}
of_shuffled = {recipe: best("shuffled", recipe)[1] for recipe in RECIPES}
lesson.draw_recipes(args.output / "fine_tuning.png", of_shuffled, of_one_class)

# %% [markdown]
# ## Saved and loaded
#
# The flag is saved with the layer; `unfreeze_statistics` takes it away.

# %%
path = args.output / "fine_tuned.keras"
_, model = freeze_statistics(base)
model.save(path)
loaded = keras.saving.load_model(path)
(base_of_loaded,) = [
    layer for layer in loaded.layers if isinstance(layer, keras.Model)
]
before = lesson.state_of(base_of_loaded)
lesson.fit(loaded, batches, min(20, args.steps), 0.01)
means_moved, gamma_moved = lesson.moved(before, lesson.state_of(base_of_loaded))
assert means_moved == 0 < gamma_moved
np.testing.assert_allclose(
    keras_renorm.revert(loaded).predict(x_new[:64], verbose=0),
    loaded.predict(x_new[:64], verbose=0),
    rtol=1e-4,
    atol=1e-4,
)

# %%
for (order, recipe, _), values in results.items():
    if recipe in ("trainable = False", "freeze_statistics"):
        assert np.all(values[:, 1] == 0), recipe  # at every rate
    _, mean_moved, gamma_moved = best(order, recipe)[1].T
    if recipe == "everything trained":
        assert np.all(mean_moved > 0)
    assert np.all((gamma_moved > 0) == (recipe != "trainable = False"))
if args.is_whole:
    frozen = of_one_class["freeze_statistics"][:, 0]
    assert np.all(frozen > 0.85)
    assert np.all(frozen > of_one_class["everything trained"][:, 0] + 0.1)
    # Where minibatches are shuffled, no recipe is far ahead.
    means = [values[:, 0].mean() for values in of_shuffled.values()]
    assert max(means) - min(means) < 0.1
    lesson.say("All claims hold")

# %% [markdown]
# What to try next: `BATCH_SIZE = 8`; `convert(base)` without freezing.
