"""GGUF, the file of llama.cpp: the trained codes and scales in ggml's block types, metadata and tokenizer in one file.

    model.gguf       all of it; nothing else is needed to serve the model

Which type holds which weight is told in :mod:`~lightning_qat.formats.gguf.encoding`; ggml's own quantizers are never called, because their
rules are others (Q4_0: signed maximum over -8). Every export is read back with the `gguf` package, codes, scales and values bit for bit,
and run by transformers, which dequantizes the file and computes in floating point. llama.cpp itself quantizes the inputs of every product
(Q4_0, Q5_0, Q8_0: groups of 32, amax/127, fp16 scales; K types and ternary: groups of 256): train with ``llama.cpp-w4a8`` to see that.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.codes import IntegerWeight
from lightning_qat.formats.company import model_dtype
from lightning_qat.formats.gguf.architectures import DTYPES, family_of, row_order, stored_tensors, tensor_names, write_metadata
from lightning_qat.formats.gguf.blocks import BLOCK_TYPES, Bytes
from lightning_qat.formats.gguf.encoding import block_type, check_scales, decode, encode
from lightning_qat.formats.gguf.tokenizer import check_tokenizer, compare_tokenizers, write_tokenizer
from lightning_qat.formats.verification import Stored, compare_outputs, compare_weights, weights_to_store
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

FILE = "model.gguf"
GROUPS = (32, 64, 96, 128, 192, 256, 512, 768, 1024)
_SHARED = {"granularity": ("channel", "tensor"), "axis": (None, 0), "scale_dtype": ("float16", "bfloat16", "float32")}
_GROUPED = _SHARED | {"granularity": ("group",), "group_size": GROUPS}
_SYMMETRIC = {"bits": (1, 2, 3, 4, 5, 6, 7, 8), "symmetric": (True,), "code_range": ("narrow", "full")}
_INTEGER_ZERO = {"bits": (2, 3, 4, 5, 6, 7), "symmetric": (False,), "zero_point": ("integer",)}
_FLOAT_ZERO = {"bits": (2, 3, 4), "symmetric": (False,), "zero_point": ("float",)}
INPUT = TensorSpec(bits=8, granularity="group", group_size=32, scale_dtype="float16")

EXECUTES = runtimes.add(
    "gguf",
    Runtime(
        weight=tuple(rule(**where, **what) for where in (_GROUPED, _SHARED) for what in (_SYMMETRIC, _INTEGER_ZERO, _FLOAT_ZERO)),
        input=(
            rule(
                bits=(8,),
                quantizer=("minmax",),
                granularity=("group",),
                group_size=(32,),
                symmetric=(True,),
                dynamic=(True,),
                range_finder=("absmax",),
                code_range=("narrow",),
                divisor=("qmax",),
                scale_dtype=("float16",),
                round_via=("divide",),
                arithmetic=("float32",),
            ),
        ),
    ),
)


def _weight(bits: int) -> TensorSpec:
    return TensorSpec(bits=bits, granularity="group", group_size=32, scale_dtype="float16")


PRESETS.add("gguf-q4_0", QuantScheme(weight=_weight(4)))
PRESETS.add("gguf-q8_0", QuantScheme(weight=_weight(8)))
PRESETS.add("llama.cpp-w4a8", QuantScheme(weight=_weight(4), input=INPUT))


@formats.register("gguf")
class GgufFormat(Format):
    """Writes `model.gguf`."""

    name = "gguf"
    runtime = EXECUTES
    packages = ("gguf",)
    transformers_only = True

    def scale_dtype(self, model: nn.Module) -> torch.dtype:
        """The type of `d` in every block."""
        return torch.float16

    def check(self, job: Job) -> None:
        """Family, tokenizer, dtypes, and for every weight that there is a block type for it."""
        family = family_of(job.model)
        check_tokenizer(job.tokenizer, _rows(job))
        name_of = tensor_names(job.model, family)
        weights = {weight.key: weight for weight in weights_to_store(job)}
        for key, tensor in stored_tensors(job.model):
            if key in weights:
                block_type(weights[key])
                check_scales(weights[key])
            elif "_quantizer." not in key and tensor.dtype not in DTYPES:
                raise ValueError(f"model: {key} is {tensor.dtype}, a GGUF file holds {', '.join(map(str, DTYPES))}")
            if "_quantizer." not in key:
                name_of(key)

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """One file; the manifest gets the block type of every weight, and bits that are stored for each trained one."""
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

        family = family_of(job.model)
        writer = GGUFWriter(folder / FILE, family.architecture)
        write_metadata(writer, job.model, family)
        write_tokenizer(writer, job.tokenizer, _rows(job))
        types: dict[str, str] = {}
        elements: dict[str, int] = {}
        for name, key, tensor, weight in _tensors(job):
            order = row_order(job.model, family, name, len(tensor if weight is None else weight.codes))
            if weight is None:
                data, kind = _float_bytes(tensor, order)
            else:
                block = block_type(weight)
                data, kind = _ordered(encode(weight, block), order), block.name
                types[weight.name] = kind
                elements[kind] = elements.get(kind, 0) + weight.codes.numel()
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        if elements:
            most = max(elements, key=lambda kind: elements[kind])
            writer.add_file_type(next(kind for kind in LlamaFileType if kind.name in (f"MOSTLY_{most}", f"MOSTLY_{most}_S")))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        stored = sum(BLOCK_TYPES[kind].bits * count for kind, count in elements.items())
        return {
            "types": types,
            "stored_bits": stored / sum(elements.values()) if elements else None,
            "dtype": str(model_dtype(job.model)).removeprefix("torch."),
        }

    def verify(self, job: Job, folder: Path) -> dict[str, Any]:
        """Codes, scales and values with the `gguf` package, outputs and tokenizer with transformers, which quantizes no inputs."""
        from transformers import AutoTokenizer

        compared = _compare_tensors(job, folder / FILE)
        compare_tokenizers(job.tokenizer, AutoTokenizer.from_pretrained(folder, gguf_file=FILE))
        loaded = _load(folder, model_dtype(job.model))
        in_float = replace(job, fit=replace(job.fit, dropped=("input", "kv")))
        return compared | compare_outputs(in_float, lambda **inputs: _logits(loaded, inputs))

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """A dense model of transformers, in the dtype that was trained."""
        if model is not None:
            raise ValueError("model: a GGUF file builds its own model; leave it out")
        return _load(folder, getattr(torch, manifest["dtype"]))


def _rows(job: Job) -> int:
    rows: int = job.model.config.vocab_size  # type: ignore[union-attr, assignment]
    return rows


def _tensors(job: Job) -> Iterator[tuple[str, str, Tensor, IntegerWeight | None]]:
    """(name in the file, name in the state dict, tensor, its codes if it is quantized) of everything that is written."""
    name_of = tensor_names(job.model, family_of(job.model))
    weights = {weight.key: weight for weight in weights_to_store(job)}
    for key, tensor in stored_tensors(job.model):
        if "_quantizer." not in key:
            yield name_of(key), key, tensor, weights.get(key)


def _float_bytes(tensor: Tensor, order: Tensor | None) -> tuple[Any, str]:
    """Matrices in their own dtype, vectors in fp32, which llama.cpp expects; both are exact."""
    tensor = tensor.detach().cpu().contiguous()
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    kind = DTYPES[tensor.dtype]
    data = tensor.view(torch.uint8).numpy() if kind == "BF16" else tensor.numpy()
    return _ordered(data, order), kind


def _ordered(data: Any, order: Tensor | None) -> Any:
    return data if order is None else np.ascontiguousarray(data[order.numpy()])


def _compare_tensors(job: Job, file: Path) -> dict[str, Any]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    family = family_of(job.model)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names: dict[str, str] = {}
    for name, key, tensor, weight in _tensors(job):
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


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype, output_loading_info=True)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]):
        raise RuntimeError(f"export: transformers could not place {wrong[0]} of the GGUF file")
    return model.eval()


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
