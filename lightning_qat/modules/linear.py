"""Quantized `nn.Linear` and transformers' `Conv1D` (GPT-2's linear layer, whose weight is stored [in, out])."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lightning_qat.modules.layer import QuantLayer, register_layer


@register_layer(nn.Linear)
class QuantLinear(QuantLayer, nn.Linear):
    """y = fq(x) fq(W)^T + b; x [..., in], W [out, in]."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape [..., in] -> [..., out]."""
        return functional.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


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
        x = self.quantized_input(x)
        product = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.quantized_weight())
        return product.reshape(*x.shape[:-1], self.nf)
