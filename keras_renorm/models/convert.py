"""From Keras's batch normalization to ours, and back."""

import inspect
from typing import Any

import keras

from keras_renorm import graphs
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models import legacy
from keras_renorm.models.rebuild import describe, rebuild
from keras_renorm.models.traversal import find_layers

KERAS = keras.layers.BatchNormalization
# Weights that are arguments too.
_GIVEN = {"limit_values", "limit_steps"}


def convert(
    model: Any,
    to: type[BatchNormalization] = BatchRenormalization,
    **layer_arguments: Any,
) -> keras.Model:
    """A copy of a model with our layers for all batch normalization in it.

    The copy infers what the model infers. It has the model's weights, layer
    names, `trainable` flags and shared layers. If the model is compiled, the
    copy is compiled alike, with an optimizer that begins anew; what
    `optimizer.exclude_from_weight_decay` left out has to be left out again.
    State besides weights (vocabularies, a stateful layer's, random
    generators') is copied, and functions need not be registered. `model` is not
    changed. A functional model of a class of its own (keras-hub's backbones)
    becomes a plain functional model.

    Batch normalization of Keras and of this package is found in sequential,
    functional and nested models, in wrappers such as `TimeDistributed`, and in
    custom layers whose `get_config` holds it.

    A model of tf_keras (Keras 2) becomes one of Keras 3, not compiled. It may
    hold layers that Keras 3 has too, and sums and products; the statistics of
    its renormalization come along.

    Args:
        model: A built sequential or functional model.
        to: The class to convert to: `BatchRenormalization` (default) or
            `BatchNormalization`.
        **layer_arguments: Arguments for each new layer, in place of the old
            layer's: `momentum=0.95`, `r_max=2.0`, `frozen_statistics=True`...
            Without them a new layer has what the old one has: a Keras layer
            with `renorm=True` hands on its `renorm_clipping` as limits; a
            layer of `to`, everything, step counter included.

    Returns:
        A new model.

    Raises:
        TypeError: If `model` is no model, `to` is neither class, or an
            argument is of the wrong kind.
        ValueError: If the model is neither sequential nor functional, has no
            batch normalization, has some out of reach (created inside a custom
            layer) or of a class of its own; if one of tf_keras has what Keras
            3 lacks; if an argument is out of range.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.BatchNormalization(),
    ... ])
    >>> converted = convert(model, momentum=0.95)
    >>> converted.layers[0].momentum
    0.95
    """
    if to not in (BatchNormalization, BatchRenormalization):
        raise TypeError(
            "`to` must be keras_renorm.BatchNormalization or "
            f"keras_renorm.BatchRenormalization. Received: to={to!r}."
        )
    return _with_layers(model, to, layer_arguments)


def revert(model: Any) -> keras.Model:
    """A copy of a model with Keras's `BatchNormalization` for our layers.

    The copy infers what the model infers, and bit for bit what the Keras model
    did that `model` was converted from. It needs no `keras_renorm` to load. It
    has the model's weights, names, `trainable` flags and shared layers. If the
    model is compiled, the copy is compiled alike, with an optimizer that begins
    anew, as `convert`. `model` is not changed.

    What Keras's layer lacks is dropped: limits and step counter, virtual
    batches, `frozen_statistics`. To train the copy with statistics that stand,
    set its layers' `trainable` to `False`, which holds gamma and beta as well.

    Args:
        model: A sequential or functional model.

    Returns:
        A new model.

    Raises:
        ValueError: As `convert`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), BatchRenormalization()])
    >>> type(revert(model).layers[0]) is keras.layers.BatchNormalization
    True
    """
    return _with_layers(model, KERAS, {})


def _with_layers(
    model: keras.Model, to: Any, layer_arguments: dict[str, Any]
) -> keras.Model:
    if to is not KERAS:
        to(**layer_arguments)  # raises before anything is built
    if legacy.is_tf_keras(model):
        return legacy.translate(
            model,
            lambda config: to.from_config(
                {**_arguments_of(config, to), **layer_arguments}
            ),
        )
    layers = find_layers(model, KERAS)
    if not layers:
        raise ValueError(
            "`model` must have a batch normalization layer. Received: "
            f"model={model.name}, which has none."
        )
    foreign = [
        layer
        for layer in layers
        if type(layer) not in (KERAS, BatchNormalization, BatchRenormalization)
    ]
    if foreign:
        raise ValueError(
            "`model` must have no batch normalization of a class of its own, "
            "whose meaning conversion would lose. Received: "
            f"{describe(foreign)} of class {type(foreign[0]).__name__}."
        )

    def replace(
        layer: Any, config: dict[str, Any]
    ) -> tuple[type, dict[str, Any]]:
        return to, {**_arguments_of(config, to), **layer_arguments}

    new_model, copies = rebuild(
        model, lambda layer: isinstance(layer, KERAS), replace
    )
    for layer in layers:
        if layer.built:
            _copy_weights(layer, copies[id(layer)])
    return new_model


def _arguments_of(config: dict[str, Any], to: type) -> dict[str, Any]:
    """Of the configuration of a layer, what one of class `to` takes."""
    accepted = {"name", "dtype"}.union(
        *(
            inspect.signature(each.__init__).parameters  # type: ignore[misc]
            for each in to.__mro__[: to.__mro__.index(KERAS) + 1]
        )
    )
    arguments = {
        name: value
        for name, value in config.items()
        if name in accepted and not name.startswith("renorm")
    }
    if to is KERAS and keras.backend.backend() != "tensorflow":
        arguments["synchronized"] = False  # True is refused there
    if to is BatchRenormalization and config.get("renorm"):
        arguments |= _limits_of_clipping(config["renorm_clipping"])
    return arguments


def _limits_of_clipping(clipping: dict[str, float] | None) -> dict[str, float]:
    """Keras's `renorm_clipping` as r_max and d_max; absent is no limit."""
    clipping = clipping or {}
    lowest, highest = clipping.get("rmin"), clipping.get("rmax")
    candidates = [float("inf") if highest is None else highest]
    if lowest:
        candidates.append(1 / lowest)
    d_max = clipping.get("dmax")
    # The narrower of the two, where they are not each other's inverse.
    return {
        "r_max": max(1.0, min(candidates)),
        "d_max": float("inf") if d_max is None else d_max,
    }


def _copy_weights(old: Any, new: Any) -> None:
    """Copies the weights that both have; what is an argument came as one."""
    weights = {weight.name: weight for weight in new.weights}
    for weight in old.weights:
        if weight.name in weights.keys() - _GIVEN:
            weights[weight.name].assign(graphs.to_numpy(weight))
