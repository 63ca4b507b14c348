"""The format itself: what is refused, written, compared and loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.folder.company import save_company
from lightning_qat.formats.onnx.checking import verify_file
from lightning_qat.formats.onnx.graph import FILE, code_dtype, finish, opset_of, save
from lightning_qat.formats.onnx.session import DISABLED, SETTINGS, OnnxModel
from lightning_qat.formats.onnx.stand_ins import activation_quantizers, stored_under
from lightning_qat.formats.onnx.tracing import trace
from lightning_qat.formats.verification import weights_to_store
from lightning_qat.modules.experts import QuantExperts
from lightning_qat.modules.layer import quant_layers
from lightning_qat.runtime import Runtime, rule, runtimes
from lightning_qat.scheme import PRESETS, QuantScheme
from lightning_qat.specs import TensorSpec

EXECUTES = runtimes.add(
    "onnx",
    Runtime(
        weight=(rule(granularity=("channel", "group", "tensor"), axis=(None, 0)),),
        input=(
            rule(dynamic=(True,), quantizer=("minmax",), range_finder=("absmax",), arithmetic=("float32",), scale_rounding=("before",)),
            rule(dynamic=(False,), arithmetic=("float32",), scale_rounding=("before",)),
        ),
        kv=(rule(quantizer=("minmax",), arithmetic=("float32",), scale_rounding=("before",)),),
    ),
)
# One range for a whole tensor, with a zero point: the codes are 0 to 255, which is where QuantizeLinear saturates, so that nothing stands
# between it and the integer kernels of onnxruntime.
PRESETS.add(
    "onnx-w8a8",
    QuantScheme(
        weight=TensorSpec(bits=8),
        input=TensorSpec(bits=8, granularity="tensor", dynamic=False, symmetric=False),
    ),
)


@formats.register("onnx")
class OnnxFormat(Format):
    """Writes `model.onnx`, and `model.onnx.data` beside it where weights are large."""

    name = "onnx"
    runtime = EXECUTES
    packages = ("onnx", "onnxscript", "onnxruntime")
    transformers_first = True
    traces = True
    library = "onnx"

    def usage(self, job: Job) -> str:
        """With onnxruntime alone, in its exact settings."""
        settings = "".join(f'options.add_session_config_entry("{key}", "{value}")\n' for key, value in SETTINGS.items())
        return (
            f"import onnxruntime\n\noptions = onnxruntime.SessionOptions()\n{settings}"
            f'session = onnxruntime.InferenceSession("folder/{FILE}", options, disabled_optimizers={list(DISABLED)})\n'
            "print([(value.name, value.shape) for value in session.get_inputs()])  # then session.run(None, {name: numpy array})"
        )

    def check(self, job: Job) -> None:
        """No example to run the model with, other dtypes than float32, experts, and ranges that no graph finds."""
        if job.example is None or not any(isinstance(value, Tensor) for value in job.example.values()):
            raise ValueError(
                f"example_inputs: the graph is traced, and nothing is known to run {type(job.model).__name__} with; pass "
                "export(..., example_inputs=<tensor, tuple or keyword arguments of its forward>), or set example_input_array"
            )
        dtypes = {tensor.dtype for tensor in job.model.parameters() if tensor.is_floating_point()}
        if other := sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32}):
            raise ValueError(
                f"model: its parameters are {', '.join(other)}, and onnxruntime's kernels for CPUs compute in float32; export "
                "model.float(), which has the same codes and scales"
            )
        for name, layer in quant_layers(job.model):
            if isinstance(layer, QuantExperts):
                raise ValueError(f"{name}: which experts run depends on the input, which a traced graph cannot say; use format='native'")
        for name, quantizer in activation_quantizers(job.model).items():
            running = quantizer.running
            if running is not None and "input" not in job.fit.dropped and not bool(running.batches > 0):
                raise ValueError(f"{name}: its static range has not seen a batch; train for a step, or leave it out of the scheme")

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """The graph with the settings under which onnxruntime computes what was trained; the manifest gets opset and axes."""
        weights = weights_to_store(job)
        model = trace(job, opset_of(weights))
        first = stored_under(job.model)
        dtypes = {first[weight.name]: code_dtype(weight) for weight in weights}
        exact = {"session_config": SETTINGS, "disabled_optimizers": list(DISABLED)}
        finish(model, dtypes, {"lightning_qat.exact_onnxruntime": json.dumps(exact)})
        save(model, folder)
        save_company(job.model, job.tokenizer, folder)
        inputs = {value.name: [str(length) for length in value.shape] for value in model.graph.inputs}
        return {"opset": model.opset_imports[""], "ir_version": model.ir_version, "inputs": inputs, "onnxruntime": exact}

    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """See :mod:`~lightning_qat.formats.onnx.checking`."""
        return verify_file(job, folder)

    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """The model in onnxruntime, called like the model that was exported."""
        if model is not None:
            raise ValueError("model: an ONNX file holds its graph; leave model= out")
        is_transformers = manifest["model"]["library"] == "transformers"
        return OnnxModel(folder / FILE, AutoConfig.from_pretrained(folder) if is_transformers else None)
