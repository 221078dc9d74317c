"""Callbacks: what `fit` does with the layers; no mathematics."""

from keras_renorm.callbacks.freezing import FreezeStatistics
from keras_renorm.callbacks.monitor import RenormMonitor
from keras_renorm.callbacks.recalibration import RecalibrateStatistics
from keras_renorm.callbacks.scheduler import RenormScheduler

__all__ = [
    "FreezeStatistics",
    "RecalibrateStatistics",
    "RenormMonitor",
    "RenormScheduler",
]
