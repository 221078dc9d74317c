"""Graphs of functions, and what variables hold, on each backend."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import backend, ops

if backend.backend() == "tensorflow":
    import tensorflow as tf
elif backend.backend() == "jax":
    import jax
    from jax.experimental import io_callback

Tensor = Any


def as_one_graph(method: Any) -> Any:
    """A method of a layer, as a graph of its own where it is called eagerly.

    In eager mode each operation on a vector costs its dispatch, and a step
    has some fifty of them. The arguments are tensors, or values that the
    graph is made anew for; what the method reads of the layer but does not
    get as an argument must not change. Under a distribution strategy, and on
    other backends, it is the method itself.
    """
    if backend.backend() != "tensorflow":
        return method
    graph = tf.function(method, autograph=False, reduce_retracing=True)

    @functools.wraps(method)
    def called(self: Any, *arguments: Any) -> Any:
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            # By way of the descriptor, which holds the layer weakly.
            return graph.__get__(self, type(self))(*arguments)
        return method(self, *arguments)

    return called


def compiled(function: Any) -> Any:
    """A function of tensors as a graph, where the backend has graphs."""
    if backend.backend() != "tensorflow":
        return function
    return tf.function(function, autograph=False, reduce_retracing=True)


def tell(
    receive: Callable[..., None], tensors: Sequence[Tensor], outputs: Tensor
) -> Tensor:
    """`outputs`, after `receive(*arrays)` got the values of tensors.

    Wherever they stand: a tensor inside a loop or a conditional cannot leave
    it, while its values can. Once for each time that a loop runs through, and
    not at all where nobody uses `outputs`: Keras runs the first step of a loop
    once more, to see the shapes that it makes.
    """
    if backend.backend() == "tensorflow":
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
    if backend.backend() == "jax" and any(
        isinstance(each, jax.core.Tracer) for each in tensors
    ):
        io_callback(receive, None, *tensors)
    else:
        receive(*map(ops.convert_to_numpy, tensors))
    return outputs


def wait() -> None:
    """Waits until all that was told is received."""
    if backend.backend() == "jax":
        jax.effects_barrier()


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


def value_and_gradients(function: Any) -> tuple[Any, Any]:
    """`function(weights, *arguments)`, and it with gradients, as graphs.

    `weights` is a list of tensors; the function returns a number and keeps no
    state. The second graph returns `(value, gradients)`, the gradients a list
    of dense tensors, zero for a weight that the value does not depend on.
    """
    if backend.backend() == "tensorflow":

        def differentiated(
            weights: list[Tensor], *arguments: Any
        ) -> tuple[Tensor, list[Tensor]]:
            with tf.GradientTape() as tape:
                tape.watch(weights)
                value = function(weights, *arguments)
            gradients = tape.gradient(
                value, weights, unconnected_gradients="zero"
            )
            # That of a table that is looked up in is sparse.
            return value, [tf.convert_to_tensor(each) for each in gradients]

        return compiled(function), compiled(differentiated)
    if backend.backend() == "jax":
        return jax.jit(function), jax.jit(jax.value_and_grad(function))
    raise RuntimeError(
        "The backend of Keras must be TensorFlow or JAX. "
        f"Received: {backend.backend()}."
    )


def check_no_strategy() -> None:
    """Raises in the scope of a strategy, where Keras divides its losses."""
    if backend.backend() == "tensorflow" and tf.distribute.has_strategy():
        raise RuntimeError(
            "Losses must be measured outside the scope of a distribution "
            "strategy, inside which Keras divides them by the number of "
            f"replicas. Received: {tf.distribute.get_strategy()!r}."
        )


def read(variable: Any, dtype: str) -> Tensor:
    """The value of a variable as it is now, in a type."""
    if backend.backend() == "tensorflow":
        return tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return ops.cast(variable.value, dtype)


def adder(variables: list[Any]) -> Any:
    """A function that adds to variables in a backward pass.

    It takes the changes and the results of the pass, and returns the results.
    These wait for the additions: the backward pass of a graph computes what
    its results need, and nothing else. In a `keras.StatelessScope`, where
    variables stand for tensors, nothing is added, whenever the gradient is
    asked for.
    """
    targets = [variable.value for variable in variables]

    def add(changes: list[Tensor], results: list[Tensor]) -> list[Tensor]:
        added = [
            target.assign_add(tf.cast(change, target.dtype), read_value=False)
            for target, change in zip(targets, changes, strict=True)
            if hasattr(target, "assign_add")
        ]
        if tf.executing_eagerly():
            return results
        with tf.control_dependencies(added):
            return [tf.identity(result) for result in results]

    return add


def to_numpy(variable: Any) -> np.ndarray:
    """A copy of the value of a variable.

    Not of the variable itself, of which NumPy 2 warns.
    """
    return np.array(ops.convert_to_numpy(read(variable, variable.dtype)))
