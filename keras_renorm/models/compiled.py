"""Steps that models have traced, when a layer in them changes."""

import gc
from collections.abc import Iterable
from typing import Any

import keras

from keras_renorm import backend
from keras_renorm.models.finding import find_layers


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
    changed = {id(layer) for layer in layers}
    if not changed:
        return
    # `gc.freeze` hides objects: what is known comes first. (No list around the
    # objects, which would hold itself, and with it all of them.)
    models = {id(each): each for each in find_layers(model, keras.Model)}
    for each in gc.get_objects():
        # Not `isinstance`, which asks the object: some would import a module.
        if issubclass(type(each), keras.Model):
            models[id(each)] = each
    for each in models.values():
        traced = [
            step
            for step in ("train", "test", "predict")
            if getattr(each, f"{step}_function", None) is not None
        ]
        if traced and any(
            id(layer) in changed
            for layer in find_layers(each, keras.layers.Layer)
        ):
            for step in traced:
                backend.forget_traces(getattr(each, f"{step}_step"))
                getattr(each, f"make_{step}_function")(force=True)
