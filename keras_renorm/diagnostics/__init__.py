"""Measurements of a model that leave it as it was."""

from keras_renorm.diagnostics.landscape.functions import (
    effective_smoothness,
    gradient_predictiveness,
    internal_covariate_shift,
    loss_along_gradient,
)
from keras_renorm.diagnostics.modes.discrepancy import discrepancy
from keras_renorm.diagnostics.modes.report import Report
from keras_renorm.diagnostics.modes.verdict import Verdict
from keras_renorm.diagnostics.tiles.mismatch import tile_mismatch
from keras_renorm.diagnostics.tiles.report import TileReport
from keras_renorm.layers.activation_noise import ActivationNoise

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
