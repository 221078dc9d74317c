"""Adam for some variables, SGD for the others."""

import keras
from keras import ops


class MixedAdam(keras.optimizers.Adam):
    """Adam that leaves some variables to SGD with momentum 0.9.

    Args:
        learning_rate: Of Adam. That of SGD is five times as large, about the
            ratio of the rates that are best for the two.
        adam_on: "kernels" (of convolutions) or "others" (gamma, beta and the
            classifier): what Adam trains.
    """

    def __init__(self, learning_rate, adam_on):
        super().__init__(learning_rate)
        self.adam_on = adam_on

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        part = "kernels" if "conv" in variable.name else "others"
        if part == self.adam_on:
            super().update_step(gradient, variable, learning_rate)
            return
        # Adam's own state; there is no public way to it.
        momentum = self._momentums[self._get_variable_index(variable)]
        rate = 5 * ops.cast(learning_rate, variable.dtype)
        self.assign(momentum, 0.9 * momentum - rate * gradient)
        self.assign_add(variable, momentum)
