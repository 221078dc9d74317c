"""What a layer is beyond its configuration: state, flags, attributes."""

import copy
import enum
import functools
import inspect
import re
import tempfile
import types
from collections.abc import Callable, Collection
from typing import Any

import keras
import numpy as np

from keras_renorm._backend.variables import to_numpy
from keras_renorm.models._layers.configuration import (
    is_of_keras,
    not_made_anew,
)
from keras_renorm.models._layers.finding import has_graph, own_variables

# Values that a copy may share: data, and Keras's objects without state.
_DATA = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    np.ndarray,
    np.generic,
    inspect.Signature,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.initializers.Initializer,
    keras.dtype_policies.DTypePolicy,
)

# What a constructor makes anew for each layer, and what a graph leaves there.
_MADE = (
    keras.layers.Layer,
    keras.Variable,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
    keras.KerasTensor,
)

# What a callback does for a while.
_PASSING = {"_holds_statistics", "_is_traced"}


def hand_on(
    old: Any,
    new: Any,
    counterpart: Callable[[Any], Any],
    changed: Collection[str] = (),
) -> None:
    """Gives a copy of an object the state that its configuration lacks.

    That is: changes since it was made, and state that Keras does not
    write down: names, flags, a scope in which it was made.

    Args:
        old: A layer, a variable or an operation.
        new: Its copy.
        counterpart: From a value of the model to the value in its place in
            the copy; raises `LookupError` where there is none.
        changed: Attributes that are others on purpose.

    Raises:
        ValueError: If something belongs to it alone.
    """
    known = _attributes(new)
    # The others' attributes are Keras's, and what they are is of one object.
    is_of_the_user = (
        type(new) is type(old)
        and not changed
        and not is_of_keras(type(old))
        and not has_graph(old)
    )
    for name, value in _attributes(old).items():
        if name in _PASSING:
            continue
        if name in known:
            if name in changed:
                continue
            if _are_different_data(value, known[name]):
                setattr(new, name, copy.copy(value))
                continue
            if (
                not is_of_the_user
                or name in _of_every_layer()
                or not _is_changed(value, known[name])
            ):
                continue
        elif type(new) is not type(old) or _is_of_a_run(value):
            continue
        try:
            if name not in known and callable(getattr(type(old), name, None)):
                raise LookupError(name)
            setattr(new, name, counterpart(value))
        except NoConfigurationError:
            raise
        except (LookupError, ValueError) as error:
            raise ValueError(
                "`model` must have no layers with attributes that a copy "
                "cannot have (`keras_renorm.convert` and "
                "`keras_renorm.revert` change any model with "
                f"in_place=True). Received: layer {old.name} of class "
                f"{type(old).__name__}, with {name}={value!r}."
            ) from error


def _attributes(owner: Any) -> dict[str, Any]:
    """What an object has as its own; PyTorch keeps layers apart."""
    return vars(owner) | getattr(owner, "_modules", {})


@functools.cache
def _of_every_layer() -> frozenset[str]:
    """The attributes that Keras gives every layer, or every model."""
    # Named, so that Keras does not count it.
    return frozenset(vars(keras.Model(name="model")))


def _is_changed(value: Any, made: Any, depth: int = 4) -> bool:
    """Whether a value is another than the one that the constructor made.

    What it makes anew for each layer is the copy's own: layers, its methods
    and closures, objects that cannot be compared.
    """
    if value is made or not depth or isinstance(made, _MADE):
        return False
    if _is_data(value) and _is_data(made):
        return _are_different_data(value, made)
    if _is_of_a_graph(value) or keras.ops.is_tensor(made):
        return _are_different_tensors(value, made)
    alike = functools.partial(_is_changed, depth=depth - 1)
    if isinstance(value, list | tuple) and isinstance(made, list | tuple):
        return len(value) != len(made) or any(map(alike, value, made))
    if isinstance(value, dict) and isinstance(made, dict):
        return value.keys() != made.keys() or any(
            alike(value[key], made[key]) for key in value
        )
    if type(value) is not type(made):
        return True
    if isinstance(value, set | frozenset):
        return value != made and not any(
            isinstance(part, _MADE) for part in made
        )
    if isinstance(value, types.FunctionType):
        return value.__code__ != made.__code__ or alike(
            _held_by(value), _held_by(made)
        )
    if isinstance(value, types.MethodType):
        return value.__func__ is not made.__func__
    if isinstance(value, functools.partial):
        return alike(
            (value.func, value.args, value.keywords),
            (made.func, made.args, made.keywords),
        )
    return callable(value) and _names(value) != _names(made)


def _is_of_a_graph(value: Any) -> bool:
    """Whether a symbolic call left it, or a part of it."""
    return any(
        isinstance(leaf, keras.KerasTensor)
        for leaf in keras.tree.flatten(value)
    )


def _are_different_tensors(one: Any, other: Any) -> bool:
    if not (keras.ops.is_tensor(one) and keras.ops.is_tensor(other)):
        return False
    try:
        return not np.array_equal(to_numpy(one), to_numpy(other))
    except Exception:  # without values: of a graph
        return False


