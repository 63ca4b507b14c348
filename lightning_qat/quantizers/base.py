"""What every quantizer is: a module that turns a tensor into a scale, and through it into codes or fake-quantized values."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_qat.numerics.backends.choice import find_scale
from lightning_qat.numerics.blocks import Blocking
from lightning_qat.numerics.fake_quantize import fake_quantize_with, quantize_with
from lightning_qat.numerics.grid import Grid, QuantizedTensor
from lightning_qat.numerics.ranges import RangeFinder, compute_dtype, scale_and_zero_point
from lightning_qat.numerics.rounding import Rounding
from lightning_qat.quantizers.running_range import RunningRange
from lightning_qat.registry import Registry, did_you_mean
from lightning_qat.specs import TensorSpec


def blocking_of(spec: TensorSpec) -> Blocking:
    """Which elements of a tensor share a scale."""
    if spec.granularity == "tensor":
        return Blocking(share="all")
    if spec.granularity == "group":
        return Blocking(share="group", size=spec.group_size)
    return Blocking() if spec.axis is None else Blocking(share="axis", axis=spec.axis)


class _Bypass(torch.autograd.Function):
    """The first argument, and zeros for the gradients of the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class Quantizer(nn.Module, ABC):
    """Base class of quantizers.

    A subclass says which grid its bits mean and how a block of values gets its range. It is stateless unless it learns or remembers
    something: then parameters and buffers are created here with their final shapes, fp32 and at least 1-d. They stay fp32 when the model
    is cast: a rounded scale would be another grid.

    Args:
        spec: What to do; its `options` must be fields of the subclass's `Options`.

    Attributes:
        kept_scale: Scales that stand in place of any that would be found, one per block, [blocks, 1]; None as a rule
            (:meth:`keep_scale`).
        kept_zero_point: The same for zero points, in the dtype of the scales.

    Raises:
        ValueError: Bits or options that this quantizer does not know.
    """

    Options: ClassVar[type | None] = None
    kept_scale: Tensor | None
    kept_zero_point: Tensor | None

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.options = self._read_options(spec)
        self.grid = self.build_grid(spec)
        self.blocking = blocking_of(spec)
        self.finder = self.build_finder()
        self.how = self.build_rounding()
        self.running = None if spec.dynamic else RunningRange(self.momentum)
        self.enabled = True
        self.register_buffer("kept_scale", None)
        self.register_buffer("kept_zero_point", None)

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
    def build_finder(self) -> RangeFinder:
        """What finds the range of a block."""

    def build_rounding(self) -> Rounding:
        """The grid with the straight-through estimator; the identity unless a subclass says otherwise."""
        return Rounding(grid=self.grid, finder=self.finder, blocking=self.blocking)

    @property
    def momentum(self) -> float:
        """How slowly the running range of a static quantizer follows."""
        return 0.9

    @property
    def can_share(self) -> bool:
        """Whether siblings may take the values of one call: nothing learned or remembered, and the identity estimator."""
        return self.how.ste == "identity" and self.running is None and not self.learns

    @property
    def learns(self) -> bool:
        """Whether the quantizer has parameters; then :meth:`scale_and_zero_point` is overridden and its result gets a gradient."""
        return bool(self._parameters)

    def scale_and_zero_point(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each row, shape [rows, n] -> [rows, 1], in at least fp32; learned quantizers return their own."""
        if self.running is None:
            return find_scale(rows, self.how)
        low, high = self.running(*self.finder(rows, self.grid))
        return scale_and_zero_point(low, high, self.grid, rows.dtype)

    def keep_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Quantize one tensor with these scales from now on, whatever its values become; they are part of the state dict.

        What was learned or remembered to find scales goes. The estimator becomes ``mask``: values may leave a range that stands still, and
        those that have left it get no gradient.

        Args:
            scale: At least fp32, one per block of the tensor, in the order of :meth:`~lightning_qat.numerics.blocks.Blocking.rows`.
            zero_point: Like `scale`; needed where the grid has one, and only there.
        """
        self._parameters.clear()
        self.running, self.how = None, dataclasses.replace(self.how, ste="mask")
        self.kept_scale = scale.detach().reshape(-1, 1).clone()
        self.kept_zero_point = None if zero_point is None else zero_point.detach().reshape(-1, 1).to(scale.dtype, copy=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Scales that were kept are kept again, also by a quantizer that was built to find its own."""
        if self.kept_scale is None and (scale := state_dict.get(f"{prefix}kept_scale")) is not None:
            self.keep_scale(scale, state_dict.get(f"{prefix}kept_zero_point"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _scales(self, rows: Tensor, part: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Those that are kept, of one part of the tensor, or those of its rows."""
        if self.kept_scale is None:
            return self.scale_and_zero_point(rows)
        index, parts = part
        kept = (None if values is None else values.chunk(parts)[index] for values in (self.kept_scale, self.kept_zero_point))
        scale, zero_point = kept
        assert scale is not None
        return scale, zero_point

    def forward(self, x: Tensor, dtype: torch.dtype | None = None, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Fake-quantize.

        Args:
            x: Any shape that the granularity fits.
            dtype: Dtype of the values, None for that of `x`.
            part: (i, n) where `x` is the i-th of n equal parts of a tensor whose scales are kept.

        Returns:
            Values on the grid, shape of `x`; `x` itself while disabled or empty.
        """
        compute_dtype(x)  # refuses what is not floating point
        if not self.enabled or x.numel() == 0:
            return self.bypass(x)
        scale = zero_point = None
        if not self._finds_on_the_way:
            with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
                scale, zero_point = self._scales(self.blocking.rows(x), part)
        return fake_quantize_with(x, scale, zero_point, self.how, dtype)

    def bypass(self, x: Tensor) -> Tensor:
        """`x` as it is. Parameters stay in the graph with a gradient of zeros: DDP waits for one from each of them."""
        return _Bypass.apply(x, *self.parameters()) if self.learns and torch.is_grad_enabled() else x

    def _apply(self, fn: Any, recurse: bool = True) -> "Quantizer":
        """Move, but never cast."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    @property
    def _finds_on_the_way(self) -> bool:
        return self.running is None and self.kept_scale is None and self.how.ste != "mask" and not self.learns

    def codes(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of which :meth:`forward` returns the values.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: `x` holds NaN or inf, or no values at all (meta device).
        """
        dtype = compute_dtype(x)
        if x.is_meta:
            raise ValueError("quantize_tensor: the tensor is on the meta device and has no values")
        with torch.no_grad():
            blocks = self.blocking.split(x)
            shape = (*blocks.shape[:-1], 1)
            if x.numel() == 0:
                scale = blocks.new_zeros(shape, dtype=dtype)
                return quantize_with(x, scale, None if self.grid.zero == "none" else scale, self.grid, self.blocking)
            with self._not_observing():
                scale, zero_point = self._scales(self.blocking.rows(x), (0, 1))
            zero_point = None if zero_point is None else zero_point.view(shape)
            return quantize_with(x, scale.view(shape), zero_point, self.grid, self.blocking)

    @contextmanager
    def _not_observing(self) -> Iterator[None]:
        """Looking at codes is not training: a running range stays as it is."""
        training = self.training
        if self.running is not None:
            self.running.eval()
        try:
            yield
        finally:
            if self.running is not None:
                self.running.train(training)

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
