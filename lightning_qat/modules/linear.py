"""Quantized `nn.Linear` and transformers' `Conv1D` (GPT-2's linear layer, whose weight is stored [in, out])."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lightning_qat.modules.int8 import int8_operands
from lightning_qat.modules.layer import QuantLayer, product_dtype, register_layer
from lightning_qat.numerics.int8_linear import int8_linear


@register_layer(nn.Linear)
class QuantLinear(QuantLayer, nn.Linear):
    """y = fq(x) fq(W)^T + b; x [..., in], W [out, in]."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape [..., in] -> [..., out]."""
        dtype = product_dtype(input)
        if self.int8_forward and (codes := int8_operands(self, input, dtype)) is not None:
            return int8_linear(input, self.weight, self.bias, codes, dtype or input.dtype)
        return functional.linear(self.quantized_input(input, dtype), self.quantized_weight(dtype), self.bias)


@register_layer(Conv1D)
class QuantConv1D(QuantLayer, Conv1D):
    """y = fq(x) fq(W) + b; x [..., in], W [in, out]."""

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """[in, out] -> [out, in]."""
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [in, out]."""
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., in] -> [..., out]."""
        dtype = product_dtype(x)
        x = self.quantized_input(x, dtype)
        product = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.quantized_weight(dtype))
        return product.reshape(*x.shape[:-1], self.nf)
