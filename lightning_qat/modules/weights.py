"""The weights of quantized layers one by one: what is counted and written does not depend on how many a layer has."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from lightning_qat.modules.layer import QuantLayer, quant_layers
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.quantizers import Quantizer


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

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight seen as a matrix."""
        return self.layer.matrix_shape(self.parameter)


def layer_weights(model: nn.Module) -> Iterator[LayerWeight]:
    """Every weight of every quantized layer."""
    return (LayerWeight(name, layer, parameter) for name, layer in quant_layers(model) for parameter in layer.weight_names)


def stands_for_codes(model: nn.Module) -> Callable[[str], bool]:
    """Whether codes stand for a name in the state dict: a quantized weight, or what its quantizer holds."""
    keys = {weight.key for weight in layer_weights(model) if weight.quantizer is not None}
    inside = tuple(f"{key}_quantizer." for key in keys)
    return lambda name: name in keys or name.startswith(inside)
