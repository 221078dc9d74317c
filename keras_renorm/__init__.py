"""Batch (re)normalization for Keras that behaves the same when it serves."""

from keras_renorm import callbacks, diagnostics, schedules
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models.convert import convert, revert
from keras_renorm.models.fold import fold
from keras_renorm.models.freeze import freeze_statistics, unfreeze_statistics
from keras_renorm.models.recalibrate import recalibrate
from keras_renorm.models.replacing import replacing
from keras_renorm.models.statistics import get_statistics, set_statistics

__version__ = "0.1.0"

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "callbacks",
    "convert",
    "diagnostics",
    "fold",
    "freeze_statistics",
    "get_statistics",
    "recalibrate",
    "replacing",
    "revert",
    "schedules",
    "set_statistics",
    "unfreeze_statistics",
]


def __dir__() -> list[str]:
    """What tab completion offers: not the modules that these are made of."""
    return [*__all__, "__version__"]
