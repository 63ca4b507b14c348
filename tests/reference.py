"""Oracles to compare with, written anew from their formulas.

First the quantizers of LLM-QAT's reference code, epsilons included; everything runs in the dtype of the input, as there, so that the
overflows of half precision can be shown too. Then ours in numpy's float32.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_qat import TensorSpec

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


def code_limits(spec: TensorSpec) -> tuple[int, int]:
    """(smallest, largest) code of a spec."""
    half = 2 ** (int(spec.bits) - 1)
    if not spec.symmetric or spec.code_range == "unsigned":
        return 0, 2 * half - 1
    return (-half if spec.quantizer == "mean_abs" or spec.code_range == "full" else 1 - half), half - 1


def stored(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounded to a dtype that numpy may not have."""
    return torch.from_numpy(x).to(dtype).float().numpy()


def numpy_codes(x: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(scale, zero point, codes, values) of float32 rows, min-max, with numpy's half-to-even rounding."""
    f, (qmin, qmax), kept = np.float32, code_limits(spec), getattr(torch, spec.scale_dtype)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    if spec.symmetric:
        low, high = f(0), np.abs(x).max(1, keepdims=True) if qmin < 0 else np.maximum(high, f(0))
    elif spec.zero_point == "integer":
        low, high = np.minimum(low, f(0)), np.maximum(high, f(0))
    scale = stored((high - low) / (f(2**spec.bits - 1) / f(2) if spec.divisor == "half_range" else f(qmax)), kept)
    steps_of = (lambda v: v / scale) if spec.round_via == "divide" else (lambda v: v * (f(1) / scale))
    if not spec.symmetric and spec.zero_point == "float":
        zero_point = stored(low, kept)
        codes = np.clip(np.rint(steps_of(x - zero_point)), qmin, qmax)
        return scale, zero_point, codes, codes * scale + zero_point
    zero_point = np.zeros_like(scale) if spec.symmetric else np.clip(np.rint(-low / scale), qmin, qmax)
    codes = np.clip(np.rint(steps_of(x)) + zero_point, qmin, qmax)
    return scale, zero_point, codes, (codes - zero_point) * scale
