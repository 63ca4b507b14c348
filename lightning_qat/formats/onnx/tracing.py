"""A quantized model as an ONNX graph: weights as integers behind DequantizeLinear, activations on the very formulas of training.

    weight            codes, scale [, zero_point] -> DequantizeLinear                                 (+ Add, where the zero point is a value)
    static input      [Clip ->] QuantizeLinear -> DequantizeLinear, uint8, constant scale             what integer kernels are built from
    any other input   Abs, ReduceMax, Div, Clip, Div, Round, Clip, Mul for symmetric ranges found on the way; else the formula of training
                      as torch.export sees it

For the time of the export, stand-ins take the places of the quantizers; the model is as it was afterwards.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Job
from lightning_qat.formats.codes import IntegerWeight
from lightning_qat.formats.executed import executing, first_tensor
from lightning_qat.formats.verification import weights_to_store
from lightning_qat.modules.layer import named_quantizers
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.numerics.ranges import AbsMax
from lightning_qat.quantizers import Quantizer

NAME = "name"  # what a node is to be called
MARK = "lightning_qat"  # domain of the nodes that tell what a quantizer read and made; they do not stay in the graph
OPSET, INT2_OPSET = 21, 25  # int4 and blocks of scales came with 21, int2 with 25
INT2_BITS = 2
SHIFT = 128  # between int8 codes and the uint8 ones of activations, for which runtimes have the most kernels


class StoredWeight(nn.Module):
    """Codes and scales of one weight, and the node that makes values of them, which is named like the weight.

    Args:
        weight: The weight.
        shape: Shape to store the codes in: that of the parameter, or [out, in].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: IntegerWeight, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name = weight.name
        self.group_size = weight.group_size if weight.scale.shape[1] > 1 else None
        self.adds = weight.has_float_zero
        self.register_buffer("codes", weight.codes.reshape(shape).contiguous())
        self.register_buffer("scale", self._shaped(weight.scale, weight))
        self.register_buffer("zero_point", None if weight.zero_point is None else self._shaped(weight.zero_point, weight))

    def _shaped(self, values: Tensor, weight: IntegerWeight) -> Tensor:
        """[out, groups] as DequantizeLinear takes it: a number for the whole tensor, [out], or as it is."""
        if weight.spec.granularity == "tensor":
            return values[0, 0].clone()
        return values if self.group_size is not None else values[:, 0].contiguous()

    def forward(self) -> Tensor:
        """The values, in the shape of the codes."""
        grouped = {} if self.group_size is None else {"block_size": self.group_size}
        attributes = {"axis": 0 if self.group_size is None else 1, **grouped} if self.scale.dim() else None
        inputs = [self.codes, self.scale]
        if self.zero_point is not None and not self.adds:
            inputs.append(self.zero_point)
        values = torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, attributes, dtype=self.scale.dtype, shape=self.codes.shape, metadata_props={NAME: self.name}
        )
        if not self.adds:
            return values
        assert self.zero_point is not None
        if self.group_size is None:
            return values + (self.zero_point.unsqueeze(-1) if self.zero_point.dim() else self.zero_point)
        return (values.unflatten(1, (-1, self.group_size)) + self.zero_point.unsqueeze(-1)).flatten(1)


