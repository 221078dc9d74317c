"""Which steps of `fit` are probed."""

import math
from dataclasses import dataclass


@dataclass
class Clock:
    """Counts steps, and says which are probed: every so many, one an epoch.

    Where several steps are one execution, it is probed as a whole. An epoch of
    unknown length may end before a probe is due: it has probes in reserve, at
    powers of two.

    Attributes:
        every: Steps from one probe to the next.
        step: Number of steps so far.
        size: Steps of a whole execution.
        stride: Steps of the present execution, or of the last one.
    """

    every: int
    step: int = 0
    size: int = 1
    stride: int = 1
    # Of the epoch: its steps, and whether it has a probe.
    _steps: int | None = None
    _is_probed: bool = False
    _first_batch: int = 0
    # The step from which on steps are counted to the next probe.
    _last: int = 0

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        """An epoch of so many steps; `None` where that is unknown."""
        self._steps = steps
        self._is_probed = False
        resumed = epoch * (steps or 0)
        if resumed > self.step:  # those of a run before
            self.step = self._last = resumed

    def begin(self, batch: int) -> bool:
        """Whether to probe the execution that begins with a batch."""
        self._first_batch, self.stride = batch, self.size
        return self._is_due() or self._is_in_reserve(batch)

    def end(self, steps: int) -> bool:
        """Whether a probe of so many steps was due; else it is in reserve."""
        self.stride = steps
        is_due = self._is_due()
        self.step += self.stride
        return is_due

    def probed(self, has_figures: bool) -> None:
        """What was due is done; it may have given no figures."""
        self._is_probed |= has_figures
        self._last = self.step

    def _is_due(self) -> bool:
        end = self._first_batch + self.stride
        is_last = end >= (self._steps or math.inf)
        due = (self._last // self.every + 1) * self.every
        return self.step + self.stride >= due or (
            is_last and not self._is_probed
        )

    def _is_in_reserve(self, batch: int) -> bool:
        return (
            self._steps is None
            and not self._is_probed
            # A power of two lies in between.
            and (batch + self.stride).bit_length() > batch.bit_length()
        )
