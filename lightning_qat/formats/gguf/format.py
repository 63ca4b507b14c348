"""The format: what llama.cpp executes, what is written, and how it is verified."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.folder.company import dtype_name, model_dtype
from lightning_qat.formats.gguf.architectures import (
    DTYPES,
    family_of,
    row_order,
    stored_tensors,
    tensor_names,
    unread_settings,
    write_metadata,
)
from lightning_qat.formats.gguf.blocks import BLOCK_TYPES
from lightning_qat.formats.gguf.encoding import block_type, check_scales, encode
from lightning_qat.formats.gguf.reading import FILE, compare_tensors, load_model, logits_of, save_config, written_tensors
from lightning_qat.formats.gguf.tokenizer import check_tokenizer, compare_tokenizers, write_tokenizer
from lightning_qat.formats.verification import compare_outputs, weights_to_store
from lightning_qat.modules.layer import quant_layers
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

GROUPS = (32, 64, 96, 128, 192, 256, 512, 768, 1024)
_SHARED = {"granularity": ("channel", "tensor"), "axis": (None, 0), "scale_dtype": ("float16",)}
_GROUPED = _SHARED | {"granularity": ("group",), "group_size": GROUPS}
_SYMMETRIC = {"bits": (1, 2, 3, 4, 5, 6, 7, 8), "symmetric": (True,), "code_range": ("narrow", "full")}
_INTEGER_ZERO = {"bits": (2, 3, 4, 5, 6, 7), "symmetric": (False,), "zero_point": ("integer",)}
_FLOAT_ZERO = {"bits": (2, 3, 4), "symmetric": (False,), "zero_point": ("float",)}
_INPUT = {
    "bits": (8,),
    "quantizer": ("minmax",),
    "granularity": ("group",),
    "symmetric": (True,),
    "dynamic": (True,),
    "range_finder": ("absmax",),
    "code_range": ("narrow",),
    "divisor": ("qmax",),
    "arithmetic": ("float32",),
}

EXECUTES = runtimes.add(
    "gguf",
    Runtime(
        weight=tuple(rule(**where, **what) for where in (_GROUPED, _SHARED) for what in (_SYMMETRIC, _INTEGER_ZERO, _FLOAT_ZERO)),
        input=(  # of weights in blocks of 32, and of 256
            rule(**_INPUT, group_size=(32,), scale_dtype=("float16",), scale_rounding=("after",), round_via=("reciprocal",)),
            rule(**_INPUT, group_size=(256,), scale_dtype=("float32",), scale_rounding=("before",), round_via=("divide",)),
        ),
    ),
)


def _weight(bits: int) -> TensorSpec:
    """What Q4_0 and Q8_0 hold, without their most negative code.

    -8..7 with amax / 7.5 starts closer to the float model and trains to a slightly worse one (docs/targets/gguf.md); both are exact.
    """
    return TensorSpec(bits=bits, granularity="group", group_size=32, scale_dtype="float16")


PRESETS.add("gguf-q4_0", QuantScheme(weight=_weight(4)))
PRESETS.add("gguf-q8_0", QuantScheme(weight=_weight(8)))
PRESETS.add(
    "llama.cpp-w4a8",
    QuantScheme(
        weight=_weight(4),
        input=TensorSpec(bits=8, granularity="group", group_size=32, scale_dtype="float16", scale_rounding="after", round_via="reciprocal"),
    ),
)


@formats.register("gguf")
class GgufFormat(Format):
    """Writes `model.gguf`."""

    name = "gguf"
    runtime = EXECUTES
    packages = ("gguf",)
    transformers_only = True
    library = "gguf"

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
            name_of(key)
            if key in weights:
                block_type(weights[key])
                check_scales(weights[key])
            elif tensor.dtype not in DTYPES:
                raise ValueError(f"model: {key} is {tensor.dtype}, a GGUF file holds {', '.join(map(str, DTYPES))}")
        _check_inputs(job, {weight.name: weight for weight in weights.values()})

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """One file, and a config where transformers' reader leaves something out.

        The manifest gets the block type of every weight, and bits that are stored for each trained one.
        """
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

        family = family_of(job.model)
        writer = GGUFWriter(folder / FILE, family.architecture)
        write_metadata(writer, job.model, family)
        write_tokenizer(writer, job.tokenizer, _rows(job))
        types: dict[str, str] = {}
        elements: dict[str, int] = {}
        for name, _, tensor, weight in written_tensors(job):
            order = row_order(job.model, family, name, len(tensor if weight is None else weight.codes))
            if weight is None:
                data, kind = _float_bytes(tensor)
            else:
                block = block_type(weight)
                data, kind = encode(weight, block), block.name
                types[weight.name] = kind
                elements[kind] = elements.get(kind, 0) + weight.codes.numel()
            data = data if order is None else np.ascontiguousarray(data[order.numpy()])
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        if elements:
            most = max(elements, key=lambda kind: elements[kind])
            writer.add_file_type(next(kind for kind in LlamaFileType if kind.name in (f"MOSTLY_{most}", f"MOSTLY_{most}_S")))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if settings := unread_settings(job.model):
            save_config(folder, settings)
        stored = sum(BLOCK_TYPES[kind].bits * count for kind, count in elements.items())
        return {
            "types": types,
            "stored_bits": stored / sum(elements.values()) if elements else None,
            "dtype": dtype_name(job.model),
        }

    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """Codes, scales and values with the `gguf` package, outputs and tokenizer with transformers, which quantizes no inputs."""
        from transformers import AutoTokenizer

        compared = compare_tensors(job, folder / FILE)
        compare_tokenizers(job.tokenizer, AutoTokenizer.from_pretrained(folder, gguf_file=FILE))
        loaded = load_model(folder, model_dtype(job.model))
        in_float = replace(job, fit=replace(job.fit, dropped=("input", "kv")))
        return compared | compare_outputs(in_float, lambda **inputs: logits_of(loaded, inputs))

    def usage(self, job: Job) -> str:
        """With transformers; llama.cpp takes the file as it is."""
        names, more = "AutoModelForCausalLM, AutoTokenizer", ""
        if unread_settings(job.model):
            names, more = f"AutoConfig, {names}", ', config=AutoConfig.from_pretrained("folder")'
        return (
            f"from transformers import {names}\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("folder", gguf_file="{FILE}"{more})  # llama.cpp: llama-cli -m folder/{FILE}\n'
            f'tokenizer = AutoTokenizer.from_pretrained("folder", gguf_file="{FILE}")'
        )

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """A dense model of transformers, in the dtype that was trained."""
        if model is not None:
            raise ValueError("model: a GGUF file builds its own model; leave it out")
        return load_model(folder, getattr(torch, manifest["dtype"]))


def _rows(job: Job) -> int:
    rows: int = job.model.config.vocab_size  # type: ignore[union-attr, assignment]
    return rows


def _check_inputs(job: Job, weights: dict[str, IntegerWeight]) -> None:
    """llama.cpp quantizes the inputs of a product in the blocks of its weight, and of floating-point weights not at all."""
    if "input" in job.fit.dropped:
        return
    for name, layer in quant_layers(job.model):
        if layer.input_quantizer is None:
            continue
        spec = job.fit.inputs.get(name, layer.input_quantizer.spec)
        if name not in weights:
            raise ValueError(
                f"{name}: has quantized inputs and a floating-point weight, whose inputs llama.cpp leaves alone; use drop=('input',)"
            )
        kind = block_type(weights[name])
        if kind.form == "shifted":
            raise ValueError(
                f"{name}: llama.cpp rounds sums of the inputs of {kind.name} weights to fp16, which no spec of inputs says; train the "
                "weight with zero_point='integer', or export with drop=('input',)"
            )
        if kind.size != spec.group_size:
            raise ValueError(
                f"{name}: input.group_size: got {spec.group_size}, llama.cpp quantizes inputs of {kind.name} weights in groups of "
                f"{kind.size}; train with that, or export with drop=('input',)"
            )


def _float_bytes(tensor: Tensor) -> tuple[Any, str]:
    """Matrices in their own dtype, vectors in fp32, which llama.cpp expects; both are exact."""
    tensor = tensor.detach().cpu().contiguous()
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    kind = DTYPES[tensor.dtype]
    return (tensor.view(torch.uint8).numpy() if kind == "BF16" else tensor.numpy()), kind
