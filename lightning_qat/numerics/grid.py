"""The contract of a code grid: integer codes, and the values they stand for.

    codes  = clamp(round_half_even(x / scale - offset) + zero_point, qmin, qmax)      encode
    values = (codes - zero_point + offset) * scale                                    decode

`offset` is 0 for integer grids and 1/2 for the grids without a zero (the +-0.5 and +-1.5 levels of LLM-QAT's 2-bit weights). Both run
in at least fp32 whatever the dtype of `x`, with a true division; values are cast last. What is trained, converted and exported goes
through these two functions and no other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The integers a code may take, and where they sit.

    Args:
        qmin: Smallest code.
        qmax: Largest code.
        offset: What is added to a code before scaling: 0, or 0.5 for grids without a zero.
        round_via: ``divide`` by the scale, or multiply by its ``reciprocal``.
    """

    qmin: int
    qmax: int
    offset: float = 0.0
    round_via: Literal["divide", "reciprocal"] = "divide"

    @property
    def levels(self) -> int:
        """How many different values one scale can express."""
        return self.qmax - self.qmin + 1


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Integer codes with all that is needed to read them back.

    Args:
        codes: int8 (uint8 for unsigned 8-bit grids), shape of the quantized tensor.
        scale: At least fp32; one element per row of codes, shape [...], or per group along the last axis, shape [..., groups]; shape [1]
            when one scale serves the whole tensor.
        zero_point: int16 like `scale`, or None on symmetric grids.
        grid: The integers and the offset.
        group_size: Codes that share a scale along the last axis, or None.
        dtype: The dtype that :meth:`dequantize` returns.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    group_size: int | None
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The values of the codes, in `dtype`; by definition what fake quantization returns."""
        blocks = as_blocks(self.codes, self.group_size, whole=self.scale.numel() == 1)
        zero_point = None if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return cast(decode(blocks, self.scale.unsqueeze(-1), zero_point, self.grid), self.dtype).reshape(self.codes.shape)


def as_blocks(x: Tensor, group_size: int | None, whole: bool = False) -> Tensor:
    """View `x` so that what shares a scale lies along the last axis.

    Args:
        x: Any shape with at least one axis.
        group_size: Split the last axis into groups of this size, shape [..., n] -> [..., n / group_size, group_size].
        whole: One scale for the whole tensor, shape [1, numel].

    Raises:
        ValueError: `group_size` does not divide the last axis.
    """
    if whole:
        return x.reshape(1, -1)
    if group_size is None:
        return x
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size: got {group_size} for a last axis of {x.shape[-1]}; it must divide it without rest")
    return x.unflatten(-1, (-1, group_size))


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes as floating-point integers, shape of `x`; a scale of 0 (a block of zeros) gives the codes nearest 0."""
    x = x.to(scale.dtype)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = x / safe if grid.round_via == "divide" else x * (1.0 / safe)
    if grid.offset:
        codes = codes - grid.offset
    codes = torch.round(codes)
    if zero_point is not None:
        codes = codes + zero_point
    return torch.clamp(codes, grid.qmin, grid.qmax)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Values of codes in the dtype of the scale, shape of `codes`."""
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point
    if grid.offset:
        values = values + grid.offset
    return values * scale


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype`; the end of a grid may lie beyond the largest float, which then stands for it."""
    limit = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp(-limit, limit).to(dtype)
