"""What training minimizes, as a function of the weights."""

import math
import weakref
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_renorm._backend import runtime, tracing
from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.variables import kept_buffers, read, to_numpy
from keras_renorm._checks import is_number, python_value
from keras_renorm._step import choice
from keras_renorm.models._data.arrays import check_inputs
from keras_renorm.models._layers.finding import (
    find_layers,
    names_of,
    own_variables,
)
from keras_renorm.models._layers.graphs import kept


class Objective:
    """The loss of a model on one batch, as a function of its weights.

    The model runs in a stateless scope of Keras: it reads the values that it
    is handed, and what it assigns (moving statistics, counters, seeds) is
    dropped. So each evaluation starts from the same state, with the same
    dropout, and after an error there is nothing to restore.

    Raises:
        TypeError, ValueError: As `loss_along_gradient`.
    """

    def __init__(
        self, model: keras.Model, loss: Any, batch: Any, training: bool
    ) -> None:
        runtime.check_no_strategy()
        self.model = _checked_model(model)
        checked_loss = _checked_loss(loss)
        self._batch = _checked_batch(batch)
        check_inputs(self.model, self._batch[0], "batch")
        self.weights, self._state = (
            [read(variable, variable.dtype) for variable in variables]
            for variables in _variables(model)
        )
        self._value, self._with_gradients = _graphs(
            model, checked_loss, training, self._batch[0]
        )

    def value(self, weights: list[Tensor]) -> float:
        """The loss at some weights."""
        return float(to_numpy(self._value(weights, self._state, self._batch)))

    def gradients(self, weights: list[Tensor]) -> list[Tensor]:
        """The gradient of the loss at some weights, a tensor a weight."""
        _, gradients = self._with_gradients(weights, self._state, self._batch)
        return gradients

    def moved(
        self,
        gradients: list[Tensor],
        step_size: float,
        among: Collection[int] | None = None,
    ) -> list[Tensor]:
        """The weights after a step against a gradient.

        In the weights' own types, as an optimizer does it. With `among`, only
        the weights at these places move.
        """
        return [
            weight - ops.cast(step_size, weight.dtype) * gradient
            if among is None or at in among
            else weight
            for at, (weight, gradient) in enumerate(
                zip(self.weights, gradients, strict=True)
            )
        ]

    def layers(self) -> list[tuple[str, list[int]]]:
        """Names of the layers that own weights, and the places of these.

        In the order of the weights. The owner is the innermost layer.
        """
        owners: dict[int, Any] = {}
        for layer in find_layers(self.model, keras.layers.Layer):
            for variable in own_variables(layer):
                owners.setdefault(id(variable), layer)
        layers: dict[int, Any] = {}
        places: dict[int, list[int]] = {}
        learned, _ = _variables(self.model)
        for at, variable in enumerate(learned):
            owner = owners[id(variable)]
            layers[id(owner)] = owner
            places.setdefault(id(owner), []).append(at)
        names = names_of(self.model, layers.values())
        return list(zip(names, places.values(), strict=True))


