"""A quantizer that learns, for tests of everything that holds parameters of quantizers."""

import torch
from torch import nn

from lightning_qat.quantizers.minmax import MinMaxQuantizer


class LearnedGain(MinMaxQuantizer):
    """Min-max times a learned number."""

    def __init__(self, spec):
        super().__init__(spec)
        self.gain = nn.Parameter(torch.ones(1))

    def scale_and_zero_point(self, rows):
        scale, zero_point = super().scale_and_zero_point(rows.detach())
        return scale * self.gain, zero_point
