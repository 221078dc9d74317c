"""`keras.ops`, and on PyTorch the functions that do its work.

Before each operation Keras looks for symbols among the arguments and asks for
types and devices. Where nothing makes a graph of it once and for all, that
takes longer than an operation on a vector (a root of 64 numbers: 5.8 us by
Keras, 1.5 by PyTorch, 0.7 by NumPy), and a step has hundreds.
"""

import operator
from typing import Any

import keras
import numpy as np
from keras import ops as keras_ops

# Of any backend; there is no type that fits all of them.
Tensor = Any

ops: Any = keras_ops


if keras.backend.backend() == "torch":
    import torch

    def _either(of_torch: Any, of_numpy: Any) -> Any:
        def operation(x: Any, *arguments: Any, **named: Any) -> Any:
            is_tensor = isinstance(x, torch.Tensor)
            return (of_torch if is_tensor else of_numpy)(x, *arguments, **named)

        return staticmethod(operation)

    def _cast(x: Any, dtype: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(
                getattr(torch, dtype) if isinstance(dtype, str) else dtype
            )
        return x.astype(dtype) if hasattr(x, "astype") else x

    def _sum(x: torch.Tensor, axis: Any = None) -> torch.Tensor:
        # PyTorch takes no axes for all of them.
        if axis is None or isinstance(axis, int) or axis:
            return torch.sum(x, axis)
        return x

    class _OfTorch:
        """`keras.ops`, of tensors or of arrays (`tracing.by_numpy`).

        Numbers have the type of what is beside them.
        """

        abs = _either(torch.abs, np.abs)
        # Methods: NumPy's functions of these names ask first, what takes as
        # long as they do.
        all = staticmethod(lambda x: x.all())
        any = staticmethod(lambda x: x.any())
        cast = staticmethod(_cast)
        clip = _either(
            torch.clamp,
            lambda x, low, high: np.minimum(np.maximum(x, low), high),
        )
        # Keras's, and its `max` from a value on, read numbers back from
        # tensors, which those of a symbolic call have not.
        full_like = _either(torch.full_like, np.full_like)
        isfinite = _either(torch.isfinite, np.isfinite)
        log = _either(torch.log, np.log)
        logical_and = staticmethod(operator.and_)
        maximum = _either(lambda x, y: torch.clamp(x, min=y), np.maximum)
        minimum = _either(lambda x, y: torch.clamp(x, max=y), np.minimum)
        ones_like = _either(torch.ones_like, np.ones_like)
        power = _either(torch.pow, np.power)
        rsqrt = _either(torch.rsqrt, lambda x: 1.0 / np.sqrt(x))
        shape = staticmethod(lambda x: tuple(x.shape))
        sigmoid = _either(torch.sigmoid, lambda x: 1.0 / (1.0 + np.exp(-x)))
        sqrt = _either(torch.sqrt, np.sqrt)
        square = _either(torch.square, np.square)
        stop_gradient = _either(torch.Tensor.detach, lambda x: x)
        sum = _either(_sum, lambda x, axis=None: x.sum(axis))
        unstack = _either(
            lambda x, num=None, axis=0: torch.unbind(x, axis),
            lambda x, num=None, axis=0: tuple(x.T if axis else x),
        )
        zeros_like = _either(torch.zeros_like, np.zeros_like)

        @staticmethod
        def max(x: Any, axis: Any = None, **named: Any) -> Any:
            if isinstance(x, np.ndarray):
                return x.max(axis, **named)
            if "initial" in named and x.numel():
                least = named.pop("initial")
                return keras_ops.max(x, axis, **named).clamp(min=least)
            return keras_ops.max(x, axis, **named)

        @staticmethod
        def stack(values: Any) -> Any:
            is_tensor = isinstance(values[0], torch.Tensor)
            return (torch.stack if is_tensor else np.array)(values)

        @staticmethod
        def where(condition: Any, x1: Any, x2: Any) -> Any:
            is_tensor = isinstance(condition, torch.Tensor)
            return (torch.where if is_tensor else np.where)(condition, x1, x2)

        def __getattr__(self, name: str) -> Any:
            return getattr(keras_ops, name)

    ops = _OfTorch()
