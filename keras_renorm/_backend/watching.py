"""What a layer reports while a model runs, and the steps of Keras's loops."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import tree

from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.runtime import jax, name, runs_on, tf
from keras_renorm._backend.variables import to_numpy

if runs_on("jax"):
    from jax.experimental import io_callback


def report(
    receive: Callable[..., None], tensors: Sequence[Tensor], outputs: Tensor
) -> Tensor:
    """`outputs`, after `receive(*arrays)` got the values of tensors.

    From any place in a graph: a tensor inside a loop or a conditional cannot
    leave it, but its values can. `receive` is called once for each iteration of
    a loop, and not at all where nothing uses `outputs`: Keras runs the first
    step of a loop once more, to see the shapes that it makes.
    """
    if runs_on("tensorflow"):
        rank = len(outputs.shape)

        def received(*arrays: np.ndarray) -> np.ndarray:
            receive(*arrays)
            return np.zeros(rank, "int32")

        # All of the outputs, from a place that only the call tells: TensorFlow
        # drops what is only waited for, and what it can see to change nothing.
        begin = tf.numpy_function(
            received, list(tensors), tf.int32, stateful=False
        )
        begin = tf.ensure_shape(begin, [rank])
        told = tf.slice(outputs, begin, tf.shape(outputs))
        told.set_shape(outputs.shape)
        return told
    if runs_on("jax") and any(
        isinstance(each, jax.core.Tracer) for each in tensors
    ):
        io_callback(receive, None, *tensors)
    else:
        receive(*map(to_numpy, tensors))
    return outputs


def predict_function(model: Any, receive: Callable[[Any], None]) -> Any:
    """What `model.predict` runs in the place of a step: it only reads.

    `receive` gets each batch, on the host, whole where replicas share it. On
    JAX the model has its variables meanwhile, which Keras takes from it.
    """

    def by_tensorflow(batches: Sequence[Any]) -> Tensor:
        whole = functools.partial(_whole, strategy=model.distribute_strategy)
        return by_torch(tree.map_structure(whole, batches))

    def by_torch(batches: Sequence[Any]) -> Tensor:
        for batch in batches:
            receive(batch)
        return ops.zeros((1,))

    def by_jax(state: Any, iterator: Any) -> tuple[Tensor, Any]:
        for variables, values in zip(
            (model.trainable_variables, model.non_trainable_variables),
            state,
            strict=True,
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        receive(next(iterator))  # at the end of the data it ends Keras's loop
        for batch in itertools.islice(iterator, model.steps_per_execution - 1):
            receive(batch)
        return ops.zeros((1,)), state

    return {
        "tensorflow": by_tensorflow,
        "jax": by_jax,
        "torch": by_torch,
    }[name()]


def _whole(leaf: Any, strategy: Any) -> Any:
    """A part of a batch of Keras's loop, as a model takes it."""
    if isinstance(leaf, tf.experimental.Optional):
        return None
    if isinstance(leaf, tf.distribute.DistributedValues):
        return tf.concat(strategy.experimental_local_results(leaf), axis=0)
    return leaf


def step_arguments(model: Any, name: str, batch: Any) -> tuple[Any, ...]:
    """Arguments of a `train_step`, `test_step` or `predict_step`."""
    if not runs_on("jax"):
        return (batch,)
    state = [model.trainable_variables, model.non_trainable_variables]
    if name == "train_step":
        optimizer = getattr(model, "optimizer", None)  # if it is compiled
        state.append(getattr(optimizer, "variables", []))
    if name != "predict_step":
        state.append(model.metrics_variables)
    return [[each.value for each in group] for group in state], batch


def with_size(
    values: Tensor,
    axis: int,
    size: int,
    check: Callable[[Any], None] | None = None,
) -> Tensor:
    """`values`, the size of an axis known while a graph is built.

    Values that turn out to have another size are an error: that of
    `check(size of the axis)`, which is called where the size was not known.
    (A graph that was made for several shapes knows none, and would broadcast.)
    """
    if values.shape[axis] is not None:
        return values
    shape = [size if at == axis else None for at in range(len(values.shape))]
    if check is None:
        return tf.ensure_shape(values, shape)
    checked = tf.numpy_function(check, [tf.shape(values)[axis]], [])
    with tf.control_dependencies([checked]):
        return tf.ensure_shape(values, shape)