def _held_by(function: types.FunctionType) -> list[Any]:
    """What a function holds beside its code."""
    cells = [
        getattr(cell, "cell_contents", None)
        for cell in function.__closure__ or ()
    ]
    return [*cells, function.__defaults__, function.__kwdefaults__]


def _names(function: Any) -> list[Any]:
    names = ("__module__", "__qualname__", "__name__")
    return [getattr(function, name, None) for name in names]


def _are_different_data(one: Any, other: Any) -> bool:
    if not (_is_data(one) and _is_data(other)):
        return False
    if isinstance(one, keras.dtype_policies.DTypePolicy):
        return not are_same_policies(one, other)
    try:
        return not bool(one == other)
    except ValueError:  # arrays
        return True


def are_same_policies(one: Any, other: Any) -> bool:
    """Whether two policies are equal; Keras compares no maps of policies."""
    kind = keras.dtype_policies.DTypePolicyMap
    if isinstance(one, kind) and isinstance(other, kind):
        return bool(one.get_config() == other.get_config())
    return bool(one == other)


def _is_data(value: Any) -> bool:
    if isinstance(value, _DATA):
        return True
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return isinstance(value, dict) and all(
        map(_is_data, [*value.keys(), *value.values()])
    )


def _is_of_a_run(value: Any) -> bool:
    """Whether `fit` left it on a model: its history."""
    return isinstance(value, keras.callbacks.Callback)


def adapt_alike(old: Any, new: Any) -> None:
    """Quantizes a layer, and gives it LoRA weights, as another is.

    What its configuration says it is already. One that a custom layer makes is
    as it was made.
    """
    mode = getattr(old, "quantization_mode", None)
    if mode and not getattr(new, "quantization_mode", None):
        settings = getattr(old, "quantization_config", None)
        new.quantize(mode, **({"config": settings} if settings else {}))
    if getattr(old, "lora_enabled", False) and not new.lora_enabled:
        new.enable_lora(old.lora_rank, lora_alpha=old.lora_alpha)


def copy_variable(variable: keras.Variable) -> keras.Variable:
    """A new variable with all that a variable is."""
    new = keras.Variable(
        to_numpy(variable),
        trainable=variable.trainable,
        dtype=variable.dtype,
        name=variable.name,
    )
    hand_on(variable, new, lambda value: value)
    return new


def copy_state(old: Any, new: Any) -> None:
    """Gives a layer the state of another of its class.

    All that Keras saves, the same way; then the rest: the state
    of random generators, and of a stateful recurrent layer, and what variables
    are beside their values. Of the layers inside, nothing.

    Raises:
        ValueError: If the layers have other variables.
    """
    try:
        new.load_own_variables(_saved(old))
        copy_assets(old, new)
    except (ValueError, KeyError, AttributeError) as error:
        raise not_made_anew(old) from error
    variables = [own_variables(old), own_variables(new)]
    if getattr(old, "stateful", False) and hasattr(old, "states"):
        variables[0] += keras.tree.flatten(old.states)
        variables[1] += keras.tree.flatten(new.states)
    pairs = list(zip(*map(_in_order, variables), strict=False))
    if len({*map(len, variables), len(pairs)}) > 1 or any(
        (one.shape, one.dtype) != (two.shape, two.dtype) for one, two in pairs
    ):
        raise not_made_anew(old)
    for variable, copied in pairs:
        copied.assign(to_numpy(variable))
        # The setter: on PyTorch it does more than keep the flag.
        copied.trainable = variable.trainable
        hand_on(variable, copied, lambda value: value)


def _in_order(variables: list[keras.Variable]) -> list[keras.Variable]:
    """By name: quantization and LoRA add some later than construction does.

    Not by the numbers that Keras gives: those of a copy are others.
    """
    return sorted(
        variables, key=lambda variable: re.sub(r"\d+", "", variable.name)
    )


def reload(layer: Any) -> None:
    """Lets a layer update all that depends on its new weights.

    `set_weights` does not; loading does.
    """
    layer.load_own_variables(_saved(layer))


def _saved(layer: Any) -> dict[str, np.ndarray]:
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    # Copies: JAX gives the memory of a variable away.
    return {name: to_numpy(value) for name, value in store.items()}


def copy_assets(old: Any, new: Any) -> None:
    """Copies the files of a layer of its own: vocabularies."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


class NoConfigurationError(ValueError):
    """An object of a class whose configuration does not make it anew."""


def is_untrained(layer: Any) -> bool:
    """Whether moving statistics are as they were made: mean 0, variance 1.

    Or as other initializers of the layer make them.
    """
    return not layer.built or all(
        np.array_equal(
            to_numpy(weight),
            to_numpy(initializer(weight.shape, weight.dtype)),
        )
        for weight, initializer in (
            (layer.moving_mean, layer.moving_mean_initializer),
            (layer.moving_variance, layer.moving_variance_initializer),
        )
    )
