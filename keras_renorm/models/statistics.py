"""The moving statistics of a whole model, as arrays."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm import backend
from keras_renorm.models.finding import built_layers, names_of, unique_names

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
        key: backend.to_numpy(variable)
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
            with it. Names with the numbers of another session are accepted.

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
    layers = built_layers(model)
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
