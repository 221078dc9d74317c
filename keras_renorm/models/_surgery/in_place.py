"""Other layers in the place of some, in a model that stays the same object.

What refers to a layer (an attribute, a list, a graph, a closure) still refers
to it: the layer itself becomes another.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import keras

from keras_renorm._backend import runtime
from keras_renorm._checks import warn
from keras_renorm.models._layers.configuration import Configurations
from keras_renorm.models._layers.finding import describe, find_layers
from keras_renorm.models._layers.graphs import models_with, trace_anew
from keras_renorm.models._layers.state import are_same_policies
from keras_renorm.models.replacing import as_asked

# From a layer and its configuration to class and configuration of the new one.
Replace = Callable[[Any, dict[str, Any]], tuple[type, dict[str, Any]]]
# Weights that an optimizer knows.
TRAINED = ("gamma", "beta")


def check_built(model: keras.Model, layers: Sequence[Any]) -> None:
    """Raises if layers of a model are not built: their shapes are unknown."""
    unbuilt = [layer for layer in layers if not layer.built]
    if unbuilt:
        raise ValueError(
            "`model` must be built to be changed in place: call it on data, "
            "make it in `keras_renorm.replacing`, or leave out layers that it "
            "never calls (layers=lambda layer: layer.built). Received: "
            f"model={model.name}, with the layers "
            f"{describe(unbuilt, model)} not built."
        )


def replace_in_place(
    model: keras.Model,
    layers: Sequence[Any],
    replace: Replace,
    copy_weights: Callable[[Any, Any], None],
    kept: Collection[str] = TRAINED,
    sources: Sequence[Any] | None = None,
) -> None:
    """Turns layers of a model into others; all of them or, on errors, none.

    Args:
        model: A model, which holds them.
        layers: The layers.
        replace: From a layer and its configuration to the class and the
            configuration of the one that it becomes.
        copy_weights: Hands the weights of a layer on to a new one.
        kept: Names of weights that stay the same variables.
        sources: Layers for `replace`, in the place of `layers`.
    """
    configurations = Configurations()
    news = []
    # Weights are made where the model's are.
    strategy = getattr(model, "distribute_strategy", None)
    with as_asked(), strategy.scope() if strategy else nullcontext():
        for layer, source in zip(layers, sources or layers, strict=True):
            config = configurations.read(source)
            new = configurations.make(*replace(source, config))
            _build_alike(layer, new)
            copy_weights(layer, new)
            news.append(new)
        names = [
            (_names(layer), _names(new))
            for layer, new in zip(layers, news, strict=True)
        ]
    remembered = _remembering(layers)
    for layer, new, (old_names, new_names) in zip(
        layers, news, names, strict=True
    ):
        _become(layer, new, old_names, new_names, kept)
    trace_anew(model, layers)
    runtime.track_parameters(
        lambda: (
            layer
            for holder in models_with(model, layers, _is_built)
            for layer in find_layers(holder, keras.layers.Layer)
        )
    )
    _warn_of_optimizers(model, remembered, _remembering(layers))


def _remembering(layers: Sequence[Any]) -> list[Any]:
    return [
        layer
        for layer in layers
        if getattr(layer, "gradient_momentum", None) is not None
    ]


def _is_built(model: Any) -> bool:
    return getattr(model, "built", False)  # others may be half made


def _warn_of_optimizers(
    model: keras.Model, before: list[Any], after: list[Any]
) -> None:
    """Warns where an optimizer knows other weights than it must add to.

    Those of `Accumulator`. Keras says then how many there are.

    Args:
        model: The model that layers were changed in.
        before: Those that remembered gradients.
        after: Those that do so now.
    """
    if runtime.keeps_state_backwards():
        return

    def is_trained(model: Any) -> bool:
        return getattr(getattr(model, "optimizer", None), "built", False)

    trained = models_with(model, [*before, *after], is_trained)
    if trained:
        names = ", ".join(model.name for model in trained)
        other = "" if before else " Or convert with gradient_momentum=None."
        warn(
            f"Compile {names} before the next training: on "
            f"Keras's {runtime.name()} backend an optimizer must know in "
            f"which weights layers remember gradients.{other}"
        )


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
    layer: Any,
    new: Any,
    old_names: Sequence[str],
    new_names: Sequence[str],
    kept: Collection[str],
) -> None:
    """Turns a layer into another, which must not be used afterwards.

    What every layer has (name, path, calls, `trainable`, scopes) stays, and
    `kept` stay the same variables.
    """
    new.trainable = True  # Where it is not, no flag says which weights train.
    # Keras lets no built layer have other variables by public means.
    layer._tracker.unlock()
    trains = {}
    try:
        for name in old_names:
            value = getattr(layer, name)
            if name in kept:
                continue
            if isinstance(value, keras.Variable):
                trains[name] = value.trainable
                layer._untrack_variable(value)
                setattr(layer, name, None)  # to delete one collects garbage
            delattr(layer, name)
        layer.__class__ = type(new)
        for name in new_names:
            value = vars(new)[name]
            if name in kept:
                variable = getattr(layer, name)
                if variable is not None:
                    variable.regularizer = value.regularizer
                    variable.constraint = value.constraint
                continue
            if isinstance(value, keras.Variable):
                layer._track_variable(value)
                value.trainable = trains.get(name, value.trainable)
            setattr(layer, name, value)
        layer.input_spec = new.input_spec
        layer.activity_regularizer = new.activity_regularizer
        if not are_same_policies(layer.dtype_policy, new.dtype_policy):
            layer.dtype_policy = new.dtype_policy
    finally:
        layer._tracker.lock()
