"""Measurements of a model that leave it as it was."""

from keras_renorm.diagnostics.landscape import (
    effective_smoothness,
    gradient_predictiveness,
    internal_covariate_shift,
    loss_along_gradient,
)
from keras_renorm.diagnostics.noise import ActivationNoise

__all__ = [
    "ActivationNoise",
    "effective_smoothness",
    "gradient_predictiveness",
    "internal_covariate_shift",
    "loss_along_gradient",
]
