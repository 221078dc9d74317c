"""Batches of data, from whatever holds them."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm import arguments


class Batches:
    """Batches, from whatever holds them.

    Iterating gives `(x, y, sample_weight)`; the last two are `None` where the
    data has none.

    Args:
        dataset: As for `recalibrate`.
        steps: Number of batches, or `None` for all.
        batch_size: Examples a batch where `dataset` is arrays.
        model: Its inputs say whether arrays are one input or several, and what
            they must fit.
        is_most: Whether `steps` are the most, and fewer are no error.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range; if the dataset is empty,
            never ends while `steps` is `None`, has arrays of unequal length,
            is a list of inputs and labels, does not fit the inputs of the
            model, or is known to hold fewer than `steps` batches.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        batch_size: int,
        model: Any,
        *,
        is_most: bool = False,
    ) -> None:
        if steps is not None:
            steps = arguments.check_integer("steps", steps, minimum=1)
        self.dataset = dataset
        self.batch_size = arguments.check_integer("batch_size", batch_size, 1)
        self.model = model
        inputs = len(_inputs_of(model) or [None])
        self._arrays = _as_arrays(dataset, inputs)
        self.asked = steps
        self._is_most = is_most
        self.known = self._known_steps()
        if self.known == 0:
            raise ValueError(
                "`dataset` must hold at least one batch. Received: "
                f"dataset={_described(dataset)}, which is empty."
            )
        if self.known == math.inf and steps is None:
            raise ValueError(
                "`steps` must be given for a dataset that never ends. "
                "Received: steps=None."
            )
        if self.known is not None:
            self._check_enough(self.known)
        if self._arrays is not None:
            check_inputs(model, self._arrays[0])

    @property
    def steps(self) -> int | None:
        """Number of batches to come, where it is known."""
        known = [each for each in (self.asked, self.known) if each is not None]
        return int(min(known)) if known else None

    @property
    def is_repeatable(self) -> bool:
        """Whether the data can be read more than once."""
        return not isinstance(self.dataset, Iterator)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        for batch in itertools.islice(self._all_batches(), self.asked):
            x, y, sample_weight = _unpacked(batch)
            check_inputs(self.model, x)
            yield x, y, sample_weight

    def check_complete(self, seen: int) -> None:
        """Raises if the data ran out, or there was none."""
        if seen == 0:
            raise ValueError(
                "`dataset` must hold at least one batch. Received: "
                f"dataset={_described(self.dataset)}, which is empty."
            )
        self._check_enough(seen)

    def check_repeatable(self) -> None:
        """Raises if the data can be read only once."""
        if not self.is_repeatable:
            raise ValueError(
                "`dataset` must be one that can be read again where "
                "layer_by_layer=True. Received: dataset="
                f"{_described(self.dataset)}."
            )

    def _check_enough(self, found: float) -> None:
        if self.asked is None or self._is_most or self.asked <= found:
            return
        raise ValueError(
            "`steps` must not be above the number of batches in `dataset`. "
            f"Received: steps={self.asked}, for {found} batches."
        )

    def _known_steps(self) -> float | None:
        if self._arrays is not None:
            return math.ceil(_examples(self._arrays) / self.batch_size)
        if isinstance(self.dataset, keras.utils.PyDataset):
            count = self.dataset.num_batches
            return math.inf if count is None else count
        if hasattr(self.dataset, "cardinality"):  # tf.data
            count = int(self.dataset.cardinality())
            return {-1: math.inf, -2: None}.get(count, count)
        if (
            not hasattr(self.dataset, "__iter__")
            # What has a shape, but is no array, has rows and not batches.
            or isinstance(self.dataset, str | bytes | dict | tuple)
            or hasattr(self.dataset, "shape")
        ):
            raise TypeError(
                "`dataset` must be arrays, a tf.data.Dataset, a PyDataset or "
                "an iterable of batches. Received: dataset="
                f"{_described(self.dataset)}."
            )
        return None

    def _all_batches(self) -> Iterator[Any]:
        if self._arrays is not None:
            return self._slices(self._arrays)
        if isinstance(self.dataset, keras.utils.PyDataset):
            return (self.dataset[index] for index in range(self.steps or 0))
        # Not through a generator of ours, which would close theirs when it
        # ends: of one that never ends, the next steps are read later.
        return iter(self.dataset)

    def _slices(self, arrays: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        for begin in range(0, _examples(arrays), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            yield tuple(
                tree.map_structure(lambda leaf, at=part: leaf[at], each)
                if each is not None
                else None
                for each in arrays
            )


def check_inputs(model: Any, x: Any, name: str = "dataset") -> None:
    """Raises if a batch of arrays does not fit the inputs of a model.

    Keras checks shapes where it traces a graph, and not again where the graph
    takes a shape that was generalized: a batch of labels is broadcast there.
    """
    inputs = _inputs_of(model)
    if not inputs:
        return
    pairs: list[tuple[Any, Any]]
    if isinstance(x, dict):
        # What is not an input, Keras leaves out.
        named = {each.name: each for each in inputs}
        pairs = [(x[key], named[key]) for key in named if key in x]
    else:
        leaves = tree.flatten(x)
        if len(leaves) != len(inputs):
            raise ValueError(
                f"`{name}` must give as many arrays of inputs as the model "
                f"has. Received: {len(leaves)} for {len(inputs)} of "
                f"model={model.name}."
            )
        pairs = list(zip(leaves, inputs, strict=True))
    for array, expected in pairs:
        # Of another rank, Keras adds or drops an axis where it can.
        fits = len(array.shape) != len(expected.shape) or all(
            None in sizes or sizes[0] == sizes[1]
            for sizes in zip(array.shape[1:], expected.shape[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"`{name}` must give inputs of the model's shapes. Received: "
                f"a batch of shape {tuple(array.shape)}, for "
                f"{tuple(expected.shape)} of model={model.name}."
            )


def _inputs_of(model: Any) -> list[Any]:
    """The symbolic inputs of a model, none where it is subclassed."""
    return list(getattr(model, "inputs", None) or [])


def _is_array(value: Any) -> bool:
    return len(getattr(value, "shape", ())) > 0 and (
        ops.is_tensor(value) or hasattr(value, "__array__")
    )


def _is_arrays(structure: Any) -> bool:
    leaves = tree.flatten(structure)
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves)


def _converted(structure: Any) -> Any:
    """Frames as arrays; of a series a column, as Keras makes it."""

    def converted(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) or ops.is_tensor(leaf):
            return leaf
        array = np.asarray(leaf)
        if array.ndim == 1 and hasattr(leaf, "to_frame"):
            return array[:, np.newaxis]
        return array

    return tree.map_structure(converted, structure)


def _as_arrays(dataset: Any, inputs: int) -> tuple[Any, ...] | None:
    """`(x,)`, `(x, y)` or `(x, y, sample_weight)`, if `dataset` is arrays."""
    if isinstance(dataset, Iterator):
        return None
    if isinstance(dataset, list):
        if inputs > 1 and len(dataset) == inputs and _is_arrays(dataset):
            return (_converted(dataset),)
        _check_list(dataset)
        return None
    if isinstance(dataset, tuple) and dataset:
        x, *others = dataset
        if _is_arrays(x):
            _check_parts(others)
            return tuple(
                part if part is None else _converted(part) for part in dataset
            )
        return None
    if isinstance(dataset, dict) or _is_array(dataset):
        return (_converted(dataset),) if _is_arrays(dataset) else None
    return None


def _check_list(dataset: list[Any]) -> None:
    """Raises if a list of arrays is inputs and labels, and not batches."""
    if not all(map(_is_array, dataset)):
        return
    shapes = [tuple(each.shape) for each in dataset]
    # Batches differ in length, or in what comes between it and the channels.
    ranks, lengths, widths = (
        len(set(each))
        for each in (
            map(len, shapes),
            (shape[0] for shape in shapes),
            (shape[-1] for shape in shapes),
        )
    )
    if ranks > 1 or (lengths == 1 and widths > 1):
        raise ValueError(
            "`dataset` must be a tuple where it is inputs and labels, (x, y), "
            "and hold tuples where it is a list of batches, [(x,), (x,)]. "
            f"Received: a list of arrays of shapes {shapes[:3]}."
        )


def _check_parts(others: list[Any]) -> None:
    """Raises if what comes after x are neither labels nor weights."""
    fits = len(others) <= 2 and all(
        part is None or _is_arrays(part) for part in others
    )
    if not fits:
        described = ["array(s)", *map(_described, others)]
        raise TypeError(
            "`dataset` must be x, (x, y) or (x, y, sample_weight), of arrays, "
            f"where it is a tuple. Received: ({', '.join(described)})."
        )


def _examples(arrays: tuple[Any, ...]) -> int:
    sizes = {
        int(leaf.shape[0])
        for each in arrays
        if each is not None
        for leaf in tree.flatten(each)
    }
    if len(sizes) > 1:
        raise ValueError(
            "`dataset` must hold arrays of the same length. Received: "
            f"lengths {sorted(sizes)}."
        )
    return sizes.pop()


def _unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """x, y and weights of a batch, of arrays."""
    parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if not 1 <= len(parts) <= 3 or not _is_arrays(parts[0]):
        found = ", ".join(map(_described, parts[:4]))
        raise TypeError(
            "`dataset` must give batches of arrays: x, (x, y) or (x, y, "
            f"sample_weight). Received: a batch of {found}."
        )
    x, y, sample_weight = (
        part if part is None or not _is_arrays(part) else _converted(part)
        for part in (*parts, None, None)[:3]
    )
    return x, y, sample_weight


def _described(value: Any) -> str:
    return f"<{type(value).__name__}>"
