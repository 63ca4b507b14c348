"""compressed-tensors in the layout that vLLM runs: 8-bit products of int8 codes, or packed weights beside floating-point activations.

    weights and inputs    int-quantized: int8 codes, one scale a row, whatever the bits of the weight (its codes are a part of int8)
    weights alone         pack-quantized: one scale a row, or a group of 32, 64 or 128

vLLM's int8 kernel divides by the largest magnitude over 127 and multiplies by the reciprocal, in fp32. It was read, not run: the file is
checked through transformers, which executes another grid for activations, and is compared with the model on that one.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Job, formats
from lightning_qat.formats.compressed_tensors.format import EXECUTES as TRANSFORMERS
from lightning_qat.formats.compressed_tensors.format import CompressedTensorsFormat
from lightning_qat.formats.compressed_tensors.layout import Storage, input_entry, input_scale, input_specs
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.exactness.fitting import fit_model
from lightning_qat.formats.folder.company import model_dtype
from lightning_qat.modules.shared_input import SIBLINGS
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

BITS = (4, 8, 2, 3, 5, 6, 7, 1)
WEIGHT: dict[str, tuple[Any, ...]] = {
    "bits": BITS,
    "symmetric": (True,),
    "code_range": ("narrow", "full"),
    "axis": (None, 0),
    "scale_dtype": ("bfloat16", "float16"),
}
INPUT: dict[str, tuple[Any, ...]] = {
    "bits": (8,),
    "group_size": (None,),
    "symmetric": (True,),
    "scale_dtype": ("float32",),
    "scale_rounding": ("before",),
    "arithmetic": ("float32",),
}
EXECUTES = runtimes.add(
    "vllm",
    Runtime(
        weight=(
            rule(granularity=("channel", "tensor"), group_size=(None,), **WEIGHT),
            rule(granularity=("group",), group_size=(128, 64, 32), **WEIGHT),
        ),
        input=(
            rule(
                granularity=("token",),
                quantizer=("minmax",),
                range_finder=("absmax",),
                divisor=("qmax",),
                code_range=("narrow", "full"),
                round_via=("reciprocal",),
                **INPUT,
            ),
            rule(granularity=("tensor",), dynamic=(False,), code_range=("full",), round_via=("divide",), **INPUT),
        ),
    ),
)
PRESETS.add("vllm-w4a16", QuantScheme(weight=TensorSpec(bits=4, granularity="group", group_size=64, scale_dtype="bfloat16")))
PRESETS.add(
    "vllm-w8a8",
    QuantScheme(
        weight=TensorSpec(bits=8, scale_dtype="bfloat16"),
        input=TensorSpec(bits=8, granularity="token", round_via="reciprocal"),
    ),
)


@formats.register("vllm")
class VllmFormat(CompressedTensorsFormat):
    """Writes a folder for `vllm serve`."""

    name: ClassVar[str] = "vllm"
    runtime: ClassVar[Runtime | None] = EXECUTES
    library: ClassVar[str] = "vllm"

    def scale_dtype(self, model: nn.Module) -> torch.dtype:
        """Half precision, in which vLLM serves a model trained in float32 too; bf16 numbers survive both kinds of it."""
        dtype = model_dtype(model)
        return dtype if dtype == torch.float16 else torch.bfloat16

    def input_scale_dtype(self, model: nn.Module) -> torch.dtype:
        """In fp32, as vLLM keeps them."""
        return torch.float32

    def storage(self, weight: IntegerWeight, layer: nn.Module, input: TensorSpec | None) -> tuple[Storage, int]:
        """int8 for 8-bit products; packed otherwise."""
        return ("pack-quantized", weight.bits) if input is None else ("int-quantized", 8)

    def check(self, job: Job) -> None:
        """Layers that stay in floating point, weights that the int8 kernel cannot multiply, and parts of a fused layer that differ."""
        super().check(job)
        inputs = input_specs(job)
        for weight in layer_weights(job.model):
            _check_layer(job, weight, weight.layer_name in inputs)
        _check_siblings(job)

    def compare(self, job: Job, loaded: Any) -> dict[str, Any]:
        """With the model on the grid that transformers executes, which for activations is not vLLM's."""
        if not input_specs(job):
            return super().compare(job, loaded)
        fit = fit_model(job.model, TRANSFORMERS, "compressed-tensors", model_dtype(job.model), job.fit.dropped, inexact=True)
        executed = replace(job, fit=replace(fit, scale_dtypes=job.fit.scale_dtypes))
        return {**super().compare(executed, loaded), "outputs_compared_on": "the grid of transformers; vLLM was not run"}

    def usage(self, job: Job) -> str:
        """The offline engine; `vllm serve folder` is the server."""
        return 'from vllm import LLM\n\nmodel = LLM("folder")  # vLLM itself was not run when the folder was verified'


def _check_layer(job: Job, weight: LayerWeight, has_input: bool) -> None:
    model: PreTrainedModel = job.model  # type: ignore[assignment]
    spec = None if weight.quantizer is None else weight.quantizer.spec
    if isinstance(weight.layer, nn.Embedding) or weight.layer is model.get_output_embeddings():
        if spec is not None or has_input:
            raise ValueError(
                f"format 'vllm' cannot express {weight.name}: vLLM keeps embeddings and the output head in floating point; leave them out "
                "of the scheme (exclude), or use format='compressed-tensors'"
            )
    elif has_input and (spec is None or spec.granularity == "group"):
        got = "no quantized weight" if spec is None else f"weight.granularity={spec.granularity!r}"
        raise ValueError(
            f"format 'vllm' cannot express {weight.name}: its input is quantized and it has {got}; vLLM's int8 kernel multiplies with "
            "weights of one scale a row (weight.granularity='channel'); export with drop=('input',), or use format='compressed-tensors'"
        )


def _check_siblings(job: Job) -> None:
    """Layers that read the same input are fused by vLLM, and must be quantized alike."""
    weights, inputs = {weight.layer_name: weight for weight in layer_weights(job.model)}, input_specs(job)
    for name, module in job.model.named_modules():
        for siblings in SIBLINGS:
            parts = [f"{name}.{part}".lstrip(".") for part in siblings if isinstance(getattr(module, part, None), nn.Linear)]
            for part in parts[1:]:
                if _described(weights.get(part), inputs.get(part)) != _described(weights.get(parts[0]), inputs.get(parts[0])):
                    raise ValueError(
                        f"format 'vllm' cannot express {part} quantized otherwise than {parts[0]}: vLLM fuses them into one layer; give "
                        "both the same specs (overrides), or use format='compressed-tensors'"
                    )


def _described(weight: LayerWeight | None, input: TensorSpec | None) -> tuple[Any, ...]:
    """All that parts of a fused layer share: how codes are stored, and the one scale of a static input."""
    spec = None if weight is None or weight.quantizer is None else weight.quantizer.spec
    stored = None if spec is None else (spec.bits, spec.quantizer == "mean_abs", spec.group_size)
    if weight is None or input is None:
        return stored, None
    return stored, input_entry(input), None if input.dynamic else float(input_scale(weight.layer))
