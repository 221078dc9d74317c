"""Which backend runs, what it can do, and where a computation runs.

Kernels for TensorFlow take `tf` from here; it is `None` where the backend is
another, as `torch` and `jax` are.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_renorm._backend.operations import Tensor, ops


def name() -> str:
    """The name of Keras's backend."""
    return str(keras.backend.backend())


def runs_on(backend: str) -> bool:
    """Whether it is this one."""
    return name() == backend


tf: Any = None
torch: Any = None
jax: Any = None
if runs_on("tensorflow"):
    import tensorflow

    tf = tensorflow
    try:
        # Private: see tests/test_private.py.
        from tensorflow.python.framework.config import (  # noqa: TID251
            is_op_determinism_enabled,
        )
    except ImportError:
        is_op_determinism_enabled = None
elif runs_on("jax"):
    import jax as jax_module

    jax = jax_module
elif runs_on("torch"):
    import torch as torch_module
    from torch import distributed

    torch = torch_module


def has_fused_operators() -> bool:
    """Whether there are TensorFlow's."""
    return runs_on("tensorflow")


def has_aten(inputs: Tensor) -> bool:
    """Whether PyTorch's operators take these inputs, and are the fast way.

    On a CPU. A compiler joins plain operations itself.
    """
    return (
        runs_on("torch")
        and inputs.device.type == "cpu"
        and inputs.is_floating_point()
        and inputs.numel() > 0
        and not torch.compiler.is_compiling()
    )


def records_operations() -> bool:
    """Whether PyTorch records what is computed, to take its gradient."""
    return runs_on("torch") and torch.is_grad_enabled()


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made, in which numbers of Python are fixed."""
    if runs_on("tensorflow"):
        return tf.is_symbolic_tensor(tensor)
    return runs_on("jax") and isinstance(tensor, jax.core.Tracer)


@functools.lru_cache(256)
def constant(value: float, dtype: str) -> Any:
    """A number that layers which share a graph may each have another of.

    A tensor on TensorFlow, and the same one each time: to make one takes time.
    """
    if not runs_on("tensorflow"):
        return value
    with tf.init_scope(), tf.device(None):
        return tf.constant(value, dtype)


def counter_dtype(dtype: str) -> str:
    """The type of a counter that means of weights do not cut, at least `dtype`.

    A float32 counts to 2**24; float64 is not on each device of the others.
    """
    return "float64" if runs_on("tensorflow") else dtype


def lets_keras_synchronize() -> bool:
    """Whether Keras's own layer takes `synchronized=True`."""
    return runs_on("tensorflow")


def lets_callbacks_reach_batches() -> bool:
    """Whether what a callback assigns within an epoch has an effect.

    During an epoch Keras's JAX trainer holds the weights itself.
    """
    return not runs_on("jax")


def replicas() -> Any:
    """The context of the replica that this runs in, `None` if it is alone.

    It is a strategy's of TensorFlow. `None`, too, outside the replicas: where
    a strategy builds or saves a model.
    """
    if not runs_on("tensorflow"):
        return None
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


def check_one_process() -> None:
    """Raises where PyTorch trains in several, which do not share statistics."""
    if not (
        runs_on("torch")
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        return
    count = distributed.get_world_size()
    if count > 1:
        raise RuntimeError(
            "`synchronized` must be False where several processes of PyTorch "
            "train: each would normalize its own examples. Received: "
            f"synchronized=True, {count} processes."
        )


def runs_as_one_graph() -> bool:
    """Whether `traced_when_eager` makes a graph here and now."""
    return (
        runs_on("tensorflow")
        and tf.executing_eagerly()
        and not tf.distribute.has_strategy()
        and not tf.config.functions_run_eagerly()
    )


def must_be_deterministic() -> bool:
    """Whether what differs from run to run on a GPU may run on one.

    TensorFlow has no public way to ask for the first half.
    """
    return (
        is_op_determinism_enabled is not None
        and is_op_determinism_enabled()
        and has_gpu()
    )


def has_gpu() -> bool:
    """Whether TensorFlow has a GPU, where it places what it can."""
    return bool(tf.config.list_physical_devices("GPU"))


def drops_what_is_unused() -> bool:
    """Whether what is made here is computed only if it is asked for."""
    return runs_on("tensorflow") and not tf.executing_eagerly()


def as_tensor(inputs: Any) -> Tensor:
    """Inputs, maybe a variable, as a tensor of the graph in the making."""
    if not runs_on("tensorflow"):
        return ops.convert_to_tensor(inputs)
    inputs = tf.convert_to_tensor(inputs)
    if tf.inside_function() and not tf.is_symbolic_tensor(inputs):
        return tf.identity(inputs)
    return inputs


def wait() -> None:
    """Waits until each `receive` of `report` has been called."""
    if runs_on("jax"):
        jax.effects_barrier()


def check_no_strategy() -> None:
    """Raises in the scope of a strategy, where Keras divides its losses."""
    if runs_on("tensorflow") and tf.distribute.has_strategy():
        raise RuntimeError(
            "Losses must be measured outside the scope of a distribution "
            "strategy, inside which Keras divides them by the number of "
            f"replicas. Received: {tf.distribute.get_strategy()!r}."
        )


def keeps_state_backwards() -> bool:
    """Whether a backward pass can write to variables; else `Accumulator`."""
    return not runs_on("jax")


def may_scale_loss(inputs: Any, dtype: str) -> bool:
    """Whether the loss may be multiplied, so that float16 holds its gradient.

    `dtype` is that of who asks, who may be of float32 in a network of float16.
    """
    if runs_on("torch"):
        kind = inputs.device.type
        if (
            kind != "meta"  # of a symbolic call, where PyTorch casts nothing
            and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.float16
        ):
            return True
    if "float16" in (dtype, keras.config.dtype_policy().compute_dtype):
        return True
    # The layer may be of another type, and the policy put back: there is no
    # public way to ask who trains.
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "train_step":
            model = frame.f_locals.get("self")
            optimizer = getattr(model, "optimizer", None)
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                return True
        frame = frame.f_back
    return False


def is_ragged(inputs: Any) -> bool:
    """Whether this is a `tf.RaggedTensor`."""
    return runs_on("tensorflow") and isinstance(inputs, tf.RaggedTensor)


def padded(ragged: Any, mask: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """A ragged tensor with padding, its mask, and a function back.

    `mask` is the one that a call was given with it, ragged or not.
    """
    present = tf.ones_like(ragged.flat_values[..., 0], tf.bool)
    present = ragged.with_flat_values(present).to_tensor(False)
    if mask is not None:
        mask = tf.cast(mask.to_tensor() if is_ragged(mask) else mask, tf.bool)
        while mask.shape.rank < present.shape.rank:
            mask = mask[..., tf.newaxis]
        present = tf.logical_and(present, mask)
    lengths = ragged.nested_row_lengths()

    def restore(outputs: Any) -> Any:
        return tf.RaggedTensor.from_tensor(
            outputs, lengths, ragged_rank=ragged.ragged_rank
        )

    return ragged.to_tensor(), present, restore


def track_parameters(find: Callable[[], Iterable[Any]]) -> None:
    """Lets PyTorch see the variables that the layers found have now.

    Keras tells it when a layer is built, and what a layer holds inside may have
    other variables since.
    """
    for layer in find() if runs_on("torch") else ():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()
