"""Measurements of a model that leave it as it was."""

from keras_renorm._landscape.activation_noise import ActivationNoise
from keras_renorm._landscape.functions import (
    effective_smoothness,
    gradient_predictiveness,
    internal_covariate_shift,
    loss_along_gradient,
)
from keras_renorm.diagnostics._report.discrepancy import discrepancy
from keras_renorm.diagnostics._report.report import Report
from keras_renorm.diagnostics._report.verdict import Verdict
from keras_renorm.diagnostics._tiles.mismatch import tile_mismatch
from keras_renorm.diagnostics._tiles.report import TileReport

__all__ = [
    "ActivationNoise",
    "Report",
    "TileReport",
    "Verdict",
    "discrepancy",
    "effective_smoothness",
    "gradient_predictiveness",
    "internal_covariate_shift",
    "loss_along_gradient",
    "tile_mismatch",
]
