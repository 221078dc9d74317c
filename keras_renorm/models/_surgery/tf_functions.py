"""TensorFlow's functions, as tf_keras keeps them in a graph, in `keras.ops`.

What is made so is part of a Keras graph, and of its file.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

# What Keras does not resize images by, and says in a call only.
LACKING_INTERPOLATIONS = {"gaussian", "mitchellcubic"}


# The length of a tensor, where it depends on the data.
_UNKNOWN = object()


def apply(
    function: Callable[..., Any],
    symbol: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
    shape_of: Callable[[Any], Any],
) -> Any:
    """The outputs of a function of TensorFlow, by operations of Keras.

    Args:
        function: The function of TensorFlow.
        symbol: Its public name, without `tf.`.
        arguments: Keras tensors, and values; of the shape of a tensor, sizes.
        named: The same by name.
        output: The output in tf_keras.
        shape_of: The shape of that, `None` where it varies.

    Returns:
        Keras tensors; a value where it was called with values only.

    Raises:
        NotImplementedError: If Keras has no such operation.
        Exception: What the operation raises.
    """
    symbol = symbol.removeprefix("compat.v1.")
    if not any(
        isinstance(leaf, keras.KerasTensor)
        for leaf in tree.flatten((arguments, named))
    ):
        return _of_values(function, symbol, arguments, named, output)
    arguments, named = _as_written(function, arguments, named)
    if symbol in ("reshape", "image.resize"):
        known = _RESHAPING[symbol](shape_of(output))
        arguments = (arguments[0], known, *arguments[2:])
    if _has_unknown(arguments, named):
        raise NotImplementedError("of a size that is not known")
    if symbol == "shape":
        return _shape(*arguments)
    if symbol not in _FUNCTIONS:
        raise NotImplementedError
    try:
        inspect.signature(_FUNCTIONS[symbol]).bind(*arguments, **named)
    except TypeError:
        raise NotImplementedError("with these arguments") from None
    return tree.map_structure(
        _of_the_type, _FUNCTIONS[symbol](*arguments, **named), output
    )


def _of_values(
    function: Callable[..., Any],
    symbol: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> Any:
    if not _has_unknown(arguments, named):
        return tree.map_structure(np.asarray, function(*arguments, **named))
    if symbol == "__operators__.getitem" and isinstance(arguments[0], tuple):
        item = arguments[1]
        return arguments[0][item[0] if isinstance(item, tuple) else item]
    if symbol == "unstack":
        return list(arguments[0])
    if any(not tensor.dtype.is_integer for tensor in tree.flatten(output)):
        raise NotImplementedError("of a size that is not known")
    # Good for a shape that is known otherwise, and for nothing else.
    return tree.map_structure(lambda _: _UNKNOWN, output)


def _has_unknown(*structures: Any) -> bool:
    for leaf in tree.flatten(structures):
        is_slice = isinstance(leaf, slice)
        parts = (leaf.start, leaf.stop, leaf.step) if is_slice else (leaf,)
        if any(part is _UNKNOWN for part in parts):
            return True
    return False


def _of_the_type(new: Any, old: Any) -> Any:
    """A tensor, of the type that it had in TensorFlow."""
    if not isinstance(new, keras.KerasTensor) or new.dtype == old.dtype.name:
        return new
    kinds = {
        dtype.rstrip("0123456789") for dtype in (new.dtype, old.dtype.name)
    }
    if len(kinds) > 1:
        raise NotImplementedError(f"of type {old.dtype.name}")
    return ops.cast(new, old.dtype.name)


def _as_written(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position as far as that goes, without those by default."""
    signature = inspect.signature(function)
    given = signature.bind(*arguments, **named).arguments
    by_position: list[Any] = []
    by_name: dict[str, Any] = {}
    is_contiguous = True
    for name, parameter in signature.parameters.items():
        if name == "name" or name not in given:
            is_contiguous = False
        elif parameter.kind is parameter.VAR_POSITIONAL:
            by_position.extend(given[name])
        elif parameter.kind is parameter.VAR_KEYWORD:
            by_name.update(given[name])
        elif given[name] is parameter.default or (
            isinstance(given[name], bool | int | float | str)
            and type(given[name]) is type(parameter.default)
            and given[name] == parameter.default
        ):
            is_contiguous = False
        elif is_contiguous:
            by_position.append(given[name])
        else:
            by_name[name] = given[name]
    return tuple(by_position), by_name


def _new_shape(shape: Any) -> list[int]:
    """What a tensor is reshaped to, with -1 for a size that varies."""
    sizes = [-1 if size is None else size for size in shape]
    if sizes.count(-1) > 1:
        raise NotImplementedError("to a shape that is not known")
    return sizes


