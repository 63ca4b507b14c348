"""How compressed-tensors describes and stores a layer: the entries of its config group, and its tensors."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight, other_tensors
from lightning_qat.modules.kv import kv_of
from lightning_qat.modules.layer import QuantLayer, quant_layers
from lightning_qat.quantizers import Quantizer
from lightning_qat.specs import KVSpec, TensorSpec

Storage = Literal["pack-quantized", "int-quantized", "dense"]


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One layer as the library sees it.

    Attributes:
        name: Its name in the model.
        group: What its config group says: ``weights``, ``input_activations``, ``output_activations`` and ``format``.
        tensors: What the file holds for it, by full names.
    """

    name: str
    group: dict[str, Any]
    tensors: dict[str, Tensor]


def integers(bits: int, strategy: str, *, dynamic: bool, symmetric: bool = True, group_size: int | None = None) -> dict[str, Any]:
    """The library's description of an integer grid."""
    size = {} if group_size is None else {"group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic, **size}


def weight_entry(weight: IntegerWeight, bits: int) -> dict[str, Any]:
    """The description of a weight whose codes are declared with `bits`."""
    grouped = weight.scale.shape[1] > 1
    size = weight.group_size if grouped else None
    return integers(bits, "group" if grouped else "channel", dynamic=False, symmetric=weight.zero_point is None, group_size=size)


def weight_tensors(weight: IntegerWeight, bits: int, storage: Storage, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, scales and zero points under the library's names."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if storage == "pack-quantized":
        tensors = {"weight_packed": pack_to_int32(weight.codes, bits), "weight_shape": torch.tensor(weight.codes.shape)}
    else:
        tensors = {"weight": weight.codes}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = weight.zero_point
    return {f"{weight.name}.{key}": tensor for key, tensor in {**tensors, "weight_scale": weight.scale.to(dtype)}.items()}


def input_entry(spec: TensorSpec) -> dict[str, Any]:
    """The description of a layer's input."""
    return integers(spec.code_bits, spec.granularity, dynamic=spec.dynamic, group_size=spec.group_size)


def input_scale(layer: QuantLayer) -> Tensor:
    """The scale of a static input quantizer, fp32 [1]: what it would quantize the next batch with."""
    assert isinstance(layer.input_quantizer, Quantizer)
    device = next(iter([*layer.parameters(), *layer.buffers()])).device
    return layer.input_quantizer.codes(torch.zeros(1, 1, device=device)).scale.reshape(1).float().cpu()


def output_entries(job: Job) -> dict[str, dict[str, Any]]:
    """Descriptions of what projections return, by name of the projection: keys and values that are quantized before RoPE."""
    entries: dict[str, dict[str, Any]] = {}
    for name, spec, head_dim in quantized_kv(job, "pre_rope"):
        by_head = spec.granularity == "token_head"
        entry = integers(spec.tensor.code_bits, "group" if by_head else "token", dynamic=True, group_size=head_dim if by_head else None)
        entries |= {f"{name}.{projection}": entry for projection in ("k_proj", "v_proj")}
    return entries


def cache_entry(job: Job) -> dict[str, Any] | None:
    """The description of keys and values that are quantized after RoPE, in every attention module alike."""
    for _, spec, head_dim in quantized_kv(job, "post_rope"):
        return integers(spec.tensor.code_bits, "group", dynamic=True, group_size=head_dim)
    return None


def quantized_kv(job: Job, position: str) -> list[tuple[str, KVSpec, int]]:
    """(name of the attention module, spec, features per head) of keys and values that are written."""
    if "kv" in job.fit.dropped:
        return []
    modules = ((name, module, kv_of(module)) for name, module in job.model.named_modules())
    return [(name, spec, module.key_quantizer.head_dim) for name, module, spec in modules if spec is not None and spec.position == position]


def input_specs(job: Job) -> dict[str, TensorSpec]:
    """Specs of the inputs that are written, by name of the layer."""
    if "input" in job.fit.dropped:
        return {}
    return {name: layer.input_quantizer.spec for name, layer in quant_layers(job.model) if layer.input_quantizer is not None}


def untied_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is no code and belongs to no quantizer; of tied tensors the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in other_tensors(model).items():
        place = (tensor.data_ptr(), tensor.numel())
        if not tensor.numel() or place not in seen:
            tensors[name] = tensor.detach().cpu().contiguous()
        seen.add(place)
    return tensors


def config_of(job: Job, layers: list[StoredLayer]) -> dict[str, Any]:
    """What `config.json` says beside the model's own settings.

    Layers of equal description form a group. A single group of linear layers is called by their class, as other tools do it; several
    groups list their layers, since a class would match before the parts of a layer that an engine has fused.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for layer in layers:
        names = next((names for group, names in groups if group == layer.group), None)
        if names is None:
            groups.append((layer.group, names := []))
        names.append(layer.name)
    named = {layer.name for layer in layers}
    linear = {name for name, module in job.model.named_modules() if isinstance(module, nn.Linear)}
    if len(groups) == 1 and named <= linear:
        groups = [(groups[0][0], ["Linear"])]
    storages = {group["format"] for group, _ in groups} - {"dense"}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",  # left out, the model would load with random weights
        "format": storages.pop() if len(storages) == 1 else "mixed-precision" if storages else "dense",
        "config_groups": {f"group_{i}": {"targets": names, **group} for i, (group, names) in enumerate(groups)},
        "ignore": sorted(linear - named),
        "kv_cache_scheme": cache_entry(job),
    }
