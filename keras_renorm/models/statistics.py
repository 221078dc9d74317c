"""The moving statistics of a whole model, as arrays."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm import graphs
from keras_renorm.models.rebuild import describe
from keras_renorm.models.traversal import (
    Choice,
    choose_layers,
    names_of,
    unique_names,
)

Statistics = dict[str, np.ndarray]
_NAMES = ("moving_mean", "moving_variance")


def get_statistics(model: keras.Model) -> Statistics:
    """Copies of the moving means and variances of a model.

    A bank of statistics, one a domain, is what a network needs to serve
    several (Li et al. 2016, arXiv:1603.04779, "AdaBN"). To keep one on disk:

        np.savez("night.npz", **get_statistics(model))
        set_statistics(model, np.load("night.npz"))

    Args:
        model: A built model with batch normalization, Keras's or ours, at any
            depth.

    Returns:
        Arrays of shape `(channels,)` by name: `"<layer>/moving_mean"` and
        `"<layer>/moving_variance"`. Where several layers have one name (in
        nested models), they are numbered in order, past numbers that are
        names already: `"<layer>_1"`... Names that Keras gave are counted from
        the model's first layer on (`"batch_normalization"`,
        `"batch_normalization_1"`...), whatever else the session made.

    Raises:
        ValueError: If the model has no batch normalization, or is not built.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> sorted(get_statistics(model))
    ['bn/moving_mean', 'bn/moving_variance']
    """
    return {
        key: graphs.to_numpy(variable)
        for key, variable in _variables(model).items()
    }


def set_statistics(
    model: keras.Model, statistics: Mapping[str, np.ndarray]
) -> None:
    """Puts moving means and variances into a model, in place.

    Nothing else changes, and nothing at all if something does not fit.

    Args:
        model: A built model with batch normalization, at any depth.
        statistics: What `get_statistics` returns, or a file of `np.savez`
            with it. Names with the numbers of another session do, too.

    Raises:
        ValueError: If the model has no batch normalization, or is not built;
            if names or shapes are not the model's; if a value is not finite,
            or a variance negative.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> bank = get_statistics(model)
    >>> bank["bn/moving_mean"] += 3
    >>> set_statistics(model, bank)
    >>> model.layers[0].moving_mean.numpy().tolist()
    [3.0, 3.0]
    """
    variables = _variables(model)
    statistics = _renamed(statistics)
    missing = sorted(variables.keys() - set(statistics))
    unknown = sorted(set(statistics) - variables.keys())
    if missing or unknown:
        raise ValueError(
            "`statistics` must be those of the same architecture. Received: "
            f"{len(set(statistics))} arrays for the {len(variables)} of "
            f"{model.name}; missing {missing[:4]}, unknown {unknown[:4]}."
        )
    values = {key: np.array(statistics[key]) for key in variables}
    for key, value in values.items():
        if value.shape != tuple(variables[key].shape):
            raise ValueError(
                "`statistics` must have the shapes of the model's. Received: "
                f"{key} of shape {value.shape}, for {variables[key].shape}."
            )
        is_variance = key.endswith(_NAMES[1])
        if not np.all(np.isfinite(value)) or (is_variance and value.min() < 0):
            raise ValueError(
                "`statistics` must be finite, and variances not negative. "
                f"Received: {key}={value}."
            )
    for key, variable in variables.items():
        variable.assign(values[key])


def _variables(model: keras.Model) -> dict[str, Any]:
    layers = statistics_layers(model)
    return {
        f"{name}/{kind}": getattr(layer, kind)
        for name, layer in zip(names_of(layers), layers, strict=True)
        for kind in _NAMES
    }


def _renamed(
    statistics: Mapping[str, np.ndarray],
) -> Mapping[str, np.ndarray]:
    """A bank by the names of `names_of`, which older banks may not have."""
    parts = [key.rpartition("/") for key in statistics]
    old = list(dict.fromkeys(layer for layer, _, _ in parts))
    new = dict(zip(old, unique_names(old), strict=True))
    return {
        f"{new[layer]}{slash}{kind}": statistics[f"{layer}{slash}{kind}"]
        for layer, slash, kind in parts
    }


def statistics_layers(model: keras.Model, layers: Choice = None) -> list[Any]:
    """The batch normalization of a model, or some of it; all of that built."""
    chosen = choose_layers(model, layers)
    if not chosen:
        raise ValueError(
            "`model` must have a batch normalization layer. Received: "
            f"model={model.name}, which has none."
        )
    unbuilt = [layer for layer in chosen if not layer.built]
    if unbuilt:
        raise ValueError(
            "`model` must be built: call it on data, or give it an `Input`. "
            f"Received: model={model.name}, with the layers "
            f"{describe(unbuilt)} not built."
        )
    return chosen


def is_untrained(layer: Any) -> bool:
    """Whether moving statistics are as they were made: mean 0, variance 1.

    Or what other initializers of the layer give.
    """
    return not layer.built or all(
        np.array_equal(
            graphs.to_numpy(weight),
            graphs.to_numpy(initializer(weight.shape, weight.dtype)),
        )
        for weight, initializer in (
            (layer.moving_mean, layer.moving_mean_initializer),
            (layer.moving_variance, layer.moving_variance_initializer),
        )
    )


def check_no_keras_renorm(layers: list[Any]) -> None:
    """Raises if a layer's moving statistics are not averages of a batch's."""
    renormalized = [
        layer for layer in layers if getattr(layer, "renorm", False)
    ]
    if renormalized:
        raise ValueError(
            "`model` must have no Keras layer with `renorm=True`, whose "
            "moving statistics follow from others; `keras_renorm.convert` "
            f"it. Received: layers {describe(renormalized)}."
        )