def _new_size(shape: Any) -> tuple[int, int]:
    """The height and width that images are resized to."""
    height, width = shape[-3:-1]
    if height is None or width is None:
        raise NotImplementedError("to a size that is not known")
    return height, width


_RESHAPING = {"reshape": _new_shape, "image.resize": _new_size}


def _shape(tensor: Any, *out_type: Any) -> tuple[Any, ...]:
    return tuple(_UNKNOWN if size is None else size for size in tensor.shape)


def _with_lists(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of one tensor, with lists for arrays: for its file."""

    def as_list(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else value

    @functools.wraps(operation)
    def with_lists(tensor: Any, *arguments: Any, **named: Any) -> Any:
        given = tree.map_structure(as_list, (arguments, named))
        return operation(tensor, *given[0], **given[1])

    return with_lists


def _pad(
    tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0
) -> Any:
    given = {"constant_values": constant_values} if mode == "CONSTANT" else {}
    widths = np.asarray(paddings).tolist()
    return ops.pad(tensor, widths, mode.lower(), **given)


def _split(value: Any, num_or_size_splits: Any, axis: int = 0) -> Any:
    parts = num_or_size_splits
    if np.ndim(parts) == 0:
        return ops.split(value, int(parts), axis)
    sizes = [int(size) for size in parts]
    if -1 in sizes:
        sizes[sizes.index(-1)] += value.shape[axis] - sum(sizes)
    return ops.split(value, list(itertools.accumulate(sizes))[:-1], axis)


def _gather(params: Any, indices: Any, axis: int = 0) -> Any:
    return ops.take(params, indices, axis)


def _matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False
) -> Any:
    return ops.matmul(
        ops.swapaxes(a, -1, -2) if transpose_a else a,
        ops.swapaxes(b, -1, -2) if transpose_b else b,
    )


def _one_hot(indices: Any, depth: int, dtype: Any = "float32") -> Any:
    return ops.one_hot(indices, depth, dtype=dtype)


def _resize(
    images: Any, size: Any, method: str = "bilinear", antialias: bool = False
) -> Any:
    if method in LACKING_INTERPOLATIONS:
        raise NotImplementedError(f"with method={method}")
    # Of 16 bits, too, TensorFlow gives 32 for all but the nearest.
    if method != "nearest":
        images = ops.cast(images, "float32")
    return ops.image.resize(
        images, size, method, antialias, data_format="channels_last"
    )


def _l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12) -> Any:
    squares = ops.sum(ops.square(x), axis, keepdims=True)
    return ops.multiply(x, ops.rsqrt(ops.maximum(squares, epsilon)))


def _norm(
    tensor: Any, ord: Any = None, axis: Any = None, keepdims: bool = False
) -> Any:
    if ord not in (None, "euclidean", 2) or not (
        axis is None or isinstance(axis, int)
    ):
        raise NotImplementedError(f"with ord={ord}")
    return ops.sqrt(ops.sum(ops.square(tensor), axis, keepdims=keepdims))


def _pool(operation: Callable[..., Any]) -> Callable[..., Any]:
    def pool(input: Any, ksize: Any, strides: Any, padding: str) -> Any:
        return operation(
            input,
            *map(_of_space, (ksize, strides)),
            padding.lower(),
            "channels_last",
        )

    return pool


def _of_space(sizes: Any) -> Any:
    """Without those of batch and channels, which are 1."""
    if np.ndim(sizes) == 0 or len(sizes) < 4:
        return sizes
    if sizes[0] != 1 or sizes[-1] != 1:
        raise NotImplementedError("across examples or channels")
    return tuple(sizes[1:-1])


def _strided_slice(
    input_: Any,
    begin: Any,
    end: Any,
    strides: Any = None,
    begin_mask: int = 0,
    end_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Any:
    def item(axis: int) -> Any:
        step = None if strides is None else int(strides[axis])
        first = None if begin_mask >> axis & 1 else int(begin[axis])
        last = None if end_mask >> axis & 1 else int(end[axis])
        is_one = shrink_axis_mask >> axis & 1
        return first if is_one else slice(first, last, step)

    return input_[tuple(map(item, range(len(begin))))]


def _slice(input_: Any, begin: Any, size: Any) -> Any:
    return input_[
        tuple(
            slice(int(first), None if length == -1 else int(first + length))
            for first, length in zip(begin, size, strict=True)
        )
    ]


def _sum_of(inputs: list[Any]) -> Any:
    total, *others = inputs
    for other in others:
        total = ops.add(total, other)
    return total


def _reverse(tensor: Any, axis: Any) -> Any:
    # One after the other: early versions of Keras take one axis only.
    for place in np.ravel(axis):
        tensor = ops.flip(tensor, int(place))
    return tensor


_MATH_NAMES = (
    "abs add ceil cos cosh divide_no_nan equal erf exp expm1 floor greater "
    "greater_equal less less_equal log log1p logical_and logical_not "
    "logical_or logical_xor maximum minimum multiply negative not_equal "
    "reciprocal round rsqrt sigmoid sign sin sinh softplus sqrt square "
    "subtract tan tanh"
)
_NN_NAMES = "elu leaky_relu log_softmax relu relu6 selu silu softmax softsign"
_SAME_NAMES = "cast einsum ones_like stack stop_gradient tensordot zeros_like"
_SIZE_NAMES = "broadcast_to expand_dims repeat reshape squeeze tile transpose"
# Of later versions of Keras.
_NEW_NAMES = ("depth_to_space", "space_to_depth")
# By their public names, those that the operators of Python call as well.
# The arguments are TensorFlow's, by position and by name.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"math.{name}": getattr(ops, name) for name in _MATH_NAMES.split()},
    **{
        f"math.reduce_{name}": _with_lists(getattr(ops, name))
        for name in ("all", "any", "max", "mean", "min", "prod", "std", "sum")
    },
    **{f"nn.{name}": getattr(ops, name) for name in _NN_NAMES.split()},
    **{name: getattr(ops, name) for name in _SAME_NAMES.split()},
    **{name: _with_lists(getattr(ops, name)) for name in _SIZE_NAMES.split()},
    **{
        f"nn.{name}": getattr(ops, name)
        for name in _NEW_NAMES
        if hasattr(ops, name)
    },
    "__operators__.add": ops.add,
    "__operators__.eq": ops.equal,
    "__operators__.getitem": lambda tensor, item: tensor[item],
    "__operators__.ne": ops.not_equal,
    "clip_by_value": _with_lists(ops.clip),
    "concat": ops.concatenate,
    "floor_div": ops.floor_divide,
    "gather": _gather,
    "identity": lambda input: input,
    "image.flip_left_right": lambda image: ops.flip(image, -2),
    "image.resize": _resize,
    "keras.backend.batch_flatten": lambda x: ops.reshape(
        x, (-1, math.prod(x.shape[1:]))
    ),
    "linalg.matmul": _matmul,
    "math.add_n": _sum_of,
    "math.argmax": lambda input, axis=0: ops.argmax(input, axis),
    "math.argmin": lambda input, axis=0: ops.argmin(input, axis),
    "math.cumsum": lambda x, axis=0: ops.cumsum(x, axis),
    "math.divide": ops.divide,
    "math.floordiv": ops.floor_divide,
    "math.floormod": ops.mod,
    "math.l2_normalize": _l2_normalize,
    "math.log_sigmoid": ops.log_sigmoid,
    "math.pow": ops.power,
    "math.reduce_logsumexp": _with_lists(ops.logsumexp),
    "math.reduce_variance": _with_lists(ops.var),
    "math.squared_difference": lambda x, y: ops.square(ops.subtract(x, y)),
    "math.truediv": ops.divide,
    "nn.avg_pool2d": _pool(ops.average_pool),
    "nn.avg_pool": _pool(ops.average_pool),
    "nn.bias_add": lambda value, bias: ops.add(value, np.asarray(bias)),
    "nn.gelu": lambda features, approximate=False: ops.gelu(
        features, approximate
    ),
    "nn.max_pool": _pool(ops.max_pool),
    "nn.max_pool2d": _pool(ops.max_pool),
    "norm": _norm,
    "one_hot": _one_hot,
    "pad": _pad,
    "reverse": _reverse,
    "slice": _slice,
    "split": _split,
    "strided_slice": _strided_slice,
    "unstack": lambda value, num=None, axis=0: ops.unstack(value, num, axis),
    # Of a condition alone, TensorFlow gives the places in another form.
    "where": lambda condition, x, y: ops.where(condition, x, y),
}
# What a function is as an activation of a layer, by its own name.
ACTIVATIONS = {
    **{name: name for name in _NN_NAMES.split()},
    "exp": "exponential",
    "gelu": "gelu",
    "log_softmax_v2": "log_softmax",
    "sigmoid": "sigmoid",
    "softmax_v2": "softmax",
    "softplus": "softplus",
    "swish": "silu",
    "tanh": "tanh",
}
