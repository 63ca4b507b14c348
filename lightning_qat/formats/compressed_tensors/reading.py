"""What transformers and compressed-tensors make of a folder, read before the first forward pass turns codes into float weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.compressed_tensors.layout import input_scale, input_specs
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.folder.company import model_dtype
from lightning_qat.formats.verification import Stored


def load_as_written(job: Job, folder: Path) -> Any:
    """The model as transformers loads it, on the device of the written one.

    Raises:
        RuntimeError: A tensor of the file was not used, or one of the model has no values: transformers only prints that.
    """
    settings = {"dtype": model_dtype(job.model), "attn_implementation": job.model.config._attn_implementation}  # type: ignore[union-attr]
    loaded, info = type(job.model).from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)  # type: ignore[attr-defined]
    check_loading(info)
    return loaded.to(next(job.model.parameters()).device)


def check_loading(info: Mapping[str, Any]) -> None:
    """Raise a RuntimeError where names of a file and of a model do not fit together."""
    if wrong := {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}:
        raise RuntimeError(f"export: the written file does not fit the model that transformers builds from it: {wrong}")


def read_weight(loaded: nn.Module, weight: IntegerWeight) -> Stored:
    """Codes, scales and zero points of one layer, unpacked by the library."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    layer: Any = loaded.get_submodule(weight.name)
    codes = getattr(layer, "weight_packed", None)
    if codes is None:
        codes = layer.weight
    else:
        shape = torch.Size(layer.weight_shape.tolist())
        codes = unpack_from_int32(codes, layer.quantization_scheme.weights.num_bits, shape)
    zero_point = getattr(layer, "weight_zero_point", None)
    return Stored(
        codes=codes.detach().cpu(),
        scale=layer.weight_scale.detach().float().cpu(),
        zero_point=None if zero_point is None else zero_point.detach().cpu(),
    )


def compare_input_scales(job: Job, loaded: nn.Module) -> int:
    """Count the static scales of inputs; a RuntimeError where one is not that of training in the dtype of the model."""
    places = [place for place, spec in input_specs(job).items() if not spec.dynamic]
    for place in places:
        layer: Any = job.model.get_submodule(place)
        theirs: Any = loaded.get_submodule(place)
        if not torch.equal(theirs.input_scale.detach().cpu(), input_scale(layer).to(model_dtype(job.model))):
            raise RuntimeError(f"export: {place}: the scale of its input reads back differently than it was written")
    return len(places)
