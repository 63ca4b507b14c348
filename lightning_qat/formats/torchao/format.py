"""The format itself: what is refused, written, compared and loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.exactness.codes import IntegerWeight, other_tensors
from lightning_qat.formats.exactness.executed import computed_buffers, outputs_of
from lightning_qat.formats.folder.company import dtype_name, model_dtype, save_company
from lightning_qat.formats.folder.manifest import model_kind
from lightning_qat.formats.folder.skeleton import plain_copy, transformers_class
from lightning_qat.formats.torchao.files import fill, load_tensors, save_tensors, tied_names
from lightning_qat.formats.torchao.tensors import quantized_tensors, quantizes_input, transformers_config
from lightning_qat.formats.verification import Stored, compare_outputs, compare_weights
from lightning_qat.modules import scheme_of
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

EXECUTES = runtimes.add(
    "torchao",
    Runtime(
        weight=(rule(granularity=("channel", "group", "tensor"), zero_point=("integer",), axis=(None, 0), scale_dtype=("bfloat16",)),),
        input=(
            rule(
                bits=(8,),
                granularity=("token",),
                symmetric=(False,),
                zero_point=("integer",),
                dynamic=(True,),
                quantizer=("minmax",),
                range_finder=("absmax",),
                code_range=("narrow",),
                divisor=("qmax",),
                scale_dtype=("float32",),
                scale_rounding=("before",),
                round_via=("reciprocal",),
                arithmetic=("float32",),
            ),
        ),
    ),
)
# XNNPACK, which ExecuTorch runs on a CPU, keeps the scales of groups in bf16.
PRESETS.add(
    "executorch-8da4w",
    QuantScheme(
        weight=TensorSpec(bits=4, granularity="group", group_size=32, scale_dtype="bfloat16"),
        input=TensorSpec(bits=8, granularity="token", symmetric=False, round_via="reciprocal"),
    ),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@formats.register("torchao")
class TorchaoFormat(Format):
    """Writes `model.safetensors`, and `config.json` for models of transformers."""

    name = "torchao"
    runtime = EXECUTES
    packages = ("torchao",)
    transformers_first = True
    library = "transformers"

    def usage(self, job: Job) -> str:
        """`from_pretrained`, which needs torchao and nothing of this library."""
        if not isinstance(job.model, PreTrainedModel):
            return super().usage(job)
        kind = type(job.model).__name__
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("folder")  # pip install torchao'

    def scale_dtype(self, model: nn.Module) -> torch.dtype:
        """Moving a tensor of torchao (``.to("cuda")``, even ``.to("cpu")``) casts its scales to the dtype of its values."""
        return model_dtype(model)

    def check(self, job: Job) -> None:
        """Layers without a torchao kernel, inputs without quantized weights, and dtypes."""
        for weight in layer_weights(job.model):
            _check_layer(weight, quantizes_input(weight, job))
        if any(quantizes_input(weight, job) for weight in layer_weights(job.model)):
            _check_float32(job.model)

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Codes as torchao tensors, and every other tensor as it is."""
        model, tied = job.model, tied_names(job.model)
        quantized = quantized_tensors(job)
        tensors = other_tensors(model) | quantized
        if isinstance(model, PreTrainedModel):
            save_company(
                model, job.tokenizer, folder, {"dtype": dtype_name(model), "quantization_config": transformers_config(model, quantized)}
            )
        else:
            tensors |= computed_buffers(model)
        save_tensors({name: tensor.detach() for name, tensor in tensors.items() if name not in tied}, folder)
        return {"tied": tied}

    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """Codes, then outputs, of what `from_pretrained`, or torchao's reader, makes of the folder."""
        manifest = {"model": model_kind(job.model), "tied": tied_names(job.model)}
        loaded = self.load(folder, manifest, None if isinstance(job.model, PreTrainedModel) else plain_copy(job.model))
        loaded.to(next(job.model.parameters()).device)  # as users do; and products of another device round otherwise
        compared = compare_weights(job, lambda weight: _stored(loaded, weight))
        return {**compared, **compare_outputs(job, lambda **example: outputs_of(loaded, example))}

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """A transformers model by `from_pretrained`; another module is filled."""
        kind = manifest["model"]["class"]
        if manifest["model"]["library"] == "transformers":
            return _from_pretrained(folder, kind)
        if model is None:
            raise ValueError(f"model: this is a {kind} of your own; pass model=<an instance> to load_quantized")
        if scheme_of(model) is not None:
            raise ValueError(f"model: the given {type(model).__name__} is quantized already; pass a plain one")
        fill(model, load_tensors(folder), manifest["tied"])
        return model.eval()


def _check_layer(weight: LayerWeight, with_input: bool) -> None:
    kind = weight.layer.float_type
    if kind not in (nn.Linear, nn.Embedding):
        raise ValueError(
            f"{weight.name}: {kind.__name__} layers have no torchao tensor here, Linear and Embedding layers have; leave it out of the "
            f"scheme (exclude=('type:{kind.__name__}',)), or use format='native'"
        )
    if weight.quantizer is None and with_input:
        raise ValueError(
            f"{weight.name}: its input is quantized and its weight is not, but torchao quantizes inputs of quantized weights only; train "
            "with a spec for its weight too, or export with drop=('input',)"
        )
    if with_input and weight.shape[1] == 1:
        raise ValueError(f"{weight.name}: torchao fails on quantized inputs of one feature; leave the layer out of the scheme")
    if "." not in weight.key:
        raise ValueError("model: a layer on its own has no name in a torchao file; put it into a module, such as nn.Sequential(layer)")
    if (dtype := getattr(weight.layer, weight.parameter).dtype) not in DTYPES:
        raise ValueError(f"{weight.name}: its weight is {dtype}, torchao's is float32, bfloat16 or float16; use model.float()")


def _check_float32(model: nn.Module) -> None:
    """In half precision torchao rounds scale, zero point and quotient of an input on the way, which no spec repeats."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if half := dtypes - {torch.float32}:
        raise ValueError(
            f"input: the model is {str(half.pop()).removeprefix('torch.')}, where torchao computes codes of inputs in that dtype, which no "
            "scheme trains; in float32 it is exact: export model.float(), or export with drop=('input',)"
        )


def _from_pretrained(folder: Path, kind: str) -> nn.Module:
    loaded: Any = transformers_class(kind).from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    wrong = {what: sorted(keys)[:3] for what, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"path: transformers cannot place every tensor of {str(folder)!r}: {wrong}")
    plain: nn.Module = model.eval()
    return plain


def _stored(loaded: nn.Module, weight: IntegerWeight) -> Stored:
    """What torchao's tensor holds: its zero points are zeros where there are none."""
    tensor: Any = loaded.get_parameter(weight.key)
    if not hasattr(tensor, "qdata"):
        raise RuntimeError(f"export: {weight.name} reads back as {type(tensor).__name__}, not as a tensor of torchao")
    zero_point: Tensor | None = tensor.zero_point
    if weight.zero_point is None and not bool(tensor.zero_point.any()):
        zero_point = None
    return Stored(tensor.qdata, tensor.scale.float(), zero_point)
