# %% [markdown]
# # How does batch normalization help optimization?
#
# It was introduced to keep the distribution of each layer's inputs stable.
# Santurkar et al. 2018 (arXiv:1805.11604) answered that it makes the loss
# smoother instead, and Bjorck et al. 2018 (arXiv:1806.02375) that it allows
# larger learning rates. We repeat what they measured:
#
# 1. training without batch normalization, with it, and with noise behind it
#    that makes the distributions unstable again;
# 2. the loss and its gradient along the gradient, as training goes;
# 3. internal covariate shift, in the sense of Santurkar et al.;
# 4. the learning rates 0.0001, 0.003 and 0.1;
# 5. the batch size as a source of noise.
#
# By default on scikit-learn's digits (1,797 real images of 8x8 pixels) with
# seven convolutions, which takes a minute and a quarter on two CPU cores.
# `--scale full` is CIFAR-10 with VGG and ResNet-110, and wants a GPU and a day
# or more. Not all that the papers saw shows at the small scale; what does not
# is said below. Needs `pip install keras-renorm[tutorials]`.
#
# As a script: `python 08_optimization.py --seeds 3 --output my_folder`.

# %%
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from keras import layers, ops
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_renorm
from keras_renorm import diagnostics

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

# %%
parser = argparse.ArgumentParser()
parser.add_argument("--scale", choices=["small", "full"], default="small")
parser.add_argument("--seeds", type=int, default=2, help="runs of each kind")
parser.add_argument("--steps", type=int, help="of each run")
parser.add_argument("--points", type=int, help="of a run that are measured")
parser.add_argument("--batch-size", type=int)
parser.add_argument(
    "--blocks",
    type=int,
    default=18,
    help="of each stage of the full networks, at most; 18 is ResNet-110",
)
parser.add_argument(
    "--output", type=Path, default=Path("output/08_optimization")
)
# A notebook's arguments are the kernel's, not ours: edit the defaults there.
args = parser.parse_args([] if IN_NOTEBOOK else None)
FULL = args.scale == "full"
POINTS = args.points or (40 if FULL else 8)
BATCH_SIZE = args.batch_size or (128 if FULL else 32)
if min(args.seeds, POINTS, BATCH_SIZE, args.blocks) < 1:
    parser.error("need --seeds, --points, --batch-size, --blocks of 1 or more")
if args.steps is not None and args.steps < POINTS:
    parser.error(f"need --steps of {POINTS} or more")
args.output.mkdir(parents=True, exist_ok=True)
console = Console()

# %% [markdown]
# ## The data
#
# Standardized. The full scale pads CIFAR-10 by 4 pixels, crops at random, and
# mirrors half of the images, as He et al. 2016 (arXiv:1512.03385, section
# 4.2). It downloads 170 MB through tensorflow-datasets.


# %%
def load_data():
    """Training images and labels, validation images and labels."""
    if FULL:
        import tensorflow_datasets as tfds

        arrays = []
        for split in tfds.load(
            "cifar10", split=["train", "test"], as_supervised=True
        ):
            x, y = split.batch(len(split)).get_single_element()
            arrays += [x.numpy().astype("float32"), y.numpy()]
        x_train, y_train, x_val, y_val = arrays
    else:
        x, y = load_digits(return_X_y=True)
        x_train, x_val, y_train, y_val = train_test_split(
            x.astype("float32").reshape(-1, 8, 8, 1),
            y,
            test_size=0.25,
            stratify=y,
            random_state=0,
        )
    mean = x_train.mean(axis=(0, 1, 2))
    stddev = x_train.std(axis=(0, 1, 2))
    return (x_train - mean) / stddev, y_train, (x_val - mean) / stddev, y_val


x_train, y_train, x_val, y_val = load_data()


def augmented(x, y):
    """A minibatch, each image moved and mirrored at random."""
    padded = tf.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    x = tf.map_fn(
        lambda image: tf.image.random_crop(image, (32, 32, 3)), padded
    )
    return tf.image.random_flip_left_right(x), y


