"""Noise that makes the distribution of activations unstable."""

from functools import partial
from typing import Any

import keras
from keras import ops

from keras_renorm._backend.operations import Tensor
from keras_renorm._checks import check_at_least, check_integer
from keras_renorm._step import choice


@keras.saving.register_keras_serializable(package="keras_renorm")
class ActivationNoise(keras.layers.Layer):
    """Noise of time-varying, non-zero mean and non-unit variance.

    The layer of the "noisy batch normalization" experiment. After batch
    normalization it shifts and scales the distribution of every activation,
    differently at each step, and so undoes what normalization is said to be
    for.

    Training: each call draws, for each unit j,

        mean_j  ~ U(-mean_limit, mean_limit)
        scale_j ~ U(1, scale_limit)

    and for each example i

        m_ij ~ U(mean_j - mean_spread, mean_j + mean_spread)
        s_ij ~ N(scale_j, scale_spread²)
        outputs_ij = s_ij * inputs_ij + m_ij

    Inference: the inputs as they are. A unit is one activation of an example:
    in an image each channel of each pixel draws its own noise. Gradients are
    those of the line above: the upstream gradient times s. The noise is drawn
    in float32, or in float64 where the layer computes in it, and applied in
    the type that the layer computes in. A mask passes through and plays no
    part.

    Args:
        mean_limit: n_μ, the largest mean of a unit's noise, in units of the
            inputs; at least 0. Default 0.5.
        scale_limit: n_σ, the largest mean factor of a unit; at least 1.
            Default 1.25.
        mean_spread: r_μ, half the width of what is added to examples of one
            unit, in units of the inputs; at least 0. Default 0.1.
        scale_spread: r_σ, the standard deviation of the factors of examples
            of one unit; at least 0. Default 0.1.
        seed: An integer, or `None` (default) for one that Keras draws.

    Call arguments:
        inputs: Tensor of any shape `(batch, ...)`.
        training: Whether to add noise. Default False.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range.

    Example:

    >>> layer = ActivationNoise(seed=0)
    >>> x = np.ones((2, 3), "float32")
    >>> bool(ops.all(layer(x, training=True) == x))
    False
    >>> bool(ops.all(layer(x) == x))
    True

    References:
        Santurkar et al. 2018, arXiv:1805.11604, section 2.1 and appendix A,
        Algorithm 1.
    """

    def __init__(
        self,
        mean_limit: float = 0.5,
        scale_limit: float = 1.25,
        mean_spread: float = 0.1,
        scale_spread: float = 0.1,
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check = partial(check_at_least, is_finite=True)
        self.mean_limit = check("mean_limit", mean_limit, 0)
        self.scale_limit = check("scale_limit", scale_limit, 1)
        self.mean_spread = check("mean_spread", mean_spread, 0)
        self.scale_spread = check("scale_spread", scale_spread, 0)
        self.seed = None if seed is None else check_integer("seed", seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.supports_masking = True

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Adds noise in training; see the class."""
        if not training:
            return inputs
        dtype = choice.statistics_dtype(self.compute_dtype)
        shape = ops.shape(inputs)
        unit = (1, *shape[1:])

        def uniform(shape: Any, low: float, high: float) -> Tensor:
            return keras.random.uniform(
                shape, low, high, dtype=dtype, seed=self.seed_generator
            )

        mean = uniform(unit, -self.mean_limit, self.mean_limit)
        scale = uniform(unit, 1.0, self.scale_limit)
        m = mean + uniform(shape, -self.mean_spread, self.mean_spread)
        s = scale + keras.random.normal(
            shape,
            stddev=self.scale_spread,
            dtype=dtype,
            seed=self.seed_generator,
        )
        return ops.cast(s, inputs.dtype) * inputs + ops.cast(m, inputs.dtype)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        """The shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "mean_limit": self.mean_limit,
            "scale_limit": self.scale_limit,
            "mean_spread": self.mean_spread,
            "scale_spread": self.scale_spread,
            "seed": self.seed,
        }
