"""The weights of quantized layers one by one: what is counted and written does not depend on how many a layer has."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_qat.modules.layer import QuantLayer, quant_layers
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.numerics.grid import QuantizedTensor
from lightning_qat.quantizers import Quantizer

WEIGHT_DTYPES = "quantization_weight_dtypes"  # where a checkpoint keeps what :func:`weight_dtypes` returns


class LayerWeight(NamedTuple):
    """One weight of a quantized layer, whether it is quantized or not.

    Attributes:
        layer_name: Dotted name of its layer.
        layer: The layer.
        parameter: Name of the parameter in the layer; its quantizer is ``<parameter>_quantizer``.
    """

    layer_name: str
    layer: QuantLayer
    parameter: str

    @property
    def key(self) -> str:
        """Its name in a state dict."""
        return f"{self.layer_name}.{self.parameter}".lstrip(".")

    @property
    def name(self) -> str:
        """Its name in exported files: that of its layer where the layer has one weight."""
        return self.layer_name if self.parameter == "weight" else self.key

    @property
    def quantizer(self) -> Quantizer | PackedWeight | None:
        """Its quantizer, its packed codes, or None."""
        quantizer: Quantizer | PackedWeight | None = getattr(self.layer, f"{self.parameter}_quantizer")
        return quantizer

    def codes(self) -> QuantizedTensor:
        """The integer codes of a fake-quantized weight, exactly those of the last forward pass; where it is sharded, every rank must ask.

        Raises:
            ValueError: There is no fake quantizer, or the weight holds NaN or inf.
        """
        if not isinstance(self.quantizer, Quantizer):
            raise ValueError(f"{self.name}: has no fake quantizer")
        weight = self.layer.as_quantized(full_weight(getattr(self.layer, self.parameter)))
        return self.quantizer.codes(self.layer.to_matrix(weight))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight seen as a matrix."""
        return self.layer.matrix_shape(self.parameter)


def full_weight(weight: Tensor) -> Tensor:
    """A weight as one tensor; of a sharded one (FSDP2) every rank gets a copy of all of it, and every rank must ask."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def layer_weights(model: nn.Module) -> Iterator[LayerWeight]:
    """Every weight of every quantized layer."""
    return (LayerWeight(name, layer, parameter) for name, layer in quant_layers(model) for parameter in layer.weight_names)


def weight_dtypes(model: nn.Module) -> dict[str, str]:
    """The dtypes that weights are rounded to before they are quantized, by name of the layer; of the others nothing."""
    layers = quant_layers(model)
    return {name: str(layer.weight_dtype).removeprefix("torch.") for name, layer in layers if layer.weight_dtype is not None}


def set_weight_dtypes(model: nn.Module, dtypes: dict[str, str]) -> None:
    """The inverse of :func:`weight_dtypes`; layers that are not named keep theirs."""
    for name, layer in quant_layers(model):
        if name in dtypes:
            layer.weight_dtype = getattr(torch, dtypes[name])


def stands_for_codes(model: nn.Module) -> Callable[[str], bool]:
    """Whether codes stand for a name in the state dict: a quantized weight, or what its quantizer holds."""
    keys = {weight.key for weight in layer_weights(model) if weight.quantizer is not None}
    inside = tuple(f"{key}_quantizer." for key in keys)
    return lambda name: name in keys or name.startswith(inside)
