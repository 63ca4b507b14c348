"""How values are spread, as counts between edges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BINS = 32


@dataclass(frozen=True)
class Histogram:
    """How many values lie between edges.

    Attributes:
        edges: One more than there are bins; a value on an edge belongs to the bin above it, on the last edge to the last bin.
        counts: Values in each bin.
        whole: Whether values are whole numbers; then the last one of a bin is one less than its upper edge.
        log: Whether the edges are spread evenly over the logarithm.
    """

    edges: Sequence[float]
    counts: Sequence[int]
    whole: bool = False
    log: bool = False

    @classmethod
    def of_integers(cls, values: ArrayLike) -> "Histogram":
        """Bins of a whole width, at most `BINS` of them and about as many."""
        values = np.asarray(values, np.int64)
        low, high = int(values.min()), int(values.max())
        if low == high:  # one bar that does not fill the picture
            low, high = low - 2, high + 2
        width = math.ceil((high - low + 1) / BINS)
        edges = np.arange(low, high + width + 1, width)
        return cls(edges.tolist(), np.histogram(values, edges)[0].tolist(), whole=True)

    @classmethod
    def of_shares(cls, values: ArrayLike) -> "Histogram":
        """Twenty bins from 0 to 1."""
        edges = np.linspace(0, 1, 21)
        return cls(edges.tolist(), np.histogram(np.clip(values, 0, 1), edges)[0].tolist())

    @classmethod
    def of_ratios(cls, values: ArrayLike) -> "Histogram":
        """Bins of equal width over the logarithm of positive values."""
        values = np.asarray(values, np.float64)
        low, high = float(values.min()), float(values.max())
        if high <= low * 1.01:  # one value: a bin around it
            low, high = low / 1.1, high * 1.1
        edges = np.geomspace(low, high, BINS + 1)
        return cls(edges.tolist(), np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist(), log=True)
