"""Calls of layers, asked how far what they give depends on."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend.variables import to_numpy
from keras_renorm.models._layers.finding import inside

# What differs by less, of the largest output, is rounding.
ROUNDING = 1e-4
# A layer is asked on maps of this size at least, where it takes them. One that
# sees all of them may have a large kernel: it is asked once more, on a long and
# narrow map.
PROBED = 64
LONG, NARROW = 1024, 4
ATTENTION = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)


class Call:
    """A call of a layer, as it was with the first window.

    Attributes:
        layer: The layer.
        given: Its arguments, those with names too, in a flat list.
        outputs: What it gave.
    """

    def __init__(
        self, layer: Any, arguments: Any, named: Any, outputs: Any
    ) -> None:
        self.layer, self.outputs = layer, outputs
        self.given = tree.flatten((arguments, named))
        self._form = tree.map_structure(lambda _: None, (arguments, named))

    @cached_property
    def main(self) -> int | None:
        """Which of what it was given is the map: the largest."""
        sizes = {
            index: math.prod(each.shape)
            for index, each in enumerate(self.given)
            if _is_map(each)
        }
        return max(sizes, key=lambda index: sizes[index], default=None)

    @property
    def rearranges(self) -> bool:
        """Whether it gives the values of a map, in another form."""
        if isinstance(self.layer, keras.layers.Reshape | keras.layers.Permute):
            return len(self.outputs.shape) >= 3
        old = None if self.main is None else self.given[self.main]
        new = self.outputs
        if (
            old is None
            or not _is_map(new)
            or old.shape == new.shape
            or math.prod(old.shape) != math.prod(new.shape)
        ):
            return False
        old, new = (np.sort(each, axis=None) for each in arrays([old, new]))
        return np.array_equal(old, new)

    def sees_all(self, axis: int, axes: Sequence[int]) -> bool:
        """Whether what is far away along an axis changes what it gives.

        One half of its inputs is changed, and the farthest eighth of its
        outputs looked at. What gives one size whatever it sees, sees all.
        """
        others = [each for each in axes if each != axis]
        try:
            return self._gives_one_size(axis) or (
                self._is_changed_afar(axis, PROBED)
                and self._is_changed_afar(axis, LONG, others)
            )
        except Exception:
            # It takes inputs of one size only. A block of layers may reach
            # that far without seeing everything.
            is_block = inside(self.layer) and not isinstance(
                self.layer, ATTENTION
            )
            return not is_block and self._is_changed_afar(axis, 1)

    def _gives_one_size(self, axis: int) -> bool:
        main = self.given[self.main or 0]
        size = main.shape[axis]
        old = tensors_of(self.outputs)
        if all(
            len(each.shape) != len(main.shape) or each.shape[axis] == size
            for each in old
        ):
            return False
        larger, _ = self._inputs(axis, max(PROBED, 2 * size))
        return any(
            len(before.shape) == len(main.shape)
            and size != before.shape[axis] == after.shape[axis]
            for before, after in zip(old, self._again(larger), strict=True)
        )

    def _is_changed_afar(
        self, axis: int, size: int, narrowed: Sequence[int] = ()
    ) -> bool:
        rank = len(self.given[self.main or 0].shape)
        outputs = map(self._again, self._inputs(axis, size, narrowed))
        return any(
            _differs_afar(old, new, axis, rank)
            for old, new in zip(*outputs, strict=True)
        )

    def _inputs(
        self, axis: int, size: int, narrowed: Sequence[int] = ()
    ) -> tuple[list[Any], list[Any]]:
        """What it was given, repeated to a size, and with one half changed."""
        main = self.given[self.main or 0]
        repeats = -(-size // main.shape[axis])
        random = np.random.default_rng(0)
        before, after = list(self.given), list(self.given)
        for index, each in enumerate(self.given):
            if not _is_map(each) or len(each.shape) != len(main.shape):
                continue
            if each.shape[axis] == 1 < main.shape[axis]:  # one for all pixels
                continue
            (values,) = arrays([each])
            for other in narrowed:
                few = range(min(values.shape[other], NARROW))
                values = values.take(few, other)
            values = np.concatenate([values] * repeats, axis)
            noise = random.normal(
                scale=float(values.std()) or 1.0, size=values.shape
            )
            half = np.arange(values.shape[axis]) < values.shape[axis] // 2
            noise *= half.reshape([-1] + [1] * (values.ndim - axis - 1))
            before[index] = ops.cast(values, each.dtype)
            after[index] = ops.cast(
                values + noise.astype(values.dtype), each.dtype
            )
        return before, after

    def _again(self, given: Sequence[Any]) -> list[np.ndarray]:
        """Its outputs for other inputs."""
        arguments, named = tree.pack_sequence_as(self._form, list(given))
        with keras.StatelessScope():
            outputs = self.layer(*arguments, **named)
        return arrays(tensors_of(outputs))


def _differs_afar(
    old: np.ndarray, new: np.ndarray, axis: int, rank: int
) -> bool:
    if old.ndim == rank and old.shape[axis] > 1:
        far = range(old.shape[axis] * 7 // 8, old.shape[axis])
        old, new = old.take(far, axis), new.take(far, axis)
    limit = ROUNDING * np.abs(old).max(initial=1e-30)
    differs = np.abs(new - old) > limit
    if 2 < old.ndim != rank:
        # Where the half that is far away lies in it is not known.
        return bool(differs.mean() > 3 / 4)
    return bool(differs.any())


def _is_map(tensor: Any) -> bool:
    return len(
        getattr(tensor, "shape", ())
    ) >= 3 and "float" in keras.backend.standardize_dtype(tensor.dtype)


def tensors_of(structure: Any) -> list[Any]:
    """What of a structure has a shape."""
    return [each for each in tree.flatten(structure) if hasattr(each, "shape")]


def arrays(tensors: Sequence[Any]) -> list[np.ndarray]:
    """The values of tensors, in a type that NumPy computes in."""
    return [to_numpy(ops.cast(each, "float32")) for each in tensors]
