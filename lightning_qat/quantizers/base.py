"""What every quantizer is: a module that turns a tensor into a scale, and through it into codes or fake-quantized values."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_qat.numerics.fake_quantize import fake_quantize_with, quantize_with
from lightning_qat.numerics.grid import Grid, QuantizedTensor, as_blocks
from lightning_qat.numerics.ranges import compute_dtype
from lightning_qat.registry import Registry, did_you_mean
from lightning_qat.specs import TensorSpec


class Quantizer(nn.Module, ABC):
    """Base class of quantizers.

    A subclass says which grid its bits mean and how a block of values gets its scale. It is stateless unless it learns something:
    then its parameters are created here with their final shapes, fp32 and at least 1-d.

    Args:
        spec: What to do; its `options` must be fields of the subclass's `Options`.

    Raises:
        ValueError: Bits or options that this quantizer does not know.
    """

    Options: ClassVar[type | None] = None

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.options = self._read_options(spec)
        self.grid = self.build_grid(spec)
        self.enabled = True

    @classmethod
    def _read_options(cls, spec: TensorSpec) -> Any:
        given = dict(spec.options or {})
        known = [] if cls.Options is None else list(getattr(cls.Options, "__dataclass_fields__"))  # noqa: B009  dataclasses.fields does not trace
        for key in given:
            if key not in known:
                raise ValueError(f"TensorSpec.options of quantizer {spec.quantizer!r}: unknown key {key!r}, {did_you_mean(key, known)}")
        return None if cls.Options is None else cls.Options(**given)

    @staticmethod
    @abstractmethod
    def build_grid(spec: TensorSpec) -> Grid:
        """The code grid of a spec; a ValueError names what it cannot be."""

    @abstractmethod
    def scale_and_zero_point(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each block, shape [..., n] -> [..., 1], in at least fp32."""

    @property
    def clip(self) -> float | None:
        """Bound of the gradient mask; None is the identity straight-through estimator."""
        return None

    @property
    def can_share(self) -> bool:
        """Whether siblings may take the values of one call: nothing learned, and the identity estimator."""
        return self.clip is None and next(self.parameters(), None) is None

    def _blocking(self, x: Tensor) -> tuple[Tensor, int | None, bool]:
        whole = self.spec.granularity == "tensor"
        return as_blocks(x, self.spec.group_size, whole), self.spec.group_size, whole

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize: values on the grid, shape and dtype of `x`; `x` itself while disabled or empty."""
        if not self.enabled or x.numel() == 0:
            return x
        with torch.no_grad():
            blocks, group_size, whole = self._blocking(x)
            scale, zero_point = self.scale_and_zero_point(blocks)
        return fake_quantize_with(x, scale, zero_point, self.grid, group_size, whole, self.clip)

    def codes(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of which :meth:`forward` returns the values.

        Raises:
            ValueError: `x` holds NaN or inf.
        """
        with torch.no_grad():
            blocks, group_size, whole = self._blocking(x)
            if x.numel() == 0:
                scale = blocks.new_zeros((*blocks.shape[:-1], 1), dtype=compute_dtype(x))
                zero_point = None if self.spec.symmetric else scale
            else:
                scale, zero_point = self.scale_and_zero_point(blocks)
            return quantize_with(x, scale, zero_point, self.grid, group_size, whole)

    def extra_repr(self) -> str:
        """The spec in one line, without its defaults."""
        default = TensorSpec(bits=self.spec.bits)
        parts = [f"{self.spec.bits} bits", self.spec.granularity]
        parts += [
            f"{field.name}={value}"
            for field in dataclasses.fields(TensorSpec)
            if field.name not in ("bits", "granularity") and (value := getattr(self.spec, field.name)) != getattr(default, field.name)
        ]
        return ", ".join(parts)


quantizers: Registry[type[Quantizer]] = Registry("TensorSpec.quantizer", "lightning_qat.quantizers")


def build_quantizer(spec: TensorSpec) -> Quantizer:
    """The quantizer that a spec names."""
    return quantizers.get(spec.quantizer)(spec)


def fake_quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """Values of the codes of `x`, with a straight-through gradient.

    Args:
        x: Floating-point tensor; blocks lie along its last axis (``channel``, ``token`` and ``token_head`` are one block a row).
        spec: What to do; a spec that is off returns `x`.

    Returns:
        Shape and dtype of `x`; exactly ``quantize_tensor(x, spec).dequantize()``.

    Example:
        >>> fake_quantize(torch.tensor([0.9, -0.35, 0.1, -1.4]), TensorSpec(bits=4))
        tensor([ 0.8000, -0.4000,  0.0000, -1.4000])
    """
    return x if spec.is_off else build_quantizer(spec)(x)


def quantize_tensor(x: Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Integer codes and scales of `x` (arguments as in :func:`fake_quantize`).

    Raises:
        ValueError: The spec is off, or `x` holds NaN or inf.
    """
    spec.code_bits  # noqa: B018  raises when the spec is off
    return build_quantizer(spec).codes(x)
