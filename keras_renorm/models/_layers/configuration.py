"""Objects of the configuration of others, for copies within a process.

A configuration is made for files: a function in it is a name. A copy needs no
file, so what cannot be found by a name is passed on itself.
"""

import copy
import types
import warnings
from typing import Any

import keras

from keras_renorm.models._layers.finding import find_layers


def config_of(owner: Any) -> dict[str, Any]:
    """`get_config`, without the warning that a lambda in a file is unsafe."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*includes a `lambda`")
        try:
            return dict(owner.get_config())
        except (NotImplementedError, TypeError) as error:  # of the user's
            if isinstance(owner, keras.Model):
                for layer in owner.layers:
                    config_of(layer)
            if isinstance(owner, keras.layers.Layer):
                raise not_made_anew(owner) from error
            raise


def not_made_anew(layer: Any) -> ValueError:
    """The error for a layer that its configuration does not make anew."""
    return ValueError(
        "`model` must have layers that their configuration makes anew, with "
        "the same weights, and what they hold must be in one place "
        "(`keras_renorm.convert` and `keras_renorm.revert` change any model "
        f"with in_place=True). Received: layer {layer.name} of class "
        f"{type(layer).__name__}."
    )


class Configurations:
    """Configurations whose functions can be read, by this object only."""

    def __init__(self) -> None:
        # Functions and classes, by the names in their place.
        self._known: dict[str, Any] = {}
        self._takes_names = True

    def read(self, owner: Any, takes_names: bool = True) -> dict[str, Any]:
        """The configuration of a layer, an optimizer or a metric.

        What a class of the user's writes down in its own way (a name in the
        place of a function, say) is what its constructor takes, and stays;
        `takes_names` is false where it turned out to take the function.
        """
        self._takes_names = takes_names
        config = config_of(owner)
        self._learn_classes(owner)
        return self._members(owner, config)

    def make(self, kind: type, config: dict[str, Any]) -> Any:
        """An object of a class, of such a configuration."""
        with keras.saving.custom_object_scope(self._known):
            return kind.from_config(config)  # type: ignore[attr-defined]

    def alike(self, owner: Any) -> Any:
        """A new object of the same class and configuration."""
        try:
            return self.make(type(owner), self.read(owner))
        except Exception:  # of the user's
            config = self.read(owner, takes_names=False)
            return self.make(type(owner), config)

    def _learn_classes(self, owner: Any) -> None:
        if isinstance(owner, keras.layers.Layer):
            for layer in find_layers(owner, keras.layers.Layer):
                if not is_of_keras(type(layer)):
                    self._known[type(layer).__name__] = type(layer)

    def _members(self, owner: Any, config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        policy = getattr(owner, "dtype_policy", None)
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            # Keras writes policies without names where it has no default.
            config = {**config, "dtype": copy.deepcopy(policy)}
        stays = self._takes_names and not is_of_keras(type(owner))
        return {
            name: self._replaced(node, _member(owner, name), stays)
            if isinstance(node, dict | list | tuple | str)
            else node
            for name, node in config.items()
        }

    def _replaced(self, node: Any, value: Any, stays: bool) -> Any:
        """The node of a configuration; `value` is the object it describes.

        `stays` says whether it does where Keras did not write it.
        """
        if isinstance(node, list | tuple):
            if not isinstance(value, list | tuple):
                return node
            if len(value) != len(node):
                # `layers` of a sequential model is without its input.
                named = {getattr(part, "name", None): part for part in value}
                value = [named.get(_name_in(inner)) for inner in node]
            return type(node)(
                self._replaced(*pair, stays)
                for pair in zip(node, value, strict=True)
            )
        is_of_a_file = isinstance(node, dict) and "class_name" in node
        if (is_of_a_file or not stays) and _must_be_kept(node, value):
            return self._stand_in(value)
        if not isinstance(node, dict):
            return node
        if "class_name" in node and "config" in node:
            # How a model inside was compiled is no part of what it computes.
            node = {k: v for k, v in node.items() if k != "compile_config"}
            return {**node, "config": self._members(value, node["config"])}
        if isinstance(value, dict):
            return {
                key: self._replaced(inner, value.get(key), stays)
                for key, inner in node.items()
            }
        return node

    def _stand_in(self, value: Any) -> dict[str, Any]:
        name = f"keras_renorm>kept {id(value)}"
        self._known[name] = value  # which keeps the id its own
        return {
            "class_name": "function",
            "config": name,
            "module": "builtins",
            "registered_name": name,
        }


def is_of_keras(value: Any) -> bool:
    """Whether Keras defines a class or a function."""
    return str(getattr(value, "__module__", "")).split(".")[0] == "keras"


def _must_be_kept(node: Any, value: Any) -> bool:
    """Whether a node represents a function, or an object like one."""
    if not callable(value) or isinstance(value, keras.layers.Layer | type):
        return False
    is_function = isinstance(value, types.FunctionType)
    if is_of_keras(value if is_function else type(value)):
        # Keras finds its own functions by a plain name.
        return is_function and isinstance(node, dict)
    return True


def _name_in(node: Any) -> Any:
    """The name of the layer of a serialized node; empty for another."""
    config = node.get("config") if isinstance(node, dict) else None
    return config.get("name", "") if isinstance(config, dict) else ""


def _member(owner: Any, name: str) -> Any:
    """What an object keeps of an argument of its constructor, if it matters."""
    for attribute in (name, f"_{name}"):
        try:
            value = getattr(owner, attribute, None)
        except Exception:  # a property that cannot be read yet
            continue
        if getattr(value, "__self__", None) is owner:  # its own method
            continue
        if (
            callable(value)
            or isinstance(value, list | tuple | dict)
            or hasattr(value, "get_config")
        ):
            return value
    return None
