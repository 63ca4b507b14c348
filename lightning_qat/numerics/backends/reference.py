"""The formulas in plain torch: what every other backend is compared with, what a compiler sees, and what runs where there is none.

Tensors are rows of blocks, [rows, n]; scales and zero points are [rows, 1].
"""

import torch
from torch import Tensor

from lightning_qat.numerics import grid as grids
from lightning_qat.numerics.grid import Grid, cast, decode, unclamped
from lightning_qat.numerics.ranges import RangeFinder, scale_and_zero_point


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Values of the codes of `x` in `dtype`."""
    return cast(decode(grids.encode(x, scale, zero_point, grid), scale, zero_point, grid), dtype)


def fake_quantize_dynamic(x: Tensor, finder: RangeFinder, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The same with the range of each row found on the way."""
    return fake_quantize(x, *scale_and_zero_point(*finder(x, grid), grid, x.dtype), grid, dtype)


def encode_dynamic(x: Tensor, finder: RangeFinder, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes in the grid's integer type, their scale, zero point); where a row is not finite its codes mean nothing, its scale is NaN."""
    scale, zero_point = scale_and_zero_point(*finder(x, grid), grid, x.dtype)
    return encode(x, scale, zero_point, grid), scale, zero_point


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes in the grid's integer type; those of NaN mean nothing."""
    return torch.nan_to_num(grids.encode(x, scale, zero_point, grid)).to(grid.code_dtype)


def outside(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Which elements lie outside the grid, bounds inclusive: those whose code had to be clamped."""
    codes = unclamped(x, scale, zero_point, grid)
    return ~((codes >= grid.qmin) & (codes <= grid.qmax))
