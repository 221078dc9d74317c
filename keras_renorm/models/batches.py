"""Batches of data, from whatever holds them."""

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree


class Batches:
    """Batches, from whatever holds them.

    Iterating gives `(x, y, sample_weight)`; the last two are `None` where the
    data has none. See `recalibrate` for what `dataset` can be; whether arrays
    are one input or several is told by `inputs`, how many the model has.

    Raises:
        TypeError: If `dataset` is of another kind.
        ValueError: If it is empty, never ends while `steps` is `None`, has
            arrays of unequal length, or is known to hold fewer than `steps`
            batches.
    """

    def __init__(
        self, dataset: Any, steps: int | None, batch_size: int, inputs: int
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        # A list is the inputs of a model with several, or else of batches.
        self.is_list_of_inputs = (
            isinstance(dataset, list) and inputs > 1 and len(dataset) == inputs
        )
        self.asked = steps
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
        if steps is not None and self.known is not None and steps > self.known:
            raise self._too_few(self.known)

    @property
    def steps(self) -> int | None:
        """Number of batches to come, where it is known."""
        if self.asked is not None:
            return self.asked
        return None if self.known is None else int(self.known)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        for at, batch in enumerate(self._all_batches()):
            if self.asked is not None and at == self.asked:
                return
            yield keras.utils.unpack_x_y_sample_weight(batch)

    def check_complete(self, seen: int) -> None:
        """Raises if the data ran out, or there was none."""
        if seen == 0:
            raise ValueError(
                "`dataset` must hold at least one batch. Received: "
                f"dataset={_described(self.dataset)}, which is empty."
            )
        if self.asked is not None and seen < self.asked:
            raise self._too_few(seen)

    def check_repeatable(self) -> None:
        """Raises if the data can be read only once."""
        if isinstance(self.dataset, Iterator):
            raise ValueError(
                "`dataset` must be one that can be read again where "
                "layer_by_layer=True. Received: dataset="
                f"{_described(self.dataset)}."
            )

    def _too_few(self, found: float) -> ValueError:
        return ValueError(
            "`steps` must not be above the number of batches in `dataset`. "
            f"Received: steps={self.asked}, for {found} batches."
        )

    def _known_steps(self) -> float | None:
        if isinstance(self.dataset, keras.utils.PyDataset):
            count = self.dataset.num_batches
            return math.inf if count is None else count
        if hasattr(self.dataset, "cardinality"):  # tf.data
            count = int(self.dataset.cardinality())
            return {-1: math.inf, -2: None}.get(count, count)
        if self._is_arrays:
            return math.ceil(self._examples / self.batch_size)
        if not hasattr(self.dataset, "__iter__"):
            raise TypeError(
                "`dataset` must be arrays, a tf.data.Dataset, a PyDataset or "
                "an iterable of batches. Received: dataset="
                f"{_described(self.dataset)}."
            )
        return None

    @property
    def _is_arrays(self) -> bool:
        if isinstance(self.dataset, Iterator):
            return False
        if isinstance(self.dataset, list) and not self.is_list_of_inputs:
            return False
        leaves = tree.flatten(self.dataset)
        return bool(leaves) and all(
            isinstance(leaf, np.ndarray) or ops.is_tensor(leaf)
            for leaf in leaves
        )

    @property
    def _examples(self) -> int:
        sizes = {len(leaf) for leaf in tree.flatten(self.dataset)}
        if len(sizes) > 1:
            raise ValueError(
                "`dataset` must hold arrays of the same length. Received: "
                f"lengths {sorted(sizes)}."
            )
        return sizes.pop()

    def _all_batches(self) -> Iterator[Any]:
        if self._is_arrays:
            for begin in range(0, self._examples, self.batch_size):
                part = slice(begin, begin + self.batch_size)
                batch = tree.map_structure(
                    lambda leaf, part=part: leaf[part], self.dataset
                )
                yield (batch,) if self.is_list_of_inputs else batch
        elif isinstance(self.dataset, keras.utils.PyDataset):
            for index in range(self.steps or 0):
                yield self.dataset[index]
        else:
            yield from self.dataset


def _described(dataset: Any) -> str:
    return f"<{type(dataset).__name__}>"
