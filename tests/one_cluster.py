"""A parameter server and two workers, in one process: our layers train.

    python -m tests.one_cluster

Ends without an error if they do, and prints what is of interest. Started by
`test_multi_worker.py`; servers cannot be stopped, so it needs its process.
"""

import os
import socket

# With as many as a small machine has cores, servers of one process wait for
# each other.
os.environ["TF_NUM_INTEROP_THREADS"] = "8"

import keras
import numpy as np
import tensorflow as tf

import keras_renorm

STEPS = 100
KINDS = (
    (keras_renorm.BatchNormalization, {}),
    (keras_renorm.BatchNormalization, {"synchronized": True}),
    (keras_renorm.BatchRenormalization, {}),
)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start():
    """The servers, which live as long as they are held, and the strategy."""
    first, second, third = (f"127.0.0.1:{port}" for port in free_ports(3))
    cluster = tf.train.ClusterSpec({"worker": [first, second], "ps": [third]})
    servers = [
        tf.distribute.Server(cluster, job_name=job, task_index=task)
        for job, task in (("worker", 0), ("worker", 1), ("ps", 0))
    ]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, rpc_layer="grpc"
    )
    return servers, tf.distribute.ParameterServerStrategy(resolver)


def train(strategy, coordinator, kind, arguments):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (64, 4)).astype("float32")
    y = (x @ rng.normal(size=(4, 2))).astype("float32")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layer = kind(momentum=0.9, **arguments)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8),
                layer,
                keras.layers.Dense(2),
            ]
        )

    @tf.function
    def step(begin):
        def run():
            rows = slice(begin, begin + 16)
            with tf.GradientTape() as tape:
                outputs = model(tf.constant(x)[rows], training=True)
                loss = tf.reduce_mean((outputs - tf.constant(y)[rows]) ** 2)
            weights = [each.value for each in model.trainable_variables]
            for weight, gradient in zip(
                weights, tape.gradient(loss, weights), strict=True
            ):
                weight.assign_sub(0.01 * gradient)
            return loss

        return strategy.run(run)

    results = [
        coordinator.schedule(step, args=(tf.constant(at * 16 % 64),))
        for at in range(STEPS)
    ]
    coordinator.join()
    losses = [float(result.fetch()) for result in results]
    assert np.mean(losses[-4:]) < 0.1 * np.mean(losses[:4]), losses
    served = np.mean((keras.ops.convert_to_numpy(model(x)) - y) ** 2)
    assert served < 0.1 * losses[0], served
    print(kind.__name__, arguments, losses[0], losses[-1], served)
    if kind is keras_renorm.BatchRenormalization:
        print(f"{layer.current_step()} of {STEPS} steps were counted")
        assert STEPS / 2 <= layer.current_step() <= STEPS


if __name__ == "__main__":
    servers, strategy = start()
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    for kind, arguments in KINDS:
        train(strategy, coordinator, kind, arguments)
    print("trained", flush=True)
    os._exit(0)
