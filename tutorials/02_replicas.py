# %% [markdown]
# # Replicas: whose statistics are saved?
#
# `tf.distribute` trains one model on several devices: each replica takes its
# share of a minibatch. What of batch normalization? Each replica normalizes
# its own examples, and keeps moving statistics of its own. If the replicas
# see different data, say because each reads its own files, these drift apart,
# and no one notices, since one of them is saved and the others are dropped.
#
# We train a small convnet on scikit-learn's digits (1,797 real images of 8x8
# pixels) on two logical CPU devices. The first replica reads the files of one
# scanner, the second those of another, whose images are brighter and paler:
# with Keras's `BatchNormalization`; with keras_renorm's, whose statistics are
# averaged when read; with `synchronized=True`, so that replicas share the
# statistics of each minibatch; and with the whole minibatch on one device.
#
# Takes less than a minute on two CPU cores. Needs
# `pip install ".[tutorials]"`.
# As a script: `python 02_replicas.py --seeds 3 --output my_folder`.

# %%
import lesson

BATCH_SIZE = 32  # of both replicas together
STEPS_PER_EPOCH = 40
args = lesson.options("02_replicas", seeds=2, epochs=12)

# %%
from contextlib import nullcontext

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_renorm

# %% [markdown]
# ## Two devices from one processor
#
# Logical devices must be made before all else. Two GPUs need no such cell.

# %%
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

# %% [markdown]
# ## The data
#
# A strategy cuts each minibatch into contiguous parts: the first half of ours
# comes from the first scanner, the second half from the second. We want one
# model for both, so validation images come from both as well.

# %%
x_train, y_train, x_val, y_val = lesson.train_and_validation()


def second_scanner(x):  # brighter, with less contrast
    return 0.4 + 0.6 * x


x_val = np.concatenate([x_val, second_scanner(x_val)])
y_val = np.concatenate([y_val, y_val])


