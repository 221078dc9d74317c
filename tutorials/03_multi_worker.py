# %% [markdown]
# # Several workers
#
# The same as `02_replicas.py` with processes that talk over the network, one
# for each machine of a cluster: here two on one machine. Each worker reads
# digits of its own, 0 to 4 and 5 to 9, and normalizes with the statistics of
# the whole minibatch all the same.
#
# Start it with these two commands, in one shell (or without the `&` in two):
#
# ```bash
# TF_CONFIG='{"cluster": {"worker": ["127.0.0.1:23450", "127.0.0.1:23451"]},
#     "task": {"type": "worker", "index": 1}}' \
#     python tutorials/03_multi_worker.py &
# TF_CONFIG='{"cluster": {"worker": ["127.0.0.1:23450", "127.0.0.1:23451"]},
#     "task": {"type": "worker", "index": 0}}' \
#     python tutorials/03_multi_worker.py
# ```
#
# **On a cluster** the program is the same. In `TF_CONFIG`, the addresses are
# those of the machines, and each machine gets its own `index`; the ports must
# be open between them. `--output` must be a folder of each worker's own, or
# one that all can write. Nothing else changes: with GPUs each worker has as
# many replicas as it has GPUs.
#
# Keras 3's `fit` does not run under `MultiWorkerMirroredStrategy` (an error in
# Keras, with any model: its issue 20585), so this is a training loop of our
# own. Takes about 20 seconds on two CPU cores. Needs
# `pip install ".[tutorials]"`.

# %%
import lesson

args = lesson.options(
    "03_multi_worker",
    steps=400,
    batch_size=16,
    notes={"batch_size": "of a worker"},
)

# %%
import json
import os

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_renorm

if "TF_CONFIG" not in os.environ:
    args.fail("TF_CONFIG must be set; the two commands are in this file")

# %% [markdown]
# ## The strategy
#
# It waits until all workers have started. It must be made before TensorFlow
# does anything else.

# %%
task = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
strategy = tf.distribute.MultiWorkerMirroredStrategy()
workers = strategy.num_replicas_in_sync
lesson.say(f"Worker {task} of {workers} has started")

# %% [markdown]
# ## The data
#
# `distribute_datasets_from_function` takes each worker's own dataset.

# %%
x_train, y_train, x_val, y_val = lesson.train_and_validation()


def dataset_of(context):
    """Endless minibatches of this worker's digits."""
    mine = y_train * workers // 10 == context.input_pipeline_id
    examples = tf.data.Dataset.from_tensor_slices(
        (x_train[mine], y_train[mine])
    )
    examples = examples.shuffle(len(x_train), seed=task).repeat()
    return examples.batch(args.batch_size)


batches = iter(strategy.distribute_datasets_from_function(dataset_of))

# %% [markdown]
# ## The model
#
# Made in the strategy's scope, like the optimizer. `synchronized=True` is all
# that the layers need.

# %%
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            keras_renorm.BatchNormalization(momentum=0.9, synchronized=True),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
            keras_renorm.BatchRenormalization(
                momentum=0.9, synchronized=True, r_max=2.0, d_max=2.0
            ),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=None
    )

# %% [markdown]
# ## The training step
#
# The optimizer adds the replicas' gradients up. So each replica divides the
# losses of its examples by the size of the *whole* minibatch.


# %%
@tf.function
def train_step(iterator):
    """One step on all workers; the mean loss of the whole minibatch."""

    def run(x, y):
        with tf.GradientTape() as tape:
            losses = loss_of(y, model(x, training=True))
            loss = tf.reduce_sum(losses) / (args.batch_size * workers)
        weights = [weight.value for weight in model.trainable_variables]
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )
        return loss

    losses = strategy.run(run, args=next(iterator))
    return strategy.reduce("SUM", losses, axis=None)


for _ in range(args.steps):
    loss = train_step(batches)

# %% [markdown]
# ## All workers have the same model
#
# Each predicts for itself; no worker needs another one for that.

# %%
predict = tf.function(lambda x: model(x, training=False))
with strategy.scope():
    accuracy = np.mean(predict(x_val).numpy().argmax(axis=-1) == y_val)
lesson.say(f"Worker {task}: loss {loss:.4f}, accuracy {accuracy:.3f}")

# %% [markdown]
# ## Save
#
# Every worker must call `save`: it may have to wait for the others. Worker 0's
# file is the one to keep. It loads anywhere, without a strategy.

# %%
path = args.output / f"worker_{task}.keras"
model.save(path)
lesson.say(f"Worker {task}: saved {path}")

# %%
if args.is_whole:
    assert accuracy > 0.9
