"""Which linear layers may compute their forward product on integer codes, and the codes for it.

Faster where the machine multiplies int8 faster than the float type at hand: CUDA from compute capability 8.0 on, and CPUs with VNNI but
without AMX, whose bf16 is as fast.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.modules.layer import QuantLayer, quant_layers
from lightning_qat.numerics.backends.choice import encode_dynamic
from lightning_qat.quantizers import Quantizer

CUDA_ROWS, CUDA_MULTIPLE = 17, 8  # what torch._int_mm asks for on CUDA

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def use_int8_forward(model: nn.Module) -> dict[str, str]:
    """Let every linear layer that can compute its forward product on integer codes.

    Returns:
        For each quantized layer that cannot: why.
    """
    refused: dict[str, str] = {}
    for name, layer in quant_layers(model):
        reason = why_not(layer)
        layer.int8_forward = reason is None
        if reason is not None:
            refused[name] = reason
    return refused


def why_not(layer: QuantLayer) -> str | None:
    """Why a layer cannot compute on integer codes, or None."""
    if not isinstance(layer, nn.Linear):
        return "not a Linear layer"
    weight, input = layer.weight_quantizer, layer.input_quantizer
    if not isinstance(weight, Quantizer) or input is None:
        return "weight and input have to be fake-quantized both"
    if weight.spec.granularity != "channel" or weight.spec.axis not in (None, 0):
        return f"weight.granularity {weight.spec.granularity!r}: one scale per output channel is needed"
    if input.spec.granularity != "token":
        return f"input.granularity {input.spec.granularity!r}: one scale per token is needed"
    for part, quantizer in (("weight", weight), ("input", input)):
        if quantizer.grid.zero != "none" or quantizer.grid.offset or quantizer.grid.qmax > 127 or not quantizer.can_share:
            return f"{part}: a symmetric signed grid with the identity estimator is needed"
    return None


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether int8 products of these shapes are faster than float ones on this device."""
    if x.device.type == "cuda":
        rows = x.numel() // max(x.shape[-1], 1)
        fits = rows >= CUDA_ROWS and all(size % CUDA_MULTIPLE == 0 for size in weight.shape)
        return fits and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and bool(torch.cpu._is_vnni_supported()) and not torch.cpu._is_amx_tile_supported()


def int8_operands(layer: Any, x: Tensor, dtype: torch.dtype | None) -> Operands | None:
    """The codes and scales of a product, or None where the layer has to compute it in floating point."""
    weight, input = layer.weight_quantizer, layer.input_quantizer
    ready = isinstance(weight, Quantizer) and input is not None and weight.enabled and input.enabled
    # torch._int_mm for the CPU returns wrong numbers where the inner size is 1 (seen with torch 2.13).
    if not ready or x.numel() == 0 or x.shape[-1] < 2 or x.dtype == torch.float64 or not is_faster(x, layer.weight):
        return None
    rows = x.detach().reshape(-1, x.shape[-1])

    def compute() -> tuple[Tensor, Tensor]:
        codes, scale, _ = encode_dynamic(rows, input.how)
        return codes, scale

    with torch.no_grad():
        # Codes and values are kept apart by what they are computed for: int8 asks under its own dtype.
        x_codes = compute() if layer.shared_input is None else layer.shared_input.take(layer, x, torch.int8, compute)
        w_codes, w_scale, _ = encode_dynamic(layer.as_quantized(layer.weight.detach()), weight.how)
    return (*x_codes, w_codes, w_scale)
