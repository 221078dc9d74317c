"""What a network sees of its input, measured by changing a part of it."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend.runtime import is_traced
from keras_renorm.diagnostics._tiles.calls import (
    ROUNDING,
    Call,
    arrays,
    tensors_of,
)
from keras_renorm.models._layers.calls import replaced_calls
from keras_renorm.models._layers.finding import (
    find_layers,
    has_graph,
    inside,
)
from keras_renorm.models._layers.graphs import compiled

Sizes: TypeAlias = tuple[int, ...]


class Network:
    """A model in inference, of which a part of an image is known.

    Attributes:
        seeing: The layers that see a whole tile, in the order of their calls.
        names: Of those outputs that have the axes of the image.
        ratios: Of these, pixels for one of the input, along each axis.
    """

    def __init__(
        self, model: Any, window: np.ndarray, axes: tuple[int, ...]
    ) -> None:
        self._model, self._window, self._axes = model, window, axes
        layers = [
            layer
            for layer in find_layers(model, keras.layers.Layer)
            if layer is not model and not has_graph(layer)
        ]
        # A graph for each size: one for any size is more than some layers take.
        self._runs: defaultdict[Any, Any] = defaultdict(
            lambda: compiled(model, self._infer)
        )
        self._calls: list[Call] = []
        self._names = list(getattr(model, "output_names", []))
        with replaced_calls(layers, self._noted):
            outputs = self._eagerly(self._window)
        self._whole = tuple(window.shape[axis] for axis in axes)
        self.seeing: list[Any] = []
        # Sizes of maps: those of the image, divided or not. And of what sees
        # all: a pool of 2 x 2 is no map.
        self._maps, self._others = {self._whole}, {(1,) * len(axes)}
        for call in self._calls:
            self._follow(call)
        self._ratios = [self._ratio(each) for each in outputs]
        if not any(self._ratios):
            raise ValueError(
                "An output must have the axes of the image. Received: shapes "
                f"{[each.shape for each in outputs]} of model={model.name} "
                f"for a window of {window.shape}."
            )
        if len(self._names) != len(outputs):
            self._names = [f"output {index}" for index in range(len(outputs))]
        self.names = self._with_axes(self._names)
        self.ratios = self._with_axes(self._ratios)

    def _with_axes(self, of_outputs: Sequence[Any]) -> list[Any]:
        return [
            each
            for each, ratio in zip(of_outputs, self._ratios, strict=True)
            if ratio
        ]

    def _infer(self, inputs: Any) -> Any:
        form = getattr(self._model, "input", None)
        if isinstance(form, dict | list | tuple):
            inputs = tree.pack_sequence_as(form, [inputs])
        with keras.StatelessScope():
            return self._model(inputs, training=False)

    def _eagerly(self, inputs: np.ndarray) -> list[np.ndarray]:
        try:
            outputs = self._infer(ops.convert_to_tensor(inputs))
        except Exception as error:
            raise ValueError(
                "A tile with its halo must be an input of the model. "
                f"Received: a window of shape {inputs.shape}, of which the "
                f"model says: {error}"
            ) from error
        if isinstance(outputs, dict):
            self._names = [
                "/".join(map(str, path))
                for path, _ in tree.flatten_with_path(outputs)
            ]
        return arrays(tree.flatten(outputs))

    def _noted(self, layer: Any, call: Callable[..., Any]) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            outputs = call(*arguments, **named)
            if not any(map(is_traced, tensors_of(outputs))):
                self._calls.append(Call(layer, arguments, named, outputs))
            return outputs

        return noted

    def _ratio(self, output: np.ndarray) -> tuple[Fraction, ...] | None:
        """Pixels of an output for one of the input, along each axis."""
        if not self._sizes([output]) - (self._others - self._maps):
            return None
        ratios = tuple(
            Fraction(output.shape[axis], self._window.shape[axis])
            for axis in self._axes
        )
        if any(1 not in (each.numerator, each.denominator) for each in ratios):
            raise ValueError(
                "An output must have the sizes of the image, or a whole "
                'fraction or multiple of them: layers with padding="same", '
                "tile and halo multiples of what the network divides by. "
                f"Received: an output of shape {output.shape} of model="
                f"{self._model.name} for a window of {self._window.shape}."
            )
        return ratios

    def predict(self, inputs: np.ndarray) -> list[np.ndarray]:
        """Those outputs that have the axes of the image."""
        outputs = tree.flatten(
            self._runs[inputs.shape[1:]](ops.convert_to_tensor(inputs))
        )
        return arrays(self._with_axes(outputs))

    @property
    def factor(self) -> Sizes:
        """By what the network divides the sizes."""
        return tuple(
            math.lcm(
                *(
                    whole // size
                    for size in sizes
                    if 1 < size < whole and whole % size == 0
                )
            )
            for whole, *sizes in zip(self._whole, *self._maps, strict=True)
        )

    def _sizes(self, tensors: Sequence[Any]) -> set[Sizes]:
        """Of those that have the axes of an image."""
        return {
            tuple(int(each.shape[axis]) for axis in self._axes)
            for each in tensors
            if len(each.shape) == self._window.ndim
        }

    def _follow(self, call: Call) -> None:
        """Finds whether it sees all, and what its outputs' sizes are of."""
        if call.rearranges:
            return
        sees_all = self._sees_all(call)
        if sees_all and not any(call.layer is each for each in self.seeing):
            self.seeing.append(call.layer)
        if inside(call.layer) and not sees_all:
            return  # what is inside was asked
        inputs = self._sizes(tensors_of(call.given))
        for sizes in self._sizes(tensors_of(call.outputs)):
            if sizes in self._maps:
                continue
            if sees_all or (inputs and inputs <= self._others - self._maps):
                self._others.add(sizes)
            elif inputs & self._maps or self._is_divided(sizes):
                self._maps.add(sizes)

    def _is_divided(self, sizes: Sizes) -> bool:
        """Whether by the same whole number along all axes."""
        ratios = {
            Fraction(whole, size)
            for whole, size in zip(self._whole, sizes, strict=True)
        }
        return len(ratios) == 1 and ratios.pop().denominator == 1

    def _sees_all(self, call: Call) -> bool:
        """Whether it sees all along an axis, and nothing inside of it does."""
        if call.main is None:
            return False
        if getattr(call.layer, "go_backwards", False):
            return False  # a flipped map, until what holds it flips it again
        held = {id(each) for each in inside(call.layer)}
        if any(id(each) in held for each in self.seeing):
            return False
        given = call.given[call.main]
        rank = self._window.ndim
        if given.shape[0] != len(self._window):  # pieces of maps, as a batch
            return False
        axes: Sequence[int] = self._axes
        if len(given.shape) != rank:  # tokens
            axes = range(1, len(given.shape) - 1)
        asked = axes
        if not self._sizes([given]) & self._maps:
            asked = [max(axes, key=lambda axis: given.shape[axis])]
        return any(call.sees_all(axis, axes) for axis in asked)

    def reach(self) -> tuple[Sizes, tuple[bool, ...]]:
        """How far away a pixel changes an output, along each axis.

        What sees a whole tile is held: it gives what it gave, and what its
        inputs changed by. And whether the output has changed up to its end.
        """
        window = self._window.astype("float32")
        noise = np.random.default_rng(0).normal(
            scale=float(window.std()) or 1.0, size=window.shape
        )
        with replaced_calls(self.seeing, self._held):
            before = self._eagerly(self._window)
            reaches, beyond = [], []
            for index, axis in enumerate(self._axes):
                size = window.shape[axis]
                middle = size // 2
                found, is_beyond = 0, False
                for begins, ends in ((0, middle), (middle, size)):
                    inside_ = np.arange(size)
                    inside_ = (inside_ >= begins) & (inside_ < ends)
                    shape = [1] * window.ndim
                    shape[axis] = size
                    changed = window + noise * inside_.reshape(shape)
                    after = self._eagerly(changed.astype(self._window.dtype))
                    farthest, is_end = self._farthest(
                        before, after, index, begins, ends
                    )
                    found = max(found, farthest)
                    is_beyond = is_beyond or is_end
                reaches.append(found)
                beyond.append(is_beyond)
        return tuple(reaches), tuple(beyond)

    def _farthest(
        self,
        before: list[np.ndarray],
        after: list[np.ndarray],
        index: int,
        begins: int,
        ends: int,
    ) -> tuple[int, bool]:
        """How far outside of a part of the input outputs have changed.

        And whether they have as far away as there is an output.
        """
        axis = self._axes[index]
        farthest, is_end = 0, False
        for old, new, ratio in zip(before, after, self._ratios, strict=True):
            if not ratio:
                continue
            others = tuple(each for each in range(old.ndim) if each != axis)
            limit = ROUNDING / 10 * np.abs(old).max(initial=1e-30)
            changed = np.abs(new - old).max(axis=others) > limit
            is_end = is_end or bool(changed[-1 if begins == 0 else 0])
            # Of a fine grid, the pixel of the input that it lies in; of a
            # coarse one, the nearest of those that lie in it.
            at = np.floor(np.nonzero(changed)[0] / float(ratio[index]))
            width = max(1 / float(ratio[index]), 1)
            outside = [begins - at - width + 1, at - ends + 1]
            farthest = max(
                farthest,
                *(int(np.ceil(each.max(initial=0))) for each in outside),
            )
        return farthest, is_end

    def _held(self, layer: Any, call: Callable[..., Any]) -> Any:
        """A call that gives what it gave, but for what is local."""
        known = [each for each in self._calls if each.layer is layer]
        order = itertools.cycle(known)

        def held(*arguments: Any, **named: Any) -> Any:
            found = next(order)
            if found.main is None or not hasattr(found.outputs, "shape"):
                return found.outputs
            old = found.given[found.main]
            change = tree.flatten((arguments, named))[found.main] - old
            channel = 1 if self._axes[0] == 2 else -1
            kept, made = list(old.shape), list(found.outputs.shape)
            if kept.pop(channel) != made.pop(channel):
                change = ops.sum(change, channel, keepdims=True)
            if kept != made:
                return found.outputs
            return found.outputs + ops.cast(change, found.outputs.dtype)

        return held
