"""The Triton kernels as functions of tensors, the same as those of :mod:`~lightning_qat.numerics.backends.reference`.

Each is an op of its own, so that torch.compile sees one call and leaves it alone. An op takes plain values only, so a grid travels as its
numbers and names. Rows may be strided, columns are made contiguous. What the kernels do not take (float64) goes to the reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_qat.numerics.backends import reference, triton_kernels
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.packing import pack_bits, packed_columns, unpack_bits
from lightning_qat.numerics.ranges import AbsMax, MinMax, RangeFinder

LONGEST_TILE = 2**14  # columns of a row that one program holds at once
FEW_ROWS = 64  # long rows that would leave most of a GPU idle, one program each
WIDEST_TILE = 2**11  # columns of a tile where rows need not stay together
SMALLEST_TILE = 16  # columns; two bytes of a mask

INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED_ELEMENTS = 2**13  # of a tile; any number gives the same bits
CONFIGS = [triton.Config({"ELEMENTS": elements}, num_warps=warps) for elements, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 16))]


def _worth_trying(configs: list[Any], named: Any, **constants: Any) -> list[Any]:
    """Tiles smaller than a row differ in warps alone; the most warps then hold it best."""
    return [config for config in configs if config.kwargs["ELEMENTS"] >= constants["COLS"]] or configs[-1:]


def _tuned(kernel: Any) -> Any:
    """Picks the fastest configuration for each width of a tile; not for each n, which changes with the length of a sequence."""
    if INTERPRETED:
        return kernel
    key = [name for name in ("COLS", "LONG", "OUT") if name in kernel.arg_names]
    return triton.autotune(CONFIGS, key=key, prune_configs_by={"early_config_prune": _worth_trying})(kernel)


_dynamic_kernel, _given_kernel = _tuned(triton_kernels.dynamic_kernel), _tuned(triton_kernels.given_kernel)
_gradient_kernel = _tuned(triton_kernels.gradient_kernel)


def supports(finder: RangeFinder) -> bool:
    """Whether the kernels find this range themselves."""
    return isinstance(finder, AbsMax | MinMax)


def fake_quantize_dynamic(x: Tensor, finder: RangeFinder, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Values of the codes of rows [rows, n] in `dtype`; the range of each row is found on the way."""
    if torch.float64 in (x.dtype, dtype):
        return reference.fake_quantize_dynamic(x, finder, grid, dtype)
    return _values_dynamic(x, isinstance(finder, AbsMax), *_plain(grid), dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Values of the codes of rows [rows, n] with scales and zero points [rows, 1]."""
    if torch.float64 in (x.dtype, scale.dtype, dtype):
        return reference.fake_quantize(x, scale, zero_point, grid, dtype)
    return _values(x, scale, zero_point, *_plain(grid), dtype)


def encode_dynamic(x: Tensor, finder: RangeFinder, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integer codes [rows, n], scale of the codes [rows, 1], zero point [rows, 1]); codes of rows that are not finite mean nothing."""
    if x.dtype == torch.float64:
        return reference.encode_dynamic(x, finder, grid)
    codes, scale, zero_point = _codes_dynamic(x, isinstance(finder, AbsMax), *_plain(grid), grid.code_dtype)
    return codes, scale, zero_point if grid.zero != "none" else None


def outside_bits(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Which elements of rows [rows, n] lie outside the grid, as bits: uint8 [rows, ceil(n / 8)]."""
    if torch.float64 in (x.dtype, scale.dtype):
        return pack_bits(reference.outside(x, scale, zero_point, grid))
    return _outside(x, scale, zero_point, *_plain(grid))


def masked_gradient(grad: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [rows, n] in `dtype`, 0 where a bit of the mask [rows, ceil(n / 8)] is set."""
    if torch.float64 in (grad.dtype, dtype):
        return grad.to(dtype).masked_fill(unpack_bits(mask, grad.shape[-1]), 0)
    return _gradient(grad, mask, dtype)


def _plain(grid: Grid) -> tuple[list[float], str]:
    names = (grid.zero, grid.scale_dtype, grid.scale_rounding, grid.round_via, grid.arithmetic)
    return [float(v) for v in (grid.qmin, grid.qmax, grid.divisor, grid.offset)], " ".join(names)


def _grid(numbers: Sequence[float], names: str) -> Grid:
    qmin, qmax, divisor, offset = numbers
    fields: dict[str, Any] = dict(zip(("zero", "scale_dtype", "scale_rounding", "round_via", "arithmetic"), names.split(), strict=True))
    return Grid(qmin=int(qmin), qmax=int(qmax), divisor=divisor, offset=offset, **fields)


@torch.library.custom_op("lightning_qat::triton_values_dynamic", mutates_args=())
def _values_dynamic(x: Tensor, absmax: bool, numbers: Sequence[float], names: str, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape, dtype=dtype)
    _dynamic(x, out, absmax, _grid(numbers, names), "values")
    return out


@torch.library.custom_op("lightning_qat::triton_codes_dynamic", mutates_args=())
def _codes_dynamic(x: Tensor, absmax: bool, numbers: Sequence[float], names: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=dtype)
    return (out, *_dynamic(x, out, absmax, _grid(numbers, names), "codes"))


@torch.library.custom_op("lightning_qat::triton_values", mutates_args=())
def _values(x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: Sequence[float], names: str, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape, dtype=dtype)
    _given(x, out, scale, zero_point, _grid(numbers, names), "values")
    return out


@torch.library.custom_op("lightning_qat::triton_outside", mutates_args=())
def _outside(x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: Sequence[float], names: str) -> Tensor:
    out = x.new_empty((x.shape[0], packed_columns(x.shape[1], 1)), dtype=torch.uint8)
    _given(x, out, scale, zero_point, _grid(numbers, names), "outside")
    return out


@torch.library.custom_op("lightning_qat::triton_gradient", mutates_args=())
def _gradient(grad: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    out = grad.new_empty(grad.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    (rows, n), cols = grad.shape, _columns(grad.shape[1], WIDEST_TILE)
    grad = _columns_together(grad)
    _launch(_gradient_kernel, triton.cdiv(n, cols), grad, mask.contiguous(), out, rows, n, grad.stride(0), COLS=cols)
    return out


@_values_dynamic.register_fake
def _(x: Tensor, absmax: bool, numbers: Any, names: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_codes_dynamic.register_fake
def _(x: Tensor, absmax: bool, numbers: Any, names: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), *_empty_scales(x, names.split()[0])


@_values.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: Any, names: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_outside.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: Any, names: Any) -> Tensor:
    return x.new_empty((x.shape[0], packed_columns(x.shape[1], 1)), dtype=torch.uint8)


@_gradient.register_fake
def _(grad: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _dynamic(x: Tensor, out: Tensor, absmax: bool, grid: Grid, kind: str) -> tuple[Tensor, Tensor]:
    """Fills `out`; returns scales and zero points, which only ``codes`` have filled in any case."""
    rows, n = x.shape
    scale, zero_point = _empty_scales(x, grid.zero)
    if out.numel() == 0:
        return scale.zero_(), zero_point.zero_()
    if n > LONGEST_TILE and rows < FEW_ROWS:
        _scales_of_long_rows(x, scale, zero_point, absmax, grid)
        _given(x, out, scale, zero_point if grid.zero != "none" else None, grid, kind)
        return scale, zero_point
    x, cols = _columns_together(x), _columns(n, LONGEST_TILE)
    constants = _constants(grid, x.dtype, "QMIN", "QMAX", "DIVISOR", "OFFSET", "ZERO", "SCALE_DTYPE", "RECIPROCAL", "LATE_DTYPE")
    constants |= {"LIMIT": _limit(out), "OUT": kind, "ABSMAX": absmax, "LONG": n > cols, "COLS": cols}
    _launch(_dynamic_kernel, 1, x, out, scale, zero_point, rows, n, x.stride(0), **constants)
    return scale, zero_point


def _scales_of_long_rows(x: Tensor, scale: Tensor, zero_point: Tensor, absmax: bool, grid: Grid) -> None:
    """Reduces with torch, which spreads a row over the GPU, but divides here: torch multiplies by the reciprocal of a divisor there."""
    low, high = (AbsMax() if absmax else MinMax())(x, grid)
    constants = _constants(grid, x.dtype, "QMIN", "QMAX", "DIVISOR", "ZERO", "SCALE_DTYPE")
    with torch.cuda.device_of(x):
        triton_kernels.scale_kernel[(1,)](low, high, scale, zero_point, len(x), ROWS=FEW_ROWS, **constants, **_options())


def _given(x: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, kind: str) -> None:
    if out.numel() == 0:
        return
    (rows, n), cols = x.shape, _columns(x.shape[1], WIDEST_TILE)
    x = _columns_together(x)
    scale = scale.to(torch.float32).expand(rows, 1).contiguous()
    zero = scale if zero_point is None else zero_point.to(torch.float32).expand(rows, 1).contiguous()
    constants = _constants(grid, x.dtype, "QMIN", "QMAX", "OFFSET", "RECIPROCAL", "LATE_DTYPE")
    constants |= {"ZERO": "none" if zero_point is None else grid.zero, "LIMIT": _limit(out), "OUT": kind, "COLS": cols}
    _launch(_given_kernel, triton.cdiv(n, cols), x, out, scale, zero, rows, n, x.stride(0), **constants)


def _launch(kernel: Any, tiles: int, *args: Any, **constants: Any) -> None:
    """Runs a kernel whose tiles take `tiles` of them for a row; the number of rows in `args` comes right after the tensors."""
    args = tuple(arg.view(torch.int16) if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 else arg for arg in args)
    rows = next(arg for arg in args if not isinstance(arg, Tensor))
    if INTERPRETED:
        constants["ELEMENTS"] = INTERPRETED_ELEMENTS

    def blocks(meta: Any) -> tuple[int]:
        return (triton.cdiv(rows, max(1, meta["ELEMENTS"] // meta["COLS"])) * tiles,)

    with torch.cuda.device_of(args[0]):
        kernel[blocks](*args, **constants, **_options())


def _options() -> dict[str, Any]:
    """A fused multiply-add would skip the rounding of the product."""
    return {} if INTERPRETED else {"enable_fp_fusion": False}


def _empty_scales(x: Tensor, zero: str) -> tuple[Tensor, Tensor]:
    """Space for scales [rows, 1], and for zero points where the grid has some."""
    return x.new_empty((x.shape[0], 1), dtype=torch.float32), x.new_empty((x.shape[0] if zero != "none" else 0, 1), dtype=torch.float32)


def _columns_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _columns(n: int, most: int) -> int:
    return max(SMALLEST_TILE, min(triton.next_power_of_2(n), most))


def _limit(out: Tensor) -> float:
    """The largest value that may be stored; only floating-point results are cut off there."""
    return min(torch.finfo(out.dtype if out.is_floating_point() else torch.float32).max, torch.finfo(torch.float32).max)


def _constants(grid: Grid, dtype: torch.dtype, *names: str) -> dict[str, Any]:
    """The named ones, and what a tensor of `dtype` is computed in."""
    computed, late = grid.computed_in(dtype), grid.scale_rounding == "after"
    every = {
        "QMIN": float(grid.qmin),
        "QMAX": float(grid.qmax),
        "DIVISOR": float(grid.divisor),
        "OFFSET": float(grid.offset),
        "ZERO": grid.zero,
        "SCALE_DTYPE": "float32" if late else grid.scale_dtype,  # of scales that codes are computed with
        "LATE_DTYPE": grid.scale_dtype if late else "float32",  # of scales that codes are multiplied with
        "RECIPROCAL": grid.round_via == "reciprocal",
    }
    return {"COMPUTED": str(computed).removeprefix("torch."), **{name: every[name] for name in names}}
