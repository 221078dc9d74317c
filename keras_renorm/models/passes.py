"""Passes over data that watch what goes through a model's normalization."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm import backend, functional, kernels
from keras_renorm.models.batches import Batches
from keras_renorm.models.calls import replaced_calls
from keras_renorm.models.feeding import Feed, Feeder
from keras_renorm.models.finding import describe
from keras_renorm.operations import Tensor

# Batch means that scatter by this much of the standard deviation of all data,
# where batches are no random draws. A smaller scatter harms there: what the
# examples of a batch have in common is taken from them in training.
GROUPED = 0.1

# Of a batch: layers, and what a call of each reported.
Calls = list[tuple[Any, Any]]


class LayerCall:
    """A call of a layer that is watched.

    Attributes:
        inputs: The inputs, which have the layer's channels.
        training: The flag that arrived, `None` where there was none.
        mask: The mask, or `None`.
    """

    def __init__(
        self, call: Callable[..., Any], given: inspect.BoundArguments
    ) -> None:
        self._call = call
        self._given = given
        first, *_ = given.arguments
        self._first = first
        self.inputs = given.arguments[first]
        self.training = given.arguments.get("training")
        self.mask = given.arguments.get("mask")

    def run(self, training: bool | None) -> Tensor:
        """The layer's own outputs, with another flag if it takes one.

        What is assigned is dropped: a second call of a shared layer must find
        the statistics as they are.
        """
        self._given.arguments[self._first] = self.inputs
        if "training" in self._given.signature.parameters:
            self._given.arguments["training"] = training
        with keras.StatelessScope():
            return self._call(*self._given.args, **self._given.kwargs)


# From a layer and a call of it to the outputs in the place of its own.
Hook = Callable[[Any, LayerCall], Tensor]


def aligned_inputs(
    layer: Any, inputs: Tensor, mask: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """Inputs in the type of statistics, the channel axis, the aligned mask."""
    axis = layer.axis % len(inputs.shape)
    if mask is not None:
        mask = functional.align_mask(mask, inputs, axis)
    values = ops.cast(inputs, kernels.statistics_dtype(inputs.dtype))
    return values, axis, mask


def example_moments(
    values: Tensor, axis: int, mask: Tensor | None
) -> functional.Moments:
    """Moments of the examples' channel means."""
    has_elements = mask
    if len(values.shape) > 2:
        moments = functional.centered_moments(values, (0, axis), mask)[1]
        values = moments.mean
        has_elements = None if mask is None else moments.count > 0
    return functional.centered_moments(values, (1,), has_elements)[1]


def f_of_batches(examples: "Total", epsilon: float) -> tuple[float, float]:
    """F of one-way analysis of variance, and what it may be by chance.

    Of the examples' channel means in batches. F is a mean over channels; the
    limit is four standard deviations of the F of one channel, for channels may
    all say the same, and 2 at least. NaN where it cannot be told.
    """
    batches = examples.batches
    free = examples.count - batches
    if batches < 2 or free <= 0:
        return math.nan, math.nan
    between = examples.variance - examples.within
    between = between * examples.count / (batches - 1)
    within = examples.within * examples.count / free
    varies = examples.variance > 1e-12 * (examples.mean**2 + epsilon)
    if not np.any(varies):
        return math.nan, math.nan
    # Where nothing varies within batches, but between them.
    f = between[varies] / np.maximum(
        within[varies], 1e-6 * examples.variance[varies]
    )
    limit = 1 + 4 * math.sqrt(2 / (batches - 1) + 2 / free)
    return float(np.mean(f)), max(2.0, limit)


