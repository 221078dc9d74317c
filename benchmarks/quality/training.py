"""One training: from its description to its figures."""

import functools
import time
from dataclasses import asdict, dataclass

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_renorm
from benchmarks.quality import batches, networks, rest, tasks
from benchmarks.quality.contenders import CONTENDERS
from benchmarks.quality.decay import Constant, Cosine
from keras_renorm.callbacks import RenormScheduler

EPOCHS = 10  # how often accuracy is measured on the way
OPTIMIZERS = {
    "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9),
    # At a rate that does not decay.
    "sgd_constant": functools.partial(keras.optimizers.SGD, momentum=0.9),
    "sgd_rest_0.1": functools.partial(rest.SGD, rest=0.1, momentum=0.9),
    "adam": keras.optimizers.Adam,
    "adam_rest_10": functools.partial(rest.Adam, rest=10.0),
    # Without most of its scaling by parameter.
    "adam_epsilon_0.1": functools.partial(keras.optimizers.Adam, epsilon=0.1),
}
# Tuning uses other seeds than evaluation, and another split of the data.
TUNING_SEED = 1_000


@dataclass(frozen=True)
class Run:
    """All that a training depends on."""

    task: str
    regime: str
    contender: str
    optimizer: str
    rate: float
    steps: int
    seed: int

    def __str__(self):
        return "/".join(map(str, asdict(self).values()))


def train(run):
    """Accuracies of one training on the test images, as a dictionary."""
    start = time.perf_counter()
    task = task_of(run)
    images, test = task.train, task.test
    initial = initial_weights(run)
    if run.regime.startswith("fine_tuning"):
        pretrained = _pretrained(run)
        initial = [
            new | _as_renorm(old)
            for new, old in zip(initial, pretrained, strict=True)
        ]
        images, test = task.shifted_train, task.shifted
        few = np.random.default_rng(run.seed).permutation(len(images.x))
        images = tasks.Images(*(array[few[:200]] for array in images))
        if CONTENDERS[run.contender].adapted:
            initial = _adapted(initial, run, images)
    rng = np.random.default_rng([run.seed, 3])
    rows = batches.draw(run.regime, images.y, run.steps, rng)
    trainer = _trainer(run.task, run.contender, run.optimizer, run.steps)
    trained, curve = trainer.fit(initial, run.rate, rows, images, test)
    result = {
        **asdict(run),
        "accuracy": curve[-1],
        "curve": curve,
        "shifted": accuracy(trained, task.shifted),
    }
    if _is_batch_normalization(run.contender):
        # Keras's renorm layer cannot be recalibrated; a plain one can, and
        # infers the same.
        model = make_model("bn", run.task, run.steps)
        copy_weights(layer_weights(trained), model)
        result["recalibrated"] = _recalibrated(model, images, test)
        result["shifted_recalibrated"] = _recalibrated(
            model, task.shifted_train, task.shifted
        )
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


def task_of(run):
    """Its data, of the split for tuning or for what counts."""
    return tasks.load(run.task, int(run.seed >= TUNING_SEED))


def _is_batch_normalization(contender):
    return isinstance(CONTENDERS[contender].layer(1), layers.BatchNormalization)


def make_model(contender, task, steps):
    """The network of a task, normalized by a contender."""
    return networks.make(
        tasks.load(task, 0), lambda: CONTENDERS[contender].layer(steps)
    )


def _score(is_segmentation):
    """What a test measures, under the name of accuracy.

    Of segments, intersection over union with the pixels of the digit.
    """
    if not is_segmentation:
        return keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    return keras.metrics.IoU(
        2, target_class_ids=[1], sparse_y_pred=False, name="accuracy"
    )


def layer_weights(model):
    """Weights of each layer, by name."""
    return [
        {weight.name: weight.numpy() for weight in layer.weights}
        for layer in model.layers
    ]


def copy_weights(source, model):
    """Assigns what a network of `make_model` shares with another, by name."""
    for weights, layer in zip(source, model.layers, strict=True):
        for weight in layer.weights:
            if weight.name in weights:
                weight.assign(weights[weight.name])


def _as_renorm(weights):
    """With the statistics that Keras's renormalization keeps of its own."""
    if "moving_mean" not in weights:
        return weights
    epsilon = keras.layers.BatchNormalization().epsilon
    return weights | {
        "renorm_mean": weights["moving_mean"],
        "renorm_stddev": np.sqrt(weights["moving_variance"] + epsilon),
    }


def initial_weights(run):
    """A new network's, by the seed of the run."""
    keras.utils.set_random_seed(run.seed)
    return layer_weights(make_model(run.contender, run.task, run.steps))


