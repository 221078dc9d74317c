"""Optimizers whose rate differs between kernels and all the rest."""

import keras


class _ScaledRest:
    """A base class: scales the rate of what is no kernel of a convolution.

    Args:
        learning_rate: Of the kernels.
        rest: The rate of gamma, beta and the classifier over that.
        **arguments: Those of the optimizer.
    """

    def __init__(self, learning_rate, rest, **arguments):
        super().__init__(learning_rate, **arguments)
        self.rest = rest

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        if "conv" not in variable.name:
            learning_rate = learning_rate * self.rest
        super().update_step(gradient, variable, learning_rate)


class SGD(_ScaledRest, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with another rate for the rest."""


class Adam(_ScaledRest, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with another rate for the rest."""
