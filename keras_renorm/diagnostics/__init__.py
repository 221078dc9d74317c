"""Seeing what normalization does; nothing here changes a model."""

from keras_renorm.diagnostics.discrepancy import discrepancy
from keras_renorm.diagnostics.report import Report
from keras_renorm.diagnostics.verdict import Verdict

__all__ = [
    "Report",
    "Verdict",
    "discrepancy",
]
