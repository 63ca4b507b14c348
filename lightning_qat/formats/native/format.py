"""The native format, version 1: everything the library can express, in two files.

    model.safetensors     <layer>.packed       uint8 [out, bytes]: codes, low bit first, each row on a byte of its own
                          <layer>.scale        [out], [out, groups] or [1], in the scheme's scale dtype
                          <layer>.zero_point   uint8 [1, bytes]: packed like the codes, in the order of the scales; on asymmetric grids
                          every other parameter and buffer under its own name and dtype
    manifest.json         format version, scheme, per layer (bits, shape, dtype), tied names, effective bits, checksums, versions

A transformers model also gets its config, generation config and tokenizer.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.exactness.codes import stored_codes
from lightning_qat.formats.exactness.executed import computed_buffers, outputs_of
from lightning_qat.formats.folder.company import save_company
from lightning_qat.formats.folder.manifest import model_kind
from lightning_qat.formats.folder.skeleton import build_transformers_model, plain_copy
from lightning_qat.formats.native.entries import check_entries
from lightning_qat.formats.verification import compare_outputs
from lightning_qat.modules import insert_quantizers, remove_quantizers, scheme_of
from lightning_qat.modules.insertion import quantized_root
from lightning_qat.modules.packed import PackedWeight, pack_tensors
from lightning_qat.modules.weights import LayerWeight, layer_weights, stands_for_codes
from lightning_qat.scheme import QuantScheme
from lightning_qat.specs import TensorSpec

WEIGHTS = "model.safetensors"


@formats.register("native")
class NativeFormat(Format):
    """Writes `model.safetensors` and `manifest.json`."""

    name = "native"

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Packed codes, and every other tensor as it is."""
        model = job.model
        tensors, layers = _packed_layers(model)
        rest, tied = _other_tensors(model)
        coded, buffers = stands_for_codes(model), computed_buffers(model)
        computed = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in buffers.items() if not coded(name)}
        save_file({**tensors, **rest, **computed}, folder / WEIGHTS, metadata={"format": "pt"})
        save_company(model, job.tokenizer, folder)
        return {
            "root": quantized_root(model),
            "counted_bits": _counted_bits(layers, {**rest, **computed}),
            "layers": layers,
            "input_only": [weight.name for weight in layer_weights(model) if weight.quantizer is None],
            "tied": tied,
            "computed_buffers": sorted(computed),
        }

    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """Packed codes and scales must be those of the model's quantizers, and what is loaded must compute the same."""
        written = load_file(folder / WEIGHTS)
        tensors, layers = _packed_layers(job.model)
        if wrong := [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]:
            raise RuntimeError(f"export: {wrong[0]} reads back differently than it was written")
        counted = {"weights": len(layers), "codes_different": 0, "scales_different": 0}
        if job.example is None:
            return {**counted, "max_logit_difference": None}
        kind = model_kind(job.model)
        known = kind["library"] == "transformers" and getattr(transformers, kind["class"], None) is type(job.model)
        manifest = {"model": kind, "scheme": job.scheme.to_dict(), **entries}
        loaded = self.load(folder, manifest, None if known else plain_copy(job.model))
        loaded.to(next(job.model.parameters()).device)
        return {**counted, **compare_outputs(job, lambda **example: outputs_of(loaded, example))}

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """With packed codes."""
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"path: cannot read {str(folder / WEIGHTS)!r}: {error}") from error
        check_entries(folder, manifest, tensors)
        if model is None:
            if manifest["model"]["library"] != "transformers":
                raise ValueError(f"model: this is a {manifest['model']['class']} of your own; pass model=<an instance> to load_quantized")
            model = build_transformers_model(folder, manifest["model"]["class"])
        _insert(model, manifest)
        _fill(model, manifest, tensors)
        if isinstance(model, PreTrainedModel) and manifest["tied"]:
            model.tie_weights()
        return model.eval()


