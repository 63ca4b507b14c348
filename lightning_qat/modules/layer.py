"""What every quantized layer shares: where its quantizers hang, how its weight is seen as a matrix, and the two caches.

A layer becomes quantized by changing its class in place (`nn.Linear` -> `QuantLinear`), so identity, names, tied weights, hooks and
references survive. A quantizer always sees the weight as a matrix [out, in]; a layer says how to view it so and back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_qat.modules.packed import PackedWeight, packed_weights
from lightning_qat.modules.shared_input import SharedInput
from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.specs import TensorSpec


class QuantLayer(nn.Module):
    """Mixin of quantized layers; subclasses also derive from the layer they replace.

    Attributes:
        weight_quantizer: Quantizer of the weight, its packed codes, or None.
        input_quantizer: Quantizer of the input, or None.
        shared_input: The group of siblings that read the same input (q/k/v, gate/up), or None.
    """

    float_type: ClassVar[type[nn.Module]]
    input_granularities: ClassVar[tuple[str, ...]] = ("token", "group", "tensor")

    weight: Tensor
    weight_quantizer: Quantizer | PackedWeight | None
    input_quantizer: Quantizer | None
    shared_input: SharedInput | None
    keep_quantized_weight: bool
    kept_weight: Tensor | None

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Why this very layer cannot be quantized, or None."""
        return None

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix [out, in], a view."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight seen as a matrix."""
        if isinstance(self.weight_quantizer, PackedWeight):
            return self.weight_quantizer.shape
        rows, columns = self.to_matrix(self.weight).shape
        return rows, columns

    def attach(self, weight: TensorSpec | None, input: TensorSpec | None) -> None:
        """Hang quantizers on a layer whose class was just changed."""
        self.weight_quantizer = None if weight is None else build_quantizer(weight)
        self.input_quantizer = None if input is None else build_quantizer(input)
        self.shared_input, self.keep_quantized_weight, self.kept_weight = None, False, None

    def detach(self) -> None:
        """Become the original layer again."""
        for name in ("weight_quantizer", "input_quantizer", "shared_input", "keep_quantized_weight", "kept_weight"):
            delattr(self, name)
        self.__class__ = self.float_type  # type: ignore[assignment]

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, in its own shape; computed once inside :func:`cached_weights`."""
        quantizer = self.weight_quantizer
        if quantizer is None or (isinstance(quantizer, Quantizer) and not quantizer.enabled):
            return self.weight
        if not self.keep_quantized_weight or torch.is_grad_enabled():
            return self._compute_weight()
        if self.kept_weight is None:
            self.kept_weight = self._compute_weight()
        return self.kept_weight

    def _compute_weight(self) -> Tensor:
        quantizer = self.weight_quantizer
        assert quantizer is not None
        if isinstance(quantizer, PackedWeight):
            return self.from_matrix(quantizer.dequantize().to(self.weight.dtype))
        return self.from_matrix(quantizer(self.to_matrix(self.weight)))

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on its grid; siblings that were handed the same tensor compute it once."""
        if self.input_quantizer is None or not self.input_quantizer.enabled:
            return x
        if self.shared_input is not None:
            return self.shared_input.quantize(self.input_quantizer, x)
        return self.input_quantizer(x)


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every quantized layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer))


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every quantizer in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


@contextmanager
def quantizers_disabled(model: nn.Module) -> Iterator[None]:
    """Run the model in full precision inside the block; weights stay as trained.

    Raises:
        ValueError: The model was loaded from packed codes and has no float weights.
    """
    if packed := packed_weights(model):
        raise ValueError(f"quantizers_disabled: {packed[0]} holds packed codes, there is no full precision to run in")
    before = [(quantizer, quantizer.enabled) for _, quantizer in named_quantizers(model)]
    try:
        for quantizer, _ in before:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once inside the block; for evaluation and generation, where no weight changes.

    Bound to a block of code and not to "has it changed": fused optimizers, sharded parameters and writes through ``.data`` change
    weights without a trace. Calls with gradients enabled never read the cache.
    """
    layers = [layer for _, layer in quant_layers(model)]
    try:
        for layer in layers:
            layer.keep_quantized_weight = True
        yield
    finally:
        for layer in layers:
            layer.keep_quantized_weight, layer.kept_weight = False, None


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {}


def register_layer(float_type: type[nn.Module]) -> Callable[[type[QuantLayer]], type[QuantLayer]]:
    """Register the quantized class of one exact layer type."""

    def add(cls: type[QuantLayer]) -> type[QuantLayer]:
        cls.float_type = float_type
        LAYERS[float_type] = cls
        return cls

    return add