class DynamicInput(nn.Module):
    """A quantizer that finds its range on the way.

    Its formula for max |x| is written shorter than in :mod:`~lightning_qat.numerics.ranges`, with the same bits: a row of zeros stays zeros
    under any scale, and rows whose largest value is within 2^-20 of the largest float are left out. All else is traced as it is.
    """

    enabled = True

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__()
        self.quantizer, self.name = quantizer, name

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values on the grid."""
        grid, blocking = self.quantizer.grid, self.quantizer.blocking
        if self.quantizer.finder != AbsMax() or grid.offset or grid.scale_dtype != "float32" or self.quantizer.learns:
            return _marked(x, self.quantizer(x, dtype), self.name)
        blocks = blocking.split(x)
        scale = (blocks.abs().amax(-1, keepdim=True) / grid.divisor).clamp(min=torch.finfo(x.dtype).tiny)
        steps = blocks / scale if grid.round_via == "divide" else blocks * (1.0 / scale)
        values = steps.round().clamp(grid.qmin, grid.qmax) * scale
        return _marked(x, blocking.join(values, x.shape), self.name)


class StaticInput(nn.Module):
    """A quantizer with one constant scale, as a pair of QuantizeLinear and DequantizeLinear.

    Args:
        quantizer: The quantizer.
        name: Its name in the model.
    """

    enabled = False  # layers hand a tensor to `bypass` as it is, without viewing it in blocks: one scale fits every shape
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__()
        self.name, grid = name, quantizer.grid
        scale, zero_point = constant_scale(quantizer)
        shift = 0 if grid.qmin == 0 else SHIFT
        self.clips = (grid.qmin + shift, grid.qmax + shift) != (0, 2 * SHIFT - 1)
        self.low, self.high = ((code - zero_point) * scale.cpu() for code in (grid.qmin, grid.qmax))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.tensor(zero_point + shift, dtype=torch.uint8, device=scale.device))

    def bypass(self, x: Tensor) -> Tensor:
        """Values on the grid; QuantizeLinear saturates at 0 and 255, a narrower range is cut off before."""
        inside = x.clamp(self.low.item(), self.high.item()) if self.clips else x
        scales = (self.scale, self.zero_point)
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (inside, *scales), dtype=torch.uint8, shape=x.shape)
        values = torch.onnx.ops.symbolic("DequantizeLinear", (codes, *scales), dtype=x.dtype, shape=x.shape)
        return _marked(x, values, self.name)


def _marked(x: Tensor, values: Tensor, name: str) -> Tensor:
    return torch.onnx.ops.symbolic(f"{MARK}::Quantized", (x, values), {"name": name}, dtype=values.dtype, shape=values.shape, version=1)


def constant_scale(quantizer: Quantizer) -> tuple[Tensor, int]:
    """Scale (a number) and zero point of a static quantizer."""
    device = next(iter([*quantizer.parameters(), *quantizer.buffers()]), torch.empty(0)).device
    found = quantizer.codes(torch.zeros(1, 1, device=device))
    return found.scale.float().reshape(()), 0 if found.zero_point is None else int(found.zero_point)


def is_quantize_linear(quantizer: Quantizer) -> bool:
    """Whether QuantizeLinear computes the codes of a quantizer: a constant scale, a true division, integer zero points."""
    grid = quantizer.grid
    if quantizer.spec.dynamic or grid.round_via != "divide" or grid.offset or grid.zero == "float":
        return False
    return bool(constant_scale(quantizer)[0] > 0)  # the grid of a tensor that was always 0 is no QuantizeLinear


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of inputs, keys and values that is switched on, by name."""
    weights = {id(weight.quantizer) for weight in layer_weights(model)}
    return {name: quantizer for name, quantizer in named_quantizers(model) if id(quantizer) not in weights and quantizer.enabled}


def stored_names(model: nn.Module) -> dict[str, str]:
    """For each quantized weight the module that holds its codes; weights that are tied and on the same grid share one."""
    holders: dict[Any, str] = {}
    names = {}
    for weight in layer_weights(model):
        if weight.quantizer is not None:
            parameter = getattr(weight.layer, weight.parameter)
            tied = (id(parameter), weight.quantizer.spec) if parameter.numel() else weight.key
            names[weight.name] = holders.setdefault(tied, f"{weight.key}_quantizer")
    return names


