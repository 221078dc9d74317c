# %% [markdown]
# # How does batch normalization help optimization?
#
# It was introduced to keep the distribution of each layer's inputs stable.
# Santurkar et al. 2018 (arXiv:1805.11604) answered that it makes the loss
# smoother instead, and Bjorck et al. 2018 (arXiv:1806.02375) that it allows
# larger learning rates. We repeat what they measured: training with and without
# it, and with noise after it that makes the distributions unstable again; the
# loss and its gradient along the gradient; internal covariate shift; learning
# rates; and the noise of the batch size.
#
# On scikit-learn's digits, in a minute and a quarter on two CPU cores. `--scale
# full` is CIFAR-10 with VGG and ResNet-110 (`papers.py`): a GPU and a day or
# more. Needs `pip install ".[tutorials]"`. As a script: `python
# 08_optimization.py --seeds 3 --output my_folder`.

# %%
import lesson

args = lesson.options(
    "08_optimization",
    scale=("small", "full"),
    seeds=2,
    steps=int,
    points=int,
    batch_size=int,
    blocks=18,
    notes={"points": "of a run that are measured", "blocks": "of a stage"},
)

# %%
import functools

import keras
import numpy as np
import papers
from keras import layers

import keras_renorm
from keras_renorm import diagnostics

FULL, SEEDS = args.scale == "full", range(args.seeds)
POINTS = args.points or (40 if FULL else 8)
BATCH_SIZE = args.batch_size or (128 if FULL else 32)
if args.steps is not None and args.steps < POINTS:
    args.fail(f"need --steps of {POINTS} or more")
DATA = x_train, y_train, x_val, y_val = papers.load_data(FULL)


def draw(rng, size=BATCH_SIZE):
    """One minibatch, drawn with replacement, as arrays."""
    rows = rng.integers(len(x_train), size=size)
    return x_train[rows], y_train[rows]


# %% [markdown]
# ## The networks
#
# After each convolution comes nothing, batch normalization, or batch
# normalization and then `ActivationNoise`: each activation is shifted and
# scaled at random, by other amounts in each step and on average not by 0 and
# 1. So what normalization did to the distribution is undone.

# %%
KINDS = ("standard", "BN", "noisy BN")


def convolve(x, filters, kind, strides=1, decay=0.0):
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


vgg = functools.partial(papers.vgg, convolve, x_train.shape[1:])
resnet = functools.partial(papers.resnet, convolve, x_train.shape[1:])
NETWORKS = papers.networks(convolve, x_train.shape[1:], FULL, args.blocks)
RATES = (0.0001, 0.003, 0.1)
MEASURED_RATE, OF_RATES = (0.1, "ResNet") if FULL else (0.003, "VGG")
RUNS = [(OF_RATES, kind, rate) for kind in KINDS[:2] for rate in RATES]
if FULL:
    RUNS += [("VGG", kind, MEASURED_RATE) for kind in KINDS]
