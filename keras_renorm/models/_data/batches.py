"""Data for passes over a model, read as Keras reads it."""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_renorm._backend import watching
from keras_renorm._checks import check_integer
from keras_renorm.models._data.arrays import (
    as_arrays,
    check_inputs,
    checked_batch,
    converted,
    described,
    examples_of,
    inputs_of,
    is_array,
    length_of,
    rows_of,
)

# After so many batches of data of unknown length it is asked whether it ends.
MANY_BATCHES = 10_000
# Whose classes of data Keras's own loop reads.
_READ_BY_KERAS = {"grain", "keras", "tensorflow", "torch"}


class Batches:
    """Batches of a dataset, read by the model's own `predict`.

    So arrays, frames, sparse matrices, `tf.data`, `PyDataset`, loaders of
    PyTorch and the preprocessing of a model's own (of a task of keras-hub)
    are as in `fit`. An iterable of batches is read here: Keras takes a list
    for several inputs, and reads more of a generator than it uses.

    Args:
        dataset: As for `recalibrate`.
        steps: Number of batches, or `None` for all.
        batch_size: Examples a batch where `dataset` is arrays.
        model: The model that reads the data. Its inputs say whether arrays are
            one input or several, and the shapes that they must fit.
        is_most: Whether `steps` are the most, and fewer are no error.
        is_drawn: Whether, of arrays, the examples of `steps` batches are drawn
            at random, as `fit` draws them. Otherwise whole batches are taken
            at even distances. Either way they are from all of the arrays.

    Raises:
        TypeError, ValueError: As `recalibrate`, as far as it is known before
            the data is read.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        batch_size: int,
        model: Any,
        *,
        is_most: bool = False,
        is_drawn: bool = False,
    ) -> None:
        if steps is not None:
            steps = _checked_steps(steps)
        self.dataset = dataset
        self.batch_size = check_integer("batch_size", batch_size, 1)
        if not isinstance(model, keras.Model):
            model = keras.Sequential([model])
        self.model = model
        inputs = len(inputs_of(model) or [None])
        self._arrays = as_arrays(dataset, inputs)
        self.asked = steps
        self._is_most = is_most
        self.known = self._known_steps()
        if self.known == 0:
            raise _empty(dataset)
        if self.known == math.inf and steps is None:
            raise ValueError(
                "`steps` must be given for a dataset that never ends. "
                "Received: steps=None."
            )
        if self.known is not None:
            self._check_enough(self.known)
        if self._arrays is not None:
            if _own_predict(self.model) is None:  # which may change them
                check_inputs(model, self._arrays[0])
            if steps is not None and steps < (self.known or 0):
                self._arrays = self._rows_of_steps(steps, is_drawn)

    @property
    def steps(self) -> int | None:
        """Number of batches to come, where it is known."""
        known = [
            steps for steps in (self.asked, self.known) if steps is not None
        ]
        return int(min(known)) if known else None

    @property
    def is_repeatable(self) -> bool:
        """Whether the data can be read more than once."""
        return not isinstance(self.dataset, Iterator)

    def read(
        self, receive: Callable[[Any], None], verbose: int | bool = True
    ) -> int:
        """Calls `receive(batch)` for each batch; returns their number.

        A batch is what Keras hands to a step: `x`, `(x,)`, `(x, y)` or
        `(x, y, sample_weight)`.

        Raises:
            ValueError: If the data ran out, or there was none.
        """
        seen = 0

        def receive_one(batch: Any) -> None:
            nonlocal seen
            if seen == self.steps:  # of a `predict` that goes on
                return
            receive(batch)
            seen += 1
            if seen == MANY_BATCHES and self.steps is None:
                warnings.warn(
                    f"`dataset` goes on after {MANY_BATCHES:,} batches. If it "
                    "never ends, give `steps`.",
                    stacklevel=2,
                )

        if self._arrays is not None or _is_of_keras(self.dataset):
            # Labels come after: `predict` would take them for inputs.
            data, given = self.dataset, {"steps": self.asked}
            if self._arrays is not None:
                data, given = self._arrays[0], {"batch_size": self.batch_size}
            self._predict(
                lambda batch: receive_one(self._with_labels(batch, seen)),
                data,
                verbose=int(bool(verbose)),
                **given,
            )
        else:
            bar = keras.utils.Progbar(
                self.steps, verbose=int(bool(verbose)), unit_name="batch"
            )
            # Not through a generator of ours, which would close theirs when it
            # ends: of one that never ends, the next steps are read later.
            for batch in itertools.islice(iter(self.dataset), self.asked):
                self._receive_checked(checked_batch(batch), receive_one)
                bar.update(seen, finalize=False)
            bar.update(seen, finalize=True)
        if seen == 0:
            raise _empty(self.dataset)
        self._check_enough(seen)
        return seen

    def check_repeatable(self) -> None:
        """Raises if the data can be read only once."""
        if not self.is_repeatable:
            raise ValueError(
                "`dataset` must be one that can be read again where "
                "layer_by_layer=True. Received: dataset="
                f"{described(self.dataset)}."
            )

    def _receive_checked(
        self, batch: tuple[Any, ...], receive: Callable[[Any], None]
    ) -> None:
        """A batch that was read here, as a `predict` of its own makes it."""
        if _own_predict(self.model) is None:
            receive(batch)
            return
        x, *others = batch
        self._predict(
            lambda made: receive((_inputs_of(made), *others)),
            x,
            verbose=0,
            batch_size=examples_of(x),
        )

    def _predict(
        self, receive: Callable[[Any], None], data: Any, **given: Any
    ) -> None:
        """Reads data in Keras's loop, on the model's own `predict`."""
        predict = _own_predict(self.model)
        failures: list[BaseException] = []
        seen = 0

        def receive_or_note(batch: Any) -> None:
            nonlocal seen
            try:
                receive(batch)
                seen += 1
            except BaseException as error:
                failures.append(error)
                raise

        function = watching.predict_function(self.model, receive_or_note)
        for method in (predict, keras.Model.predict):
            if method is None or seen:
                continue
            before = self.model.predict_function
            self.model.predict_function = function
            try:
                with warnings.catch_warnings():
                    # It is an error here, below.
                    warnings.filterwarnings("ignore", ".*ran out of data")
                    method(self.model, data, **given)
            except Exception as error:
                # Keras's loop fails where there is no batch at all, and one of
                # the user's may not know what to make of our outputs.
                if failures or not (
                    isinstance(error, UnboundLocalError)
                    or (method is predict and seen)
                ):
                    raise
            finally:
                self.model.predict_function = before

    def _with_labels(self, batch: Any, index: int) -> Any:
        """A batch of arrays, of which Keras has read the inputs."""
        _, *others = self._arrays or (None,)
        if not others:
            return batch
        begin = index * self.batch_size
        rows = np.arange(
            begin, min(begin + self.batch_size, length_of(self._arrays or ()))
        )
        return _inputs_of(batch), *tree.map_structure(
            lambda leaf: converted(rows_of(leaf, rows)), others
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
            return math.ceil(length_of(self._arrays) / self.batch_size)
        if isinstance(self.dataset, keras.utils.PyDataset):
            count = self.dataset.num_batches
            return math.inf if count is None else count
        if callable(getattr(self.dataset, "cardinality", None)):  # tf.data
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
                f"{described(self.dataset)}."
            )
        return None

    def _rows_of_steps(self, steps: int, is_drawn: bool) -> tuple[Any, ...]:
        """So many batches, from all of the arrays."""
        arrays: Any = self._arrays
        examples, size = length_of(arrays), self.batch_size
        if is_drawn:
            drawn = np.random.default_rng(0).permutation(examples)
            rows = drawn[: steps * size]
        else:
            # The last batch, which may be smaller, only where all are taken.
            begins = np.linspace(0, examples // size - 1, steps).round()
            rows = (
                begins[:, np.newaxis].astype(int) * size + np.arange(size)
            ).ravel()

        def taken(leaf: Any) -> Any:
            # A file's rows can be read in ascending order only.
            places = np.argsort(rows)
            return rows_of(rows_of(leaf, rows[places]), np.argsort(places))

        return tuple(tree.map_structure(taken, list(arrays)))


def _inputs_of(batch: Any) -> Any:
    x, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    return x


def _own_predict(model: keras.Model) -> Any:
    """`predict` of a class of its own, if it takes the same arguments."""
    own = type(model).predict
    if own is keras.Model.predict:
        return None
    try:
        inspect.signature(own).bind(
            model, None, batch_size=None, steps=None, verbose=0
        )
    except TypeError:
        return None
    return own


def _is_of_keras(dataset: Any) -> bool:
    """Whether Keras's loop takes data of this class."""
    return not isinstance(dataset, Iterator) and any(
        parent.__module__.split(".")[0] in _READ_BY_KERAS
        for parent in type(dataset).__mro__
    )


def _checked_steps(steps: Any) -> int:
    if is_array(steps) or isinstance(steps, list):
        raise TypeError(
            "`steps` must be an integer. Received: "
            f"steps={described(steps)}. Labels belong to `dataset`: (x, y)."
        )
    return check_integer("steps", steps, minimum=1)


def _empty(dataset: Any) -> ValueError:
    return ValueError(
        "`dataset` must hold at least one batch. Received: "
        f"dataset={described(dataset)}, which is empty."
    )
