"""The weights of a model as plain signed integers, whatever grid they were trained on: what every target writes.

unsigned codes      codes - 2^(b-1) and zero_point - 2^(b-1)          the same values, (codes - zero_point) * scale; where the zero
point is a value, codes * scale + zero_point, they stay unsigned
half-integer grids  2 * codes + 1 with half the scale, one bit more   (codes + 1/2) * scale, exactly: halving a float loses nothing
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qat.modules.layer import named_quantizers
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.modules.weights import LayerWeight, layer_weights, stands_for_codes
from lightning_qat.numerics.grid import QuantizedTensor
from lightning_qat.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """One weight seen as a matrix [out, in].

    Args:
        name: Name of its layer (or of the weight, where a layer has several).
        key: Its name in a state dict.
        spec: How it was quantized.
        codes: int8 [out, in], within [-2^(bits-1), 2^(bits-1) - 1]; uint8, from 0 to 2^bits - 1, where the zero point is a value.
        scale: fp32 [out, groups]; one group a row unless the granularity is ``group``.
        zero_point: int8 [out, groups] in the range of the codes, fp32 [out, groups] where it is a value, or None.
        bits: Bits that hold every code.
        dtype: The dtype of the trained weight.
    """

    name: str
    key: str
    spec: TensorSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def has_float_zero(self) -> bool:
        """Whether the zero point is a value that is added, and not a code that is subtracted."""
        return self.zero_point is not None and self.zero_point.is_floating_point()

    def dequantize(self) -> Tensor:
        """The values in fp32, [out, in]: those of the fake-quantized weight."""
        codes = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        if self.zero_point is None:
            return (codes * self.scale.unsqueeze(-1)).flatten(1)
        zero_point = self.zero_point.float().unsqueeze(-1)
        if self.has_float_zero:
            return (codes * self.scale.unsqueeze(-1) + zero_point).flatten(1)
        return ((codes - zero_point) * self.scale.unsqueeze(-1)).flatten(1)


def stored_codes(weight: LayerWeight) -> QuantizedTensor:
    """The trained codes of a weight, of a fake quantizer or packed."""
    return weight.quantizer.codes() if isinstance(weight.quantizer, PackedWeight) else weight.codes()


def integer_weights(model: nn.Module) -> Iterator[IntegerWeight]:
    """Every quantized weight of a model, one after the other."""
    return (integer_weight(weight) for weight in layer_weights(model) if weight.quantizer is not None)


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer in a state dict for which no codes stand; nothing of the quantizers of inputs, keys and values."""
    coded, inside = stands_for_codes(model), tuple(f"{name}." for name, _ in named_quantizers(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not coded(name) and not name.startswith(inside)}


def integer_weight(weight: LayerWeight) -> IntegerWeight:
    """One weight.

    Raises:
        ValueError: It is not quantized, holds NaN or inf, or shares a scale along another axis than rows.
    """
    if weight.quantizer is None:
        raise ValueError(f"{weight.name}: its weight is not quantized")
    quantized, spec = stored_codes(weight), weight.quantizer.spec
    rows, columns = weight.shape
    if spec.axis not in (None, 0):
        raise ValueError(f"{weight.name}: weight.axis: got {spec.axis}, only the native format stores scales along another axis than 0")
    groups = columns // spec.group_size if spec.group_size else 1
    codes, scale, zero_point = quantized.codes.to(torch.int16), quantized.scale, quantized.zero_point
    bits, half = spec.code_bits, 2 ** (spec.code_bits - 1)
    if quantized.grid.offset:
        codes, scale, bits = 2 * codes + 1, scale / 2, bits + 1
    elif quantized.grid.qmin == 0 and quantized.grid.zero != "float":
        codes = codes - half
        zero_point = (torch.zeros_like(scale, dtype=torch.int16) if zero_point is None else zero_point) - half
    is_value = quantized.grid.zero == "float"
    zero_point = None if zero_point is None else zero_point.to(torch.float32 if is_value else torch.int8)
    return IntegerWeight(
        name=weight.name,
        key=weight.key,
        spec=spec,
        codes=codes.to(torch.uint8 if is_value else torch.int8).cpu(),
        scale=_by_row(scale.float(), rows, groups),
        zero_point=None if zero_point is None else _by_row(zero_point, rows, groups),
        bits=bits,
        dtype=quantized.dtype,
    )


def _by_row(values: Tensor, rows: int, groups: int) -> Tensor:
    """[out], [out, groups], or [1] for the whole tensor -> [out, groups]."""
    return values.detach().cpu().reshape(-1, groups).expand(rows, groups).contiguous()