def minibatches(seed):
    """An endless dataset of shuffled minibatches."""
    dataset = tf.data.Dataset.from_tensor_slices((x_train, y_train))
    dataset = dataset.shuffle(len(x_train), seed=seed).repeat()
    dataset = dataset.batch(BATCH_SIZE)
    if FULL:
        dataset = dataset.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.prefetch(tf.data.AUTOTUNE)


def draw(rng, size=BATCH_SIZE):
    """One minibatch, drawn with replacement, as arrays."""
    rows = rng.integers(len(x_train), size=size)
    return x_train[rows], y_train[rows]


# %% [markdown]
# ## The networks
#
# Behind each convolution stands nothing, batch normalization, or batch
# normalization and then `ActivationNoise`: each activation is shifted and
# scaled at random, by other amounts in each step and on average not by 0 and
# 1. So what normalization did to the distribution is undone. All kernels
# begin as in He et al. 2015.

# %%
KINDS = ("standard", "BN", "noisy BN")


def convolve(x, filters, kind, strides=1, decay=0.0):
    """A 3x3 convolution and what stands behind it."""
    x = layers.Conv2D(
        filters,
        3,
        strides=strides,
        padding="same",
        use_bias=kind == "standard",
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(decay) if decay else None,
    )(x)
    if kind != "standard":
        x = keras_renorm.BatchNormalization(momentum=0.9)(x)
    if kind == "noisy BN":
        x = diagnostics.ActivationNoise()(x)
    return x


def vgg(kind, stages):
    """Stages of so many convolutions of so many filters, pooled between."""
    x = inputs = keras.Input(x_train.shape[1:])
    for count, filters in stages:
        for _ in range(count):
            x = layers.ReLU()(convolve(x, filters, kind))
        x = layers.MaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def resnet(kind, blocks, decay=0.0):
    """Three stages of residual blocks: 6 * blocks + 2 layers with weights.

    Where a stage begins, the shortcut skips every other pixel and gets
    channels of zeros, so that it has no weights.
    """
    inputs = keras.Input(x_train.shape[1:])
    x = layers.ReLU()(convolve(inputs, 16, kind, decay=decay))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            y = layers.ReLU()(convolve(x, filters, kind, strides, decay))
            y = convolve(y, filters, kind, decay=decay)
            if strides == 2:
                x = layers.AveragePooling2D(1, 2)(x)
                x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, filters // 2)))
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


# %% [markdown]
# ## The settings
#
# Small: one network for all questions, seven convolutions; SGD with momentum
# 0.9, minibatches of 32, 200 steps.
#
# Full: the landscape is that of VGG with 13 convolutions and one dense layer,
# SGD without momentum, learning rate 0.1 (Santurkar et al., Figure 1), 15,000
# steps. The learning rates are those of ResNet-110, momentum 0.9, weight decay
# 0.0001, 64,000 steps, the rate divided by 10 at half and at three quarters of
# them (He et al. 2016, section 4.2, whom Bjorck et al. follow; the warm-up of
# ResNet-110 in the former is left out). Minibatches of 128. What the papers do
# not state is our choice: no momentum for VGG, its number of steps, the range
# of step sizes.

# %%
RATES = (0.0001, 0.003, 0.1)
SMALL_VGG = ((3, 16), (2, 32), (2, 32))
FULL_VGG = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
WEIGHT_DECAY = 1e-4  # its gradient is that of WEIGHT_DECAY / 2 * w ** 2
if FULL:
    stages = [(min(count, args.blocks), width) for count, width in FULL_VGG]
    NETWORKS = {
        "VGG": (lambda kind: vgg(kind, stages), 15_000, 0.0),
        "ResNet": (
            lambda kind: resnet(kind, args.blocks, WEIGHT_DECAY / 2),
            64_000,
            0.9,
        ),
    }
    MEASURED_RATE, RATES_NETWORK = 0.1, "ResNet"
    RUNS = [("VGG", kind, MEASURED_RATE) for kind in KINDS]
    RUNS += [("ResNet", kind, rate) for kind in KINDS[:2] for rate in RATES]
