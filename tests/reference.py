"""The quantizers of LLM-QAT's reference code, written anew from their formulas: an oracle to compare with, epsilons included.

Everything runs in the dtype of the input, as there, so that the overflows of half precision can be shown too.
"""

import torch
from torch import Tensor

CLIP = 2.0  # The bound of the reference's gradient mask, whatever the scale.


def sym(x: Tensor, bits: int, whole: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, values): s = qmax / (max|x| + 1e-6), codes = round(x s), values = codes / (s + 1e-6); nothing is clamped."""
    largest = x.abs().max() if whole else x.abs().amax(-1, keepdim=True)
    s = (2 ** (bits - 1) - 1) / (largest + 1e-6)
    codes = torch.round(x * s)
    return codes, codes / (s + 1e-6)


def asym(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, values): (x - min) / (max - min + 1e-8) on 0 .. 2^b - 1, a float offset and no zero point."""
    low, span = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + 1e-8
    steps = 2**bits - 1
    codes = torch.round((x - low) / span * steps)
    return codes, codes / steps * span + low


def binary(w: Tensor) -> Tensor:
    """m sign(w / m) with m = mean|w| of a row; sign(0) = 0 is a third level."""
    m = w.abs().mean(-1, keepdim=True)
    return m * torch.sign(w / m)


def few_levels(w: Tensor, bits: int = 2) -> Tensor:
    """c (round(clamp(w / c, +-0.99) n - 1/2) + 1/2) / n with c = 2 mean|w| and n = 2^(b-1) levels a side."""
    c, n = 2 * w.abs().mean(-1, keepdim=True), 2 ** (bits - 1)
    return c * (torch.round(torch.clamp(w / c, -0.99, 0.99) * n - 0.5) + 0.5) / n


def clipped_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The reference's straight-through estimator: zero where |x| >= 2, although its forward pass clips nothing."""
    return grad.masked_fill((x >= CLIP) | (x <= -CLIP), 0)


def linear_sum_loss(x: Tensor, weight: Tensor, w_bits: int, a_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dweight) of the sum of a quantized linear layer's output, both estimators clipped."""
    xq, wq = sym(x, a_bits)[1], sym(weight, w_bits)[1]
    y = xq @ wq.T
    g = torch.ones_like(y)
    return y, clipped_gradient(x, g @ wq), clipped_gradient(weight, g.T @ xq)