def _pretrained(run):
    """Weights that know the unshifted images, of i.i.d. minibatches.

    All contenders that are batch normalization in inference begin with the
    same ones, of batch normalization.
    """
    contender = run.contender
    if _is_batch_normalization(contender):
        contender = "bn"
    return _pretrain(
        Run(run.task, "iid_32", contender, "sgd", 0.04, run.steps * 2, run.seed)
    )


def _adapted(weights, run, images):
    """With the statistics of `images`."""
    model = make_model("bn", run.task, run.steps)
    copy_weights(weights, model)
    keras_renorm.recalibrate(
        model, images.x, batch_size=len(images.x), verbose=False
    )
    return [
        old | new
        for old, new in zip(weights, layer_weights(model), strict=True)
    ]


@functools.lru_cache(64)
def _pretrain(run):
    task = task_of(run)
    rng = np.random.default_rng([run.seed, 4])
    rows = batches.draw(run.regime, task.train.y, run.steps, rng)
    trainer = _trainer(run.task, run.contender, run.optimizer, run.steps)
    trained, _ = trainer.fit(
        initial_weights(run), run.rate, rows, task.train, task.test
    )
    return layer_weights(trained)


def minibatches(rows, images):
    """A dataset of one minibatch for each row of `rows`."""
    x, y = tf.constant(images.x), tf.constant(images.y)
    return tf.data.Dataset.from_tensor_slices(rows).map(
        lambda row: (tf.gather(x, row), tf.gather(y, row))
    )


class Trainer:
    """A network and an optimizer, compiled once for many rates and seeds.

    `frozen`: with frozen statistics from the first step on. A contender that
    freezes them on the way goes on with a second trainer, so that neither is
    compiled again.
    """

    def __init__(
        self, task, contender, optimizer, steps, frozen=False, epochs=EPOCHS
    ):
        self.arguments = (task, contender, optimizer, steps)
        self.contender = CONTENDERS[contender]
        self.model = make_model(contender, task, steps)
        if frozen:
            keras_renorm.freeze_statistics(self.model)
        decay = Constant if optimizer == "sgd_constant" else Cosine
        self.schedule = decay(steps)
        self.optimizer = OPTIMIZERS[optimizer](self.schedule)
        self.optimizer.build(self.model.trainable_variables)
        self.steps_per_epoch = steps // epochs
        self.model.compile(
            self.optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[_score(tasks.load(task, 0).is_segmentation)],
            # Steps this small cost less than going back to Python.
            steps_per_execution=self.steps_per_epoch,
        )
        self.callbacks = []
        if self.contender.scheduler is not None:
            limits = self.contender.scheduler(steps)
            self.callbacks.append(RenormScheduler(*limits))

    def reset(self, weights, rate):
        """Begins anew, from `weights`."""
        copy_weights(weights, self.model)
        self.schedule.rate.assign(rate)
        for variable in self.optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))

    def fit(self, weights, rate, rows, images, test):
        """Trains from `weights`; the model, and its curve.

        The curve is the test accuracy after each tenth of the training.
        """
        self.reset(weights, rate)
        dataset = minibatches(rows, images)
        share = self.contender.frozen_from
        frozen_from = EPOCHS if share is None else round(share * EPOCHS)
        curve = self._fit(dataset, test, 0, frozen_from)
        if share is None:
            return self.model, curve
        frozen = _trainer(*self.arguments, frozen=True)
        copy_weights(layer_weights(self.model), frozen.model)
        frozen.schedule.rate.assign(rate)
        for old, new in zip(
            self.optimizer.variables, frozen.optimizer.variables, strict=True
        ):
            new.assign(old)
        return frozen.model, curve + frozen._fit(
            dataset, test, frozen_from, EPOCHS
        )

    def _fit(self, dataset, test, begin, end):
        if begin == end:
            return []
        history = self.model.fit(
            dataset.skip(begin * self.steps_per_epoch),
            steps_per_epoch=self.steps_per_epoch,
            initial_epoch=begin,
            epochs=end,
            validation_data=test,
            validation_batch_size=len(test.x),
            callbacks=self.callbacks,
            shuffle=False,  # drawn already
            verbose=0,
        )
        return history.history["val_accuracy"]


# Many trainings differ in rate and seed only: tracing takes as long as two.
_trainer = functools.lru_cache(3)(Trainer)


def _recalibrated(model, images, test):
    """Accuracy with the statistics of all of `images`."""
    try:
        keras_renorm.recalibrate(model, images.x, batch_size=512, verbose=False)
    except ValueError:
        # Diverged: activations are not finite, and nothing mends that.
        if np.isfinite(model(test.x, training=False)).all():
            raise
    return accuracy(model, test)


def accuracy(model, images):
    """Share of the images that are classified right, in inference."""
    score = _score(images.y.ndim > 1)
    score.update_state(images.y, model(images.x, training=False))
    return float(score.result())
