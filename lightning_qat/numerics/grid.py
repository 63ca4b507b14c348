"""The contract of a code grid: integer codes, and the values they stand for.

    zero        codes                                                            values
    none        clamp(round(x / scale - offset), qmin, qmax)                     (codes + offset) * scale
    integer     clamp(round(x / scale) + zero_point, qmin, qmax)                 (codes - zero_point) * scale
    float       clamp(round((x - zero_point) / scale), qmin, qmax)               codes * scale + zero_point

Rounding is half to even. `offset` is 0 for integer grids and 1/2 for the grids without a zero (the +-0.5 and +-1.5 levels of LLM-QAT's
2-bit weights). ``float`` is the form of LLM-QAT's reference code and of GGUF's Q4_1: the zero point is a value, not a code. Everything
runs in at least fp32 whatever the dtype of `x`, with a true division; values are cast last. Runtimes that compute in bf16 or fp16 round the
scale and the quotient on the way, which ``arithmetic="input"`` repeats. With ``scale_rounding="after"`` the scale of the codes is not
rounded yet, :func:`decode` rounds it. What is trained, converted and exported goes through these
functions and no other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_qat.numerics.blocks import Blocking
from lightning_qat.numerics.precision import SCALE_DTYPES, rounded, saturated

Zero = Literal["none", "integer", "float"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The integers a code may take, and how a range of values becomes the step between them.

    Args:
        qmin: Smallest code.
        qmax: Largest code.
        divisor: The range (largest magnitude, or ``high - low`` where there is a zero point) is this many steps.
        offset: What is added to a code before scaling: 0, or 0.5 for grids without a zero.
        zero: What a zero point is: absent, a code, or a value.
        scale_dtype: Scales (and ``float`` zero points) are rounded to this type.
        scale_rounding: When: ``before`` codes are computed, or ``after``, so that only values see the rounded scale.
        round_via: ``divide`` by the scale, or multiply by its ``reciprocal``.
        arithmetic: ``float32``, or ``input``: scale, reciprocal and quotient are rounded to the dtype of a bf16 or fp16 tensor.

    Raises:
        ValueError: ``input`` or ``after`` on a grid with a zero point or an offset, or both together.
    """

    qmin: int
    qmax: int
    divisor: float
    offset: float = 0.0
    zero: Zero = "none"
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scale_rounding: Literal["before", "after"] = "before"
    round_via: Literal["divide", "reciprocal"] = "divide"
    arithmetic: Literal["float32", "input"] = "float32"

    def __post_init__(self) -> None:
        if self.arithmetic == "input" and (self.zero != "none" or self.offset):
            raise ValueError(
                f"Grid.arithmetic: got 'input' with zero={self.zero!r} and offset={self.offset}; allowed on grids without a zero "
                "point and without an offset, others compute in 'float32'"
            )
        if self.scale_rounding == "after" and (self.zero != "none" or self.offset or self.arithmetic == "input"):
            raise ValueError(
                f"Grid.scale_rounding: got 'after' with zero={self.zero!r}, offset={self.offset} and arithmetic={self.arithmetic!r}; "
                "allowed on grids without a zero point and without an offset that compute in 'float32', others round 'before'"
            )

    @property
    def levels(self) -> int:
        """How many different values one scale can express."""
        return self.qmax - self.qmin + 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer type that holds every code."""
        return torch.int8 if self.qmax <= 127 else torch.uint8

    def computed_in(self, dtype: torch.dtype) -> torch.dtype | None:
        """What scales and quotients of a tensor of `dtype` are rounded to; None where they stay as they are, in fp32 or wider."""
        return dtype if self.arithmetic == "input" and dtype.itemsize < torch.float32.itemsize else None

    def scale_of_values(self, scale: Tensor) -> Tensor:
        """The scale that codes are multiplied with, of the one they were computed with; of itself it is the same."""
        return saturated(scale, SCALE_DTYPES[self.scale_dtype]) if self.scale_rounding == "after" else scale


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Integer codes with all that is needed to read them back.

    Args:
        codes: int8 (uint8 for unsigned 8-bit grids), shape of the quantized tensor.
        scale: At least fp32, that of the values, one element per block, shape as :class:`~lightning_qat.numerics.blocks.Blocking` tells.
        zero_point: Like `scale`; int16 where it is a code, of the scale's dtype where it is a value, None on grids without.
        grid: The integers and the offset.
        blocking: Which codes share a scale.
        dtype: The dtype that :meth:`dequantize` returns.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    blocking: Blocking
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The values of the codes, in `dtype`; by definition what fake quantization returns."""
        zero_point = None if self.zero_point is None else self.zero_point.unsqueeze(-1)
        values = decode(self.blocking.split(self.codes), self.scale.unsqueeze(-1), zero_point, self.grid)
        return self.blocking.join(cast(values, self.dtype), self.codes.shape)


def position(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Where values sit on the grid before rounding and clamping, in steps from the code of zero; a scale of 0 gives 0 steps."""
    computed = grid.computed_in(x.dtype)
    x = x.to(scale.dtype)
    if grid.zero == "float":
        assert zero_point is not None
        x = x - zero_point
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    if computed is not None:
        return rounded(x / safe if grid.round_via == "divide" else x * rounded(1.0 / safe, computed), computed)
    steps = x / safe if grid.round_via == "divide" else x * (1.0 / safe)
    return steps - grid.offset if grid.offset else steps


def unclamped(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes before they are clamped, as floating-point integers: those outside [qmin, qmax] lie outside the grid."""
    codes = torch.round(position(x, scale, zero_point, grid))
    return codes + zero_point if grid.zero == "integer" and zero_point is not None else codes


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes as floating-point integers, shape of `x`; a scale of 0 (a block of zeros) gives the codes nearest 0."""
    return torch.clamp(unclamped(x, scale, zero_point, grid), grid.qmin, grid.qmax)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Values of codes in the dtype of the scale, shape of `codes`."""
    scale = grid.scale_of_values(scale)
    values = codes.to(scale.dtype)
    if grid.zero == "float":
        assert zero_point is not None
        return values * scale + zero_point
    if grid.zero == "integer" and zero_point is not None:
        values = values - zero_point
    if grid.offset:
        values = values + grid.offset
    return values * scale


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype`; the end of a grid may lie beyond the largest float, which then stands for it."""
    limit = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp(-limit, limit).to(dtype)