@contextmanager
def stand_ins(job: Job) -> Iterator[None]:
    """Inside the block the model is one that torch.onnx can export."""
    model = job.model
    stored: dict[str, StoredWeight] = {}
    names = stored_names(model)
    to_store = {weight.name: weight for weight in weights_to_store(job)}
    with ExitStack() as stack:
        stack.enter_context(executing(model, job.fit))
        for name, quantizer in activation_quantizers(model).items():
            stand_in = (StaticInput if is_quantize_linear(quantizer) else DynamicInput)(quantizer, name)
            stack.enter_context(_replaced(model, name, stand_in))
        for weight in list(layer_weights(model)):
            if weight.quantizer is None:
                continue
            name = names[weight.name]
            if name not in stored:
                stored[name] = _stored(to_store[weight.name], weight)
            stack.enter_context(_weight_from(weight, stored[name]))
        yield


def _stored(weight: IntegerWeight, place: LayerWeight) -> StoredWeight:
    """Kernels of convolutions in their own shape, which integer kernels of runtimes look for; all else as a matrix."""
    kernel = getattr(place.layer, place.parameter).shape
    as_matrix = weight.has_float_zero or weight.scale.shape[1] > 1 or len(kernel) <= 2
    return StoredWeight(weight, weight.codes.shape if as_matrix else kernel).to(getattr(place.layer, place.parameter).device)


@contextmanager
def _replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    owner, _, attribute = name.rpartition(".")
    parent = model.get_submodule(owner)
    before = getattr(parent, attribute)
    setattr(parent, attribute, module)
    try:
        yield
    finally:
        setattr(parent, attribute, before)


@contextmanager
def _weight_from(weight: LayerWeight, stored: StoredWeight) -> Iterator[None]:
    layer: Any = weight.layer
    name, before = f"{weight.parameter}_quantizer", weight.quantizer

    def values(dtype: torch.dtype | None = None) -> Tensor:
        return layer.from_matrix(stored()) if stored.codes.dim() == 2 else stored()

    setattr(layer, name, stored)
    layer.__dict__["quantized_weight"] = values
    try:
        yield
    finally:
        del layer.__dict__["quantized_weight"]
        setattr(layer, name, before)


class _Positional(nn.Module):
    """A model with its tensors as positional arguments and its logits (or first tensor) as the only result."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        if isinstance(model, PreTrainedModel) and model.can_generate():
            self.constants["use_cache"] = False

    def forward(self, *tensors: Tensor) -> Tensor:
        return first_tensor(self.model(**dict(zip(self.names, tensors, strict=True)), **self.constants))


def trace(job: Job, inputs: Mapping[str, Any], output: str, opset: int) -> Any:
    """The model as an `onnx_ir.Model`, with the first axis of inputs (and the second one of token ids) left open.

    Raises:
        ValueError: torch.onnx cannot export the model.
    """
    whole = _Positional(job.model, inputs)
    tensors = tuple(_two_samples(inputs)[name] for name in whole.names)
    training = [module for module in whole.modules() if module.training]
    whole.eval()
    try:
        with torch.no_grad(), stand_ins(job), _quiet():
            program = torch.onnx.export(
                whole, tensors, dynamo=True, opset_version=opset, input_names=whole.names, output_names=[output],
                custom_translation_table=_translations(), dynamic_shapes=(tuple(_open_axes(tensor, tensors[0]) for tensor in tensors),), verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"format 'onnx': torch.onnx cannot export {type(job.model).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True
    assert program is not None
    return program.model


def _translations() -> dict[Any, Any]:
    """Our own op, which rounds scales to fewer bits."""
    from onnxscript import opset18

    def cast(values: Any, dtype: int) -> Any:
        return opset18.Cast(values, to=dtype)

    return {torch.ops.lightning_qat.cast.default: cast}


def _two_samples(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """torch.export takes an axis of length 1 for a constant, so that a batch of one is doubled."""
    return {name: value.repeat(2, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value
            for name, value in inputs.items()}  # fmt: skip


def _open_axes(tensor: Tensor, first: Tensor) -> dict[int, str]:
    """Axes that may have any length."""
    axes = {0: "batch"} if tensor.dim() and len(tensor) == len(first) else {}
    return axes | ({1: "sequence"} if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1 else {})


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
