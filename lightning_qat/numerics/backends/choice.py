"""Which backend computes a call.

In a graph that torch.compile traces for the CPU the formula stays visible, so that the compiler fuses it with its neighbours. CUDA takes
the Triton kernels in eager mode and in compiled graphs: inductor's own division is not exact there.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.backends import compiled, reference
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.packing import pack_bits, unpack_bits
from lightning_qat.numerics.ranges import scale_and_zero_point
from lightning_qat.numerics.rounding import BY_KEY, Rounding

HAS_TRITON = importlib.util.find_spec("triton") is not None


def fake_quantize_dynamic(x: Tensor, how: Rounding, dtype: torch.dtype) -> Tensor:
    """Values of the codes of rows [rows, n] in `dtype`; the range of each row is found on the way."""
    if (kernels := _triton(x)) is not None and kernels.supports(how.finder):
        return kernels.fake_quantize_dynamic(x, how.finder, how.grid, dtype)
    if how.is_fusable:
        return _torch(reference.fake_quantize_dynamic, x, how.finder, how.grid, dtype)
    return fake_quantize(x, *find_scale(x, how), how.grid, dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Values of the codes of rows [rows, n] with given scales [rows, 1]."""
    if (kernels := _triton(x)) is not None:
        return kernels.fake_quantize(x, scale, zero_point, grid, dtype)
    return _torch(reference.fake_quantize, x, scale, zero_point, grid, dtype)


def encode_dynamic(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integer codes, scale of their values, zero point) of rows [rows, n]."""
    if (kernels := _triton(x)) is not None and kernels.supports(how.finder):
        codes, scale, zero_point = kernels.encode_dynamic(x, how.finder, how.grid)
    elif how.is_fusable:
        codes, scale, zero_point = _torch(reference.encode_dynamic, x, how.finder, how.grid)
    else:
        scale, zero_point = find_scale(x, how)
        codes = _torch(reference.encode, x, scale, zero_point, how.grid)
    return codes, how.grid.scale_of_values(scale), zero_point


def outside_bits(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Which elements of rows [rows, n] lie outside the grid, as bits: uint8 [rows, ceil(n / 8)]."""
    if (kernels := _triton(x)) is not None:
        return kernels.outside_bits(x, scale, zero_point, grid)
    return pack_bits(reference.outside(x, scale, zero_point, grid))


def masked_gradient(grad: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [rows, n] in `dtype`, 0 where a bit of the mask [rows, ceil(n / 8)] is set."""
    if (kernels := _triton(grad)) is not None and dtype != torch.float64:
        return kernels.masked_gradient(grad, mask, dtype)
    return grad.to(dtype).masked_fill(unpack_bits(mask, grad.shape[-1]), 0)


def find_scale(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each row; what is not fusable runs in plain torch also inside compiled graphs, so that its bits stay."""
    if torch.compiler.is_compiling() and not how.is_fusable:
        scale, zero_point = _find_scale_opaque(x, how.key)
        return scale, zero_point if how.grid.zero != "none" else None
    assert how.finder is not None
    return scale_and_zero_point(*how.finder(x, how.grid), how.grid, x.dtype)


def _triton(x: Tensor) -> Any:
    """The kernels, for CUDA tensors that they take."""
    if not x.is_cuda or not HAS_TRITON or x.dtype == torch.float64:
        return None
    from lightning_qat.numerics.backends import triton_rows

    return triton_rows


def _torch(formula: Any, x: Tensor, *args: Any) -> Any:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return formula(x, *args)
    return compiled.run(formula, x, *args)


@torch.library.custom_op("lightning_qat::find_scale", mutates_args=())
def _find_scale_opaque(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    scale, zero_point = find_scale(x, BY_KEY[key])
    return scale, torch.zeros_like(scale) if zero_point is None else zero_point


@_find_scale_opaque.register_fake
def _(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((x.shape[0], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    return scale, torch.empty_like(scale)
