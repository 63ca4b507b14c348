"""Reading an export back: the bytes with the `gguf` package, the model with transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.gguf.architectures import family_of, row_order, stored_tensors, tensor_names
from lightning_qat.formats.gguf.blocks import BLOCK_TYPES
from lightning_qat.formats.gguf.encoding import decode
from lightning_qat.formats.gguf.planes import Bytes
from lightning_qat.formats.verification import Stored, compare_weights, weights_to_store

FILE = "model.gguf"


def written_tensors(job: Job) -> Iterator[tuple[str, str, Tensor, IntegerWeight | None]]:
    """(name in the file, name in the state dict, tensor, its codes if it is quantized) of everything that is written."""
    name_of = tensor_names(job.model, family_of(job.model))
    weights = {weight.key: weight for weight in weights_to_store(job)}
    for key, tensor in stored_tensors(job.model):
        yield name_of(key), key, tensor, weights.get(key)


def compare_tensors(job: Job, file: Path) -> dict[str, Any]:
    """Codes and scales as our own unpacker finds them, values as the `gguf` package computes them.

    Raises:
        RuntimeError: Anything differs.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    family = family_of(job.model)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names: dict[str, str] = {}
    for name, key, tensor, weight in written_tensors(job):
        names[key] = name
        stored = tensors[name]
        read = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type)))
        mine = tensor.detach().cpu().float() if weight is None else weight.dequantize()
        order = row_order(job.model, family, name, len(mine))
        if not torch.equal(read.view(mine.shape), mine if order is None else mine[order]):
            raise RuntimeError(f"export: {key} reads back with other values than were written")

    def read_codes(weight: IntegerWeight) -> Stored:
        name = names.get(weight.key, "token_embd.weight")  # of a tied head, which is not written
        stored = tensors[name]
        order = row_order(job.model, family, name, len(weight.codes))
        data: Bytes = np.array(stored.data)
        back = data if order is None else data[torch.argsort(order).numpy()]
        return decode(back, weight, BLOCK_TYPES[stored.tensor_type.name])

    return compare_weights(job, read_codes)


def save_config(folder: Path, settings: dict[str, Any]) -> None:
    """What transformers reads from the file, with the settings that its reader leaves out, as a config beside the file."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    type(config).from_dict(config.to_dict() | settings).save_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """A dense model of transformers, in eval mode; a config beside the file wins over what transformers reads from it.

    Raises:
        RuntimeError: The file lacks a tensor, or has one too many.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"config": AutoConfig.from_pretrained(folder)} if (folder / CONFIG_NAME).exists() else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype, output_loading_info=True, **config)
    model, info = loaded
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]):
        raise RuntimeError(f"export: transformers could not place {wrong[0]} of the GGUF file")
    return model.eval()


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model returns for keyword arguments of its forward."""
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