def batches(seed):  # half from each scanner
    rng = np.random.default_rng(seed)
    shape = (2, args.epochs * STEPS_PER_EPOCH, BATCH_SIZE // 2)
    first, second = rng.integers(len(x_train), size=shape)
    x = np.concatenate([x_train[first], second_scanner(x_train[second])], 1)
    y = np.concatenate([y_train[first], y_train[second]], 1)
    return tf.data.Dataset.from_tensor_slices((x, y))


# %% [markdown]
# ## Training, with an eye on each replica
#
# `strategy.experimental_local_results` shows what a variable holds on each
# replica: we note the moving mean of the second normalization after each epoch.


# %%
def make_model(normalization, **arguments):
    stack = [keras.Input((8, 8, 1))]
    for filters, strides in ((16, 1), (32, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            normalization(momentum=0.9, **arguments),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential(stack)


class WatchReplicas(keras.callbacks.Callback):
    """The second layer's moving mean on each replica, epoch by epoch."""

    def on_train_begin(self, logs=None):
        self.means = []

    def on_epoch_end(self, epoch, logs=None):
        variable = self.model.layers[4].moving_mean.value
        copies = strategy.experimental_local_results(variable)
        self.means.append([copy.numpy() for copy in copies])


def train(scope, normalization, arguments, seed):
    """A trained model, and what its replicas' moving means were."""
    keras.utils.set_random_seed(seed)
    with scope():
        model = make_model(normalization, **arguments)
        steps = args.epochs * STEPS_PER_EPOCH
        decay = keras.optimizers.schedules.CosineDecay(0.02, steps)
        model.compile(
            keras.optimizers.SGD(decay, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    watch = WatchReplicas()
    model.fit(
        batches(seed),
        epochs=args.epochs,
        steps_per_epoch=STEPS_PER_EPOCH,
        shuffle=False,
        callbacks=[watch],
        verbose=0,
    )
    return model, np.array(watch.means)


OURS = keras_renorm.BatchNormalization
KINDS = {
    "Keras": (strategy.scope, layers.BatchNormalization, {}),
    "keras_renorm": (strategy.scope, OURS, {}),
    "synchronized": (strategy.scope, OURS, {"synchronized": True}),
    "one device": (nullcontext, OURS, {}),
}
trained = lesson.of_all_seeds(KINDS, args.seeds, train)
models = {name: [model for model, _ in trained[name]] for name in KINDS}
means = {
    name: np.array([found for _, found in trained[name]]) for name in KINDS
}

# %% [markdown]
# ## One image, two predictions
#
# Under a strategy, `predict` shares the images out to the replicas. Does it
# matter which replica an image lands on? We give both the same images.


# %%
def disagreement(model):  # the largest difference of a probability
    twice = np.concatenate([x_val, x_val])
    logits = model.predict(twice, batch_size=len(twice), verbose=0)
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    first, second = np.split(probabilities, 2)
    return np.abs(first - second).max()


differences = {name: list(map(disagreement, models[name])) for name in KINDS}

# %% [markdown]
# ## What is saved
#
# Each model is saved, and loaded without a strategy, as a server would.


# %%
def served_accuracy(model):
    path = args.output / "served.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    logits = loaded.predict(x_val, batch_size=900, verbose=0)
    return np.mean(logits.argmax(axis=-1) == y_val)


accuracies = {
    name: np.array(list(map(served_accuracy, models[name]))) for name in KINDS
}
drifts = {  # (seeds, epochs)
    name: np.ptp(found, axis=2).mean(axis=-1) for name, found in means.items()
}
lesson.table_of_columns(
    "Two replicas, a value for each seed",
    {
        "distance of moving means": {n: drifts[n][:, -1] for n in KINDS},
        "predictions differ by": differences,
        "accuracy as served": accuracies,
    },
)

# %% [markdown]
# What to read there:
#
# - With **Keras**'s layer the replicas hold different statistics: a prediction
#   depends on the device that an image is sent to. Saved is what the first
#   replica holds, which never saw the second scanner.
# - **keras_renorm** averages the replicas' statistics wherever they are read:
#   now there is one model. It is no better here: each replica still trains on
#   minibatches of one scanner, normalized by themselves, and the mean of the
#   variances lacks the variance between the scanners.
# - **synchronized** pools each minibatch over the replicas: number for number
#   what one device does with the whole minibatch. It costs one all-reduce of
#   `2 * channels + 1` numbers a layer forward, and one of `2 * channels` back.

# %%
picture = lesson.figure(13, 4)
panels = picture.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
epochs = np.arange(1, args.epochs + 1)
# The channel whose two moving means end furthest apart in Keras's layer.
channel = np.ptp(means["Keras"][0], axis=1)[-1].argmax()
for axes, name in zip(panels, list(KINDS)[:3], strict=False):
    first, second = means[name][0, ..., channel].T
    axes.plot(epochs, first, color=lesson.BLUE, lw=4, label="replica 0")
    axes.plot(epochs, second, color=lesson.ORANGE, lw=2, label="replica 1")
    alone = means["one device"][0, :, 0, channel]
    axes.plot(epochs, alone, color="black", ls=":", label="one device")
    axes.set(title=name, xlabel="epoch")
    axes.sharey(panels[0])
panels[0].set_ylabel("moving mean of one channel")
lesson.legend_of_all(panels[0])
lesson.bars(panels[3], accuracies, dict.fromkeys(KINDS, lesson.GREY))
panels[3].set(title="As served", xlabel="accuracy", xlim=(0, 1))
lesson.save(picture, args.output / "replicas.png")

# %% [markdown]
# ## What we claim
#
# What a single step does, the same to rounding, the library's tests hold.

# %%
assert min(differences["Keras"]) > 0.1
for name in ("keras_renorm", "synchronized"):
    assert max(differences[name]) < 1e-5
assert np.all(drifts["synchronized"] == 0)  # to the last bit
assert np.all(drifts["keras_renorm"][:, -1] > 0.02)
if args.is_whole:
    best = accuracies["one device"]
    assert np.all(best > 0.9)
    assert np.all(np.abs(accuracies["synchronized"] - best) < 0.04)
    for name in ("Keras", "keras_renorm"):
        assert np.all(accuracies[name] < best - 0.15)
    lesson.say("All claims hold")

# %% [markdown]
# What to try next: replicas that see the same kind of data (let
# `second_scanner` return its input); `BatchRenormalization`, synchronized and
# not; `03_multi_worker.py`, the same with two processes, or two machines.
