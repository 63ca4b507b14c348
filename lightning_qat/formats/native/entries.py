"""What a native manifest says, held against itself and the tensors before anything is built from it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qat.formats.folder.manifest import MANIFEST
from lightning_qat.numerics.packing import packed_columns
from lightning_qat.quantizers import quantizers
from lightning_qat.scheme import QuantScheme
from lightning_qat.specs import TensorSpec

KINDS: dict[str, type] = {"root": str, "layers": dict, "input_only": list, "tied": dict, "computed_buffers": list}
DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_entries(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse what `export` does not write.

    Args:
        folder: Of the export, for errors.
        manifest: Its manifest.
        tensors: The tensors of its file.

    Raises:
        ValueError: An entry is missing or of another type, or does not belong to the tensors.
    """
    try:
        for key, kind in KINDS.items():
            if not isinstance(manifest[key], kind):
                raise ValueError(f"{key}: got a {type(manifest[key]).__name__}, expected a {kind.__name__}")
        QuantScheme.parse(manifest["scheme"])
        for name, layer in manifest["layers"].items():
            _check_layer(name, layer, tensors)
        named = [*manifest["tied"].values(), *manifest["computed_buffers"]]
        if lost := [name for name in named if name not in tensors]:
            raise ValueError(f"{lost[0]!r} is not in the file")
        if not all(isinstance(name, str) for name in manifest["input_only"]):
            raise ValueError("input_only: expected names")
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of plain data: nothing else runs here
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"path: {str(folder / MANIFEST)!r} is damaged: {reason}; export again") from error


def _check_layer(name: str, layer: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    spec = TensorSpec(**layer["spec"])
    quantizers.get(spec.quantizer)
    rows, columns = layer["shape"]
    if layer["dtype"] not in DTYPES:
        raise ValueError(f"{name}: dtype: got {layer['dtype']!r}, expected one of {DTYPES}")
    scales = tensors[f"{name}.scale"]
    expected = {"packed": (torch.uint8, rows * packed_columns(columns, spec.code_bits))}
    expected["scale"] = (scales.dtype, spec.scales_in(rows, columns))
    if spec.axis not in (None, 0, 1, -1, -2):
        raise ValueError(f"{name}: axis: got {spec.axis}, a matrix has two")
    if not spec.symmetric:
        is_value = spec.zero_point == "float"
        expected["zero_point"] = (
            (scales.dtype, scales.numel()) if is_value else (torch.uint8, packed_columns(scales.numel(), spec.code_bits))
        )
    for part, (dtype, elements) in expected.items():
        tensor = tensors[f"{name}.{part}"]
        if tensor.dtype != dtype or tensor.numel() != elements or not (scales.is_floating_point() and tensor.ndim):
            raise ValueError(f"{name}.{part}: got {tensor.dtype} {tuple(tensor.shape)}, expected {elements} of {dtype}")
