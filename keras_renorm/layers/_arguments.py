"""Arguments of the layers: what they may be, and when they may change."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import keras

from keras_renorm._checks import (
    check_boolean,
    check_epsilon,
    check_integer,
    check_known,
    check_momentum,
    check_number,
    warn,
)

# Of the accumulators; see `GradientMemory`.
GRADIENT_MOMENTUM = 0.9


class CheckedArguments(keras.layers.Layer):
    """A layer whose arguments are checked, also where one is assigned to."""

    # Arguments that may be assigned to as well.
    checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "axis": partial(check_integer, "axis"),
        "momentum": check_momentum,
        "epsilon": check_epsilon,
        "synchronized": partial(check_boolean, "synchronized"),
        "virtual_batch_size": lambda value: (
            None
            if value is None
            else check_integer("virtual_batch_size", value, minimum=1)
        ),
        "center": partial(check_boolean, "center"),
        "scale": partial(check_boolean, "scale"),
    }
    # Whether a graph has momentum and epsilon, as constants.
    _is_traced = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.checks and name in vars(self):
            value = self._changed(name, self.checks[name](value))
        super().__setattr__(name, value)

    def _changed(self, name: str, value: Any) -> Any:
        """A valid value of an argument, if the layer may have it from now."""
        old = vars(self)[name]
        if value == old:
            return value
        if name not in ("momentum", "epsilon"):
            if self.built:
                raise ValueError(
                    f"`{name}` must not change once a layer is built. "
                    f"Received: {name}={value}, which is {old} in layer "
                    f"{self.name}. `keras_renorm.convert` makes a model with "
                    "other layers."
                )
        elif self._is_traced:
            warn(
                f"`{name}` takes effect when the model is compiled next: "
                f"graphs that were made before have the old {name}."
            )
        return value

    @classmethod
    def _check_layer_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What is left for `keras.layers.Layer`, which knows what it takes."""
        if given.get("renorm", True) is False:
            # As Keras's layer has them where it does not renormalize.
            unset = {"renorm", "renorm_momentum"}
            if given.get("renorm_clipping") is None:
                unset.add("renorm_clipping")
            given = {k: v for k, v in given.items() if k not in unset}
        for name, value in given.items():
            if name.startswith("renorm"):
                raise TypeError(
                    f"`{name}` must not be given: batch renormalization "
                    "is the layer `keras_renorm.BatchRenormalization`, whose "
                    "limits are `r_max` and `d_max`. "
                    f"Received: {name}={value!r}."
                )
        if given:
            known = {
                name
                for each in cls.__mro__
                if issubclass(each, keras.layers.Layer)
                and "__init__" in vars(each)
                for name in inspect.signature(vars(each)["__init__"]).parameters
                if not name.startswith("renorm")
            }
            known |= {"input_shape", "input_dim"}
            check_known(given, known, cls.__name__)
        return given


def check_sharing(synchronized: bool, virtual_batch_size: int | None) -> None:
    if synchronized and virtual_batch_size is not None:
        raise ValueError(
            "`virtual_batch_size` must be None where synchronized=True: "
            "one narrows the examples that share statistics, the other "
            "widens them. Received: virtual_batch_size="
            f"{virtual_batch_size}."
        )


def check_gradient_momentum(value: Any) -> float | None:
    """`value` as a float in [0, 1), or `None`."""
    if value is None:
        return None
    expected = '`gradient_momentum` must be at least 0 and below 1, "auto" or '
    if isinstance(value, str):
        raise TypeError(
            f"{expected}None. Received: gradient_momentum={value!r}."
        )
    momentum = check_number("gradient_momentum", value)
    if not 0 <= momentum < 1:
        raise ValueError(
            f"{expected}None. Received: gradient_momentum={value}."
        )
    return momentum


def check_no_groups(virtual_batch_size: int | None, axis: int) -> None:
    """Raises for groups where the channels lie on the first axis."""
    if virtual_batch_size is not None:
        raise ValueError(
            "`virtual_batch_size` must be None where the channels are on "
            "the first axis: its groups are of examples, which lie there. "
            f"Received: virtual_batch_size={virtual_batch_size}, axis={axis}."
        )


def check_groups(
    gradient_momentum: float | None, virtual_batch_size: int | None
) -> None:
    if gradient_momentum is not None and virtual_batch_size is not None:
        raise ValueError(
            "`gradient_momentum` must be None where virtual_batch_size is "
            "given: groups of one batch share their moving statistics, and "
            "none of them comes after another. Received: "
            f"gradient_momentum={gradient_momentum}, "
            f"virtual_batch_size={virtual_batch_size}."
        )
