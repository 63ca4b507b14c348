"""Our codes as tensors of torchao, and torchao's own words for them."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.verification import weights_to_store
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.numerics.ranges import SCALE_DTYPES


def quantized_tensors(job: Job) -> dict[str, Tensor]:
    """The `IntxUnpackedToInt8Tensor` of each quantized weight, by its name in the state dict; tied weights share one."""
    places = {weight.key: weight for weight in layer_weights(job.model)}
    with_inputs = {id(_parameter(place)) for place in places.values() if quantizes_input(place, job)}
    tensors: dict[str, Tensor] = {}
    built: dict[int, Tensor] = {}
    for weight in weights_to_store(job):
        parameter = _parameter(places[weight.key])
        if id(parameter) not in built:
            built[id(parameter)] = _build(weight, parameter.dtype, id(parameter) in with_inputs)
        tensors[weight.key] = built[id(parameter)]
    return tensors


def quantizes_input(weight: LayerWeight, job: Job) -> bool:
    """Whether the input of a layer stays quantized in this export."""
    return weight.layer.input_quantizer is not None and "input" not in job.fit.dropped


def _parameter(weight: LayerWeight) -> Tensor:
    parameter: Tensor = getattr(weight.layer, weight.parameter)
    return parameter


def _build(weight: IntegerWeight, dtype: torch.dtype, with_input: bool) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    zero_point = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        qdata=weight.codes.contiguous(),
        scale=_as_small_as_exact(weight),
        zero_point=zero_point,
        target_dtype=getattr(torch, f"int{weight.bits}"),
        block_size=(1, weight.group_size),
        dtype=dtype,
        activation_quantization="int8_asym_per_token" if with_input else None,
    )
    return tensor


def _as_small_as_exact(weight: IntegerWeight) -> Tensor:
    """Scales in the dtype of the scheme; halved ones of half-integer grids may not be numbers of it."""
    small = weight.scale.to(SCALE_DTYPES[weight.spec.scale_dtype])
    return small if torch.equal(small.float(), weight.scale) else weight.scale


def transformers_config(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The `quantization_config` that describes tensors; transformers only reads it, the tensors themselves lie in the file."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    layers = {name.rpartition(".")[0]: _description(tensor) for name, tensor in tensors.items()}
    first = next(iter(layers.values()))
    uniform = all(description == first for description in layers.values())
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    config: dict[str, Any] = TorchAoConfig(
        first if uniform else FqnToConfig(OrderedDict(layers)),
        modules_to_not_convert=[name for name, module in kinds.items() if isinstance(module, nn.Linear) and name not in layers],
        include_input_output_embeddings=any(isinstance(kinds[name], nn.Embedding) for name in layers),
    ).to_dict()
    return config


def _description(tensor: Any) -> Any:
    """The config of torchao that stands for such a tensor."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    columns = tensor.block_size[1]
    granularity = PerAxis(0) if columns == tensor.shape[1] else PerGroup(columns)
    mapping = MappingType.ASYMMETRIC if bool(tensor.zero_point.any()) else MappingType.SYMMETRIC
    if tensor.activation_quantization is None:
        return IntxWeightOnlyConfig(tensor.target_dtype, granularity, mapping, tensor.scale.dtype)
    return Int8DynamicActivationIntxWeightConfig(tensor.target_dtype, granularity, mapping, tensor.scale.dtype)
