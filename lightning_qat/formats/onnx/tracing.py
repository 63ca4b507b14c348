"""From a quantized model to the graph of its forward pass."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Job
from lightning_qat.formats.onnx.stand_ins import stand_ins

FLOAT = 1  # float32, as ONNX numbers dtypes


def graph_inputs(job: Job) -> dict[str, Any]:
    """The example, with a mask where a language model takes one: a graph without it could not be given padded batches."""
    assert job.example is not None
    inputs = dict(job.example)
    takes_mask = isinstance(job.model, PreTrainedModel) and "attention_mask" in inspect.signature(job.model.forward).parameters
    if takes_mask and "input_ids" in inputs:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def named_outputs(result: Any) -> dict[str, Tensor]:
    """The tensors that a model returns, by the names it gives them; what is nested deeper is left out."""
    if isinstance(result, Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else ((f"output_{i}", value) for i, value in enumerate(result))
    return {name: value for name, value in items if isinstance(value, Tensor)}


class _Positional(nn.Module):
    """A model with its tensors as positional arguments and results."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        if isinstance(model, PreTrainedModel) and model.can_generate():
            self.constants["use_cache"] = False

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The results by name."""
        return named_outputs(self.model(**dict(zip(self.names, tensors, strict=True)), **self.constants))


@contextmanager
def in_eval_mode(job: Job) -> Iterator[tuple[_Positional, tuple[Tensor, ...]]]:
    """The model behind positional arguments, and the example; without gradients, and in the modes it had afterwards."""
    inputs = graph_inputs(job)
    whole = _Positional(job.model, inputs)
    device = next(iter([*whole.parameters(), *whole.buffers()]), torch.empty(0)).device
    training = [module for module in job.model.modules() if module.training]
    whole.eval()
    try:
        with torch.no_grad():
            yield whole, tuple(inputs[name].to(device) for name in whole.names)
    finally:
        for module in training:
            module.training = True


def outputs_by_name(job: Job) -> dict[str, Tensor]:
    """What the model computes from the example, on the CPU."""
    with in_eval_mode(job) as (whole, tensors):
        return {name: value.cpu() for name, value in whole(*tensors).items()}


def trace(job: Job, opset: int) -> Any:
    """The forward pass as an `onnx_ir.Model`; the first axis of inputs and the second one of token ids may have any length.

    Raises:
        ValueError: torch.onnx cannot export the model.
    """
    names = list(outputs_by_name(job))
    with in_eval_mode(job) as (whole, tensors), stand_ins(job), _quiet():
        tensors = tuple(_two_samples(tensor) for tensor in tensors)
        try:
            program = torch.onnx.export(
                whole,
                tensors,
                dynamo=True,
                opset_version=opset,
                input_names=whole.names,
                output_names=names,
                dynamic_shapes=(tuple(_open_axes(tensor, tensors[0]) for tensor in tensors),),
                custom_translation_table=_translations(),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"format: torch.onnx cannot trace {type(job.model).__name__}, in a graph that fits every batch: {reason}"
            ) from error
    assert program is not None
    return program.model


def _translations() -> dict[Any, Any]:
    """Our own op, which rounds scales to fewer bits."""
    import onnxscript

    cast: Any = onnxscript.opset18.Cast

    def rounded(values: Any, dtype: int) -> Any:
        return cast(cast(values, to=dtype), to=FLOAT)

    return {torch.ops.lightning_qat.rounded.default: rounded}


def _two_samples(tensor: Tensor) -> Tensor:
    """torch.export takes an axis of length 1 for a constant, so that a batch of one is doubled."""
    return tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() and len(tensor) == 1 else tensor


def _open_axes(tensor: Tensor, first: Tensor) -> dict[int, str]:
    """Axes that may have any length."""
    axes = {0: "batch"} if tensor.dim() and first.dim() and len(tensor) == len(first) else {}
    is_ids = tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1
    return axes | ({1: "sequence"} if is_ids else {})


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch.onnx says about packages that are not installed and about its own use of torch is nothing a user can change."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used.*", category=UserWarning)  # two inputs share an axis
            yield
    finally:
        logger.setLevel(level)
