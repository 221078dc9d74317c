"""The state of layers, which is more than their weights."""

import tempfile
from typing import Any

import keras
import numpy as np

from keras_renorm import backend
from keras_renorm.models.finding import own_variables


def copy_state(old: Any, new: Any) -> None:
    """Gives a layer the state of another of its class.

    What Keras saves of it, the same way; then what it does not save: the state
    of random generators, and of a stateful recurrent layer. Of the layers
    inside, nothing.

    Raises:
        ValueError: If the layers have not the same variables.
    """
    try:
        new.load_own_variables(_saved(old))
        copy_assets(old, new)
    except (ValueError, KeyError, AttributeError) as error:
        raise not_made_anew(old) from error
    pairs = [own_variables(old), own_variables(new)]
    if getattr(old, "stateful", False) and hasattr(old, "states"):
        pairs[0] += keras.tree.flatten(old.states)
        pairs[1] += keras.tree.flatten(new.states)
    if [v.shape for v in pairs[0]] != [v.shape for v in pairs[1]]:
        raise not_made_anew(old)
    for variable, copy in zip(*pairs, strict=True):
        copy.assign(backend.to_numpy(variable))


def reload(layer: Any) -> None:
    """Lets a layer compute what depends on the weights that it was given.

    `set_weights` does not; loading does.
    """
    layer.load_own_variables(_saved(layer))


def _saved(layer: Any) -> dict[str, np.ndarray]:
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    # Copies: JAX gives the memory of a variable away.
    return {name: backend.to_numpy(value) for name, value in store.items()}


def copy_assets(old: Any, new: Any) -> None:
    """Copies what a layer keeps in files of its own: vocabularies."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def not_made_anew(layer: Any) -> ValueError:
    """The error for a layer whose copy has other variables."""
    return ValueError(
        "`model` must have layers that their configuration makes anew, with "
        f"the same weights. Received: layer {layer.name} of class "
        f"{type(layer).__name__}."
    )


def is_untrained(layer: Any) -> bool:
    """Whether moving statistics are as they were made: mean 0, variance 1.

    Or what other initializers of the layer give.
    """
    return not layer.built or all(
        np.array_equal(
            backend.to_numpy(weight),
            backend.to_numpy(initializer(weight.shape, weight.dtype)),
        )
        for weight, initializer in (
            (layer.moving_mean, layer.moving_mean_initializer),
            (layer.moving_variance, layer.moving_variance_initializer),
        )
    )
