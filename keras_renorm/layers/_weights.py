"""Weights that are given to a layer, from a file or by hand."""

from typing import Any

import keras
import numpy as np

from keras_renorm._backend.variables import to_numpy


class CheckedWeights(keras.layers.Layer):
    """A layer that takes all weights that it is given, or none of them."""

    def load_own_variables(self, store: Any) -> None:
        """Takes the weights of a file, all of them or none."""
        expected, received = len(self.weights), len(store.keys())
        if received != expected:
            raise ValueError(
                "The file must hold the weights of this network. Received: "
                f"{received} of the {expected} weights of layer {self.name}, "
                f"of class {type(self).__name__}. Weights of a network with "
                "batch normalization of another class: load them into that "
                "network, then `keras_renorm.convert` it."
            )
        self.set_weights([store[f"{index}"] for index in range(expected)])

    def save_own_variables(self, store: Any) -> None:
        """Writes the weights, if a layer can take them again."""
        self._check_state(self.get_weights())
        # Not Keras's order, which differs from backend to backend.
        for index, weight in enumerate(self.weights):
            store[f"{index}"] = weight

    def set_weights(self, weights: Any) -> None:
        """Sets the weights, all of them or none."""
        if len(weights) != len(self.weights):
            raise ValueError(
                f"`weights` must be {len(self.weights)} arrays, for "
                f"{[weight.name for weight in self.weights]}. Received: "
                f"{len(weights)} arrays. Weights of a layer of another class: "
                "set them there, then `keras_renorm.convert` the model."
            )
        super().set_weights(self._check_state(weights))

    def _check_state(self, weights: Any) -> list[np.ndarray]:
        """Weights, if they are a state of this layer.

        An average of valid weights is one; an extrapolation may be none.
        """
        arrays = [to_numpy(value) for value in weights]
        for variable, array in zip(self.weights, arrays, strict=True):
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"`{variable.name}` of layer {self.name} must have shape "
                    f"{tuple(variable.shape)}. Received: shape={array.shape}."
                )
            if variable is self.moving_variance and (array < 0).any():
                raise ValueError(
                    f"`moving_variance` of layer {self.name} must be at least "
                    f"0. Received: {array.min()} in a channel."
                )
        return arrays
