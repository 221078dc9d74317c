"""The data and networks of `08_optimization.py`, small and as in the papers.

At the full scale the landscape is that of VGG with 13 convolutions and one
dense layer, SGD without momentum, learning rate 0.1 (Santurkar et al., Figure
1), 15,000 steps. The learning rates are those of ResNet-110, momentum 0.9,
weight decay 0.0001, 64,000 steps, the rate divided by 10 at half and at three
quarters of them (He et al. 2016, section 4.2, whom Bjorck et al. follow; the
warm-up of ResNet-110 in the former is left out). Minibatches of 128. What the
papers do not state is our choice: no momentum for VGG, its number of steps, the
range of step sizes.
"""

import functools

import keras
import lesson
import numpy as np
import tensorflow as tf
from keras import layers, ops

SMALL_VGG = ((3, 16), (2, 32), (2, 32))
FULL_VGG = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
SIZES = (4, 16, 64)
SPREADS = {  # learning rate, batch size, steps
    "small steps": (0.01, 16, 40),
    "large steps": (0.04, 64, 10),
    "four times the noise": (0.04, 16, 10),
}
WEIGHT_DECAY = 1e-4  # its gradient is that of WEIGHT_DECAY / 2 * w ** 2


def load_data(full):
    """Training images and labels, validation images and labels; standardized.

    Digits, or CIFAR-10, which downloads 170 MB.
    """
    if full:
        x_train, y_train = lesson.downloaded("cifar10", "train")
        x_val, y_val = lesson.downloaded("cifar10", "test")
        x_train, x_val = x_train.astype("float32"), x_val.astype("float32")
    else:
        x_train, y_train, x_val, y_val = lesson.train_and_validation()
        x_train, x_val = 16 * x_train, 16 * x_val
    mean = x_train.mean(axis=(0, 1, 2))
    stddev = x_train.std(axis=(0, 1, 2))
    return (x_train - mean) / stddev, y_train, (x_val - mean) / stddev, y_val


def augmented(x, y):
    """A minibatch, each image moved and mirrored at random.

    By 4 pixels at most, as He et al. 2016 (arXiv:1512.03385, section 4.2).
    """
    padded = tf.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    x = tf.map_fn(
        lambda image: tf.image.random_crop(image, (32, 32, 3)), padded
    )
    return tf.image.random_flip_left_right(x), y


