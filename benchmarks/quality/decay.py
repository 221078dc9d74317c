"""How rates fall, in steps that are compiled once for many rates."""

import keras
import tensorflow as tf


class Cosine(keras.optimizers.schedules.CosineDecay):
    """Cosine decay whose initial rate is a variable, `rate`."""

    def __init__(self, steps):
        super().__init__(1.0, steps)
        self.rate = tf.Variable(0.0)

    def __call__(self, step):
        """The rate at a step."""
        return self.rate * super().__call__(step)


class Constant(Cosine):
    """No decay."""

    def __call__(self, step):
        """The rate."""
        return tf.identity(self.rate)
