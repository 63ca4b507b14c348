"""What every quantized layer shares: where its quantizers hang, how its weight is seen as a matrix, and where values are kept.

A layer becomes quantized by changing its class in place (`nn.Linear` -> `QuantLinear`), so identity, names, tied weights, hooks and
references survive. A quantizer always sees the weight as a matrix [out, in]; a layer says how to view it so and back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_qat.modules.packed import PackedWeight, packed_weights
from lightning_qat.modules.shared_input import SharedInput
from lightning_qat.numerics.fake_quantize import straight_through
from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.specs import TensorSpec

Keeps = Literal["nothing", "without_grad", "always"]


class QuantLayer(nn.Module):
    """Mixin of quantized layers; subclasses also derive from the layer they replace.

    Attributes:
        weight_quantizer: Quantizer of the weight, its packed codes, or None.
        input_quantizer: Quantizer of the input, or None.
        shared_input: The group of siblings that read the same input (q/k/v, gate/up), or None.
        int8_forward: Whether the forward product may be computed on integer codes (:mod:`~lightning_qat.modules.int8`).
        keeps: When the quantized weight is kept for the next call (:mod:`~lightning_qat.modules.weight_cache`).
        weight_dtype: Dtype that weights are rounded to before they are quantized, None for their own. A strategy that gathers weights in
            bf16 trains the grid of the rounded weight, and so must everybody who has the fp32 one.
    """

    float_type: ClassVar[type[nn.Module]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)  # each has a quantizer under "<name>_quantizer"
    input_granularities: ClassVar[tuple[str, ...]] = ("token", "group", "tensor")

    weight: Tensor
    weight_quantizer: Quantizer | PackedWeight | None
    input_quantizer: Quantizer | None
    shared_input: SharedInput | None
    int8_forward: bool
    keeps: Keeps
    kept_weight: Any  # its values, or None
    weight_dtype: torch.dtype | None

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Why this very layer cannot be quantized, or None."""
        return None

    @classmethod
    def check_weight(cls, spec: TensorSpec) -> str | None:
        """Why this kind of layer cannot have a weight spec, or None."""
        if spec.granularity not in ("channel", "group", "tensor"):
            return f"weight.granularity: got {spec.granularity!r}, expected 'channel', 'group' or 'tensor'"
        return None

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix [out, in], a view."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix

    def matrix_shape(self, name: str = "weight") -> tuple[int, int]:
        """(out, in) of a weight seen as a matrix."""
        quantizer = getattr(self, f"{name}_quantizer")
        if isinstance(quantizer, PackedWeight):
            return quantizer.shape
        rows, columns = self.to_matrix(getattr(self, name)).shape
        return rows, columns

    def attach(self, weight: TensorSpec | None, input: TensorSpec | None) -> None:
        """Hang quantizers on a layer whose class was just changed."""
        for name in self.weight_names:
            setattr(self, f"{name}_quantizer", None if weight is None else build_quantizer(weight))
        self.input_quantizer = None if input is None else build_quantizer(input)
        self.shared_input, self.int8_forward, self.keeps, self.kept_weight, self.weight_dtype = None, False, "nothing", None, None

    def detach(self) -> None:
        """Become the original layer again."""
        quantizers = [f"{name}_quantizer" for name in self.weight_names]
        for name in (*quantizers, "input_quantizer", "shared_input", "int8_forward", "keeps", "kept_weight", "weight_dtype"):
            delattr(self, name)
        self.__class__ = self.float_type  # type: ignore[assignment]

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight on its grid, in its own shape; computed once where values are kept (:mod:`~lightning_qat.modules.weight_cache`).

        Args:
            dtype: What the product will be computed in, None for the weight's own.
        """
        quantizer = self.weight_quantizer
        if quantizer is None:
            return self.weight
        if isinstance(quantizer, Quantizer) and not quantizer.enabled:
            return quantizer.bypass(self.weight)
        trains = torch.is_grad_enabled() and self.stored_weight().requires_grad
        if self.keeps == "nothing" or (trains and not self._may_keep_in_training(quantizer)):
            return self._compute_weight(dtype)
        if self.kept_weight is None or self.kept_weight.dtype != (dtype or self.weight.dtype):
            with torch.inference_mode(False), torch.no_grad():
                self.kept_weight = self._compute_weight(dtype)
        values: Tensor = self.kept_weight
        return straight_through(self.weight, values) if trains else values

    def _may_keep_in_training(self, quantizer: nn.Module) -> bool:
        """In a compiled graph a kept value would be one more output, and repeated calls are merged anyway."""
        return self.keeps == "always" and not torch.compiler.is_compiling() and getattr(quantizer, "can_share", True)

    def _compute_weight(self, dtype: torch.dtype | None) -> Tensor:
        quantizer = self.weight_quantizer
        assert quantizer is not None
        if isinstance(quantizer, PackedWeight):
            return self.from_matrix(quantizer.dequantize().to(dtype or self.weight.dtype))
        weight = self.weight
        return self.from_matrix(quantizer(self.to_matrix(self.as_quantized(weight)), dtype or weight.dtype))

    def stored_weight(self) -> Tensor:
        """A parameter that stands for all behind the weight: it tells in which dtype they are at hand, and whether they train."""
        weight: Tensor = getattr(self, self.weight_names[0])
        return weight

    def as_quantized(self, weight: Tensor) -> Tensor:
        """A weight in the dtype that its quantizer is to see."""
        return weight if self.weight_dtype is None else weight.to(self.weight_dtype)

    def quantized_input(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The input on its grid, in `dtype`; siblings that were handed the same tensor compute it once."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return x
        if not quantizer.enabled or x.numel() == 0:
            return quantizer.bypass(x)
        if self.shared_input is None:
            return quantizer(x, dtype)
        return straight_through(x, self.shared_input.take(self, x, dtype, lambda: quantizer(x, dtype)))

    def train(self, mode: bool = True) -> "QuantLayer":
        """Changing the mode drops the kept weight: averaged weights may be swapped in between."""
        if mode != self.training:
            self.kept_weight = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantLayer":
        self.kept_weight = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.kept_weight = None
        super()._load_from_state_dict(*args, **kwargs)


def product_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes matrix products of `x` in, None where it leaves them alone."""
    kind = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if eligible and torch.is_autocast_enabled(kind) else None


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


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {}


def register_layer(float_type: type[nn.Module]) -> Callable[[type[QuantLayer]], type[QuantLayer]]:
    """Register the quantized class of one exact layer type."""

    def add(cls: type[QuantLayer]) -> type[QuantLayer]:
        cls.float_type = float_type
        LAYERS[float_type] = cls
        return cls

    return add
