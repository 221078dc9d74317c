"""Measurements of a model that leave it as it was."""

from keras_renorm.diagnostics.discrepancy import discrepancy
from keras_renorm.diagnostics.landscape import (
    effective_smoothness,
    gradient_predictiveness,
    internal_covariate_shift,
    loss_along_gradient,
)
from keras_renorm.diagnostics.noise import ActivationNoise
from keras_renorm.diagnostics.report import Report
from keras_renorm.diagnostics.verdict import Verdict

__all__ = [
    "ActivationNoise",
    "Report",
    "Verdict",
    "discrepancy",
    "effective_smoothness",
    "gradient_predictiveness",
    "internal_covariate_shift",
    "loss_along_gradient",
]
