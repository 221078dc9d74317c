"""Passes over data that watch the inputs of a model's normalization."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend import runtime, watching
from keras_renorm._backend.operations import Tensor
from keras_renorm._step import choice
from keras_renorm._step.moments import (
    Moments,
    align_mask,
    centered_moments,
    scale_and_offset,
)
from keras_renorm.models._data.batches import Batches
from keras_renorm.models._data.feeding import Feed, Feeder
from keras_renorm.models._data.totals import Total
from keras_renorm.models._layers.calls import (
    has_own_call,
    replaced_bases,
    replaced_calls,
)
from keras_renorm.models._layers.finding import describe

# Of a batch: layers, and the arrays that a call of one reported.
Calls = list[tuple[Any, Any]]


class LayerCall:
    """A call of a layer that is watched.

    Attributes:
        inputs: The inputs, which have the layer's channels.
        training: The flag that arrived, `None` where there was none.
        mask: The mask, or `None`.
        restore: From outputs to their form, ragged where the inputs are.
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
        self.restore: Callable[[Tensor], Tensor] = lambda outputs: outputs
        if runtime.is_ragged(self.inputs):  # as the layer takes it
            self.inputs, self.mask, self.restore = runtime.padded(
                self.inputs, self.mask
            )
            given.arguments["mask"] = self.mask

    def run(
        self,
        training: bool | None,
        state: Sequence[tuple[keras.Variable, Tensor]] = (),
    ) -> Tensor:
        """The layer's own outputs, with another flag if it takes one.

        Assignments are dropped: a second call of a shared layer must find
        the statistics as they are. `state` has values that variables have
        meanwhile.
        """
        self._given.arguments[self._first] = self.inputs
        if "training" in self._given.signature.parameters:
            self._given.arguments["training"] = training
        with keras.StatelessScope(state):
            return self._call(*self._given.args, **self._given.kwargs)


# From a layer and a call of it to the outputs in the place of its own.
Hook = Callable[[Any, LayerCall], Tensor]


def aligned_inputs(
    layer: Any, inputs: Tensor, mask: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """Inputs in the type of statistics, the channel axis, the aligned mask."""
    axis = layer.axis % len(inputs.shape)
    if mask is not None:
        mask = align_mask(mask, inputs, axis)
    values = ops.cast(inputs, choice.statistics_dtype(inputs.dtype))
    return values, axis, mask


def example_moments(values: Tensor, axis: int, mask: Tensor | None) -> Moments:
    """Moments of the examples' channel means."""
    examples = int(axis == 0)  # the first axis that is not the channels'
    has_elements = mask
    if len(values.shape) > 2:
        kept = (min(examples, axis), max(examples, axis))
        moments = centered_moments(values, kept, mask)[1]
        values = moments.mean
        has_elements = None if mask is None else moments.count > 0
    return centered_moments(values, (1 - examples,), has_elements)[1]


def normalized_by_batch(
    layer: Any,
    call: LayerCall,
    centered: Tensor,
    axis: int,
    moments: Moments,
    mask: Tensor | None,
) -> Tensor:
    """A batch, as batch normalization normalizes it."""
    if has_own_call(layer):
        # It infers, as all else does, by the statistics of the batch.
        statistics = (layer.moving_mean, layer.moving_variance)
        values = (moments.mean, moments.variance)
        return call.run(False, list(zip(statistics, values, strict=True)))
    scale = ops.rsqrt(moments.variance + layer.epsilon)
    if layer.gamma is not None:
        scale = scale * ops.cast(layer.gamma, scale.dtype)
    offset = layer.beta
    if offset is not None:
        offset = ops.cast(offset, scale.dtype)
    outputs = scale_and_offset(centered, (axis,), scale, offset, mask)
    return ops.cast(outputs, layer.compute_dtype)


class Reports:
    """Arrays that calls of layers report of a batch.

    A call may report tensors from any place: a recurrent cell, a loop or a
    branch of a conditional, too. In a loop it reports at each iteration.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, Any, Any]] = []
        self._error: ValueError | None = None
        self._places = 0
        self._is_running = False
        # Layers with a `call` of their own whose `super().call` was watched.
        self._seen_inside: set[int] = set()

    def report(self, layer: Any, found: Any, outputs: Tensor) -> Tensor:
        """The outputs of a call, which reports a structure of tensors."""
        form = tree.map_structure(lambda _: None, found)
        self._places += 1
        place = self._places

        def receive(*arrays: np.ndarray) -> None:
            # Copies: the memory is the backend's.
            values = [np.array(array, dtype="float64") for array in arrays]
            report = tree.pack_sequence_as(form, values)
            self._calls.append((place, layer, report))

        tensors = [ops.convert_to_tensor(leaf) for leaf in tree.flatten(found)]
        return watching.report(receive, tensors, outputs)

    def _watched(
        self, layer: Any, call: Callable[..., Any], hook: Hook
    ) -> Callable[..., Any]:
        """A layer's `call`, of which a hook sees what it normalizes."""
        hooked = self._hooked(layer, call, hook)
        if not has_own_call(layer):
            return hooked

        def watched(*arguments: Any, **named: Any) -> Tensor:
            if not self._is_running:
                return call(*arguments, **named)
            self._seen_inside.discard(id(layer))
            with keras.StatelessScope():
                outputs = call(*arguments, **named)
            if id(layer) in self._seen_inside:
                return outputs
            return hooked(*arguments, **named)  # without `super().call`

        return watched

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
                return found.restore(hook(layer, found))
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
        return watching.with_size(inputs, axis, channels, check)

    def _run(
        self, function: Callable[..., Any], feed: Feed
    ) -> tuple[Any, Calls]:
        """The outputs of the function, and all reports: `(layer, arrays)`."""
        self._calls, self._error = [], None
        self._is_running = True
        try:
            outputs = function(feed.x, feed.named)
            runtime.wait()
        except Exception:
            if self._error is not None:  # a graph's error says less
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

        `hook` watches the layers. `function` takes the inputs of the model and
        a dict of other arguments of its call; `count` takes the inputs of each
        batch, the outputs of the function, and the reports.
        """
        feeder = Feeder(data.model)

        def receive(batch: Any) -> None:
            feed = feeder(batch)
            count(feed, *self._run(function, feed))

        def inside(layer: Any, call: LayerCall) -> Tensor:
            self._seen_inside.add(id(layer))
            return hook(layer, call)

        with (
            replaced_bases(layers, partial(self._hooked, hook=inside)),
            replaced_calls(layers, partial(self._watched, hook=hook)),
        ):
            return data.read(receive, verbose)


def reached_layers(
    model: Any,
    totals: Sequence[tuple[Any, Total]],
    seen: int,
    statistics: str,
    *,
    is_silent: bool = False,
) -> list[Any]:
    """The layers that data reached. The others are left out, with a warning.

    `totals` are layers, and the moments of their elements; `seen` is the number
    of batches; an error calls `statistics` what is not finite.

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
