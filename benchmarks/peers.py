"""What the library is compared with: the formula of LLM-QAT's reference code in eager torch, and torchao's QAT.

The formula is written from the paper and from what is publicly known of its code, not copied: a straight-through estimator that keeps its
input for a mask at |x| >= 2, a scale of qmax / max|x|, round, divide; q, k and v each quantize the same input again; keys and values are
quantized as they leave their projections.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLIP = 2.0
TINY = 1e-6  # keeps a row of zeros finite
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def formula(x: Tensor, bits: int) -> Tensor:
    """Symmetric min-max values of rows along the last axis, in the dtype of `x`."""
    scale = (2 ** (bits - 1) - 1) / x.abs().amax(-1, keepdim=True).clamp(min=TINY)
    return torch.round(x * scale) / scale


class _FormulaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        return formula(x, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < CLIP), None


class FormulaLinear(nn.Linear):
    """A linear layer that quantizes its weight and its input on every call, and its output where it makes keys or values."""

    weight_bits: int
    input_bits: int
    output_bits: int | None

    def forward(self, input: Tensor) -> Tensor:
        weight = _FormulaFunction.apply(self.weight, self.weight_bits)
        out = functional.linear(_FormulaFunction.apply(input, self.input_bits), weight, self.bias)
        return out if self.output_bits is None else _FormulaFunction.apply(out, self.output_bits)


def insert_formula(model: nn.Module, weight: int, input: int, kv: int | None) -> None:
    """Turn the projections of every decoder layer into :class:`FormulaLinear`, in place."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in QUANTIZED:
            module.__class__ = FormulaLinear
            module.weight_bits, module.input_bits = weight, input  # type: ignore[assignment]
            module.output_bits = kv if last in ("k_proj", "v_proj") else None  # type: ignore[assignment]


def torchao_missing() -> str | None:
    """Why torchao cannot be used, or None."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    try:
        importlib.import_module("torchao.quantization.qat")
    except Exception as error:  # built for another torch
        return f"torchao cannot be imported: {type(error).__name__}: {str(error)[:120]}"
    return None


def insert_torchao(model: nn.Module, group_size: int) -> None:
    """torchao's 8da4w: int8 asymmetric inputs per token, int4 weights per group, its fake-quantized linear layers, in place."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=group_size),
        step="prepare",
    )
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.rpartition(".")[2] in QUANTIZED)
