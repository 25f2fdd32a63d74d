"""How far results are from what is right: the one measure of every verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Deviation:
    """Squares of errors and of what is right, added up.

    What is infinite on one side has to be the same on the other; whole numbers and truth values have to be equal.
    """

    error: float = 0.0
    size: float = 0.0

    def add(self, found: Numbers, right: Numbers) -> Deviation:
        """Count a result; one of another shape is infinitely wrong."""
        if found.shape != right.shape or (right.dtype.kind in "iub" and bool((found != right).any())):
            self.error = float("inf")
        elif right.dtype.kind not in "iub":
            wide, truth = found.astype(np.float64), right.astype(np.float64)
            # What the original hides with infinity the file may hide with the same.
            apart = np.subtract(wide, truth, where=wide != truth, out=np.zeros_like(truth))
            self.error += float(np.square(apart).sum())
            self.size += float(np.square(truth, where=~np.isinf(truth), out=np.zeros_like(truth)).sum())
        return self

    @property
    def relative(self) -> float:
        """Root of the mean square of the errors over that of what is right; infinity where something is no number."""
        ratio = (self.error / self.size) ** 0.5 if self.size else self.error**0.5
        return ratio if ratio == ratio else float("inf")
