"""What takes the places of quantizers while a model is traced.

    weight            codes, scale [, zero_point] -> DequantizeLinear, and Add where the zero point is a value
    static input      [Clip ->] QuantizeLinear -> DequantizeLinear: uint8 and a constant scale, which integer kernels are made for
    any other input   Abs, ReduceMax, Div, Clip, Div, Round, Clip, Mul for symmetric ranges found on the way; else the formula of training
                      as torch.export sees it

The model is as it was afterwards.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.exactness.executed import executing
from lightning_qat.formats.verification import weights_to_store
from lightning_qat.modules.layer import named_quantizers
from lightning_qat.modules.linear import QuantConv1D, QuantLinear
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.numerics.ranges import AbsMax
from lightning_qat.quantizers import Quantizer

MARK = "lightning_qat"  # domain of nodes that tell what a quantizer reads and makes; they do not stay in the graph
NAME = "name"  # the metadata of a node that tell which weight it dequantizes
SHIFT = 128  # from int8 codes to the uint8 ones of activations, for which onnxruntime has the most kernels


class StoredWeight(nn.Module):
    """Codes and scales of one weight, and the node that makes values of them.

    Args:
        weight: The weight.
        shape: Shape to store the codes in, [out, in] or [out, in / groups, *kernel]; None for [in, out], which a product takes as it is.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: IntegerWeight, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.name, self.adds, self.is_turned = weight.name, weight.has_float_zero, shape is None
        self.group_size = weight.group_size if weight.scale.shape[1] > 1 else None
        self.register_buffer("codes", (weight.codes.t() if shape is None else weight.codes.reshape(shape)).contiguous())
        self.register_buffer("scale", self._shaped(weight.scale, weight))
        zero_point = None if weight.zero_point is None else self._shaped(weight.zero_point, weight)
        if zero_point is not None and self.adds and zero_point.dim():
            zero_point = zero_point.unsqueeze(-1)
        self.register_buffer("zero_point", zero_point)

    def _shaped(self, values: Tensor, weight: IntegerWeight) -> Tensor:
        """[out, groups] as DequantizeLinear takes it: a number for the whole tensor, [out], or as it is."""
        if weight.spec.granularity == "tensor":
            return values[0, 0].clone()
        if self.group_size is None:
            return values[:, 0].contiguous()
        return values.t().contiguous() if self.is_turned else values

    def forward(self) -> Tensor:
        """The values, in the shape of the codes."""
        axis = int(self.is_turned)  # of the rows; blocks lie along the other one
        attributes: dict[str, Any] = {"axis": axis} if self.group_size is None else {"axis": 1 - axis, "block_size": self.group_size}
        inputs = [self.codes, self.scale]
        if self.zero_point is not None and not self.adds:
            inputs.append(self.zero_point)
        values = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            inputs,
            attributes,
            dtype=self.scale.dtype,
            shape=self.codes.shape,
            metadata_props={NAME: self.name},
        )
        if not self.adds:
            return values
        assert self.zero_point is not None
        if self.group_size is None:
            return values + self.zero_point
        return (values.unflatten(1, (-1, self.group_size)) + self.zero_point).flatten(1)


class DynamicInput(nn.Module):
    """A quantizer that finds its range on the way.

    The formula for max |x| is written shorter than in :mod:`~lightning_qat.numerics.ranges`, with the same bits: a row of zeros gives zeros
    under any scale. Only rows whose largest value is within 2^-20 of the largest float differ. Other formulas are traced as they are.
    """

    enabled = True

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__()
        self.quantizer, self.name = quantizer, name

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values on the grid."""
        quantizer = self.quantizer
        grid, blocking = quantizer.grid, quantizer.blocking
        is_plain = quantizer.finder == AbsMax() and quantizer.running is None and not quantizer.learns
        if not is_plain or grid.offset or grid.scale_dtype != "float32":
            return _marked(x, quantizer(x, dtype), self.name)
        blocks = blocking.split(x)
        scale = (blocks.abs().amax(-1, keepdim=True) / grid.divisor).clamp(min=torch.finfo(x.dtype).tiny)
        steps = blocks / scale if grid.round_via == "divide" else blocks * (1.0 / scale)
        values = steps.round().clamp(grid.qmin, grid.qmax) * scale
        return _marked(x, blocking.join(values, x.shape), self.name)


class StaticInput(nn.Module):
    """A quantizer with one constant scale.

    Args:
        quantizer: The quantizer, one that QuantizeLinear computes.
        name: Its name in the model.
    """

    enabled = False  # so that layers hand their tensor to `bypass` as it is, not viewed in blocks: one scale fits every shape
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__()
        self.name, grid = name, quantizer.grid
        scale, zero_point = constant_scale(quantizer)
        shift = 0 if grid.qmin == 0 else SHIFT
        self.clips = (grid.qmin + shift, grid.qmax + shift) != (0, 2 * SHIFT - 1)
        self.low, self.high = (((code - zero_point) * scale).item() for code in (grid.qmin, grid.qmax))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.tensor(zero_point + shift, dtype=torch.uint8, device=scale.device))

    def bypass(self, x: Tensor) -> Tensor:
        """Values on the grid; QuantizeLinear saturates at 0 and 255, a narrower range is cut off before."""
        inside = x.clamp(self.low, self.high) if self.clips else x
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
    """Whether QuantizeLinear computes the codes of a quantizer: a constant scale, a true division, no value as a zero point."""
    grid = quantizer.grid
    if quantizer.spec.dynamic or grid.round_via != "divide" or grid.offset or grid.zero == "float":
        return False
    return bool(constant_scale(quantizer)[0] > 0)  # the grid of a tensor that was always 0 is none of QuantizeLinear's


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of inputs, keys and values that is switched on, by name."""
    weights = {id(weight.quantizer) for weight in layer_weights(model)}
    return {name: quantizer for name, quantizer in named_quantizers(model) if id(quantizer) not in weights and quantizer.enabled}


