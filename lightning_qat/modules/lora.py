"""LoRA adapters of PEFT (arXiv 2106.09685) under quantizers: y = fq(x) fq(W + scaling * B A)^T + b.

The sum is what is quantized, so the integers that were trained are those of the merged weight. PEFT puts a layer of its own in the place of
`nn.Linear`, with the plain layer and the thin matrices inside; that layer changes its class like any other, and its parts stay as they are.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_qat.modules.layer import QuantLayer, product_dtype, register_layer
from lightning_qat.modules.linear import QuantLinear
from lightning_qat.modules.weights import full_weight
from lightning_qat.numerics.low_rank import add_low_rank

HOME, PLAIN = "peft.tuners.lora.layer", "Linear"
NAME = "QuantLoraLinear"


class QuantLora(QuantLayer):
    """A quantized linear layer whose weight is W + scaling * B A; x [..., in], W [out, in], A [rank, in], B [out, rank]."""

    base_layer: nn.Linear
    lora_A: nn.ModuleDict  # noqa: N815  PEFT's names
    lora_B: nn.ModuleDict  # noqa: N815
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight with its active adapters, at least fp32, [out, in]; computed at every call."""
        return sum_of(self, self.weight_dtype)

    def stored_weight(self) -> Tensor:
        """See :meth:`QuantLayer.stored_weight`: the adapter trains, and W stands still."""
        parts = [matrix for _, *matrices in _active(self) for matrix in matrices]
        return next((part for part in (*parts, self.base_layer.weight) if part.requires_grad), self.base_layer.weight)

    def as_quantized(self, weight: Tensor) -> Tensor:
        """The sum itself: `weight_dtype` is that of its parts."""
        return weight

    def matrix_shape(self, name: str = "weight") -> tuple[int, int]:
        """See :meth:`QuantLayer.matrix_shape`."""
        rows, columns = self.base_layer.weight.shape
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., in] -> [..., out]."""
        dtype = product_dtype(x)
        weight = self.quantized_weight(dtype or x.dtype)  # the sum may be wider than what is computed with
        return functional.linear(self.quantized_input(x, dtype), weight.to(dtype or x.dtype), self.bias)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT would leave a plain layer behind, and the quantizers with the old one."""
        raise ValueError("merge: this layer holds quantizers; call lightning_qat.merge_lora(model), which keeps them")


def lora_class(float_type: type[nn.Module]) -> type[QuantLayer] | None:
    """The quantized class of PEFT's linear layer, registered; None for any other type.

    It is made when first asked for, here or by pickle (:func:`__getattr__`): importing PEFT takes seconds, and it need not be there.
    """
    if (float_type.__module__, float_type.__name__) != (HOME, PLAIN):
        return None
    about = {"__module__": __name__, "__qualname__": NAME, "__doc__": "Quantized linear layer with a LoRA adapter."}
    return globals().setdefault(NAME, register_layer(float_type)(type(NAME, (QuantLora, float_type), about)))


def __getattr__(name: str) -> Any:
    if name != NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from peft.tuners.lora.layer import Linear

    return lora_class(Linear)


