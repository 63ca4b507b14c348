"""From values to scales: what one step of a grid is worth, computed in at least fp32.

Symmetric:   scale = max|x| / qmax            (LLM-QAT section 3.2; `divisor="half_range"` divides by half the range instead)
Asymmetric:  scale = (hi - lo) / (2^b - 1),   zero_point = round(-lo / scale) + qmin,   lo = min(x, 0), hi = max(x, 0)
"""

import torch
from torch import Tensor

SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(x: Tensor) -> torch.dtype:
    """At least fp32; float64 stays float64.

    Raises:
        TypeError: `x` is not floating point.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"quantize: got a tensor of {x.dtype}, expected a floating-point tensor")
    return torch.promote_types(x.dtype, torch.float32)


def round_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """Round a scale to the dtype it is stored in, and return it in its own; what overflows there saturates, codes then clip."""
    if scale_dtype == "float32":
        return scale
    stored = SCALE_DTYPES[scale_dtype]
    limited = torch.where(scale.isnan(), scale, scale.clamp(max=torch.finfo(stored).max))
    return limited.to(stored).to(scale.dtype)


def guard_finite(magnitude: Tensor) -> Tensor:
    """NaN where a block holds inf or NaN (its values become NaN, never a wrong number), and a range whose codes cannot overflow."""
    limit = torch.finfo(magnitude.dtype).max * (1 - 2.0**-20)
    return torch.where(magnitude.isfinite(), magnitude.clamp(max=limit), torch.full_like(magnitude, torch.nan))


def floor_scale(scale: Tensor) -> Tensor:
    """A finite scale whose reciprocal is finite too; 0 stays 0."""
    info = torch.finfo(scale.dtype)
    return torch.where(scale > 0, scale.clamp(info.tiny, info.max), scale)


def absmax_scale(blocks: Tensor, divisor: float) -> Tensor:
    """max|x| of each block over `divisor`, shape [..., n] -> [..., 1]."""
    dtype = compute_dtype(blocks)
    return floor_scale(guard_finite(blocks.abs().amax(-1, keepdim=True).to(dtype)) / divisor)


def minmax_scale(blocks: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(scale, lo) of each block with 0 inside its range, shapes [..., 1]."""
    dtype = compute_dtype(blocks)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    low, high = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)
    # Halving first keeps hi - lo finite for ranges near the largest float.
    scale = floor_scale(guard_finite(high / 2 - low / 2) / (steps / 2))
    return scale, low
