"""Batch (re)normalization for Keras that behaves the same when it serves."""

from keras_renorm import callbacks, schedules
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization

__version__ = "0.1.0"

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "callbacks",
    "schedules",
]
