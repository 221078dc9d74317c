"""Which computation a step takes. The numbers are the same to rounding."""

import math
from typing import Any

import keras

from keras_renorm._backend import runtime
from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import tf
from keras_renorm._step.pooling import ALONE, Pool

# A tensor of fewer elements is normalized with plain operations in a graph:
# below, the fused operators' fixed cost outweighs what they save. A training
# step on two cores, plain over fused: 0.78 at 50,000 elements, (16, 14, 14,
# 16); 1.02 at 100,000, (32, 14, 14, 16); 1.14 at 131,000, (32, 8, 8, 64); 1.6
# at 524,000, (32, 32, 32, 16).
SMALL_ELEMENTS = 100_000


# In `fit` the batch size is unknown while the graph is built; Keras's default
# is assumed.
ASSUMED_BATCH_SIZE = 32


# cuDNN normalizes by given statistics no more than this along the first axis.
LARGEST_BATCH_OF_CUDNN = 65_535


# Operations after which the fused operator infers fastest: TensorFlow's
# optimizer joins it, and the activation, to a convolution without bias; and an
# argument of a graph cannot be written over.
JOINED = ("Conv2D", "Placeholder")


def statistics_dtype(dtype: Any) -> str:
    """The type that statistics are computed and stored in: float32 at least."""
    # Not `result_type`, which gives float32 for float64 on Keras's JAX backend.
    is_double = keras.backend.standardize_dtype(dtype) == "float64"
    return "float64" if is_double else "float32"


def choose(
    inputs: Tensor,
    axis: int,
    mask: Tensor | None,
    pool: Pool = ALONE,
    is_corrected: bool = False,
    is_moving: bool = False,
    is_forward: bool = False,
) -> str:
    """Which computation, by its name.

    - "fused": TensorFlow's fused operators, near the bandwidth limit.
    - "affine": x a + b, with moving statistics (`is_moving`) in a graph.
      TensorFlow writes both passes over what the operation before wrote, and
      joins the second with a residual network's sum; the fused operator
      writes to new memory, and in networks that takes longer. Not in 16
      bits, which that operator reads as they are, nor after `JOINED`.
    - "matrix": plain operations on a `(rows, channels)` view. Under XLA,
      where the fused training operator computes E[x²] - E[x]² and 4-D
      reductions are slow; for small tensors in a graph; to train one channel,
      whose elements the fused operator adds one by one: of 2**24 its variance
      is off by 3 %.
    - "plain": operations of `keras.ops` on any axis, with a mask, in groups,
      in float64 (which the fused operators do not take), on other backends;
      and in forward mode (`is_forward`), which in a graph passes by the
      gradients that the others have.
    - "corrected": the same operations, with the corrected gradient written out
      (`is_corrected`; not in forward mode, where nothing is remembered).
    - "aten": PyTorch's operators, on a CPU.

    Neither does a GPU take more examples than `LARGEST_BATCH_OF_CUDNN`.

    Where replicas share statistics, or the gradient is corrected, the fused
    path is for channels last: the operator for its gradient takes no other
    layout.
    """
    plain = "corrected" if is_corrected and not is_forward else "plain"
    if mask is not None or pool.virtual_batch_size is not None or is_forward:
        return plain
    if not runtime.has_fused_operators():
        return "aten" if runtime.has_aten(inputs) else plain
    if keras.backend.standardize_dtype(inputs.dtype) not in (
        "float32",
        "bfloat16",
        "float16",
    ):
        return plain
    is_last = axis == len(inputs.shape) - 1
    is_one = inputs.shape[axis] == 1 and not is_moving
    if (
        is_one
        or _is_compiled_by_xla(inputs)
        or _is_too_large_for_cudnn(inputs, axis)
    ):
        return "matrix" if is_last else plain
    if (is_corrected or pool.spans_replicas) and not is_last:
        return plain
    if tf.executing_eagerly() and (
        is_moving or not runtime.runs_as_one_graph()
    ):
        return "fused"  # one operator, one dispatch
    if is_moving and is_last:
        is_joined = inputs.op.type in JOINED or inputs.dtype != tf.float32
        return "fused" if is_joined else "affine"
    sizes = [ASSUMED_BATCH_SIZE if n is None else n for n in inputs.shape]
    if math.prod(sizes) >= SMALL_ELEMENTS:
        return "fused"
    return "matrix" if is_last else plain


def _is_too_large_for_cudnn(inputs: Tensor, axis: int) -> bool:
    """Whether it is known that the first axis of a `FusedView` is."""
    if axis == len(inputs.shape) - 1:
        axis = 0 if axis == 1 else 1  # rows are on another axis
    batch = math.prod(size or 1 for size in inputs.shape[:axis])
    return batch > LARGEST_BATCH_OF_CUDNN and runtime.has_gpu()


def _is_compiled_by_xla(inputs: Tensor) -> bool:
    """Whether the graph that `inputs` belongs to will be compiled by XLA.

    TensorFlow has no public way to ask. While it traces a function with
    `jit_compile=True`, the function's graph, or one outside it, has a
    control-flow context of this name.
    """
    graph = getattr(inputs, "graph", None)
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if type(context).__name__ == "XLAControlFlowContext":
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False
