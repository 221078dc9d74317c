# %% [markdown]
# # Domain adaptation: brown digits, then black ones
#
# A network learns from brown digits on cream paper and is then shown black
# ones in poor light. Its weights may well do; its moving statistics are those
# of brown digits. Does it help to replace nothing but these, and how many
# images of the new domain does that take? They need no labels.
#
# The digits are scikit-learn's (1,797 real images of 8x8 pixels), coloured;
# dark brown is near, black is far.
#
# Takes about a minute on two CPU cores. Needs
# `pip install ".[tutorials]"`.
# As a script: `python 05_domain_adaptation.py --seeds 3 --output my_folder`.

# %%
import lesson
from domains import CLASSES, DOMAINS, check, describe, load_domains

DRAWS = 3  # sets of target images of each size
BATCH_SIZE = 512  # of inference
PRIORS = (0, 16, 64)
args = lesson.options(
    "05_domain_adaptation", data=tuple(DOMAINS), seeds=2, steps=600
)

# %%
import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_renorm

SOURCE, *TARGETS = DOMAINS[args.data]
SEEDS = range(args.seeds)

# %% [markdown]
# Data are made on the spot by `colored_digits.py`. Other names are downloaded,
# gigabytes of them (`domains.py`): dogs, cats and dogs, clip art and sketches.
# They need more steps (`--steps 5000`).

# %%
data = load_domains(args.data, args.output / "tfds")
describe(args.data, data)


# %%
def train(seed):
    keras.utils.set_random_seed(seed)
    images, labels = data[SOURCE, "train"]
    stack = [keras.Input(images.shape[1:]), layers.Rescaling(1 / 255)]
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            keras_renorm.BatchNormalization(momentum=0.95),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)]
    model = keras.Sequential(stack)
    batches = tf.data.Dataset.from_tensor_slices((images, labels))
    batches = batches.shuffle(len(images)).repeat().batch(32)
    lesson.fit(model, batches, args.steps, 0.04)
    return model


def logits(model, domain):
    images = data[domain, "test"][0]
    parts = np.split(images, range(BATCH_SIZE, len(images), BATCH_SIZE))
    return np.concatenate([model.predict_on_batch(part) for part in parts])


def hits(model, domain):
    """Whether each test image is recognized."""
    return logits(model, domain).argmax(axis=-1) == data[domain, "test"][1]


models = [train(seed) for seed in lesson.track(SEEDS)]

# %% [markdown]
# ## A bank of statistics for each domain
#
# `recalibrate` replaces moving means and variances by those of the images that
# it is given, here all training images of the target, without their labels
# ("AdaBN": Li et al. 2016, arXiv:1603.04779). No weight changes, so a network
# can keep a bank for each domain: a few kilobytes, written and read by NumPy.


# %%
def adapt(seed, images, prior=0):
    keras_renorm.set_statistics(models[seed], homes[seed])
    keras_renorm.recalibrate(
        models[seed],
        images,
        prior_examples=prior,
        layer_by_layer=True,  # the default where there is a prior
        batch_size=BATCH_SIZE,
        verbose=False,
    )


homes, before, after, hits_before = [], {}, {}, {}
for seed, model in enumerate(models):
    homes.append(keras_renorm.get_statistics(model))
    on_source = logits(model, SOURCE)
    before[SOURCE, seed] = hits(model, SOURCE).mean()
    np.savez(args.output / f"{SOURCE}.npz", **homes[seed])
    for target in TARGETS:
        keras_renorm.set_statistics(model, homes[seed])
        hits_before[target, seed] = hits(model, target)
        before[target, seed] = hits_before[target, seed].mean()
        adapt(seed, data[target, "train"][0])
        after[target, seed] = hits(model, target).mean()
        bank = keras_renorm.get_statistics(model)
        np.savez(args.output / f"{target}.npz", **bank)
    after[SOURCE, seed] = hits(model, SOURCE).mean()  # by the last target's

    # Back on the source, from its bank: the same to the bit.
    with np.load(args.output / f"{SOURCE}.npz") as bank:
        keras_renorm.set_statistics(model, bank)
    np.testing.assert_array_equal(logits(model, SOURCE), on_source)

lesson.table_of_columns(
    f"Accuracy, each seed (on {SOURCE}: with {TARGETS[-1]}'s statistics)",
    {
        title: {
            key: [of[key, seed] for seed in SEEDS] for key in DOMAINS[args.data]
        }
        for title, of in (("source's statistics", before), ("target's", after))
    },
    head="test domain",
)