def _variables(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """Those that learn, and all others of a model.

    What a variable that is overwritten with it gets is no gradient.
    """
    learned: list[Any] = []
    others = list(model.non_trainable_variables)
    for variable in model.trainable_variables:
        is_state = getattr(variable, "overwrite_with_gradient", False)
        (others if is_state else learned).append(variable)
    return learned, others


def _graphs(
    model: keras.Model, loss: Any, training: bool, x: Any
) -> tuple[Any, Any]:
    """The loss and its gradients as graphs, traced again after a change."""
    # Keras checks the shapes that a graph is made for, and one that was made
    # for several numbers of channels would broadcast.
    shapes = tuple(
        None if leaf is None else tuple(leaf.shape)[1:]
        for leaf in tree.flatten(x)
    )
    return kept(
        model,
        ("objective", training),
        (*tree.flatten(loss), shapes),
        lambda: tracing.value_and_gradients(_function(model, loss, training)),
    )


def _function(model: keras.Model, loss: Any, training: bool) -> Any:
    reference = weakref.ref(model)  # or the graphs would keep the model

    def compute(
        weights: list[Tensor], state: list[Tensor], batch: list[Any]
    ) -> Tensor:
        x, y, sample_weight = batch
        # Keras's masks write into weights on PyTorch.
        sample_weight = tree.map_structure(
            lambda leaf: None if leaf is None else ops.copy(leaf), sample_weight
        )
        model: Any = reference()
        learned, others = _variables(model)
        variables = learned + others
        values = list(weights) + list(state)
        with (
            kept_buffers(lambda: find_layers(model, keras.layers.Layer)),
            keras.StatelessScope(
                state_mapping=zip(variables, values, strict=True),
                collect_losses=True,
            ),
        ):
            outputs = model(x, training=training)
            total = _loss_value(loss, y, outputs, sample_weight)
            for penalty in model.losses:
                total = total + ops.cast(ops.sum(penalty), total.dtype)
        if len(total.shape) > 0:
            raise ValueError(
                "`loss` must give one number. Received: a loss of shape "
                f"{tuple(total.shape)}."
            )
        return total

    return compute


class _FromFunction(keras.losses.Loss):
    """A loss from a function, in the type of the outputs, float32 at least."""

    def __init__(self, function: Any, dtype: str) -> None:
        super().__init__(name="loss", dtype=dtype)
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        if ops.is_tensor(y_true) and ops.is_tensor(y_pred):
            y_true, y_pred = _of_one_rank(y_true, y_pred)
        return self._function(y_true, y_pred)


def _of_one_rank(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) against (n, 1) would broadcast to (n, n): as Keras, make it fit."""
    pair = [y_true, y_pred]
    ranks = [len(structure.shape) for structure in pair]
    longer = int(np.argmax(ranks))
    if abs(ranks[0] - ranks[1]) == 1 and pair[longer].shape[-1] == 1:
        if min(ranks) == 1:
            pair[1 - longer] = ops.expand_dims(pair[1 - longer], -1)
        else:
            pair[longer] = ops.squeeze(pair[longer], -1)
    return pair[0], pair[1]


def _loss_value(loss: Any, y: Any, outputs: Any, sample_weight: Any) -> Tensor:
    if _is_of_one_output(loss):
        flat = [tree.flatten(part) for part in (y, outputs, sample_weight)]
        if len(flat[1]) > 1:
            loss = dict.fromkeys(_names(outputs), loss)  # their sum
        elif all(len(part) == 1 for part in flat):
            (y,), (outputs,), (sample_weight,) = flat
    if isinstance(loss, keras.losses.Loss):
        return loss(y, outputs, sample_weight)
    if callable(loss):
        dtype = choice.statistics_dtype(tree.flatten(outputs)[0].dtype)
        return _FromFunction(loss, dtype)(y, outputs, sample_weight)
    parts = loss, y, outputs
    names = [_names(part) for part in parts]
    if names[0] != names[1] or names[0] != names[2]:
        raise ValueError(
            "`loss` must have one loss for each output of the model and each "
            f"target. Received: losses {names[0]}, targets {names[1]}, "
            f"outputs {names[2]}."
        )
    many = isinstance(sample_weight, list | tuple | dict)
    return sum(
        _loss_value(
            loss[name],
            y[name],
            outputs[name],
            sample_weight[name] if many else sample_weight,
        )
        for name in names[0]
    )


def _is_of_one_output(loss: Any) -> bool:
    """Whether it is Keras's, which would take several for one tensor."""
    return isinstance(loss, keras.losses.Loss) or (
        callable(loss) and str(loss.__module__).startswith("keras.")
    )


def _names(structure: Any) -> list[Any]:
    if isinstance(structure, dict):
        return sorted(structure)
    if isinstance(structure, list | tuple):
        return list(range(len(structure)))
    return ["one"]


def checked_step_sizes(step_sizes: Any) -> np.ndarray:
    """Step sizes as an array."""
    step_sizes = python_value(step_sizes)
    sizes = [step_sizes]
    if hasattr(step_sizes, "__iter__") and not isinstance(step_sizes, str):
        sizes = list(step_sizes)
    if not all(is_number(size) for size in sizes):
        raise TypeError(
            "`step_sizes` must be a number or a sequence of numbers. "
            f"Received: step_sizes={step_sizes!r}."
        )
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ValueError(
            "`step_sizes` must be positive and finite, and at least one. "
            f"Received: step_sizes={step_sizes!r}."
        )
    return np.array(sizes, dtype="float64")


def _checked_model(model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a Keras model. Received: model={model!r}."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built: call it on data, or give it an `Input`. "
            f"Received: model={model.name}."
        )
    if not _variables(model)[0]:
        raise ValueError(
            "`model` must have trainable weights. Received: "
            f"model={model.name}, which has none."
        )
    return model


def _checked_loss(loss: Any) -> Any:
    """A Loss or a function, or a structure of them."""
    if isinstance(loss, list | tuple) and loss:
        return [_checked_loss(part) for part in loss]
    if isinstance(loss, dict) and loss:
        return {name: _checked_loss(part) for name, part in loss.items()}
    if isinstance(loss, str):
        try:
            return keras.losses.get(loss)
        except ValueError:
            raise ValueError(
                "`loss` must be the name of a Keras loss. Received: "
                f"loss={loss!r}."
            ) from None
    if not callable(loss):
        raise TypeError(
            "`loss` must be a Keras loss, its name or a function, or a list "
            f"or dict of them. Received: loss={loss!r}."
        )
    return loss


def _checked_batch(batch: Any) -> list[Any]:
    """Tensors `[x, y, sample_weight]`, the last `None` if there is none."""
    expected = "`batch` must be (x, y) or (x, y, sample_weight). Received: "
    if not isinstance(batch, tuple | list):
        raise TypeError(f"{expected}batch=<{type(batch).__name__}>.")
    if len(batch) not in (2, 3):
        raise ValueError(f"{expected}{len(batch)} parts.")

    def converted(leaf: Any) -> Any:
        return None if leaf is None else ops.convert_to_tensor(leaf)

    # `None` is an optional input, or no weights.
    return [tree.map_structure(converted, part) for part in (*batch, None)[:3]]
