"""Runs Keras's batch normalization and ours on the cases where they differ.

    python benchmarks/differences.py

Prints one row a case: what Keras did, what keras_renorm did. Nothing is
looked up: every cell is computed here, with the Keras that is installed
(its `renorm=True` needs 3.14). The last cases run on two logical CPU devices
under `MirroredStrategy`. Takes about half a minute.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from rich.console import Console
from rich.table import Table

import keras_renorm

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, (64, 4)).astype("float32")


def keras_bn(**arguments):
    return keras.layers.BatchNormalization(**arguments)


def keras_renormalization(**arguments):
    return keras.layers.BatchNormalization(renorm=True, **arguments)


def trained_losses(layer, scale, shift):
    """Losses of a small classifier on inputs of some scale."""
    keras.utils.set_random_seed(0)
    x = RNG.normal(size=(512, 10)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    model = keras.Sequential(
        [
            keras.Input((10,)),
            layer(),
            keras.layers.Dense(32, activation="relu"),
            layer(),
            keras.layers.Dense(2),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(x * scale + shift, y, batch_size=8, epochs=3, verbose=0)
    return history.history["loss"]


def default_limits_from_step_zero(layer):
    inputs = [(1, 0), (100, 0), (0.01, 0), (1, 500)]
    finite = sum(
        bool(np.all(np.isfinite(trained_losses(layer, *scaling))))
        for scaling in inputs
    )
    return f"loss stays finite in {finite} of {len(inputs)} input scalings"


def limits_changed_after_compile(is_keras):
    """A model that is nothing but the layer: loss 1 if limits are closed."""
    if is_keras:
        layer = keras_renormalization(
            renorm_clipping={"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}
        )
    else:
        layer = keras_renorm.BatchRenormalization(r_max=1.0, d_max=0.0)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    before = model.train_on_batch(X, np.zeros_like(X))
    if is_keras:
        layer.renorm_clipping = {"rmax": 9.0, "rmin": 1 / 9, "dmax": 9.0}
    else:
        layer.r_max, layer.d_max = 9.0, 9.0
    after = model.train_on_batch(X, np.zeros_like(X))
    return "ignored" if abs(after - before) < 0.1 else "takes effect"


def moving_variance_written(layer):
    layer = layer(momentum=0.9)
    layer(X, training=True)
    layer.moving_variance.assign(np.full(4, 50.0))
    layer(X, training=True)
    value = float(np.mean(layer.moving_variance.numpy()))
    return f"one step after writing 50: {value:.1f}"


def one_nan_sample(layer):
    layer, bad = layer(), X.copy()
    bad[3, 1] = np.nan
    layer(bad, training=True)
    layer(X, training=True)
    poisoned = int(np.sum(~np.isfinite(layer.moving_mean.numpy())))
    return f"{poisoned} of 4 channels NaN for ever"


def empty_batch(layer):
    layer = layer()
    layer(X[:0], training=True)
    return _intact(layer)


def all_masked_batch(layer):
    layer = layer()
    layer.build((None, 5, 4))
    layer.moving_mean.assign(np.full(4, 2.0))
    inputs = ops.ones((3, 5, 4))
    layer(inputs, training=True, mask=ops.zeros((3, 5), bool))
    return _intact(layer, 2.0)


def _intact(layer, value=0.0):
    mean = layer.moving_mean.numpy()
    if np.allclose(mean, value):
        return "statistics unchanged"
    return f"moving mean {value} becomes {mean[0]:.3g}"


def mask_with_channels_first(layer):
    """Two of six time steps hidden; channels on axis 1."""
    layer = layer(axis=1, momentum=0.0)
    inputs = np.moveaxis(RNG.normal(3.0, 1.0, (8, 6, 4)), -1, 1)
    mask = np.ones((8, 6), bool)
    mask[:, 4:] = False
    try:
        layer(inputs.astype("float32"), training=True, mask=mask)
    except Exception as error:
        return f"{type(error).__name__}"
    expected = inputs[:, :, :4].mean(axis=(0, 2))
    error = np.abs(layer.moving_mean.numpy() - expected).max()
    return "right" if error < 1e-5 else f"mean off by {error:.2g}"


def called_with_training_false(is_keras):
    """Fine-tuning through `base(x, training=False)`."""
    if is_keras:
        layer = keras_bn()
    else:
        layer = keras_renorm.BatchNormalization(frozen_statistics=True)
    inputs = keras.Input((4,))
    base = keras.Model(inputs, layer(inputs))
    outer = keras.Input((4,))
    model = keras.Model(outer, base(outer, training=False))
    model.compile("sgd", "mse")
    model.fit(X, X, epochs=2, verbose=0)
    moved = np.abs(layer.moving_mean.numpy()).max() > 0
    return "statistics move" if moved else "statistics stand"


def pure_float16(layer):
    layer = layer(dtype="float16")
    inputs = np.full((8, 4), 100.0, "float16")
    for _ in range(2_000):
        layer(inputs, training=True)
    return f"a mean of 100 reads {float(layer.moving_mean.numpy()[0]):.2f}"


def invalid_arguments(layer):
    accepted = []
    for name, value in (("momentum", 1.5), ("epsilon", -1.0)):
        try:
            layer(**{name: value})
        except ValueError:
            continue
        accepted.append(f"{name}={value}")
    return f"accepts {', '.join(accepted)}" if accepted else "ValueError"


def constant_channel(layer):
    layer = layer()
    outputs = layer(np.full((32, 56, 56, 2), 10000.7, "float32"), training=True)
    return f"a constant 10000.7 gives |y| = {np.abs(outputs).max():.2g}"


def gradient_penalty(layer):
    """The gradient of a squared gradient through two layers, as in WGAN-GP."""
    layers = [layer(dtype="float64"), layer(dtype="float64")]
    x = tf.constant(np.random.default_rng(0).normal(size=(16, 4)))
    shift = tf.Variable(np.zeros(4))

    def penalty():
        inputs = x
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            hidden = (layers[0](inputs, training=True) + shift) ** 3
            outputs = layers[1](hidden, training=True) ** 3
        return tf.reduce_sum(tape.gradient(outputs, inputs) ** 2)

    with tf.GradientTape() as tape:
        value = penalty()
    gradient = tape.gradient(value, shift).numpy()
    difference = np.zeros(4)
    for channel, step in enumerate(1e-6 * np.eye(4)):
        for sign in (1, -1):
            shift.assign(sign * step)
            difference[channel] += sign * penalty().numpy() / 2e-6
    error = np.abs(gradient - difference).max() / np.abs(difference).max()
    return f"off by {error:.0e} of its size"


def strategy():
    """Two replicas; one strategy for all cases, since two clash."""
    if not hasattr(strategy, "made"):
        strategy.made = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    return strategy.made


def train_on_replicas(layer, parts, masks=None):
    """A layer after a step in which each replica had its part."""
    with strategy().scope():
        layer.build((None, *parts[0].shape[1:]))

    def values_of(arrays):
        return strategy().experimental_distribute_values_from_function(
            lambda context: tf.constant(
                arrays[context.replica_id_in_sync_group]
            )
        )

    values = [values_of(parts)] + ([] if masks is None else [values_of(masks)])
    tf.function(
        lambda *values: strategy().run(
            lambda x, mask=None: layer(x, training=True, mask=mask), values
        )
    )(*values)
    return layer


def replicas_with_other_data(layer):
    """The same inputs, predicted on each replica."""
    with strategy().scope():
        model = keras.Sequential([keras.Input((4,)), layer(momentum=0.0)])
        model.compile("sgd", "mse")
    model.fit(np.concatenate([X[:8], X[:8] + 5]), np.zeros((16, 4)), verbose=0)
    outputs = model.predict(np.concatenate([X[:8], X[:8]]), verbose=0)
    apart = np.abs(outputs[:8] - outputs[8:]).max()
    return f"one input, two replicas: outputs differ by {apart:.2g}"


def empty_replica(layer):
    """`fit` with a last batch of one example."""
    with strategy().scope():
        normalization = layer()
        model = keras.Sequential(
            [keras.Input((4,)), normalization, keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse")
    model.fit(X[:9], np.zeros((9, 1)), batch_size=8, verbose=0)
    finite = np.all(np.isfinite(ops.convert_to_numpy(normalization.gamma)))
    return "all finite" if finite else "gamma is NaN"


def synchronized_mask(layer):
    """Two of six time steps hidden; replicas with other data."""
    parts = [X.reshape(8, 8, 4)[:, :6] + shift for shift in (0, 5)]
    mask = np.ones((8, 6), bool)
    mask[:, 4:] = False
    layer = layer(synchronized=True, momentum=0.0)
    train_on_replicas(layer, parts, [mask, mask])
    expected = np.mean([part[:, :4] for part in parts], axis=(0, 1, 2))
    error = np.abs(ops.convert_to_numpy(layer.moving_mean) - expected).max()
    return "right" if error < 1e-4 else f"mean off by {error:.2g}"


def synchronized_large_mean(layer):
    parts = np.float32(1e3 + RNG.normal(size=(2, 512, 4)))
    layer = layer(synchronized=True, momentum=0.0)
    train_on_replicas(layer, parts)
    expected = parts.reshape(-1, 4).astype("float64").var(axis=0)
    variance = ops.convert_to_numpy(layer.moving_variance)
    return f"variance off by {np.abs(variance / expected - 1).max():.1g}"


CASES = [
    (
        "renorm, default arguments",
        lambda: default_limits_from_step_zero(keras_renormalization),
        lambda: default_limits_from_step_zero(
            keras_renorm.BatchRenormalization
        ),
    ),
    (
        "renorm, limits changed after `compile`",
        lambda: limits_changed_after_compile(True),
        lambda: limits_changed_after_compile(False),
    ),
    (
        "renorm, `moving_variance` written",
        lambda: moving_variance_written(keras_renormalization),
        lambda: moving_variance_written(keras_renorm.BatchRenormalization),
    ),
    (
        "`base(x, training=False)` in fine-tuning",
        lambda: called_with_training_false(True),
        lambda: (
            called_with_training_false(False) + " with `frozen_statistics=True`"
        ),
    ),
    *(
        (
            name,
            lambda case=case: case(keras_bn),
            lambda case=case: case(keras_renorm.BatchNormalization),
        )
        for name, case in (
            ("one NaN sample", one_nan_sample),
            ("an empty batch", empty_batch),
            ("a batch that is all masked", all_masked_batch),
            ("`mask` with `axis=1`", mask_with_channels_first),
            ("`float16` policy, 2,000 steps", pure_float16),
            ("a constant channel, float32", constant_channel),
            ("invalid arguments", invalid_arguments),
            ("a gradient penalty through two layers", gradient_penalty),
            ("replicas with other data", replicas_with_other_data),
            ("a last batch that leaves a replica empty", empty_replica),
            ("`synchronized=True` and a mask", synchronized_mask),
            (
                "`synchronized=True`, mean / stddev = 1,000",
                synchronized_large_mean,
            ),
        )
    ),
]


def main():
    warnings.simplefilter("ignore")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    table = Table("case", f"Keras {keras.__version__}", "keras_renorm")
    for name, theirs, ours in CASES:
        row = []
        for run in (theirs, ours):
            try:
                row.append(run())
            except Exception as error:
                row.append(f"{type(error).__name__}: {error}"[:60])
        table.add_row(name, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