def _packed_layers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for weight in layer_weights(model):
        quantizer, layer = weight.quantizer, weight.layer
        if quantizer is None:
            continue
        if isinstance(quantizer, PackedWeight):
            parts = dict(quantizer.named_buffers())
            dtype = quantizer.dtype
        else:
            parts = pack_tensors(stored_codes(weight), quantizer.spec)
            dtype = getattr(layer, weight.parameter).dtype
        spec = asdict(quantizer.spec)
        layers[weight.name] = {"spec": spec, "shape": list(weight.shape), "dtype": str(dtype).removeprefix("torch.")}
        tensors |= {f"{weight.name}.{part}": tensor.cpu() for part, tensor in parts.items()}
    return tensors, layers


def _other_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that is not stored as codes, and which names share a tensor (safetensors stores one of them)."""
    coded = stands_for_codes(model)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[int, int], str] = {}
    for name, tensor in model.state_dict().items():
        if coded(name):
            continue
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in places:
            tied[name] = places[place]
        else:
            places[place] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _counted_bits(layers: dict[str, Any], rest: dict[str, Tensor]) -> int:
    """Exact size of what the weight file has to hold, without its header."""
    codes = sum(TensorSpec(**layer["spec"]).storage_bits(*layer["shape"]) for layer in layers.values())
    return codes + sum(tensor.numel() * tensor.element_size() * 8 for tensor in rest.values())


def _fill(model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put every tensor of the file into its place."""
    weights = {weight.name: weight for weight in layer_weights(model)}
    placeholders: dict[nn.Parameter, nn.Parameter] = {}
    for name, layer in manifest["layers"].items():
        _put_codes(weights[name], layer, tensors, placeholders)
    buffers = dict(model.named_buffers())
    for name in manifest["computed_buffers"]:
        if name not in buffers:
            raise ValueError(f"model: the export has a buffer {name!r}, the given {type(model).__name__} does not")
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, tensors.pop(name))
    for alias, name in manifest["tied"].items():
        tensors[alias] = tensors[name]
    result = model.load_state_dict(tensors, strict=False, assign=True)
    coded = stands_for_codes(model)
    missing = [key for key in result.missing_keys if not coded(key)]
    if missing or result.unexpected_keys:
        raise ValueError(f"model: missing in the export: {missing[:3]}; unknown to the model: {result.unexpected_keys[:3]}")


def _insert(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Insert quantizers exactly where the export has them, or leave the model as it was."""
    kind, root = type(model).__name__, manifest["root"]
    hint = "; it has a configure_model: call it first" if hasattr(model, "configure_model") else ""
    try:
        part = model.get_submodule(root)
    except AttributeError as error:
        raise ValueError(f"model: the export was quantized below {root!r}, which the given {kind} does not have{hint}") from error
    if scheme_of(model) is not None:
        raise ValueError(f"model: the given {kind} is quantized already; pass a plain one")
    try:
        insert_quantizers(part, QuantScheme.parse(manifest["scheme"]), allow_partial=True, final=False)
        here = {weight.name: weight.shape for weight in layer_weights(model)}
        there = {name: tuple(layer["shape"]) for name, layer in manifest["layers"].items()}
        if (lost := {*there, *manifest["input_only"]} ^ here.keys()) != set():
            name = min(lost)
            owner, other = (f"the given {kind}", "the export") if name in here else ("the export", f"the given {kind}")
            raise ValueError(f"model: {owner} has a quantized layer {name!r}, {other} does not{hint}")
        for name, shape in there.items():
            if here[name] != shape:
                raise ValueError(f"model: {name} has shape {here[name]} in the given model and {shape} in the export")
    except ValueError:
        remove_quantizers(part)
        raise


def _put_codes(
    weight: LayerWeight, entry: dict[str, Any], tensors: dict[str, Tensor], placeholders: dict[nn.Parameter, nn.Parameter]
) -> None:
    parts = {part: tensors.pop(key) for part in ("packed", "scale", "zero_point") if (key := f"{weight.name}.{part}") in tensors}
    dtype = getattr(torch, entry["dtype"])
    packed = PackedWeight(TensorSpec(**entry["spec"]), tuple(entry["shape"]), dtype, parts)
    setattr(weight.layer, f"{weight.parameter}_quantizer", packed)
    # Some models ask a layer's weight for its dtype; an empty parameter answers and holds nothing. Tied weights share one.
    before = getattr(weight.layer, weight.parameter)
    empty = placeholders.setdefault(before, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
    setattr(weight.layer, weight.parameter, empty)
