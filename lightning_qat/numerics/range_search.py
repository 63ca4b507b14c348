"""Range finders that look closer than at the extremes, and the running range of a static quantizer.

Percentile   the magnitude (or value) that a share of each block does not exceed
MeanAbs      mean|x|, the level of LLM-QAT's 1- and 2-bit weights
LpSearch     the shrunk range whose error sum |x - x_q|^p is smallest: p = 2 is the mean squared error, p = 2.4 the usual other choice
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.numerics.grid import Grid, decode, encode
from lightning_qat.numerics.ranges import AbsMax, MinMax, compute_dtype, scale_and_zero_point


def _extremes(blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    return (AbsMax() if grid.zero == "none" and grid.qmin < 0 else MinMax())(blocks, grid)


@dataclass(frozen=True)
class Percentile:
    """Leaves out the tails: `share` of each block lies inside, of both tails together on grids with a zero point.

    Args:
        share: In (0, 1]; 1 is the extremes.
    """

    share: float = 0.999
    fusable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"options.percentile: got {self.share}, allowed is more than 0 and at most 1")

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_qat.numerics.ranges.RangeFinder`."""
        low, high = _extremes(blocks, grid)
        two_sided = grid.zero != "none"
        values = (blocks if two_sided or grid.qmin == 0 else blocks.abs()).to(low.dtype)
        tail = math.floor((1 - self.share) * blocks.shape[-1] / (2 if two_sided else 1) + 1e-9)
        top = values.kthvalue(blocks.shape[-1] - tail, -1, keepdim=True).values
        bottom = values.kthvalue(1 + tail, -1, keepdim=True).values if two_sided else -top
        if grid.zero != "float":
            bottom, top = bottom.clamp(max=0), top.clamp(min=0)
        finite = low.isfinite() & high.isfinite()  # kthvalue would step over NaN
        return torch.where(finite, bottom, low), torch.where(finite, top, high)


@dataclass(frozen=True)
class MeanAbs:
    """[-mean|x|, mean|x|], summed in float64."""

    fusable: ClassVar[bool] = False

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_qat.numerics.ranges.RangeFinder`."""
        mean = blocks.abs().mean(-1, keepdim=True, dtype=torch.float64).to(compute_dtype(blocks))
        return -mean, mean


@dataclass(frozen=True)
class LpSearch:
    """Tries the range of the extremes shrunk by 1, 1 - step, 1 - 2 step, ... and keeps the first with the smallest error.

    Args:
        p: Power of the error.
        candidates: How many ranges are tried, evenly spaced from the full one down to `smallest` of it.
        smallest: The smallest share of the full range.
    """

    p: float = 2.0
    candidates: int = 80
    smallest: float = 0.2
    fusable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.p <= 0 or self.candidates < 1:
            raise ValueError(f"options: got p={self.p}, candidates={self.candidates}; both have to be positive")

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_qat.numerics.ranges.RangeFinder`."""
        low, high = _extremes(blocks, grid)
        values = blocks.to(low.dtype)
        centre = (low + high) / 2 if grid.zero == "float" else torch.zeros_like(low)
        best_low, best_high, least = low, high, torch.full_like(low, math.inf)
        for i in range(self.candidates):
            share = 1 - i * (1 - self.smallest) / max(self.candidates - 1, 1)
            tried_low, tried_high = centre + (low - centre) * share, centre + (high - centre) * share
            scale, zero_point = scale_and_zero_point(tried_low, tried_high, grid, blocks.dtype)
            error = (decode(encode(blocks, scale, zero_point, grid), scale, zero_point, grid) - values).abs_().pow_(self.p)
            error = error.sum(-1, keepdim=True, dtype=torch.float64).to(low.dtype)
            better = error < least
            least = torch.where(better, error, least)
            best_low, best_high = torch.where(better, tried_low, best_low), torch.where(better, tried_high, best_high)
        return best_low, best_high
