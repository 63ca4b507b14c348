"""The format `compressed-tensors`: what transformers executes of it, and how a model is written and read back."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.compressed_tensors import checks, reading
from lightning_qat.formats.compressed_tensors.layout import (
    Storage,
    StoredLayer,
    config_of,
    input_entry,
    input_scale,
    input_specs,
    output_entries,
    untied_tensors,
    weight_entry,
    weight_tensors,
)
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.exactness.executed import outputs_of
from lightning_qat.formats.folder.company import dtype_name, model_dtype, save_company
from lightning_qat.formats.folder.skeleton import transformers_class
from lightning_qat.formats.verification import compare_outputs, compare_weights, weights_to_store
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

BITS = (4, 8, 2, 3, 5, 6, 7)
HALF_SCALES = ("bfloat16", "float16")  # numbers that a model in half precision can hold
DYNAMIC = {
    "quantizer": ("minmax",),
    "range_finder": ("absmax",),
    "symmetric": (True,),
    "code_range": ("full",),
    "divisor": ("half_range",),
    "scale_dtype": ("float32",),
    "scale_rounding": ("before",),
    "round_via": ("divide",),
    "arithmetic": ("input",),
}
KV = {key: allowed for key, allowed in DYNAMIC.items() if key != "range_finder"}
EXECUTES = runtimes.add(
    "compressed-tensors",
    Runtime(
        weight=(
            rule(
                bits=(*BITS, 1),
                granularity=("channel", "group", "tensor"),
                zero_point=("integer",),
                axis=(None, 0),
                scale_dtype=HALF_SCALES,
            ),
        ),
        input=(
            rule(bits=BITS, granularity=("token", "group", "tensor"), dynamic=(True,), **DYNAMIC),
            rule(
                bits=BITS,
                granularity=("tensor",),
                dynamic=(False,),
                **{key: DYNAMIC[key] for key in ("symmetric", "code_range", "scale_rounding", "round_via", "arithmetic")},
            ),
        ),
        kv=(
            rule(bits=BITS, position=("pre_rope",), granularity=("token", "token_head"), **KV),
            rule(bits=BITS, position=("post_rope",), granularity=("token_head",), **KV),
        ),
    ),
)
INPUT = TensorSpec(bits=8, granularity="token", code_range="full", divisor="half_range", arithmetic="input")
PRESETS.add("ct-w4a8", QuantScheme(weight=TensorSpec(bits=4, scale_dtype="bfloat16"), input=INPUT))
PRESETS.add("ct-w8a8", QuantScheme(weight=TensorSpec(bits=8, scale_dtype="bfloat16"), input=INPUT))


@formats.register("compressed-tensors")
class CompressedTensorsFormat(Format):
    """Writes a folder for `from_pretrained`."""

    name: ClassVar[str] = "compressed-tensors"
    runtime: ClassVar[Runtime | None] = EXECUTES
    packages: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    transformers_only: ClassVar[bool] = True
    library: ClassVar[str] = "transformers"

    def scale_dtype(self, model: nn.Module) -> torch.dtype:
        """That of the model: transformers casts scales to it."""
        return model_dtype(model)

    def input_scale_dtype(self, model: nn.Module) -> torch.dtype:
        """What static scales of inputs are stored in; that of the model as well."""
        return model_dtype(model)

    def check(self, job: Job) -> None:
        """Kinds of layers, tied weights, axes of inputs, positions of keys and values."""
        checks.check_dtypes(job, self.name)
        checks.check_layers(job, self.name)
        checks.check_static_inputs(job, self.name)
        checks.check_kv(job, self.name)
        checks.check_tokens(job, self.name)

    def storage(self, weight: IntegerWeight, layer: nn.Module, input: TensorSpec | None) -> tuple[Storage, int]:
        """How codes are stored, and the bits they are declared with; the library cannot unpack embeddings and asymmetric grids."""
        unpacked = weight.zero_point is not None or isinstance(layer, nn.Embedding) or (weight.bits == 8 and input is not None)
        return "int-quantized" if unpacked else "pack-quantized", weight.bits

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Codes and scales of quantized layers, every other tensor as it is, and the config that says which is which."""
        layers = self.stored_layers(job)
        tensors = {key: tensor.contiguous() for layer in layers for key, tensor in layer.tensors.items()}
        save_file(tensors | untied_tensors(job.model), folder / "model.safetensors", metadata={"format": "pt"})
        config = config_of(job, layers)
        save_company(job.model, job.tokenizer, folder, {"dtype": dtype_name(job.model), "quantization_config": config})
        return {"quantization_format": config["format"]}

    def stored_layers(self, job: Job) -> list[StoredLayer]:
        """Everything that is quantized, those with quantized outputs first, as the library wants it."""
        weights = {weight.name: weight for weight in weights_to_store(job)}
        inputs, outputs = input_specs(job), output_entries(job)
        names = [*outputs, *(name for name in [*weights, *inputs] if name not in outputs)]
        return [self._stored_layer(job, name, weights.get(name), inputs.get(name), outputs.get(name)) for name in dict.fromkeys(names)]

    def _stored_layer(
        self, job: Job, name: str, weight: IntegerWeight | None, input: TensorSpec | None, output: dict[str, Any] | None
    ) -> StoredLayer:
        layer: Any = job.model.get_submodule(name)
        storage, tensors, group = "dense", {}, {}
        if weight is not None:
            storage, bits = self.storage(weight, layer, input)
            group["weights"] = weight_entry(weight, bits)
            tensors = weight_tensors(weight, bits, storage, model_dtype(job.model))
        if input is not None:
            group["input_activations"] = input_entry(input)
            if not input.dynamic:
                tensors[f"{name}.input_scale"] = input_scale(layer).to(self.input_scale_dtype(job.model))
        if output is not None:
            group["output_activations"] = output
        return StoredLayer(name=name, group=group | {"format": storage}, tensors=tensors)

    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """Loaded by transformers: no name missing or left over, codes and scales bitwise, outputs bitwise."""
        loaded = reading.load_as_written(job, folder)
        counted = compare_weights(job, lambda weight: reading.read_weight(loaded, weight))
        static = reading.compare_input_scales(job, loaded)
        return {**counted, "input_scales": static, **self.compare(job, loaded)}

    def compare(self, job: Job, loaded: Any) -> dict[str, Any]:
        """The outputs of the loaded model with those of the trained one."""
        return compare_outputs(job, lambda **example: outputs_of(loaded, example))

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """By `from_pretrained` of the model's class; `model` is an instance of it where transformers does not have it."""
        cls: Any = transformers_class(manifest["model"]["class"]) if model is None else type(model)
        loaded, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        reading.check_loading(info)
        return loaded.eval()

    def usage(self, job: Job) -> str:
        """Nothing but transformers is needed."""
        name = type(job.model).__name__
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("folder")  # pip install compressed-tensors'