else:
    RUNS += [("VGG", "noisy BN", rate) for rate in RATES[1:]]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STEPS = {name: (args.steps or of[1]) // POINTS for name, of in NETWORKS.items()}
start = papers.Starts(NETWORKS, LOSS, STEPS)

# %% [markdown]
# ## What is measured
#
# At `POINTS` moments of a training, on a fresh minibatch (the same for all
# kinds), and along its gradient g at the weights w, over a range of step
# sizes: the loss at w - step * g, how far the gradient there is from g, and
# that distance over the distance moved. None of this changes the model.
#
# Covariate shift is how far a layer's gradient changes when the layers before
# it are updated.


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
# Bjorck et al. look at the loss after a step over the loss before it, by step
# size, on the **first minibatches** of a training.
#
# The gradient of a minibatch of B examples has noise of variance C / B. Over
# the steps of a given way it adds up to something proportional to
# learning rate / B: that is their argument for why a larger rate acts as a
# smaller minibatch does. We measure the variance times B, and how far runs from
# the same weights **spread** when they draw other minibatches.

# %%
STEP_SIZES = np.logspace(-3, 1, 9)


def first_minibatches(model, gradient, seed):
    """Relative losses by step size on the first three minibatches."""
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(3):
        batch = draw(rng)
        line = diagnostics.loss_along_gradient(model, LOSS, batch, STEP_SIZES)
        curves.append(line.relative_losses)
        model.optimizer.apply(gradient(*batch), model.trainable_variables)
    return np.array(curves)


# %% [markdown]
# Noise is in training only, so the moving statistics of the noisy network are
# not those of its inference: it is evaluated as it is, and recalibrated.

# %%
found = papers.Outcomes(RUNS, args.seeds, KINDS, STEPS["VGG"], POINTS)
gradients = {}
for seed, run in lesson.track(
    [(at, run) for at in range(args.seeds) for run in RUNS]
):
    network, kind, rate = run
    once = network == OF_RATES and rate == 0.003 and kind != "noisy BN"
    if once:
        model = start(network, kind, seed, rate)
        if kind not in gradients:
            gradients[kind] = papers.gradient_function(model, LOSS)
        gradient = gradients[kind]
        found.relative[kind, seed] = first_minibatches(model, gradient, seed)
    landscape = None
    if network == "VGG" and rate == MEASURED_RATE:
        landscape = Landscape(seed, rate, NETWORKS[network][2])
    model = papers.train(start, DATA, run, seed, BATCH_SIZE, POINTS, landscape)
    found.add(run, seed, model, landscape and landscape.points)
    if once:
        is_short = args.steps is not None
        found.add_noise(kind, seed, model, gradient, draw, is_short)
    if kind == "noisy BN":
        keras_renorm.recalibrate(model, x_train, verbose=False)
        found.recalibrated[*run, seed] = model.evaluate(
            x_val, y_val, batch_size=450, verbose=0
        )[1]
found.table_of_rates()

# %% [markdown]
# - At 0.1 the standard network learns next to nothing, and the one with batch
#   normalization trains. So does the one with **noise**: unstable
#   distributions do not take that away.
# - At 0.003 all three train. The noise costs something; not so in the paper.
# - At 0.0001 batch normalization learns faster too. Bjorck et al. find hardly
#   a difference; but they train until nothing improves.
# - The noisy network evaluates badly as it is: its moving statistics are those
#   of noisy activations. `recalibrate` is all that it takes.
#
# ## The landscape

# %%
found.table_of_landscape()
found.draw_landscape(MEASURED_RATE, args.output / "landscape.png")

# %% [markdown]
# As in Santurkar et al., batch normalization lets the loss vary less along the
# gradient, and the gradient change less; with noise as well. (Effective
# smoothness estimates the Lipschitz constant of the gradient.)
#
# - Noise makes the internal **covariate shift** two to four times as large as
#   that of batch normalization alone, and yet the noisy network trains. But
#   most of that is the length of the gradients: their direction (the cosine)
#   turns by hardly more.
# - In the paper the shift is about as large with batch normalization as
#   without, or larger. Here it is far smaller with it.
#
# ## Step sizes and batch sizes

# %%
found.tables_of_noise()
found.draw_rates(STEP_SIZES, args.output / "optimization.png")

# %% [markdown]
# Without batch normalization the variance of the gradient times B is the same
# for all B. With it, the statistics of a minibatch are noise too, and that of
# small minibatches is more than B tells. How far runs spread follows from
# learning rate / B with batch normalization, within a factor of two or three;
# without it, not at the rate 0.04.
#
# On the first minibatches the loss goes down over about the same step sizes
# with and without batch normalization; beyond, at a step size of 10, it grows
# some ten times with it, and more than ten thousand times without.
#
# We claim this of the small scale, for every seed.

# %%
histories = found.histories
if args.is_whole:
    found.check()

# %% [markdown]
# What to try next: `resnet(kind, 2)`; `ActivationNoise(mean_limit=2)`.
