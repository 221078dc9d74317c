"""From one class of batch normalization to another: arguments, weights."""

import inspect
import math
from collections.abc import Collection, Iterable
from typing import Any

import keras

from keras_renorm._backend import runtime
from keras_renorm._backend.variables import to_numpy
from keras_renorm._checks import suggestion, warn
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization

KERAS = keras.layers.BatchNormalization
# Weights that are arguments too.
_GIVEN = {"limit_values", "limit_steps"}


def check_class(to: Any) -> None:
    """Raises if `to` is no class of this package."""
    if to not in (BatchNormalization, BatchRenormalization):
        raise TypeError(
            "`to` must be keras_renorm.BatchNormalization or "
            f"keras_renorm.BatchRenormalization. Received: to={to!r}."
        )


def check_arguments(
    given: dict[str, Any], to: type, function: str, own: Iterable[str]
) -> None:
    """Raises for arguments that neither a function nor the layer takes."""
    known = {*own, *_accepted_by(to)} - {"name", "renorm"}
    for name, value in given.items():
        if name in ("name", "trainable"):
            raise TypeError(
                f"`{name}` must not be given: layers keep theirs. Received: "
                f"{name}={value!r}."
            )
        # The layer has errors of its own for `renorm` and its arguments.
        if name not in known and not name.startswith("renorm"):
            hint = suggestion(name, known)
            raise TypeError(
                f"`{name}` must be an argument of `{function}` or of "
                f"{to.__name__}. Received: {name}={value!r}. {hint}".rstrip()
            )


def _accepted_by(to: type) -> set[str]:
    """Names of arguments that a class takes."""
    parameters = [
        parameter
        for parent in to.__mro__[: to.__mro__.index(KERAS) + 1]
        for parameter in list(
            inspect.signature(parent.__init__).parameters.values()  # type: ignore[misc]
        )[1:]
    ]
    return {"activity_regularizer", "dtype", "name"} | {
        parameter.name
        for parameter in parameters
        if parameter.kind is not parameter.VAR_KEYWORD
    }


def arguments_of(
    config: dict[str, Any], to: type, given: Collection[str] = ()
) -> dict[str, Any]:
    """The part of a configuration that a layer of class `to` takes.

    `given` are names of arguments that come in the place of these.
    """
    arguments = {
        name: value
        for name, value in without_renorm(config, to, given).items()
        if name in _accepted_by(to)
    }
    if to is KERAS and not runtime.lets_keras_synchronize():
        arguments["synchronized"] = False  # True is refused there
    return arguments


def without_renorm(
    config: dict[str, Any], to: type, given: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments with limits in the place of Keras's `renorm*`."""
    arguments = {
        name: value
        for name, value in config.items()
        if not name.startswith("renorm")
    }
    if to is BatchRenormalization and config.get("renorm"):
        clipping = config.get("renorm_clipping") or {}
        if "r_max" in given:  # whatever it says of r
            clipping = {"dmax": clipping.get("dmax")}
        arguments |= _limits_of_clipping(clipping)
    return arguments


def _limits_of_clipping(clipping: dict[str, Any]) -> dict[str, float]:
    """Keras's `renorm_clipping` as r_max and d_max; absent is no limit."""
    lowest, highest = clipping.get("rmin"), clipping.get("rmax")
    candidates = [float("inf") if highest is None else highest]
    if lowest:
        candidates.append(1 / lowest)
        if not math.isclose(*candidates, rel_tol=1e-3):
            warn(
                "`renorm_clipping` must have an `rmin` of 1 / rmax to be kept: "
                "the smallest r is 1 / r_max. The narrower of both is taken. "
                f"Received: renorm_clipping={clipping}."
            )
    d_max = clipping.get("dmax")
    # The narrower of the two, where they are not each other's inverse.
    return {
        "r_max": max(1.0, min(candidates)),
        "d_max": float("inf") if d_max is None else d_max,
    }


def copy_weights(old: Any, new: Any) -> None:
    """Copies the weights that both have; others came as arguments."""
    weights = {weight.name: weight for weight in new.weights}
    for weight in old.weights:
        if weight.name in weights.keys() - _GIVEN:
            weights[weight.name].assign(to_numpy(weight))