def stored_under(model: nn.Module) -> dict[str, str]:
    """For each quantized weight the name of that whose codes stand for it: its own, or where weights are tied that of the first."""
    firsts: dict[Any, str] = {}
    names = {}
    for weight in layer_weights(model):
        if weight.quantizer is not None:
            parameter = getattr(weight.layer, weight.parameter)
            tied = (id(parameter), weight.quantizer.spec) if parameter.numel() else weight.name
            names[weight.name] = firsts.setdefault(tied, weight.name)
    return names


@contextmanager
def stand_ins(job: Job) -> Iterator[None]:
    """Inside the block the model is one that torch.onnx can export; it is as it was afterwards."""
    model = job.model
    stored: dict[str, StoredWeight] = {}
    first, to_store = stored_under(model), {weight.name: weight for weight in weights_to_store(job)}
    with ExitStack() as stack:
        stack.enter_context(executing(model, job.fit))
        for name, quantizer in activation_quantizers(model).items():
            kind = StaticInput if is_quantize_linear(quantizer) else DynamicInput
            stack.enter_context(replaced(model, name, kind(quantizer, name)))
        for weight in list(layer_weights(model)):
            if weight.name in to_store:
                if first[weight.name] not in stored:
                    stored[first[weight.name]] = _stored(to_store[weight.name], weight)
                stack.enter_context(_weight_from(weight, stored[first[weight.name]]))
        yield


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Inside the block another module stands under a name."""
    owner, _, attribute = name.rpartition(".")
    parent = model.get_submodule(owner)
    before = getattr(parent, attribute)
    setattr(parent, attribute, module)
    try:
        yield
    finally:
        setattr(parent, attribute, before)


def _stored(weight: IntegerWeight, place: LayerWeight) -> StoredWeight:
    """As integer kernels of onnxruntime look for them: convolutions in their own shape, factors of products turned; all else a matrix."""
    parameter, layer = getattr(place.layer, place.parameter), place.layer
    if isinstance(layer, QuantLinear | QuantConv1D) and not weight.has_float_zero:
        shape = None
    else:
        is_kernel = parameter.dim() > 2 and weight.scale.shape[1] == 1 and not weight.has_float_zero
        shape = parameter.shape if is_kernel else weight.codes.shape
    return StoredWeight(weight, shape).to(parameter.device)


@contextmanager
def _weight_from(weight: LayerWeight, stored: StoredWeight) -> Iterator[None]:
    layer: Any = weight.layer
    name, before = f"{weight.parameter}_quantizer", weight.quantizer

    def values(dtype: torch.dtype | None = None) -> Tensor:
        matrix = stored().t() if stored.is_turned else stored()
        return layer.from_matrix(matrix) if matrix.dim() == 2 else matrix

    def product(x: Tensor) -> Tensor:
        y = layer.quantized_input(x) @ stored()
        return y if layer.bias is None else y + layer.bias

    setattr(layer, name, stored)
    is_product = isinstance(layer, QuantLinear | QuantConv1D) and stored.is_turned
    methods = {"quantized_weight": values} | ({"forward": product} if is_product else {})
    vars(layer).update(methods)
    try:
        yield
    finally:
        for method in methods:
            del vars(layer)[method]
        setattr(layer, name, before)