def _active(layer: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(name, A, B) of the adapters that take part in the forward pass."""
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    return [(name, layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]


def sum_of(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """W + scaling * B A of a layer with adapters, at least fp32.

    Args:
        layer: PEFT's linear layer, quantized or not.
        dtype: Dtype that a strategy hands the three matrices out in, None for their own.

    Returns:
        Shape [out, in]; of a sharded layer all of it, and every rank must ask.
    """

    def part(matrix: Tensor) -> Tensor:
        return full_weight(matrix) if dtype is None else full_weight(matrix).to(dtype)

    weight = part(layer.base_layer.weight)
    for name, a, b in _active(layer):
        weight = add_low_rank(weight, part(a), part(b), float(layer.scaling[name]))
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that PEFT put into a model."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or other is None:  # then there are none
        return
    kinds = (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that cannot become a part of the weight they belong to.

    Raises:
        ValueError: Names the first such layer, why, and the way out.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name)
    for name, layer in adapted_layers(model):
        if (reason := _why_not(layer)) is not None:
            raise ValueError(f"{name}: {reason}")
        if others := [holder for holder in holders[id(layer.base_layer.weight)] if holder != f"{name}.base_layer"]:
            raise ValueError(
                f"{name}: has an adapter, but shares its weight with {others[0]}; leave it out of the adapter's target modules"
            )


def _why_not(layer: Any) -> str | None:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if not isinstance(layer, QuantLora) and kind != f"{HOME}.{PLAIN}":
        return f"adapters of type {kind} cannot be quantized; adapt nn.Linear layers with LoRA, and no others (target_modules)"
    if isinstance(layer.base_layer, QuantLayer):
        return (
            "its adapter was put on top of quantizers and would stay outside of them; add adapters first, then quantizers "
            "(here: remove_quantizers(model), then insert_quantizers again)"
        )
    if type(layer.base_layer) is not nn.Linear:
        return f"has an adapter on a {type(layer.base_layer).__name__}, allowed is nn.Linear; leave it out of target_modules"
    if layer.lora_variant:
        return (
            f"its adapter is a {type(next(iter(layer.lora_variant.values()))).__name__}, allowed is plain LoRA (use_dora=False and so on)"
        )
    if dropped := [dropout.p for dropout in layer.lora_dropout.values() if getattr(dropout, "p", 0) > 0]:
        return f"lora_dropout: got {dropped[0]}, allowed is 0: W + BA has no branch of its own to drop inputs of"
    if any(layer.lora_bias.values()):
        return "lora_bias: got True, allowed is False; train the layer's own bias instead (bias='lora_only')"
    if layer.merged:
        return "its adapter is merged already; call unmerge first"
    return None


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Put W + scaling * B A in the place of every layer with a LoRA adapter, in place.

    Quantized layers stay quantized, and their codes are exactly those of the last forward pass. Merged weights are at least fp32,
    whatever the dtype of W: rounding the sum would move codes. A model that held bf16 weights needs ``model.float()`` to run outside
    autocast. Adapters that are not active are dropped. Where matrix products depend on the device (or the number of CPU threads) by a last
    bit, so does the sum: merge where you trained.

    Args:
        model: A module with LoRA layers of PEFT, not sharded.

    Returns:
        The same model: layers have their names from before PEFT.

    Raises:
        ValueError: There is no adapter, it is switched off, the model is sharded, or an adapter cannot be merged.
    """
    found = list(adapted_layers(model))
    if not found:
        raise ValueError(f"merge_lora: {type(model).__name__} holds no LoRA adapter")
    check_adapters(model)
    for name, layer in found:
        if not _active(layer):
            raise ValueError(f"merge_lora: the adapters of {name} are switched off; enable one, or its training would be lost")
        if isinstance(layer.base_layer.weight, DTensor):
            raise ValueError(f"merge_lora: {name} is sharded; load its checkpoint into a model of one process and merge there")
    for name, layer in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _merged(layer))
    for module in model.modules():
        if not type(module).__module__.startswith("peft."):
            vars(module).pop("peft_config", None)
    return model


def _merged(layer: Any) -> nn.Linear:
    plain: nn.Linear = layer.base_layer
    weight = sum_of(layer, getattr(layer, "weight_dtype", None))
    plain.weight = nn.Parameter(weight, requires_grad=plain.weight.requires_grad)
    if isinstance(layer, QuantLora):
        plain.__class__ = QuantLinear
        assert isinstance(plain, QuantLinear)
        plain.attach(None, None)
        plain.weight_quantizer, plain.input_quantizer, plain.shared_input = (
            layer.weight_quantizer,
            layer.input_quantizer,
            layer.shared_input,
        )
    return plain.train(layer.training)
