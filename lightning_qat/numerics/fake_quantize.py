"""Fake quantization: the values of the codes in the forward pass, a written-out straight-through estimator in the backward pass.

By definition the result is `decode(encode(x))`; there is no second formula. Gradients are never left to autograd of `torch.clamp`, whose
gradient at the bounds differs between torch versions; masks are written out, bounds inclusive:

    dy/dx       1; with ``mask`` 0 where the code had to be clamped; with ``clip`` 0 where |x| >= the bound (LLM-QAT's reference code)
    dy/dscale   codes - zero_point + offset - x / scale inside, codes - zero_point + offset where clamped       (LSQ; EfficientQAT App. B)
    dy/dzero    0 inside, -scale where clamped; for a float zero point 0 inside, 1 where clamped
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.backends import choice, reference
from lightning_qat.numerics.blocks import Blocking
from lightning_qat.numerics.grid import Grid, QuantizedTensor, encode, position
from lightning_qat.numerics.packing import pack_bits
from lightning_qat.numerics.rounding import Rounding


class _FakeQuantize(torch.autograd.Function):
    """The identity saves nothing, masks are saved as bits; only scales that are trained need `x` again.

    Blocks are split and joined in here: outside, each view would be one more node of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, how: Rounding, dtype: torch.dtype) -> Tensor:
        rows = how.blocking.rows(x)
        trains_scale, mask = any(ctx.needs_input_grad[1:3]), None
        if how.ste == "clip":
            mask = pack_bits(rows.abs() >= how.clip_value)
        elif how.ste == "mask" and scale is not None:
            mask = choice.outside_bits(rows, scale, zero_point, how.grid)
        ctx.how, ctx.x_dtype, ctx.trains_scale = how, x.dtype, trains_scale
        ctx.save_for_backward(mask, *((x, scale, zero_point) if trains_scale else ()))
        if scale is not None:
            values = choice.fake_quantize(rows, scale, zero_point, how.grid, dtype)
        else:
            values = choice.fake_quantize_dynamic(rows, how, dtype)
        return how.blocking.join(values, x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mask, grad, how = ctx.saved_tensors[0], grads[0], ctx.how
        grad_x, grad_scale, grad_zero = grad, None, None
        if ctx.trains_scale:
            _, x, scale, zero_point = ctx.saved_tensors
            grad_scale, grad_zero = _range_gradients(how.blocking.rows(grad), how.blocking.rows(x), scale, zero_point, how.grid)
        if mask is not None:
            grad_x = how.blocking.join(choice.masked_gradient(how.blocking.rows(grad), mask, ctx.x_dtype), grad.shape)
        return grad_x.to(ctx.x_dtype), grad_scale, grad_zero, None, None


def _range_gradients(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    clamped = reference.outside(x, scale, zero_point, grid)
    codes, grad = encode(x, scale, zero_point, grid), grad.to(scale.dtype)
    steps = codes + grid.offset
    if grid.zero == "integer" and zero_point is not None:
        steps = steps - zero_point
    inside = position(x, scale, zero_point, grid) + grid.offset
    grad_scale = (grad * (steps - inside.masked_fill(clamped, 0))).sum(-1, keepdim=True)
    if zero_point is None:
        return grad_scale, None
    slope = torch.ones_like(scale) if grid.zero == "float" else -scale
    return grad_scale, (grad * slope * clamped).sum(-1, keepdim=True)


def fake_quantize_with(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, how: Rounding, dtype: torch.dtype | None = None
) -> Tensor:
    """Fake-quantize.

    Args:
        x: Any shape that the blocking fits.
        scale: At least fp32, shape [blocks, 1], or None to find the range of each block; gets a gradient if it asks for one.
        zero_point: Like `scale`, or None.
        how: Everything else.
        dtype: Dtype of the values, None for that of `x`; the gradient has the dtype of `x` in any case.

    Returns:
        Values on the grid, shape of `x`.
    """
    return _FakeQuantize.apply(x, scale, zero_point, how, dtype or x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Forward `values`, backward as if they were `x`: how siblings share one quantized input without sharing a graph node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        ctx.x_dtype = x.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.x_dtype), None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """`values` with the gradient of `x` (identity estimator); their dtypes may differ."""
    return _StraightThrough.apply(x, values)


def quantize_with(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, blocking: Blocking) -> QuantizedTensor:
    """Integer codes with given scales.

    Args:
        x: Any shape.
        scale: At least fp32, shape of the blocks of `x` with a last axis of 1.
        zero_point: Like `scale`, or None.
        grid: The code grid.
        blocking: Which elements of `x` share a scale.

    Raises:
        ValueError: A block holds NaN or inf, which no integer code can stand for.
    """
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            "quantize_tensor: the tensor holds NaN or inf (or spans more than the largest float); integer codes cannot stand for them"
        )
    codes = encode(blocking.split(x.detach()), scale, zero_point, grid)
    if zero_point is not None:
        zero_point = zero_point.detach().squeeze(-1)
        zero_point = zero_point.to(torch.int16) if grid.zero == "integer" else zero_point
    return QuantizedTensor(
        codes=blocking.join(codes.to(grid.code_dtype), x.shape),
        scale=grid.scale_of_values(scale.detach()).squeeze(-1),
        zero_point=zero_point,
        grid=grid,
        blocking=blocking,
        dtype=x.dtype,
    )
