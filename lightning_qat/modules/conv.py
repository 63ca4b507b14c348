"""Quantized convolutions: weights per output channel (or per group of the flattened kernel), inputs per sample or per tensor."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_qat.modules.layer import QuantLayer, product_dtype, register_layer

if TYPE_CHECKING:
    _ConvBase = nn.Conv2d
else:
    _ConvBase = object


class _QuantConv(QuantLayer, _ConvBase):
    input_granularities = ("token", "tensor")

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """[out, in / groups, *kernel] -> [out, in / groups * kernel]."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse view."""
        return matrix.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def quantized_input(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A token of a convolution is a whole sample: one scale for all its channels and positions."""
        if self.input_quantizer is None:
            return x
        if not self.input_quantizer.enabled:
            return self.input_quantizer.bypass(x)
        samples = x.flatten(1) if x.dim() == len(self.kernel_size) + 2 else x.reshape(1, -1)
        values = super().quantized_input(samples, dtype).view(x.shape)
        layout = torch.channels_last
        return values.contiguous(memory_format=layout) if x.dim() == 4 and x.is_contiguous(memory_format=layout) else values

    def forward(self, input: Tensor) -> Tensor:
        """As the convolution it replaces."""
        dtype = product_dtype(input)
        return self._conv_forward(self.quantized_input(input, dtype), self.quantized_weight(dtype), self.bias)


@register_layer(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """Quantized `nn.Conv1d`; input [batch, in, length]."""


@register_layer(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """Quantized `nn.Conv2d`; input [batch, in, height, width]."""