def minibatches(x, y, size, seed, full):
    """An endless dataset of shuffled minibatches."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(len(x), seed=seed).repeat().batch(size)
    if full:
        dataset = dataset.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.prefetch(tf.data.AUTOTUNE)


def vgg(convolve, shape, kind, stages):
    """Stages of so many convolutions of so many filters, pooled between."""
    x = inputs = keras.Input(shape)
    for count, filters in stages:
        for _ in range(count):
            x = layers.ReLU()(convolve(x, filters, kind))
        x = layers.MaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def resnet(convolve, shape, kind, blocks, decay=0.0):
    """Three stages of residual blocks: 6 * blocks + 2 layers with weights.

    Where a stage begins, the shortcut skips every other pixel and gets
    channels of zeros, so that it has no weights.
    """
    inputs = keras.Input(shape)
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


def networks(convolve, shape, full, blocks):
    """`{name: (function of a kind, steps of a training, momentum)}`."""
    if not full:
        small = lambda kind: vgg(convolve, shape, kind, SMALL_VGG)  # noqa: E731
        return {"VGG": (small, 200, 0.9)}
    stages = [(min(count, blocks), width) for count, width in FULL_VGG]
    decay = WEIGHT_DECAY / 2
    return {
        "VGG": (
            lambda kind: vgg(convolve, shape, kind, stages),
            15_000,
            0.0,
        ),
        "ResNet": (
            lambda kind: resnet(convolve, shape, kind, blocks, decay),
            64_000,
            0.9,
        ),
    }


def decays(share):
    """How often the learning rate was divided by 10, after some of a run."""
    return int(share >= 0.5) + int(share >= 0.75)


class Starts:
    """Models as new. Each kind is compiled once, for all seeds and rates.

    What changes between trainings are the values of variables.
    """

    def __init__(self, networks, loss, steps_per_epoch):
        self.networks, self.loss = networks, loss
        self.steps_per_epoch = steps_per_epoch
        self.compiled = {}

    def __call__(self, network, kind, seed, rate):
        """A model with new weights and the optimizer as new."""
        make, _, momentum = self.networks[network]
        keras.utils.set_random_seed(seed)
        fresh = make(kind)
        model = self.compiled.setdefault((network, kind), fresh)
        if model is fresh:
            model.compile(
                keras.optimizers.SGD(rate, momentum=momentum),
                self.loss,
                metrics=["accuracy"],
                # Small steps cost less than going back to Python after each.
                steps_per_execution=self.steps_per_epoch[network],
            )
            model.optimizer.build(model.trainable_variables)
        model.set_weights(fresh.get_weights())
        for variable in model.optimizer.variables:
            variable.assign(ops.zeros_like(variable))
        model.optimizer.learning_rate = rate
        return model


def gradient_function(model, loss):
    """The gradient of a minibatch, traced once for all sizes."""

    @tf.function(reduce_retracing=True)
    def gradient(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tape.gradient(value, model.trainable_variables)

    return gradient


def flat(tensors):
    """All numbers of some tensors as one vector."""
    return np.concatenate([np.ravel(tensor) for tensor in tensors])


def gradient_noise(gradient, draw, sizes, draws):
    """Total variance of the gradient times the batch size, by batch size."""
    return np.array(
        [
            size
            * np.var(
                [flat(gradient(*draw(size))) for _ in range(draws)],
                axis=0,
                ddof=1,
            ).sum()
            for size in sizes
        ]
    )


def spread(model, gradient, draws, rate, size, steps):
    """Total variance of the weights after plain SGD from the same start.

    `draws` are functions of a size, one for each run.
    """
    weights = model.get_weights()
    ends = []
    for draw in draws:
        model.set_weights(weights)
        for _ in range(steps):
            for variable, slope in zip(
                model.trainable_variables, gradient(*draw(size)), strict=True
            ):
                variable.assign_sub(rate * slope)
        ends.append(flat(model.trainable_variables))
    model.set_weights(weights)
    return np.var(ends, axis=0, ddof=1).sum()


def train(start, data, run, seed, batch_size, points, landscape):
    """A trained model; measured as it trains, if there is a `landscape`."""
    network, kind, rate = run
    model = start(network, kind, seed, rate)
    x_train, y_train, x_val, y_val = data
    full = "ResNet" in start.networks
    callbacks = [landscape] if landscape else []
    if network == "ResNet":
        callbacks.append(
            keras.callbacks.LearningRateScheduler(
                lambda epoch: rate * 0.1 ** decays(epoch / points)
            )
        )
    model.fit(
        minibatches(x_train, y_train, batch_size, seed, full),
        epochs=points,
        steps_per_epoch=start.steps_per_epoch[network],
        validation_data=(x_val, y_val),
        validation_batch_size=450,
        callbacks=callbacks,
        shuffle=False,  # the dataset does it
        verbose=0,
    )
    return model


class Outcomes:
    """What all runs gave: tables, pictures, and what we claim of them."""

    def __init__(self, runs, seeds, kinds, steps, points):
        self.runs, self.seeds, self.kinds = runs, range(seeds), kinds
        self.rates = sorted({rate for *_, rate in runs})
        self.of_rates = runs[0][0]  # the network that has all learning rates
        self.steps, self.settled = steps, points // 4
        self.at_points = steps * np.arange(points)
        self.histories, self.points = {}, {}
        self.accuracies, self.recalibrated = {}, {}
        self.relative, self.noise, self.spreads = {}, {}, {}
        colors = lesson.ORANGE, lesson.BLUE, lesson.GREEN
        self.colors = dict(zip(kinds, colors, strict=True))

    def each_seed(self, results, *key):
        """The results of one kind of run, a seed after the other."""
        return np.array([results[*key, seed] for seed in self.seeds])

    def losses(self):
        """The loss of each run at its end, in training mode."""
        return {run: of["loss"][-1] for run, of in self.histories.items()}

    def measured(self, kind, name):
        """What was measured, `(seeds, points, ...)`."""
        return np.array([self.points[kind, seed][name] for seed in self.seeds])

    def typical(self, kind, name):
        """The median of a measure over a training, but for its start, by seed.

        Of the largest value over step sizes; of the loss, of how much it
        varies. The start is the first quarter of the points.
        """
        values = self.measured(kind, name)
        if name == "loss":
            values = np.ptp(values, axis=-1)
        elif values.ndim == 3:
            values = values.max(axis=-1)
        return np.median(values[:, self.settled :], axis=1)

    def add(self, run, seed, model, measured):
        """Notes what a training gave."""
        history = model.history.history
        self.histories[*run, seed] = history
        self.accuracies[*run, seed] = history["val_accuracy"][-1]
        if measured:
            self.points[run[1], seed] = {
                name: np.array([point[name] for point in measured])
                for name in measured[0]
            }

    def add_noise(self, kind, seed, model, gradient, draw, is_short):
        """Measures the noise of the gradient, and how far runs spread."""
        draws, repeats, shorter = (2, 2, 10) if is_short else (100, 4, 1)
        drawn = functools.partial(draw, np.random.default_rng(seed))
        self.noise[kind, seed] = gradient_noise(gradient, drawn, SIZES, draws)
        for name, (rate, size, steps) in SPREADS.items():
            rngs = [np.random.default_rng((seed, at)) for at in range(repeats)]
            of_runs = [functools.partial(draw, rng) for rng in rngs]
            self.spreads[kind, name, seed] = spread(
                model, gradient, of_runs, rate, size, steps // shorter
            )

    def table_of_rates(self):
        columns = {
            "loss at the end": self.losses(),
            "validation accuracy": self.accuracies,
            "recalibrated": self.recalibrated,
        }
        lesson.table_of_columns(
            "Learning rates, a value for each seed",
            {
                title: {
                    f"{run[0]}, {run[1]}, {run[2]:g}": self.each_seed(of, *run)
                    if (*run, 0) in of
                    else ()
                    for run in self.runs
                }
                for title, of in columns.items()
            },
        )

    def table_of_landscape(self):
        measures = {
            "loss": "variation of the loss",
            "change": "change of the gradient",
            "smoothness": "effective smoothness",
            "shift": "covariate shift, l2",
            "cosine": "covariate shift, cosine",
        }
        columns = {
            kind: {
                title: self.typical(kind, name)
                for name, title in measures.items()
            }
            for kind in self.kinds
        }
        lesson.table_of_columns("Along the gradient", columns, head="measure")

    def tables_of_noise(self):
        """By batch size, and by how runs drew their minibatches."""
        kinds = self.kinds[:2]
        of_size = {
            f"B = {size}": {
                kind: self.each_seed(self.noise, kind)[:, at] for kind in kinds
            }
            for at, size in enumerate(SIZES)
        }
        lesson.table_of_columns(
            "Variance of the gradient, times B", of_size, form=".0f"
        )
        of_draw = {
            name: {
                kind: self.each_seed(self.spreads, kind, name) for kind in kinds
            }
            for name in SPREADS
        }
        lesson.table_of_columns("Spread of the weights", of_draw, form=".4f")

    def draw_landscape(self, rate, path):
        """Training, and what was measured as it went."""
        picture = lesson.figure(12, 7.5)
        panels = picture.subplots(2, 3).flat
        training, variation, change, smoothness, shift, empty = panels
        empty.set_axis_off()
        curves = {
            kind: [
                of["loss"]
                for of in self.each_seed(self.histories, "VGG", kind, rate)
            ]
            for kind in self.kinds
        }
        at_ends = self.at_points + self.steps
        lesson.lines(training, at_ends, curves, self.colors)
        shifts = {kind: self.measured(kind, "shift") for kind in self.kinds}
        lesson.lines(shift, self.at_points, shifts, self.colors)
        for axes, name in (
            (variation, "loss"),
            (change, "change"),
            (smoothness, "smoothness"),
        ):
            for kind, color in self.colors.items():
                values = self.measured(kind, name)[0]
                low, high = values.min(axis=-1), values.max(axis=-1)
                axes.fill_between(
                    self.at_points, low, high, color=color, alpha=0.35
                )
        for axes, title, label in (
            (training, f"Training, learning rate {rate:g}", "loss"),
            (variation, "Loss along the gradient", "loss"),
            (change, "Change of the gradient", "ℓ2"),
            (smoothness, "Change over distance", "ℓ2 over ℓ2"),
            (shift, "Internal covariate shift", "ℓ2"),
        ):
            axes.set(title=title, xlabel="step", ylabel=label, yscale="log")
        lesson.legend_of_all(training)
        lesson.save(picture, path)

    def draw_rates(self, step_sizes, path):
        """Step sizes, learning rates and batch sizes."""
        picture = lesson.figure(12, 4.2)
        first_steps, accuracy, noise = picture.subplots(1, 3)
        kinds = self.kinds[:2]
        of_steps = {
            kind: np.concatenate(self.each_seed(self.relative, kind))
            for kind in kinds
        }
        of_rates = {
            kind: np.transpose(
                [
                    self.each_seed(self.accuracies, self.of_rates, kind, rate)
                    for rate in self.rates
                ]
            )
            for kind in kinds
        }
        of_sizes = {kind: self.each_seed(self.noise, kind) for kind in kinds}
        lesson.lines(first_steps, step_sizes, of_steps, self.colors)
        lesson.lines(accuracy, self.rates, of_rates, self.colors)
        lesson.lines(noise, SIZES, of_sizes, self.colors)
        for axes, title, x, y in (
            (
                first_steps,
                "First minibatches",
                "step size",
                "loss after/before",
            ),
            (accuracy, "At the end", "learning rate", "validation accuracy"),
            (
                noise,
                "Noise of the gradient",
                "batch size B",
                "variance times B",
            ),
        ):
            axes.set(title=title, xlabel=x, ylabel=y, xscale="log")
            if axes is not accuracy:
                axes.set_yscale("log")
        first_steps.axhline(1, color="black", lw=0.8, ls=":")
        accuracy.set_ylim(0, 1.02)
        noise.set_xticks(SIZES, SIZES)
        noise.set_xticks([], minor=True)
        lesson.legend_of_all(accuracy)
        lesson.save(picture, path)

    def check(self):
        """What we claim of the small scale, for every seed."""
        each_seed, typical = self.each_seed, self.typical
        losses = self.losses()
        at = {run[1:]: each_seed(losses, *run) for run in self.runs}
        # Large learning rates.
        assert np.all(at["standard", 0.1] > 1.2)
        assert np.all(at["BN", 0.1] < 0.3)
        assert np.all(at["noisy BN", 0.1] < 0.5)
        accuracies, recalibrated = self.accuracies, self.recalibrated
        for rate in (0.003, 0.1):
            assert np.all(each_seed(accuracies, "VGG", "BN", rate) > 0.9)
            of_noisy = each_seed(recalibrated, "VGG", "noisy BN", rate)
            assert np.all(of_noisy > 0.9)
        assert np.all(each_seed(accuracies, "VGG", "standard", 0.003) > 0.85)
        assert np.all(each_seed(accuracies, "VGG", "standard", 0.1) < 0.6)
        # The noise costs something.
        for kind in ("standard", "BN"):
            assert np.all(at["noisy BN", 0.003] > at[kind, 0.003])
        # The landscape.
        for kind in ("BN", "noisy BN"):
            for name, factor in (
                ("loss", 8),
                ("change", 5),
                ("smoothness", 1.7),
            ):
                rough = typical("standard", name)
                assert np.all(rough > factor * typical(kind, name))
        shift = typical("BN", "shift")
        assert np.all(typical("noisy BN", "shift") > 1.2 * shift)
        # The first minibatches.
        assert np.all(each_seed(self.relative, "standard")[..., -1] > 1_000)
        assert np.all(each_seed(self.relative, "BN")[..., -1] < 100)
        # The batch size.
        for kind, lowest, highest in (("standard", 0.5, 2), ("BN", 4, 40)):
            of_kind = each_seed(self.noise, kind)
            ratio = of_kind[:, 0] / of_kind[:, -1]
            assert np.all((ratio > lowest) & (ratio < highest))
        small, large, noisier = self._spreads("BN")
        assert np.all((large > small / 4) & (large < 2 * small))
        assert np.all(noisier > 2.5 * np.maximum(small, large))
        small, large, _ = self._spreads("standard")
        assert np.all(large > 10 * small)
        lesson.say("All claims hold")

    def _spreads(self, kind):
        return [self.each_seed(self.spreads, kind, name) for name in SPREADS]
