"""Graphs of models: kept while nothing changes, traced anew where it does."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from keras_renorm._backend import tracing
from keras_renorm.models._layers.finding import find_layers

# Tracing takes longer than many batches. By model and use, each with its
# conditions. What is kept must not refer to the model, or both stay for ever.
_KEPT: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)

# What Keras notes on a model while it trains and evaluates it: no graph depends
# on it, and it is new at each epoch. If Keras removes or adds a name, the only
# cost is a trace.
_BOOKKEEPING = frozenset(
    {
        "_called",
        "_eval_epoch_iterator",
        "_initial_epoch",
        "_is_traced",  # of our layers
        "_jax_state",
        "_jax_state_synced",
        "_losses_override",
        "history",
        "predict_function",
        "stop_evaluating",
        "stop_predicting",
        "stop_training",
        "test_function",
        "train_function",
    }
)


def kept(
    model: Any, use: Any, others: tuple[Any, ...], make: Callable[[], Any]
) -> Any:
    """What was made for this use of a model before, or made anew.

    Anew where an attribute of a layer has changed, or one of the other objects
    that it is made for.
    """
    mark = others, _fingerprint(model, others)
    found = _KEPT.setdefault(model, {})
    if use not in found or found[use][0] != mark:
        found[use] = mark, make()
    return found[use][1]


@contextmanager
def forgotten_after_errors(model: Any) -> Iterator[None]:
    """Drops what was made for a model if an error leaves it half made."""
    try:
        yield
    except BaseException:
        _KEPT.pop(model, None)
        raise


def compiled(model: Any, function: Callable[..., Any]) -> Any:
    """A function that runs a model, as a graph where the model may be one."""
    return tracing.compiled(
        function, is_eager=getattr(model, "run_eagerly", False)
    )


def _fingerprint(model: Any, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a graph has baked in: the attributes of layers and others.

    Plain values as they are, other objects by identity, so that a changed
    dropout rate or a frozen layer is seen. What changes inside a list is not.
    """
    owners = [*find_layers(model, keras.layers.Layer), *others]
    return (
        tuple(id(variable) for variable in model.trainable_variables),
        tuple(
            (id(owner), name, value)
            if isinstance(value, bool | int | float | str)
            else (id(owner), name, id(value))
            for owner in owners
            for name, value in getattr(owner, "__dict__", {}).items()
            if name not in _BOOKKEEPING
        ),
    )


def trace_anew(model: Any, layers: Iterable[Any]) -> None:
    """Lets models that hold a layer trace their steps again.

    `fit`, `evaluate` and `predict` run what they traced at first, with the
    layers as they were then. The model that was compiled may be around the one
    whose layers changed, and no layer knows what holds it: so this asks all
    models that there are. A function of the user's (`tf.function`, `jax.jit`)
    is out of reach.

    Args:
        model: The model that the layers were found in.
        layers: Layers that compute otherwise now.
    """
    for holder in models_with(model, layers, _traced):
        for step in _traced(holder):
            tracing.forget_traces(getattr(holder, f"{step}_step"))
            getattr(holder, f"make_{step}_function")(force=True)


def _traced(model: Any) -> list[str]:
    """Which steps of a model were traced."""
    return [
        step
        for step in ("train", "test", "predict")
        if getattr(model, f"{step}_function", None) is not None
    ]


def models_with(
    model: Any, layers: Iterable[Any], condition: Callable[[Any], Any]
) -> list[Any]:
    """Living models that hold one of these layers of a model.

    Only those are searched of which a condition holds.
    """
    changed = {id(layer) for layer in layers}
    if not changed:
        return []
    # `gc.freeze` hides objects: what is known comes first. (No list around the
    # objects, which would hold itself, and with it all of them.)
    models = {id(held): held for held in find_layers(model, keras.Model)}
    for found in gc.get_objects():
        # Not `isinstance`, which asks the object: some would import a module.
        if issubclass(type(found), keras.Model):
            models[id(found)] = found
    return [
        holder
        for holder in models.values()
        if condition(holder)
        and any(
            id(layer) in changed
            for layer in find_layers(holder, keras.layers.Layer)
        )
    ]
