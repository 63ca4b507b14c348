"""From values to a range, from a range to scale and zero point; all in at least fp32.

    no zero point    scale = high / divisor                 the range is [-high, high], on unsigned grids [0, high]
    integer          scale = (high - low) / divisor,        zero_point = round(-low / scale) + qmin,    low <= 0 <= high
    float            scale = (high - low) / divisor,        zero_point = low

A range finder is a small frozen object that is called with blocks [..., n] and a grid and returns (low, high), each [..., 1]. The two that
need one pass are here, those that search are in :mod:`~lightning_qat.numerics.range_search`.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.precision import SCALE_DTYPES as SCALE_DTYPES
from lightning_qat.numerics.precision import saturated


class RangeFinder(Protocol):
    """Finds the range of each block; hashable.

    Attributes:
        fusable: One pass whose result has the same bits however a compiler orders it (true of maxima, not of sums).
    """

    fusable: ClassVar[bool]

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """(low, high) of blocks [..., n], each [..., 1]; NaN or inf where a block holds such."""
        ...


@dataclass(frozen=True)
class AbsMax:
    """[-max|x|, max|x|] (LLM-QAT, section 3.2)."""

    fusable: ClassVar[bool] = True

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See :class:`RangeFinder`."""
        high = blocks.abs().amax(-1, keepdim=True).to(compute_dtype(blocks))
        return -high, high


@dataclass(frozen=True)
class MinMax:
    """[min x, max x]; 0 is inside unless the grid's zero point is a value."""

    fusable: ClassVar[bool] = True

    def __call__(self, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See :class:`RangeFinder`."""
        dtype = compute_dtype(blocks)
        low, high = blocks.amin(-1, keepdim=True).to(dtype), blocks.amax(-1, keepdim=True).to(dtype)
        return (low, high) if grid.zero == "float" else (low.clamp(max=0), high.clamp(min=0))


def compute_dtype(x: Tensor) -> torch.dtype:
    """At least fp32; float64 stays float64.

    Raises:
        TypeError: `x` is not floating point.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"quantize: got a tensor of {x.dtype}, expected a floating-point tensor")
    return torch.promote_types(x.dtype, torch.float32)


def scale_and_zero_point(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of ranges.

    Args:
        low: Smallest values, any shape.
        high: Largest values, likewise.
        grid: The code grid.
        dtype: Dtype of the tensor that is quantized, which some grids compute in.

    Returns:
        Of the shape and dtype of the ranges, the scale that codes are computed with; NaN where a range is not finite, so that its values
        are NaN and never a wrong number.
    """
    high = torch.where(low.isfinite(), high, low)
    if grid.zero == "none":
        scale, computed = _stored(_step(high, grid.divisor), grid), grid.computed_in(dtype)
        return scale if computed is None else saturated(scale, computed), None
    if grid.zero == "float":
        # codes * scale reaches high - low: a range whose width is not a float has no such grid, and becomes NaN.
        return _stored(_step(high - low, grid.divisor), grid), _stored(low, grid)
    # Halving first keeps the step finite for ranges near the largest float.
    scale = _stored(_step(high / 2 - low / 2, grid.divisor / 2), grid)
    zero_point = torch.round(-low / scale.masked_fill(scale == 0, 1)) + grid.qmin
    return scale, zero_point.clamp(grid.qmin, grid.qmax)


def _step(magnitude: Tensor, divisor: float) -> Tensor:
    """`magnitude / divisor`: NaN for inf and NaN; limited so that codes do not overflow and its reciprocal is finite; 0 stays 0."""
    info = torch.finfo(magnitude.dtype)
    finite = torch.where(magnitude.isfinite(), magnitude.clamp(max=info.max * (1 - 2.0**-20)), torch.full_like(magnitude, torch.nan))
    # By a tensor: on CUDA torch divides by a number through its rounded reciprocal.
    step = finite / torch.full_like(finite, divisor)
    return torch.where(step > 0, step.clamp(info.tiny, info.max), step)


def _stored(values: Tensor, grid: Grid) -> Tensor:
    """Rounded to the dtype they are stored in, returned in their own; left alone where that comes after the codes."""
    return values if grid.scale_dtype == "float32" or grid.scale_rounding == "after" else saturated(values, SCALE_DTYPES[grid.scale_dtype])