class Told:
    """What the calls of layers report of a batch.

    A call may report tensors from any place: a recurrent cell, a loop or a
    branch of a conditional, too. In a loop it reports at each iteration.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, Any, Any]] = []
        self._error: ValueError | None = None
        self._places = 0
        self._is_running = False

    def tell(self, layer: Any, found: Any, outputs: Tensor) -> Tensor:
        """The outputs of a call, which reports a structure of tensors."""
        form = tree.map_structure(lambda _: None, found)
        self._places += 1
        place = self._places

        def receive(*arrays: np.ndarray) -> None:
            # Copies: the memory is the backend's.
            values = [np.array(each, dtype="float64") for each in arrays]
            told = tree.pack_sequence_as(form, values)
            self._calls.append((place, layer, told))

        tensors = [ops.convert_to_tensor(each) for each in tree.flatten(found)]
        return backend.tell(receive, tensors, outputs)

    def _hooked(
        self, layer: Any, call: Callable[..., Any], hook: Hook
    ) -> Callable[..., Any]:
        signature = inspect.signature(call)

        def hooked(*arguments: Any, **named: Any) -> Tensor:
            if not self._is_running:  # but a loss that calls layers, say
                return call(*arguments, **named)
            found = LayerCall(call, signature.bind(*arguments, **named))
            found.inputs = self._checked(layer, found.inputs)
            is_traced = vars(layer).get("_is_traced")
            try:
                return hook(layer, found)
            finally:
                if is_traced is None:  # this graph is made anew if need be
                    vars(layer).pop("_is_traced", None)

        return hooked

    def _checked(self, layer: Any, inputs: Tensor) -> Tensor:
        """The inputs of a layer, which have its channels."""
        channels = layer.moving_mean.shape[0]

        def check(size: Any) -> None:
            if int(size) != channels:
                self._error = ValueError(
                    "`dataset` must give each layer its channels. Received: "
                    f"{int(size)} for the {channels} of {layer.name!r}."
                )
                raise self._error

        axis = layer.axis % len(inputs.shape)
        return backend.with_size(inputs, axis, channels, check)

    def _run(
        self, function: Callable[..., Any], feed: Feed
    ) -> tuple[Any, Calls]:
        """What the function gives, and what was reported: `(layer, arrays)`."""
        self._calls, self._error = [], None
        self._is_running = True
        try:
            outputs = function(feed.x, feed.named)
            backend.wait()
        except Exception:
            if self._error is not None:  # a graph's error tells less
                raise self._error from None
            raise
        finally:
            self._is_running = False
        calls = sorted(self._calls, key=lambda call: call[0])
        self._calls = []
        return outputs, [(layer, found) for _, layer, found in calls]

    def run_over(
        self,
        data: Batches,
        layers: Sequence[Any],
        hook: Hook,
        function: Callable[..., Any],
        count: Callable[[Feed, Any, Calls], None],
        verbose: int | bool,
    ) -> int:
        """Runs a function of a model over data; the number of batches.

        Args:
            data: The batches.
            layers: What is watched.
            hook: What watches.
            function: Of the inputs of the model and of other arguments of its
                call, a dict.
            count: Takes of each batch what was fed, what the function gave,
                and what was reported.
            verbose: Whether to show a progress bar.

        Raises:
            ValueError: As `Batches.read`.
        """
        feeder = Feeder(data.model)

        def receive(batch: Any) -> None:
            feed = feeder(batch)
            count(feed, *self._run(function, feed))

        def hooked(layer: Any, call: Callable[..., Any]) -> Any:
            return self._hooked(layer, call, hook)

        with replaced_calls(layers, hooked):
            return data.read(receive, verbose)


class Total:
    """Moments of all batches so far, in float64: Chan et al. 1983.

    Attributes:
        examples: Number of examples; kept by whoever adds.
        skipped: Number of elements a channel that were left out; likewise.
        batches: Number of batches that had an element.
        count: Number of elements a channel; where channels have masks of
            their own, the fewest.
        mean: Mean of all elements.
        variance: Variance of all elements (divisor `count`).
        within: What of it is within batches: their variances, weighted by
            count. The rest is between their means.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.skipped = 0.0
        self.batches = 0
        self._counts: Any = 0.0
        self.mean: Any = 0.0
        self.variance: Any = 0.0
        self.within: Any = 0.0

    @property
    def count(self) -> float:
        """Number of elements of the channel that has the fewest."""
        return float(np.min(self._counts))

    @property
    def between(self) -> Any:
        """Variance of the batch means (divisor: batches less 1)."""
        between = np.maximum(self.variance - self.within, 0)
        return between * self.batches / max(self.batches - 1, 1)

    @property
    def is_finite(self) -> bool:
        """Whether no batch brought NaN or infinity."""
        return bool(
            np.all(np.isfinite(self.mean))
            and np.all(np.isfinite(self.variance))
        )

    def add(
        self,
        count: Any,
        shift: np.ndarray,
        residual: Any,
        variance: Any,
    ) -> None:
        """Pools the `Moments` of a batch; nothing where it had no element."""
        if not np.max(count):
            return
        self.batches += 1
        self._counts = self._counts + count
        share = count / np.maximum(self._counts, 1)
        with np.errstate(all="ignore"):  # not finite: an error later
            distance = (shift + residual) - self.mean
            self.variance = (
                (1 - share) * self.variance
                + share * variance
                + share * (1 - share) * distance**2
            )
            self.within = (1 - share) * self.within + share * variance
            self.mean = self.mean + share * distance


def reached_layers(
    model: Any,
    totals: Sequence[tuple[Any, Total]],
    seen: int,
    statistics: str,
    *,
    is_silent: bool = False,
) -> list[Any]:
    """The layers that data reached. The others are left out, with a warning.

    Args:
        model: The model, for names.
        totals: Layers, and what was seen of their elements.
        seen: Number of batches.
        statistics: What may not be finite, in the words of the error.
        is_silent: Whether the others are known already.

    Raises:
        ValueError: If the data reached none.
        NotFiniteError: If it made statistics NaN or infinite.
    """
    found = [(layer, total) for layer, total in totals if total.count]
    unseen = [layer for layer, total in totals if not total.count]
    if not found:
        raise ValueError(
            "`dataset` must reach batch normalization with at least one "
            f"unmasked element. Received: {seen} batches that gave none to "
            f"{describe(unseen, model)}."
        )
    bad = [layer for layer, total in found if not total.is_finite]
    if bad:
        raise NotFiniteError(
            "`dataset` must make finite activations. Received: one that makes "
            f"the {statistics} of {describe(bad, model)} NaN or infinite."
        )
    if unseen and not is_silent:
        warnings.warn(
            "Layers that no element of `dataset` reached are left out: "
            f"{describe(unseen, model)}.",
            stacklevel=2,
        )
    return [layer for layer, _ in found]


class NotFiniteError(ValueError):
    """Data makes activations that are NaN or infinite."""
