"""The native format, version 1: everything the library can express, in two files.

    model.safetensors     <layer>.packed       uint8 [out, bytes]: codes, low bit first, each row on a byte of its own
                          <layer>.scale        [out], [out, groups] or [1], in the scheme's scale dtype
                          <layer>.zero_point   uint8 [1, bytes]: packed like the codes, in the order of the scales; on asymmetric grids
                          every other parameter and buffer under its own name and dtype
    manifest.json         format version, scheme, per layer (bits, shape, dtype), tied names, effective bits, checksums, versions

A transformers model also gets its config, generation config and tokenizer.
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, formats
from lightning_qat.formats.skeleton import build_transformers_model
from lightning_qat.generation import has_tokenizer, load_tokenizer
from lightning_qat.modules import insert_quantizers, remove_quantizers, scheme_of
from lightning_qat.modules.insertion import quantized_root
from lightning_qat.modules.packed import PackedWeight, pack_tensors
from lightning_qat.modules.weights import LayerWeight, layer_weights, stands_for_codes
from lightning_qat.scheme import QuantScheme
from lightning_qat.specs import TensorSpec

FORMAT, FORMAT_VERSION = "lightning_qat", 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"


@formats.register("native")
class NativeFormat(Format):
    """Writes `model.safetensors` and `manifest.json`."""

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write, and read back: the packed codes must be the codes of the model's quantizers."""
        tensors, layers = _packed_layers(model)
        rest, tied = _other_tensors(model)
        computed = _computed_buffers(model)
        save_file({**tensors, **rest, **computed}, folder / WEIGHTS, metadata={"format": "pt"})
        _save_company(model, folder)
        scheme = scheme_of(model)
        assert scheme is not None
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": _model_kind(model),
            "scheme": scheme.to_dict(),
            "root": quantized_root(model),
            "effective_bits": scheme.effective_bits(model) if layers else None,
            "counted_bits": _counted_bits(layers, {**rest, **computed}),
            "layers": layers,
            "input_only": [weight.name for weight in layer_weights(model) if weight.quantizer is None],
            "tied": tied,
            "computed_buffers": sorted(computed),
            "dropped": [],
            "sha256": {file.relative_to(folder).as_posix(): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()},
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(folder / MANIFEST, folder / WEIGHTS)  # safetensors makes files that only their owner can read
        written = load_file(folder / WEIGHTS)
        wrong = [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]
        if wrong:
            raise RuntimeError(f"export: {wrong[0]} reads back differently than it was written")


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
            parts = pack_tensors(weight.codes(), quantizer.spec)
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


def _computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers that a checkpoint leaves out, such as rotary frequencies: a model cast to bf16 has rounded ones."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in kept and buffer.is_floating_point()}
    return {name: buffer.detach().cpu().contiguous().clone() for name, buffer in buffers.items()}


def _counted_bits(layers: dict[str, Any], rest: dict[str, Tensor]) -> int:
    """Exact size of what the weight file has to hold, without its header."""
    codes = sum(TensorSpec(**layer["spec"]).storage_bits(*layer["shape"]) for layer in layers.values())
    return codes + sum(tensor.numel() * tensor.element_size() * 8 for tensor in rest.values())


def _model_kind(model: nn.Module) -> dict[str, str]:
    library = "transformers" if isinstance(model, PreTrainedModel) else "torch"
    return {"library": library, "class": type(model).__name__}


def _save_company(model: nn.Module, folder: Path) -> None:
    if not isinstance(model, PreTrainedModel):
        return
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    source = model.config._name_or_path
    if not source or ((Path(source) / MANIFEST).exists() and not has_tokenizer(source)):
        return
    try:
        load_tokenizer(source).save_pretrained(folder)
    except ValueError as error:
        warnings.warn(f"export: {error}; save a tokenizer into the exported folder yourself", stacklevel=2)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_quantized(path: str | Path, model: nn.Module | None = None) -> Any:
    """A model from its exported codes; float weights of quantized layers are never built.

    Args:
        path: A folder that :func:`export` wrote in the native format.
        model: For a model that is not one of transformers: an instance of its class, whose weights are replaced.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: Not an export, a newer format version, a damaged file, or `model` missing or of another shape.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: cannot read {str(folder / WEIGHTS)!r}: {error}") from error
    if model is None:
        if manifest["model"]["library"] != "transformers":
            raise ValueError(f"model: this is a {manifest['model']['class']} of your own; pass model=<an instance> to load_quantized")
        model = build_transformers_model(folder, manifest["model"]["class"])
    _insert(model, manifest)
    weights = {weight.name: weight for weight in layer_weights(model)}
    for name, layer in manifest["layers"].items():
        _put_codes(weights[name], layer, tensors)
    for name in manifest["computed_buffers"]:
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, tensors.pop(name))
    for alias, name in manifest["tied"].items():
        tensors[alias] = tensors[name]
    result = model.load_state_dict(tensors, strict=False, assign=True)
    coded = stands_for_codes(model)
    missing = [key for key in result.missing_keys if not coded(key)]
    if missing or result.unexpected_keys:
        raise ValueError(f"model: missing in the export: {missing[:3]}; unknown to the model: {result.unexpected_keys[:3]}")
    if isinstance(model, PreTrainedModel) and manifest["tied"]:
        model.tie_weights()
    return model.eval()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"path: no {MANIFEST} in {str(folder)!r}; expected a folder written by lightning_qat.export")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {str(path)!r} is damaged: {error}") from error
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} is {manifest.get('format')!r} version {manifest.get('format_version')!r}; this library reads "
            f"{FORMAT!r} version {FORMAT_VERSION}"
        )
    for name, digest in manifest["sha256"].items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"path: the manifest names a file outside its folder: {name!r}")
        if not file.is_file() or _sha256(file) != digest:
            raise ValueError(f"path: {str(file)!r} is missing or damaged (checksum differs from the manifest); export again")
    return manifest


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


def _put_codes(weight: LayerWeight, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    parts = {part: tensors.pop(key) for part in ("packed", "scale", "zero_point") if (key := f"{weight.name}.{part}") in tensors}
    dtype = getattr(torch, entry["dtype"])
    packed = PackedWeight(TensorSpec(**entry["spec"]), tuple(entry["shape"]), dtype, parts)
    setattr(weight.layer, f"{weight.parameter}_quantizer", packed)
    # Some models ask a layer's weight for its dtype; an empty parameter answers and holds nothing.
    setattr(weight.layer, weight.parameter, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
