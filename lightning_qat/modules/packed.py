"""A weight as it is stored: packed codes, scales, and nothing else."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.numerics.grid import QuantizedTensor
from lightning_qat.numerics.packing import pack, unpack
from lightning_qat.numerics.ranges import SCALE_DTYPES
from lightning_qat.quantizers import blocking_of, quantizers
from lightning_qat.specs import TensorSpec


class PackedWeight(nn.Module):
    """Packed codes of a matrix [out, in] with its scales.

    Args:
        spec: How the matrix was quantized.
        shape: (out, in).
        dtype: The dtype that :meth:`dequantize` returns.
        tensors: ``packed`` uint8 [out, bytes], ``scale`` in the spec's scale dtype ([out], [out, groups] or [1]), and on asymmetric
            grids ``zero_point``: uint8 [1, bytes], packed like the codes in the order of the scales, or like `scale` where it is a value.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec, self.shape, self.dtype = spec, shape, dtype
        self.grid = quantizers.get(spec.quantizer).build_grid(spec)
        for name in ("packed", "scale", "zero_point"):
            self.register_buffer(name, tensors.get(name))

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeight":
        """Move, but never cast: a rounded scale would be another model. The layer's weight tells which dtype is wanted."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def codes(self, rows: slice = slice(None)) -> QuantizedTensor:
        """The integer codes and scales; of some `rows` only where each has scales of its own."""
        bits = self.spec.code_bits
        codes = unpack(self.packed[rows], bits, self.grid.qmin, self.shape[1])
        scale = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))
        zero_point = self.zero_point
        if zero_point is not None and self.grid.zero == "float":
            zero_point = zero_point.to(scale.dtype)
        elif zero_point is not None:
            zero_point = unpack(zero_point, bits, 0, scale.numel()).view_as(scale)
        return QuantizedTensor(
            codes=codes.to(self.grid.code_dtype),
            scale=scale[rows],
            zero_point=None if zero_point is None else zero_point[rows],
            grid=self.grid,
            blocking=blocking_of(self.spec),
            dtype=self.dtype,
        )

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """The values of the codes, shape [out, in]; `rows` as in :meth:`codes`."""
        return self.codes(rows).dequantize()

    def extra_repr(self) -> str:
        """The spec in a few words."""
        return f"{self.spec.bits} bits, {self.spec.granularity}, shape={self.shape}"


def packed_weights(model: nn.Module) -> list[str]:
    """Names of the weights that are there only as packed codes."""
    return [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]


def pack_tensors(quantized: QuantizedTensor, spec: TensorSpec) -> dict[str, Tensor]:
    """The tensors of a :class:`PackedWeight`, as they are written to a file."""
    # "float32" means not rounded: scales of a float64 model stay float64.
    dtype = quantized.scale.dtype if spec.scale_dtype == "float32" else SCALE_DTYPES[spec.scale_dtype]
    tensors = {
        "packed": pack(quantized.codes, spec.code_bits, quantized.grid.qmin),
        "scale": quantized.scale.to(dtype).contiguous(),
    }
    if quantized.zero_point is not None and quantized.grid.zero == "float":
        tensors["zero_point"] = quantized.zero_point.to(dtype).contiguous()
    elif quantized.zero_point is not None:
        tensors["zero_point"] = pack(quantized.zero_point.reshape(1, -1), spec.code_bits, 0)
    return tensors
