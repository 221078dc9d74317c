"""What a network sees of its input, measured by changing a part of it."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend.variables import to_numpy
from keras_renorm.models._layers.calls import replaced_calls
from keras_renorm.models._layers.finding import find_layers, inside
from keras_renorm.models._layers.graphs import compiled

# What differs by less, of the largest output, is rounding.
ROUNDING = 1e-4
# A layer is asked on maps of this size at least, where it takes them.
PROBED = 64


class _Call(NamedTuple):
    """A call of a layer, as it was with the first window."""

    layer: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    outputs: Any

    def again(self, inputs: Any) -> list[np.ndarray]:
        """Its outputs for other inputs."""
        with keras.StatelessScope():
            outputs = self.layer(inputs, *self.arguments[1:], **self.named)
        return _arrays(tree.flatten(outputs))


class Network:
    """A model in inference, of which a part of an image is known.

    Attributes:
        names: Of those outputs that have the axes of the image.
        ratios: Of these, pixels for one of the input, along each axis.
    """

    def __init__(
        self, model: Any, window: np.ndarray, axes: tuple[int, ...]
    ) -> None:
        self._model, self._window, self._axes = model, window, axes
        self._leaves = [
            layer
            for layer in find_layers(model, keras.layers.Layer)
            if layer is not model and not inside(layer)
        ]
        # A graph for each size: one for any size is more than some layers take.
        self._runs: defaultdict[Any, Any] = defaultdict(
            lambda: compiled(model, self._infer)
        )
        self._calls: list[_Call] = []
        with replaced_calls(self._leaves, self._noted):
            outputs = self._eagerly(self._window)
        self._ratios = [self._ratio(each) for each in outputs]
        if not any(self._ratios):
            raise ValueError(
                "An output must have the axes of the image. Received: shapes "
                f"{[each.shape for each in outputs]} of model={model.name} "
                f"for a window of {window.shape}."
            )
        names = list(getattr(model, "output_names", []))
        if isinstance(self._form, dict):
            names = sorted(self._form)
        if len(names) != len(outputs):
            names = [f"output {index}" for index in range(len(outputs))]
        self.names = self._with_axes(names)
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
            self._form = tree.map_structure(lambda _: None, outputs)
        except Exception as error:
            raise ValueError(
                "A tile with its halo must be an input of the model. "
                f"Received: a window of shape {inputs.shape}, of which the "
                f"model says: {error}"
            ) from error
        return _arrays(tree.flatten(outputs))

    def _noted(self, layer: Any, call: Callable[..., Any]) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            outputs = call(*arguments, **named)
            self._calls.append(_Call(layer, arguments, named, outputs))
            return outputs

        return noted

    def _ratio(self, output: np.ndarray) -> tuple[Fraction, ...] | None:
        """Pixels of an output for one of the input, along each axis."""
        if output.ndim != self._window.ndim:
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
        return _arrays(self._with_axes(outputs))

    @property
    def factor(self) -> tuple[int, ...]:
        """By what the network divides the sizes."""
        factors = [1] * len(self._axes)
        for call in self._calls:
            for output in tree.flatten(call.outputs):
                if len(output.shape) != self._window.ndim:
                    continue
                for index, axis in enumerate(self._axes):
                    size, whole = output.shape[axis], self._window.shape[axis]
                    if 1 < size < whole and whole % size == 0:
                        factors[index] = max(factors[index], whole // size)
        return tuple(factors)

    def seeing(self) -> list[Any]:
        """The layers that see a whole tile, in the order of their calls."""
        found: dict[int, Any] = {}
        for call in self._calls:
            if id(call.layer) not in found and self._sees_all(call):
                found[id(call.layer)] = call.layer
        return list(found.values())

    def _sees_all(self, call: _Call) -> bool:
        """Whether what is far away changes what a layer gives.

        One half of its inputs is changed, and the farther quarter of its
        outputs looked at.
        """
        first: Any = call.arguments[0] if call.arguments else None
        if len(getattr(first, "shape", ())) != self._window.ndim:
            return False
        if "float" not in keras.backend.standardize_dtype(first.dtype):
            return False
        inputs = to_numpy(ops.cast(first, "float32"))
        for axis in self._axes:
            if inputs.shape[axis] < 4:
                inputs = np.concatenate([inputs] * 4, axis)
        axis = max(self._axes, key=lambda each: inputs.shape[each])
        repeats = -(-PROBED // inputs.shape[axis])
        try:
            larger = np.concatenate([inputs] * repeats, axis)
            return _is_changed_afar(call, larger, axis)
        except Exception:
            # It takes inputs of one size only.
            original = to_numpy(ops.cast(first, "float32"))
            return _is_changed_afar(call, original, axis)

    def reach(
        self, seeing: Sequence[Any]
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """How far away a pixel changes an output, along each axis.

        What sees a whole tile is held: it gives what it gave, and what its
        inputs changed by.
        """
        window = self._window.astype("float32")
        noise = np.random.default_rng(0).normal(
            scale=float(window.std()) or 1.0, size=window.shape
        )
        with replaced_calls(seeing, self._held):
            before = self._eagerly(self._window)
            reaches, beyond = [], []
            for index, axis in enumerate(self._axes):
                size = window.shape[axis]
                middle = size // 2
                found = 0
                for begins, ends in ((0, middle), (middle, size)):
                    inside_ = np.arange(size)
                    inside_ = (inside_ >= begins) & (inside_ < ends)
                    shape = [1] * window.ndim
                    shape[axis] = size
                    changed = window + noise * inside_.reshape(shape)
                    after = self._eagerly(changed.astype(self._window.dtype))
                    found = max(
                        found,
                        self._farthest(before, after, index, begins, ends),
                    )
                reaches.append(found)
                beyond.append(found >= min(middle, size - middle))
        return tuple(reaches), tuple(beyond)

    def _farthest(
        self,
        before: list[np.ndarray],
        after: list[np.ndarray],
        index: int,
        begins: int,
        ends: int,
    ) -> int:
        """How far outside of a part of the input outputs have changed."""
        axis = self._axes[index]
        farthest = 0
        for old, new, ratio in zip(before, after, self._ratios, strict=True):
            if not ratio:
                continue
            others = tuple(each for each in range(old.ndim) if each != axis)
            limit = ROUNDING / 10 * np.abs(old).max(initial=1e-30)
            changed = np.abs(new - old).max(axis=others) > limit
            at = np.nonzero(changed)[0] / float(ratio[index])
            # Of a coarse grid, the pixel nearest to the part.
            width = 1 / float(ratio[index])
            outside = [begins - at - width + 1, at - ends + 1]
            farthest = max(
                farthest,
                *(int(np.ceil(each.max(initial=0))) for each in outside),
            )
        return farthest

    def _held(self, layer: Any, call: Callable[..., Any]) -> Any:
        """A call that gives what it gave, but for what is local."""
        known = [each for each in self._calls if each.layer is layer]
        order = itertools.cycle(known)

        def held(*arguments: Any, **_: Any) -> Any:
            found = next(order)
            if not hasattr(found.outputs, "shape"):
                return found.outputs
            if tuple(found.outputs.shape) != tuple(arguments[0].shape):
                return found.outputs
            change = arguments[0] - found.arguments[0]
            return found.outputs + ops.cast(change, found.outputs.dtype)

        return held


def _arrays(tensors: Sequence[Any]) -> list[np.ndarray]:
    return [to_numpy(ops.cast(each, "float32")) for each in tensors]


def _is_changed_afar(call: _Call, inputs: np.ndarray, axis: int) -> bool:
    half = inputs.shape[axis] // 2
    noise = np.random.default_rng(0).normal(
        scale=float(inputs.std()) or 1.0, size=inputs.shape
    )
    index = [slice(None)] * inputs.ndim
    index[axis] = slice(half)
    changed = inputs.copy()
    changed[tuple(index)] += noise[tuple(index)].astype(inputs.dtype)
    dtype = tree.flatten(call.arguments)[0].dtype
    both = (call.again(ops.cast(each, dtype)) for each in (inputs, changed))
    for old, new in zip(*both, strict=True):
        if old.ndim == inputs.ndim and old.shape[axis] > 1:
            index[axis] = slice(old.shape[axis] * 3 // 4, None)
            old, new = old[tuple(index)], new[tuple(index)]
        scale = np.abs(old).max(initial=1e-30)
        if np.abs(new - old).max(initial=0) > ROUNDING * scale:
            return True
    return False
