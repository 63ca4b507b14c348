"""A linear layer on integer codes: the product of the fake-quantized tensors, computed from their codes.

    y[i, j] = s_x[i] * s_w[j] * sum_k codes_x[i, k] * codes_w[j, k] + bias[j]

The sum is exact in int32; turning it into fp32 rounds above 2^24, so y is the fp32 product of the fake-quantized tensors to about 1e-7.
The backward pass is that of the fake-quantized product with identity straight-through estimators, on values decoded from the codes:
one byte an element is saved where a plain layer saves two or four.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.backends import compiled


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor,
        w_codes: Tensor,
        w_scale: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale)
        ctx.dtypes = (dtype, x.dtype, weight.dtype, None if bias is None else bias.dtype)
        product = torch._int_mm(x_codes, w_codes.t())
        y = _run(_scaled, product, x_scale, w_scale.t(), bias, dtype)
        return y.reshape(*x.shape[:-1], w_codes.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        dtype, x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grads[0].reshape(-1, w_codes.shape[0]).to(dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            values = _run(_decoded, w_codes, w_scale, dtype)
            grad_x = (grad @ values).to(x_dtype).reshape(*grads[0].shape[:-1], w_codes.shape[1])
        if ctx.needs_input_grad[1]:
            values = _run(_decoded, x_codes, x_scale, dtype)
            grad_weight = (grad.t() @ values).to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _scaled(product: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = product.to(x_scale.dtype) * x_scale * w_scale
    return (y if bias is None else y + bias).to(dtype)


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(scale.dtype) * scale).to(dtype)


def _run(formula: Any, x: Tensor, *args: Any) -> Any:
    plain = torch.compiler.is_compiling() or x.device.type != "cpu"
    return formula(x, *args) if plain else compiled.run(formula, x, *args)


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, codes: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The linear layer of codes.

    Args:
        x: What the codes of the input were made of, shape [..., in]; it only receives the gradient.
        weight: What the codes of the weight were made of, shape [out, in]; likewise.
        bias: Shape [out], or None.
        codes: Input codes int8 [tokens, in], input scales fp32 [tokens, 1], weight codes int8 [out, in], weight scales fp32 [out, 1].
        dtype: Dtype of the result and of the products in the backward pass.

    Returns:
        Shape [..., out].
    """
    return _Int8Linear.apply(x, weight, bias, *codes, dtype)
