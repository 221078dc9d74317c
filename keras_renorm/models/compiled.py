"""Steps that models have traced, when a layer in them changes."""

import gc
from collections.abc import Iterable
from typing import Any

import keras

from keras_renorm.models.finding import find_layers


def trace_anew(layers: Iterable[Any]) -> None:
    """Lets models that hold a layer trace their steps again.

    `fit`, `evaluate` and `predict` run what they traced at first, with the
    layers as they were then. The model that was compiled may be around the one
    whose layers changed, and no layer knows what holds it: so this asks all
    models that there are. A function of the user's (`tf.function`, `jax.jit`)
    is out of reach.

    Args:
        layers: Layers that compute otherwise now.
    """
    changed = {id(layer) for layer in layers}
    for each in gc.get_objects() if changed else ():
        # Not `isinstance`, which asks the object: some would import a module.
        if not issubclass(type(each), keras.Model):
            continue
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
                getattr(each, f"make_{step}_function")(force=True)
