"""Replicas, each with statistics of its own."""

import keras
import numpy as np
import pytest

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.callbacks import RenormScheduler
from tests import helpers

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


@pytest.fixture(scope="module")
def strategy():
    # One a process: two of them clash.
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.mark.parametrize("kind", [BatchNormalization, BatchRenormalization])
@pytest.mark.parametrize("sizes", [(4,), (24, 24, 8)], ids=["small", "fused"])
def test_fit_and_a_last_batch_that_leaves_a_replica_empty(
    kind, sizes, strategy, rng
):
    with strategy.scope():
        layer = kind(momentum=0.5)
        model = keras.Sequential(
            [keras.Input(sizes), layer, keras.layers.Dense(2)]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
    x = helpers.inputs_of(rng, (33, *sizes))
    y = np.zeros((33, *sizes[:-1], 2))
    callbacks = [RenormScheduler()] if kind is BatchRenormalization else []
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    for weight in model.weights:
        assert np.all(np.isfinite(helpers.to_numpy(weight))), weight.path
    assert np.all(helpers.statistics(layer)[0] != 0)
    if callbacks:
        assert layer.current_step() == 10
        assert layer.current_limits() == (3.0, 5.0)
    outputs = model.predict(x, verbose=0)
    assert np.all(np.isfinite(outputs))


@pytest.mark.parametrize("sizes", [(4,), (24, 24, 8)], ids=["small", "fused"])
def test_a_replica_normalizes_its_own_examples(sizes, strategy, rng):
    with strategy.scope():
        layer = BatchNormalization()
        layer.build((None, *sizes))
    x = helpers.inputs_of(rng, (8, *sizes))
    parts = iter(np.split(x, 2))
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(next(parts))
    )
    outputs = tf.function(
        lambda values: strategy.run(
            lambda part: layer(part, training=True), (values,)
        )
    )(values)
    single = BatchNormalization()
    for part, result in zip(
        np.split(x, 2),
        strategy.experimental_local_results(outputs),
        strict=True,
    ):
        helpers.assert_close(result, single(part, training=True), 1e-5)
