"""Tensors of torchao in a safetensors file, flattened and put together again by torchao's own functions."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_qat.formats.exactness.executed import computed_buffers

WEIGHTS = "model.safetensors"


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each further name of a tied parameter or buffer its first one; a file holds it once."""
    live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    first: dict[int, str] = {}
    return {name: owner for name, tensor in live.items() if (owner := first.setdefault(id(tensor), name)) != name}


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, those of torchao in parts."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    flat, metadata = flatten_tensor_state_dict(tensors)
    # Their reader splits every listed name at a dot; a parameter of the outermost module has none, and needs no putting together.
    metadata["tensor_names"] = json.dumps([name for name in tensors if "." in name])
    save_file({name: tensor.cpu().contiguous() for name, tensor in flat.items()}, folder / WEIGHTS, metadata=metadata | {"format": "pt"})


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Read them back.

    Raises:
        ValueError: The file cannot be read.
    """
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    try:
        flat = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: cannot read {str(folder / WEIGHTS)!r}: {error}") from error
    tensors, plain = unflatten_tensor_state_dict(flat, metadata)
    return {**tensors, **plain}


def fill(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Put tensors into a plain module, all of them or none.

    Raises:
        ValueError: Names or shapes differ.
    """
    tensors = tensors | {alias: tensors[name] for alias, name in tied.items()}
    kind, here = type(model).__name__, {**model.state_dict(), **computed_buffers(model)}
    if lost := {*here} ^ {*tensors}:
        name = min(lost)
        owner, other = (f"the given {kind}", "the export") if name in here else ("the export", f"the given {kind}")
        raise ValueError(f"model: {owner} holds {name!r}, {other} does not")
    for name, tensor in tensors.items():
        if here[name].shape != tensor.shape:
            raise ValueError(f"model: {name} has shape {tuple(here[name].shape)} in the given model, {tuple(tensor.shape)} in the export")
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._parameters:
            module._parameters[attribute] = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        else:
            module._buffers[attribute] = tensor
