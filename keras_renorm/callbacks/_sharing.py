"""Callbacks that are copied."""

import copy
from typing import Any


class SharesData:
    """A callback whose copies read the same data.

    A search over settings copies its callbacks for each trial, and neither
    datasets nor files can be copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for name in ("dataset", "_writer"):
            if name in vars(self):
                memo[id(vars(self)[name])] = vars(self)[name]
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied
