# %% [markdown]
# # A network from elsewhere: train it in small minibatches, give it back
#
# A colleague's network has Keras's own batch normalization. It must learn new
# classes from a stream that brings four images at a time, all of one class. And
# what you hand back must be a plain Keras network, which loads and serves where
# keras_renorm is not installed.
#
# 1. `convert` puts renormalization in the place of each normalization layer;
# 2. train it on the stream;
# 3. `revert` gives Keras's layers back, with the same outputs;
# 4. `fold` takes them out altogether, for serving;
# 5. export all three for TensorFlow (SavedModel), LiteRT and ONNX, and run each
#    in its own runtime.
#
# Takes about a minute on two CPU cores. Needs
# `pip install ".[tutorials,export]"` (without `export`, the runtimes
# of LiteRT and ONNX are left out).
# As a script: `python 06_small_batches_and_export.py --output my_folder`.

# %%
import lesson

CLASSES, BATCH_SIZE = 5, 4
args = lesson.options(
    "06_small_batches_and_export", data=lesson.DATA, seeds=3, steps=800
)

# %%
import warnings

import keras
import numpy as np
from keras import layers

import keras_renorm

# %% [markdown]
# ## The data
#
# The network knows the digits 0 to 4. The stream brings 5 to 9. Half of those
# are kept for validation. `--data mnist` downloads MNIST instead.

# %%
x, y = lesson.load(args.data)
x_old, y_old = x[y < CLASSES], y[y < CLASSES]
x_new, y_new = x[y >= CLASSES], y[y >= CLASSES] - CLASSES


def one_class_batches(rng, labels):  # rows of the data, (steps, batch)
    return lesson.one_class_rows(rng, labels, args.steps, BATCH_SIZE)


def iid_batches(rng, labels):
    return rng.integers(len(labels), size=(args.steps, BATCH_SIZE))


# %% [markdown]
# ## The colleague's network
#
# Nothing of ours in it.


# %%
def pretrained(seed):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input(x.shape[1:])]
    for filters, strides in ((16, 1), (32, 1), (64, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            layers.BatchNormalization(momentum=0.95),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)]
    model = keras.Sequential(stack)
    batches = lesson.shuffled(x_old, y_old, seed)
    lesson.fit(model, batches, min(350, args.steps), 0.05)
    return model


# %% [markdown]
# ## Convert
#
# The copy has the same weights and gives the same outputs. Its moving averages
# are those of a trained network, so there is nothing to wait for: the limits
# are open from the first step (from scratch they would begin closed, which is
# what `RenormScheduler` does).


