"""A quantizer from its spec, and the two functions that need nothing but a tensor and a spec."""

import torch
from torch import Tensor

from lightning_qat.numerics.grid import QuantizedTensor
from lightning_qat.quantizers.base import Quantizer, quantizers
from lightning_qat.specs import TensorSpec


def build_quantizer(spec: TensorSpec) -> Quantizer:
    """The quantizer that a spec names, in fp32 also where new tensors are bf16 (Lightning's `bf16-true` builds models like that)."""
    cls, default = quantizers.get(spec.quantizer), torch.get_default_dtype()
    if default in (torch.float32, torch.float64):
        return cls(spec)
    torch.set_default_dtype(torch.float32)
    try:
        return cls(spec)
    finally:
        torch.set_default_dtype(default)


def fake_quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """Values of the codes of `x`, with a straight-through gradient.

    Args:
        x: Floating-point tensor; blocks lie along its last axis (``channel``, ``token`` and ``token_head`` are one block a row).
        spec: What to do; a spec that is off returns `x`.

    Returns:
        Shape and dtype of `x`; exactly ``quantize_tensor(x, spec).dequantize()``.

    Note:
        Each call builds a quantizer. In code that torch.compile traces whole, build it before with :func:`build_quantizer` and call that;
        only those with one-pass ranges (min-max) can be built in a graph.

    Example:
        >>> fake_quantize(torch.tensor([0.9, -0.35, 0.1, -1.4]), TensorSpec(bits=4))
        tensor([ 0.8000, -0.4000,  0.0000, -1.4000])
    """
    return x if spec.is_off else build_quantizer(spec)(x)


def quantize_tensor(x: Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Integer codes and scales of `x` (arguments as in :func:`fake_quantize`).

    Raises:
        ValueError: The spec is off, or `x` holds NaN or inf.
    """
    spec.code_bits  # noqa: B018  raises when the spec is off
    return build_quantizer(spec).codes(x)