else:
    NETWORKS = {"VGG": (lambda kind: vgg(kind, SMALL_VGG), 200, 0.9)}
    MEASURED_RATE, RATES_NETWORK = 0.003, "VGG"
    RUNS = [("VGG", kind, rate) for kind in KINDS[:2] for rate in RATES]
    RUNS += [("VGG", "noisy BN", rate) for rate in RATES[1:]]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# %% [markdown]
# ## What is measured
#
# At `POINTS` moments of a training, on a fresh minibatch (the same for all
# kinds), and along its gradient g at the weights w, over a range of step
# sizes: the loss at w - step * g, how far the gradient there is from g, and
# that distance over the distance moved. None of this changes the model.
#
# With momentum 0.9, steps add up to ten times the learning rate, so that is
# the scale of the steps: from half of it to four times.
#
# Internal covariate shift is how far the gradient of a layer changes when the
# layers before it are updated; here it is the mean over the convolutions.


# %%
class Landscape(keras.callbacks.Callback):
    """Measures the loss around the weights at the start of each epoch."""

    def __init__(self, seed, rate, momentum):
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.step = rate / (1 - momentum)
        self.points = []

    def on_epoch_begin(self, epoch, logs=None):
        batch = draw(self.rng)
        sizes = self.step * np.array([0.5, 1, 2, 4])
        given = self.model, LOSS, batch, sizes
        shift = diagnostics.internal_covariate_shift(*given[:3], self.step)
        of_convolutions = ["conv" in name for name in shift.layers]
        self.points.append(
            {
                "loss": diagnostics.loss_along_gradient(*given).values,
                "change": diagnostics.gradient_predictiveness(*given).values,
                "smoothness": diagnostics.effective_smoothness(*given).values,
                "shift": shift.values[0, of_convolutions].mean(),
                "cosine": shift.cosines[0, of_convolutions].mean(),
            }
        )


# %% [markdown]
# Models are compiled once for all seeds and learning rates: what changes are
# the values of their variables.

# %%
compiled = {}


def start(network, kind, seed, rate):
    """A model with new weights and the optimizer as new."""
    make, steps, momentum = NETWORKS[network]
    keras.utils.set_random_seed(seed)
    fresh = make(kind)
    model = compiled.setdefault((network, kind), fresh)
    if model is fresh:
        model.compile(
            keras.optimizers.SGD(rate, momentum=momentum),
            LOSS,
            metrics=["accuracy"],
            # Small steps cost less than going back to Python after each.
            steps_per_execution=(args.steps or steps) // POINTS,
        )
        model.optimizer.build(model.trainable_variables)
    model.set_weights(fresh.get_weights())
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros_like(variable))
    model.optimizer.learning_rate = rate
    return model


def decays(share):
    """How often the learning rate was divided by 10, after some of a run."""
    return int(share >= 0.5) + int(share >= 0.75)


def train(network, kind, rate, seed):
    """A trained model, its history, and what was measured."""
    _, steps, momentum = NETWORKS[network]
    model = start(network, kind, seed, rate)
    landscape = Landscape(seed, rate, momentum)
    callbacks = []
    if network == "VGG" and rate == MEASURED_RATE:
        callbacks.append(landscape)
    if network == "ResNet":
        callbacks.append(
            keras.callbacks.LearningRateScheduler(
                lambda epoch: rate * 0.1 ** decays(epoch / POINTS)
            )
        )
    history = model.fit(
        minibatches(seed),
        epochs=POINTS,
        steps_per_epoch=(args.steps or steps) // POINTS,
        validation_data=(x_val, y_val),
        validation_batch_size=450,
        callbacks=callbacks,
        shuffle=False,  # the dataset does it
        verbose=0,
    )
    return model, history.history, landscape.points


# %% [markdown]
# ### The first minibatches
#
# Bjorck et al. look at the loss after a step over the loss before it, by step
# size, on the first minibatches of a training.


