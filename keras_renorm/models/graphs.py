"""Graphs of models that are kept while nothing in the model changes."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from keras_renorm import backend
from keras_renorm.models.finding import find_layers

# Tracing takes longer than many batches. By model and use, each with what it
# was made for. What is kept must not refer to the model, or both stay for ever.
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


def compiled(model: Any, function: Callable[..., Any]) -> Any:
    """A function that runs a model, as a graph where the model may be one."""
    # Partials have no code of their own: TensorFlow counts traces by code, and
    # would warn when many models, or one model many times, are run.
    return backend.compiled(
        partial(function), is_eager=getattr(model, "run_eagerly", False)
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
