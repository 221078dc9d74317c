"""Matplotlib, which need not be installed."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`; an error that says how to get it without."""
    try:
        from matplotlib import pyplot as found
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib: pip install matplotlib"
        ) from error
    return found