# %%
def as_it_is(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def converted(model):
    return keras_renorm.convert(model, r_max=3.0, d_max=5.0)


model = pretrained(0)
np.testing.assert_allclose(
    converted(model).predict(x_new, verbose=0),
    model.predict(x_new, verbose=0),
    rtol=1e-4,
    atol=1e-4,
)

# %% [markdown]
# ## Train

# %%
RUNS = {
    "Keras's layers, one class": (as_it_is, one_class_batches),
    "converted, one class": (converted, one_class_batches),
    "Keras's layers, shuffled": (as_it_is, iid_batches),
}
accuracies = {name: [] for name in RUNS}
models = {}
for seed in lesson.track(range(args.seeds)):
    rows = np.random.default_rng(seed).permutation(len(x_new))
    train, validation = np.array_split(rows, 2)
    base = pretrained(seed)
    for name, (prepare, draw_batches) in RUNS.items():
        keras.utils.set_random_seed(seed)
        model = prepare(base)
        model.layers[-1].kernel.assign(  # the head learns other classes
            keras.random.normal(model.layers[-1].kernel.shape, stddev=0.1)
        )
        rng = np.random.default_rng(seed)
        drawn = train[draw_batches(rng, y_new[train])]
        lesson.fit(model, (x_new[drawn], y_new[drawn]), args.steps, 0.02)
        _, accuracy = model.evaluate(
            x_new[validation], y_new[validation], batch_size=512, verbose=0
        )
        accuracies[name].append(accuracy)
        models[name] = model
lesson.table_of_seeds(f"{args.steps} minibatches of {BATCH_SIZE}", accuracies)

# %% [markdown]
# ## Give it back
#
# `revert` is the way back: Keras's layers with the weights that were trained.
# `fold` goes further and multiplies them into the convolutions before them;
# what is left is a network without normalization, for inference only. It warns
# of what it could not fold: here, nothing.

# %%
tuned = models["converted, one class"]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    folded = keras_renorm.fold(tuned)
networks = {
    "converted": tuned,
    "reverted": keras_renorm.revert(tuned),
    "folded": folded,
}
assert not any(
    isinstance(layer, layers.BatchNormalization) for layer in folded.layers
)

# %% [markdown]
# The reverted network is saved, and a process that never imports keras_renorm
# loads it and predicts.

# %%
images = x_new[:64]
expected = tuned.predict(images, verbose=0)
largest = np.abs(expected).max()
networks["reverted"].save(args.output / "plain.keras")
elsewhere = lesson.predict_elsewhere(args.output / "plain.keras", images)
assert np.abs(elsewhere - expected).max() < 1e-5 * largest

# %% [markdown]
# ## Export
#
# Each form for each runtime, run there, and compared with what the network
# predicts in Keras. (Keras exports to ONNX only what was called once.)

# %%
differences = {}
for runtime, (suffix, run) in lesson.runtimes().items():
    for name, network in networks.items():
        network(images)
        path = str(args.output / f"{name}_{runtime}{suffix}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the converters' own
            network.export(path, format=runtime, verbose=False)
            outputs = run(path, images)
        difference = np.abs(outputs - expected).max() / largest
        differences[runtime, name] = difference
runtimes = list(dict.fromkeys(runtime for runtime, _ in differences))
lesson.table(
    "Largest difference to the trained network, of its largest output",
    ("runtime", *networks),
    [
        (runtime, *(f"{differences[runtime, name]:.1e}" for name in networks))
        for runtime in runtimes
    ],
)

# %% [markdown]
# ## The picture

# %%
COLORS = lesson.ORANGE, lesson.BLUE, lesson.GREY
picture = lesson.figure(11, 4)
left, right = picture.subplots(1, 2)
lesson.bars(left, accuracies, dict(zip(RUNS, COLORS, strict=True)))
left.axvline(1 / CLASSES, color="black", lw=0.8, ls=":")
left.set(title="A dot for each seed", xlabel="accuracy", xlim=(0, 1.02))
relative = {
    runtime: {name: [differences[runtime, name] * 1e7] for name in networks}
    for runtime in runtimes
}
lesson.groups(right, relative, (lesson.BLUE, lesson.GREEN, lesson.PINK))
right.set(title="Exported, less the trained", ylabel="largest, in 0.0000001")
lesson.legend(right, ncols=3)
lesson.save(picture, args.output / "small_batches_and_export.png")

# %% [markdown]
# ## What we claim of the digits and runs of full length

# %%
assert all(difference < 1e-5 for difference in differences.values())
if args.is_whole:
    plain, renormalized, shuffled = map(np.array, accuracies.values())
    assert np.all(renormalized > 0.92)
    assert np.all(renormalized > plain + 0.05)
    assert np.all(shuffled > 0.95)  # where you can shuffle, do
    lesson.say("All claims hold")

# %% [markdown]
# ## What to try next
#
# - `r_max=1.0, d_max=0.0` in `converted` is plain batch normalization: the
#   numbers of the first row.
# - `keras_renorm.recalibrate(model, x_new[train])` on the first row's network:
#   how much of it were the statistics?
# - `BATCH_SIZE = 2`, and 16.
# - A network of `keras.applications` in the place of `convnet`.
