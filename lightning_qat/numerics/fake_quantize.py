"""Fake quantization: the values of the codes in the forward pass, a written-out straight-through estimator in the backward pass.

By definition the result is `decode(encode(x))`; there is no second formula. Gradients are never left to autograd of `torch.clamp`,
whose gradient at the bounds differs between torch versions.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.grid import Grid, QuantizedTensor, as_blocks, cast, decode, encode


class _FakeQuantize(torch.autograd.Function):
    """Identity straight-through estimator; with `clip`, zero gradient where |x| >= clip (the LLM-QAT reference code)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, block: tuple[int | None, bool], clip: float | None
    ) -> Tensor:
        ctx.save_for_backward(None if clip is None else x.abs() >= clip)
        blocks = as_blocks(x, *block)
        return cast(decode(encode(blocks, scale, zero_point, grid), scale, zero_point, grid), x.dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grads[0] if mask is None else grads[0].masked_fill(mask, 0), None, None, None, None, None


def fake_quantize_with(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    group_size: int | None = None,
    whole: bool = False,
    clip: float | None = None,
) -> Tensor:
    """Fake-quantize with a given scale.

    Args:
        x: Any shape.
        scale: At least fp32, shape of the blocks of `x` with a last axis of 1.
        zero_point: Like `scale`, or None.
        grid: The code grid.
        group_size: Elements that share a scale along the last axis, or None.
        whole: One scale for the whole tensor.
        clip: Bound of the reference's gradient mask, or None for the paper's identity estimator.

    Returns:
        Values on the grid, shape and dtype of `x`.
    """
    return _FakeQuantize.apply(x, scale, zero_point, grid, (group_size, whole), clip)


class _StraightThrough(torch.autograd.Function):
    """Forward `values`, backward as if they were `x`: how siblings share one quantized input without sharing a graph node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """`values` with the gradient of `x` (identity estimator)."""
    return _StraightThrough.apply(x, values)


def quantize_with(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, group_size: int | None = None, whole: bool = False
) -> QuantizedTensor:
    """Integer codes with a given scale (arguments as in :func:`fake_quantize_with`).

    Raises:
        ValueError: A block holds NaN or inf, which no integer code can stand for.
    """
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("quantize_tensor: the tensor holds NaN or inf; integer codes cannot stand for them")
    codes = encode(as_blocks(x.detach(), group_size, whole), scale, zero_point, grid).reshape(x.shape)
    return QuantizedTensor(
        codes=codes.to(torch.int8 if grid.qmax <= 127 else torch.uint8),
        scale=scale.detach().squeeze(-1),
        zero_point=None if zero_point is None else zero_point.detach().squeeze(-1).to(torch.int16),
        grid=grid,
        group_size=group_size,
        dtype=x.dtype,
    )
