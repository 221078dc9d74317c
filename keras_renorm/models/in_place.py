"""Other layers in the place of some, in a model that stays the same object.

What refers to a layer (an attribute, a list, a graph, a closure) still refers
to it: the layer itself becomes another.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import keras

from keras_renorm.models.compiled import trace_anew
from keras_renorm.models.configuration import Configurations
from keras_renorm.models.finding import describe
from keras_renorm.models.replacing import as_asked

# Weights that an optimizer knows: they stay the same variables.
_TRAINED = ("gamma", "beta")


def replace_in_place(
    model: keras.Model,
    layers: Sequence[Any],
    replace: Callable[[Any, dict[str, Any]], tuple[type, dict[str, Any]]],
    copy_weights: Callable[[Any, Any], None],
) -> None:
    """Turns layers of a model into others; all of them or, on errors, none.

    Args:
        model: A model, which holds them.
        layers: Built layers.
        replace: From a layer and its configuration to the class and the
            configuration of the one that it becomes.
        copy_weights: Hands the weights of a layer on to a new one.

    Raises:
        ValueError: If a layer is not built.
    """
    unbuilt = [layer for layer in layers if not layer.built]
    if unbuilt:
        raise ValueError(
            "`model` must be built to be changed in place: call it on data, "
            "make it in `keras_renorm.replacing`, or leave out layers that it "
            "never calls (layers=lambda layer: layer.built). Received: "
            f"model={model.name}, with the layers "
            f"{describe(unbuilt, model)} not built."
        )
    configurations = Configurations()
    news = []
    # Weights are made where the model's are.
    strategy = getattr(model, "distribute_strategy", None)
    with as_asked(), strategy.scope() if strategy else nullcontext():
        for layer in layers:
            new = configurations.make(*replace(layer, configurations.of(layer)))
            _build_alike(layer, new)
            copy_weights(layer, new)
            news.append(new)
        names = [
            (_names(layer), _names(new))
            for layer, new in zip(layers, news, strict=True)
        ]
    for layer, new, (old_names, new_names) in zip(
        layers, news, names, strict=True
    ):
        _become(layer, new, old_names, new_names)
    trace_anew(model, layers)


def _build_alike(layer: Any, new: Any) -> None:
    """Builds a layer for the inputs of another, under the same path."""
    shape = [None] * layer.input_spec.ndim
    for axis, size in layer.input_spec.axes.items():
        shape[axis] = size
    with ExitStack() as scopes:
        for name in layer.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        new.build(tuple(shape))


def _names(layer: Any) -> list[str]:
    """The attributes that a layer has and not every layer."""
    # Named, so that Keras does not count them.
    made, plain = type(layer)(name="layer"), keras.layers.Layer(name="layer")
    names = vars(made).keys() - vars(plain).keys()
    return [
        name
        for name, value in vars(layer).items()
        if name in names or isinstance(value, keras.Variable)
    ]


def _become(
    layer: Any, new: Any, old_names: Sequence[str], new_names: Sequence[str]
) -> None:
    """Turns a layer into another, which must not be used afterwards.

    What every layer has (name, path, calls, `trainable`, policy) stays, and
    gamma and beta stay the same variables.
    """
    # Keras lets no built layer have other variables by public means.
    layer._tracker.unlock()
    try:
        for name in old_names:
            if name in _TRAINED:
                continue
            value = getattr(layer, name)
            if isinstance(value, keras.Variable):
                layer._untrack_variable(value)
                setattr(layer, name, None)  # to delete one collects garbage
            delattr(layer, name)
        layer.__class__ = type(new)
        for name in new_names:
            value = vars(new)[name]
            if name in _TRAINED:
                kept = getattr(layer, name)
                if kept is not None:
                    kept.regularizer = value.regularizer
                    kept.constraint = value.constraint
                continue
            if isinstance(value, keras.Variable):
                layer._track_variable(value)
            setattr(layer, name, value)
    finally:
        layer._tracker.lock()
