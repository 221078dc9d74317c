# %% [markdown]
# # Several hosts, with `fit`, on JAX
#
# Keras 3's `fit` does not run under TensorFlow's `MultiWorkerMirroredStrategy`
# (`03_multi_worker.py` has a loop of its own). On Keras's JAX backend it runs
# over as many processes as there are hosts: here two on one machine. Each has
# half of every batch, the digits 0 to 4 or 5 to 9, and normalizes with the
# statistics of the whole batch: JAX sees one batch, wherever its parts lie.
#
# Start it with
#
# ```bash
# pip install ".[tutorials]" jax
# for i in 0 1; do
#     python tutorials/10_several_hosts_jax.py --processes 2 --process $i &
# done; wait
# ```
#
# and once more alone, with all examples in one process: the same losses.
#
# ```bash
# python tutorials/10_several_hosts_jax.py
# ```
#
# **On a cluster of hosts with GPUs** the program is the same.
#
# - Install JAX with CUDA (`pip install "jax[cuda13]"`). Its processes talk by
#   NCCL then, and not by Gloo.
# - One process a host, with all GPUs of the host. `--coordinator` is the
#   address of process 0, the same on each host; its port must be open between
#   them. Under Slurm or Open MPI `keras.distribution.initialize()` without
#   arguments finds out all three.
# - A host's share of a batch must be divisible by the number of its GPUs.
# - Each host reads its own share (`auto_shard_dataset=False`). With the default
#   each is given whole batches of a `tf.data.Dataset`, and takes its part.
# - Process 0 saves, to a place that outlives it.
#
# (As far as it could be tried: on CPUs.) Takes half a minute on two CPU cores.

# %%
import json
import os

os.environ["KERAS_BACKEND"] = "jax"
# How processes talk where the devices are CPUs.
os.environ.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")

import lesson

args = lesson.options(
    "10_several_hosts_jax",
    processes=1,
    process=0,
    coordinator="127.0.0.1:23460",
    steps=100,
    epochs=4,
    batch_size=32,
    least={"process": 0},
    notes={
        "processes": "how many",
        "process": "which of them",
        "steps": "of an epoch",
        "batch_size": "of all",
    },
)

# %%
import keras
import numpy as np
from keras import layers

import keras_renorm

if args.process >= args.processes:
    args.fail("need --process below --processes")
if args.batch_size % (2 * args.processes):
    args.fail("need --batch-size divisible by 2 * --processes")

# %% [markdown]
# ## One distribution over all processes
#
# Before anything else is computed, and before the model is made. The same seed
# everywhere: all processes begin with the same weights.

# %%
keras.utils.set_random_seed(0)
if args.processes > 1:
    keras.distribution.initialize(
        args.coordinator, args.processes, args.process
    )
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
print(f"Process {args.process} of {args.processes} has started")

# %% [markdown]
# ## Each process's share of each batch
#
# The first half of a batch are digits 0 to 4, the second 5 to 9. Two processes
# see nothing that they share; their statistics would not be those of the batch.

# %%
x_train, y_train, x_val, y_val = lesson.train_and_validation()
rng = np.random.default_rng(0)
halves = [
    rng.choice(np.flatnonzero(mine), (args.steps, args.batch_size // 2))
    for mine in (y_train < 5, y_train >= 5)
]
batches = np.concatenate(halves, axis=1)
share = np.split(batches, args.processes, axis=1)[args.process]
print(f"Process {args.process}: digits {np.unique(y_train[share]).tolist()}")


# %% [markdown]
# ## Model and `fit`, as on one device
#
# `synchronized=True` may be given and changes nothing: on JAX a batch is one
# batch. `fit` counts in the shares of this process.

# %%
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same", use_bias=False),
        keras_renorm.BatchRenormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
        keras_renorm.BatchRenormalization(momentum=0.9),
        layers.ReLU(),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10),
    ]
)
model.compile(
    keras.optimizers.SGD(0.05, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
history = model.fit(
    x_train[share.ravel()],
    y_train[share.ravel()],
    batch_size=share.shape[1],
    epochs=args.epochs,
    shuffle=False,
    verbose=0,
)
losses = history.history["loss"]
print(f"Process {args.process}: losses {[f'{loss:.5f}' for loss in losses]}")

# %% [markdown]
# ## All processes have the same model
#
# Each saves it; one file is enough. It loads anywhere, on any backend, without
# a distribution, and predicts for itself.

# %%
name = f"{args.process}_of_{args.processes}"
model.save(args.output / f"{name}.keras")
(args.output / f"{name}.json").write_text(json.dumps(losses))
keras.distribution.set_distribution(None)
model = keras.saving.load_model(args.output / f"{name}.keras")
accuracy = np.mean(model.predict(x_val, verbose=0).argmax(axis=-1) == y_val)
print(f"Process {args.process}: accuracy {accuracy:.3f}")

# %%
if args.is_whole:
    assert accuracy > 0.9