# %% [markdown]
# ## How many target images does it take?
#
# Statistics of few images are noisy. `prior_examples=N` mixes them with those
# that the layers have: N / (N + n) of the old, n / (N + n) of the new, for n
# images (Schneider et al. 2020, arXiv:2006.16971, section 3.1).

# %%
everything = min(len(data[target, "train"][0]) for target in TARGETS)
COUNTS = [2**power for power in range(9) if 2**power < everything]
COUNTS.append(everything)
runs = [
    (key, prior, seed) for seed in SEEDS for key in TARGETS for prior in PRIORS
]
curves = {}  # run: accuracy, (counts, draws)
for target, prior, seed in lesson.track(runs, "Adapting"):
    images = data[target, "train"][0]
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(images)) for _ in range(DRAWS)]
    found = curves[target, prior, seed] = np.zeros((len(COUNTS), DRAWS))
    for at, count in enumerate(COUNTS):
        for draw, order in enumerate(orders):
            if draw and count == len(images):  # all of them again
                found[at, draw] = found[at, 0]
                continue
            adapt(seed, images[order[:count]], prior)
            found[at, draw] = hits(models[seed], target).mean()


def gains(target, prior):
    """Accuracy less that before, of shape `(counts, seeds * draws)`."""
    return np.concatenate(
        [curves[target, prior, seed] - before[target, seed] for seed in SEEDS],
        axis=1,
    )


for target in TARGETS:
    cells = [
        [f"{of.mean():+.3f} ({of.min():+.3f})" for of in gains(target, prior)]
        for prior in PRIORS
    ]
    lesson.table(
        f"Gain of accuracy on {target}: mean (lowest)",
        ("target images", *(f"prior {prior}" for prior in PRIORS)),
        list(zip(COUNTS, *cells, strict=True)),
    )

# %% [markdown]
# With **many** images the prior hardly matters, and adapting helps. On the
# **far** target a prior holds on to what is wrong: one image without it does
# about as much as 64 with a prior of 64. On the **near** target one image
# without a prior does harm: its noise costs more than the shift did. No prior
# is best on both. From 16 images on there is nothing to lose without one.
#
# ## Where it does not help
#
# Statistics of the target are those of its domain *and* of its classes. If all
# images are of one class, what it has in common counts as the domain's and is
# normalized away: on that very class the network fails.


# %%
def one_class(target, prior, seed):
    """After adapting to each class: accuracy on it, and on all; means."""
    images, labels = data[target, "train"]
    test_labels = data[target, "test"][1]
    on_class, on_all = [], []
    for label in np.intersect1d(labels, test_labels):
        hit = hits_before[target, seed]
        if prior is not None:
            adapt(seed, images[labels == label], prior)
            hit = hits(models[seed], target)
        on_class.append(hit[test_labels == label].mean())
        on_all.append(hit.mean())
    return np.mean(on_class), np.mean(on_all)


narrow = {
    (f"prior {prior}" if prior is not None else "not adapted", key): np.array(
        [one_class(key, prior, seed) for seed in SEEDS]
    )
    for key in TARGETS
    for prior in (None, *PRIORS)
}
lesson.table(
    "Adapted to one class: accuracy, mean of all classes and seeds",
    ("how", "target", "on that class", "on all classes"),
    [(*key, *found.mean(axis=0).round(3)) for key, found in narrow.items()],
)

# %% [markdown]
# A prior softens it and does not cure it.

# %%
targets_curves = {
    target: {
        prior: np.concatenate([curves[target, prior, at] for at in SEEDS], 1)
        for prior in PRIORS
    }
    for target in TARGETS
}
lesson.draw_adaptation(
    args.output / "domain_adaptation.png",
    {key: data[key, "test"][0][:24] for key in DOMAINS[args.data]},
    COUNTS,
    targets_curves,
    {key: np.mean([before[key, at] for at in SEEDS]) for key in TARGETS},
    {key[0]: narrow[key][:, 0] for key in narrow if key[1] == TARGETS[0]},
)

# %%
if args.is_whole:  # what we claim of the digits
    check(before, after, narrow, gains, COUNTS, PRIORS)

# %% [markdown]
# What to try next: a domain of your own in `colored_digits.py`.