# %%
def gradient_function(model):
    """The gradient of a minibatch, traced once for all sizes."""

    @tf.function(reduce_retracing=True)
    def gradient(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    return gradient


STEP_SIZES = np.logspace(-3, 1, 9)


def first_minibatches(model, gradient, seed):
    """Relative losses by step size on the first three minibatches."""
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(3):
        batch = draw(rng)
        curves.append(
            diagnostics.loss_along_gradient(
                model, LOSS, batch, STEP_SIZES
            ).relative_losses
        )
        model.optimizer.apply(gradient(*batch), model.trainable_variables)
    return np.array(curves)


# %% [markdown]
# ### The batch size as a source of noise
#
# The gradient of a minibatch of B examples is the gradient of all of them plus
# noise of variance C / B. A step multiplies it by the learning rate; over the
# steps that it takes to get a given way, the variances add up to something
# proportional to learning rate / B. That is the argument of Bjorck et al. for
# why a larger learning rate acts as a smaller minibatch does.
#
# We measure both at the end of a training: the variance of the gradient times
# B, and how far runs that begin at the same weights spread when they draw
# other minibatches: with the same learning rate / B in small steps and in
# large ones, and with four times as much.

# %%
SIZES = (4, 16, 64)
SPREADS = {  # learning rate, batch size, steps
    "small steps": (0.01, 16, 40),
    "large steps": (0.04, 64, 10),
    "four times the noise": (0.04, 16, 10),
}
DRAWS, REPEATS = (100, 4) if args.steps is None else (2, 2)
SHORTER = 1 if args.steps is None else 10


def flat(tensors):
    """All numbers of some tensors as one vector."""
    return np.concatenate([np.ravel(tensor) for tensor in tensors])


def gradient_noise(gradient, seed):
    """Total variance of the gradient times the batch size, by batch size."""
    rng = np.random.default_rng(seed)
    return np.array(
        [
            size
            * np.var(
                [flat(gradient(*draw(rng, size))) for _ in range(DRAWS)],
                axis=0,
                ddof=1,
            ).sum()
            for size in SIZES
        ]
    )


def spread(model, gradient, rate, size, steps, seed):
    """Total variance of the weights after plain SGD from the same start."""
    weights = model.get_weights()
    ends = []
    for run in range(REPEATS):
        rng = np.random.default_rng((seed, run))
        model.set_weights(weights)
        for _ in range(steps // SHORTER):
            for variable, slope in zip(
                model.trainable_variables,
                gradient(*draw(rng, size)),
                strict=True,
            ):
                variable.assign_sub(rate * slope)
        ends.append(flat(model.trainable_variables))
    model.set_weights(weights)
    return np.var(ends, axis=0, ddof=1).sum()


# %% [markdown]
# ## All runs
#
# Noise is in training only, so the moving statistics of the noisy network are
# not those of its inference, where nothing is noisy: it is evaluated once as
# it is, and once after `recalibrate`.

# %%
histories, points, accuracies, recalibrated = {}, {}, {}, {}
relative, noise, spreads = {}, {}, {}
gradients = {}
for seed, (network, kind, rate) in track(
    [(seed, run) for seed in range(args.seeds) for run in RUNS],
    "Training",
    console=console,
):
    once = network == RATES_NETWORK and rate == 0.003 and kind != "noisy BN"
    if once:
        model = start(network, kind, seed, rate)
        gradient = gradients.setdefault(kind, gradient_function(model))
        relative[kind, seed] = first_minibatches(model, gradient, seed)
    run = network, kind, rate, seed
    model, histories[run], measured = train(*run)
    accuracies[run] = histories[run]["val_accuracy"][-1]
    if measured:
        points[kind, seed] = {
            name: np.array([point[name] for point in measured])
            for name in measured[0]
        }
    if once:
        noise[kind, seed] = gradient_noise(gradient, seed)
        for name, setting in SPREADS.items():
            spreads[kind, name, seed] = spread(model, gradient, *setting, seed)
    if kind == "noisy BN":
        keras_renorm.recalibrate(model, x_train, verbose=False)
        recalibrated[run] = model.evaluate(
            x_val, y_val, batch_size=450, verbose=0, return_dict=True
        )["accuracy"]


def each_seed(results, *key):
    """The results of one kind of run, a seed after the other."""
    return np.array([results[*key, seed] for seed in range(args.seeds)])


def joined(values, form="{:.3f}"):
    """Numbers as a cell of a table."""
    return " ".join(form.format(value) for value in values)


# %% [markdown]
# ## Training with, without, and with noise

# %%
SMALL_RUN = not FULL and args.steps is None  # what the text below is about
losses = {run: history["loss"][-1] for run, history in histories.items()}


def make_table(title, first, columns):
    """An empty table."""
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


table = make_table(
    "Learning rates",
    "training",
    ("loss at the end", "validation accuracy", "recalibrated"),
)
for network, kind, rate in RUNS:
    key = network, kind, rate
    noisy = kind == "noisy BN"
    table.add_row(
        f"{network}, {kind}, {rate:g}",
        joined(each_seed(losses, *key)),
        joined(each_seed(accuracies, *key)),
        joined(each_seed(recalibrated, *key)) if noisy else "",
    )
console.print(table)
console.print("(a value for each seed; losses are those of training mode)")

# %% [markdown]
# What to read there, at the small scale:
#
# - At 0.1 the standard network learns next to nothing, and the one with batch
#   normalization trains. So does the one with **noise**: unstable
#   distributions do not take that away.
# - At 0.003 all three train. The noise costs something: its loss ends higher
#   than that of both others. In the paper the noisy network still beats the
#   standard one at the rate that both can take. Here it does not.
# - At 0.0001 batch normalization learns faster too. Bjorck et al. find hardly
#   a difference at that rate; but they train until nothing improves, and here
#   the run is over long before.
# - They also find that larger rates generalize better. Here 0.1 ends no
#   better than 0.003 with batch normalization, and the standard network at
#   its best rate is behind by three hundredths at most: so no such difference
#   shows on the digits.
# - As it is, the noisy network evaluates badly: its moving statistics are
#   those of noisy activations. `recalibrate` is all that it takes.
#
# ## The landscape

# %%
SETTLED = POINTS // 4  # the points from which training has left its start


def measured_at(kind, name):
    """What was measured, `(seeds, points, ...)`."""
    return np.array([points[kind, at][name] for at in range(args.seeds)])


def typical(kind, name):
    """The median of a measure over a training, but for its start, by seed.

    Of the largest value over step sizes; of the loss, of how much it varies.
    """
    values = measured_at(kind, name)
    if name == "loss":
        values = np.ptp(values, axis=-1)
    elif values.ndim == 3:
        values = values.max(axis=-1)
    return np.median(values[:, SETTLED:], axis=1)


MEASURES = {
    "loss": "variation of the loss",
    "change": "change of the gradient",
    "smoothness": "effective smoothness",
    "shift": "covariate shift, l2",
    "cosine": "covariate shift, cosine",
}
table = make_table(
    f"Along the gradient, learning rate {MEASURED_RATE:g}", "measure", KINDS
)
for name, title in MEASURES.items():
    table.add_row(title, *(joined(typical(kind, name)) for kind in KINDS))
console.print(table)

# %% [markdown]
# As in Santurkar et al., batch normalization lets the loss vary less along
# the gradient, the gradient change less, and the effective smoothness (an
# estimate of the Lipschitz constant of the gradient: less is smoother) is
# lower; with noise as well.
#
# - Not from the first step on: at the initial weights and 25 steps later the
#   loss varies more *with* batch normalization, and is no smoother. The
#   standard network reaches its steep places as it begins to learn. The table
#   leaves out the first quarter of the run, the picture shows it.
# - Noise makes the internal **covariate shift** two to four times as large as
#   that of batch normalization alone, and yet the noisy network trains where
#   the standard one does not. But most of that is the length of the
#   gradients: their direction (the cosine) turns by hardly more.
# - In the paper the shift is about as large with batch normalization as
#   without, or larger. Here it is far smaller with it. So the small scale does
#   not show that shift and training are unrelated.
#
# ## Step sizes and batch sizes

# %%
table = make_table(
    "Variance of the gradient, times B",
    "training",
    [f"B = {size}" for size in SIZES],
)
for kind in KINDS[:2]:
    rows = each_seed(noise, kind).T
    table.add_row(kind, *(joined(row, "{:.0f}") for row in rows))
console.print(table)

table = make_table("Spread of the weights", "training", SPREADS)
for kind in KINDS[:2]:
    table.add_row(
        kind,
        *(joined(each_seed(spreads, kind, name), "{:.4f}") for name in SPREADS),
    )
console.print(table)

# %% [markdown]
# Without batch normalization the variance of the gradient times B is the same
# for all B, as it must be for a mean of independent terms. With it, the
# statistics of a minibatch are noise too, and that of small minibatches is
# more than B tells.
#
# How far runs spread follows from learning rate / B with batch normalization,
# within a factor of two or three: steps four times as large with minibatches
# four times as large spread them no more than the small ones, and with the
# small minibatches some five times as much. Without it, learning rate 0.04
# leaves the region where the argument holds: the large steps spread the runs
# by far more than the small ones with the same ratio.
#
# Bjorck et al. argue from this noise to generalization. That part does not
# show on the digits, and we do not claim it.
#
# ## The picture
#
# Bands reach from the lowest to the highest value over the step sizes, for
# the first seed; lines are single seeds.

# %%
COLORS = dict(zip(KINDS, ("#d55e00", "#0072b2", "#009e73"), strict=True))
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
)
figure, axes = plt.subplots(4, 2, figsize=(11, 14), layout="constrained")
(training, variation, change, smoothness) = axes[:2].flat
(shift, first_steps, accuracy, batch_noise) = axes[2:].flat
vgg_steps = (args.steps or NETWORKS["VGG"][1]) // POINTS
at_points = vgg_steps * np.arange(POINTS)
for kind, color in COLORS.items():
    for seed in range(args.seeds):
        history = histories["VGG", kind, MEASURED_RATE, seed]
        label = kind if seed == 0 else None
        style = {"color": color, "lw": 1.5, "label": label}
        training.plot(at_points + vgg_steps, history["loss"], **style)
        shift.plot(at_points, measured_at(kind, "shift")[seed], **style)
    for place, name in (
        (variation, "loss"),
        (change, "change"),
        (smoothness, "smoothness"),
    ):
        values = measured_at(kind, name)[0]
        low, high = values.min(axis=-1), values.max(axis=-1)
        place.fill_between(
            at_points, low, high, color=color, alpha=0.35, label=kind
        )
for place, title, label in (
    (training, f"Training, learning rate {MEASURED_RATE:g}", "loss"),
    (variation, "Loss along the gradient", "loss"),
    (change, "Change of the gradient", "ℓ2"),
    (smoothness, "Change over distance", "ℓ2 over ℓ2"),
    (shift, "Internal covariate shift", "ℓ2"),
):
    place.set(title=title, xlabel="step", ylabel=label, yscale="log")
figure.legend(
    *training.get_legend_handles_labels(), loc="outside upper center", ncols=3
)

for kind in KINDS[:2]:
    for seed in range(args.seeds):
        for curve in relative[kind, seed]:
            first_steps.plot(STEP_SIZES, curve, color=COLORS[kind], lw=1)
    shown = [each_seed(accuracies, RATES_NETWORK, kind, at) for at in RATES]
    accuracy.plot(RATES, np.mean(shown, axis=1), color=COLORS[kind])
    accuracy.plot(RATES, shown, "o", color=COLORS[kind], ms=4)
    batch_noise.plot(SIZES, each_seed(noise, kind).T, color=COLORS[kind])
first_steps.axhline(1, color="black", lw=0.8, ls=":")
first_steps.set(
    title="First minibatches",
    xlabel="step size",
    ylabel="loss after / loss before",
    xscale="log",
    yscale="log",
)
accuracy.set(
    title="Validation at the end",
    xlabel="learning rate",
    ylabel="accuracy",
    xscale="log",
    ylim=(0, 1.02),
)
batch_noise.set(
    title="Noise of the gradient",
    xlabel="batch size B",
    ylabel="variance, times B",
    xscale="log",
    yscale="log",
)
batch_noise.set_xticks(SIZES, SIZES)
batch_noise.set_xticks([], minor=True)  # and keep those of y
picture = args.output / "optimization.png"
figure.savefig(picture, dpi=150)
console.print(f"The picture is in {picture}")

# %% [markdown]
# On the first minibatches of the small scale, the loss goes down over about
# the same step sizes with and without batch normalization. In the paper the
# range is wider with it. What shows is how the two fail beyond: at a step size
# of 10 the loss grows some ten times with batch normalization, and more than
# ten thousand times without. The scale of a normalized layer's kernel does not
# reach its outputs; without normalization the scales of all kernels multiply.
#
# ## What we claim
#
# At the small scale with its own number of steps, for every seed.

# %%
if SMALL_RUN:
    at = {
        (kind, rate): each_seed(losses, "VGG", kind, rate)
        for _, kind, rate in RUNS
    }
    # Large learning rates.
    assert np.all(at["standard", 0.1] > 1.2)
    assert np.all(at["BN", 0.1] < 0.3)
    assert np.all(at["noisy BN", 0.1] < 0.5)
    for rate in RATES[1:]:
        assert np.all(each_seed(accuracies, "VGG", "BN", rate) > 0.9)
    assert np.all(each_seed(accuracies, "VGG", "standard", 0.003) > 0.85)
    assert np.all(each_seed(accuracies, "VGG", "standard", 0.1) < 0.6)
    # The noise costs something, and recalibration helps.
    for kind in KINDS[:2]:
        assert np.all(at["noisy BN", 0.003] > at[kind, 0.003])
    for rate in RATES[1:]:
        assert np.all(each_seed(recalibrated, "VGG", "noisy BN", rate) > 0.9)
    # The landscape.
    for kind in ("BN", "noisy BN"):
        for name, factor in (("loss", 8), ("change", 5), ("smoothness", 1.7)):
            rough = typical("standard", name)
            assert np.all(rough > factor * typical(kind, name))
    assert np.all(typical("noisy BN", "shift") > 1.2 * typical("BN", "shift"))
    # The first minibatches.
    assert np.all(each_seed(relative, "standard")[..., -1] > 1_000)
    assert np.all(each_seed(relative, "BN")[..., -1] < 100)
    # The batch size.
    for kind, lowest, highest in (("standard", 0.5, 2), ("BN", 4, 40)):
        ratio = each_seed(noise, kind)[:, 0] / each_seed(noise, kind)[:, -1]
        assert np.all((ratio > lowest) & (ratio < highest))
    small, large, noisier = (each_seed(spreads, "BN", name) for name in SPREADS)
    assert np.all((large > small / 4) & (large < 2 * small))
    assert np.all(noisier > 2.5 * np.maximum(small, large))
    small, large, _ = (each_seed(spreads, "standard", name) for name in SPREADS)
    assert np.all(large > 10 * small)
    console.print("All claims hold")

# %% [markdown]
# ## What to try next
#
# - `--scale full`, if you have a GPU. Which of what does not show here does?
# - `resnet` at the small scale: `resnet(kind, 2)`. Residual connections make
#   large learning rates possible too. How much is left to normalization?
# - Kernels that begin smaller: `kernel_initializer="glorot_uniform"`. The
#   standard network of seven convolutions does not start at all then.
# - `BatchRenormalization` in `convolve`, in minibatches of 4: is the extra
#   noise of the statistics less?
# - More noise, `ActivationNoise(mean_limit=2)`: when does training suffer?
# - The picture of one moment: `loss_along_gradient(...).plot()`.
