"""Quantization that begins later, for weights, inputs, and keys and values each on its own."""

from collections.abc import Hashable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.quantization import QuantizationCallback, quantization_root
from lightning_qat.callbacks.schedule import Schedule, check_step, quantizers_by_role


class DelayedStart(Schedule):
    """Leaves a part of the model in full precision until a step is reached.

    Until then its quantizers pass tensors through; learned scales stay as they are: they get no gradient, no momentum and no weight
    decay, under DDP and FSDP2 too. A running range (``dynamic=False``) begins to follow when its quantizer begins.

    Example::

        Trainer(callbacks=[QuantizationCallback("w4a8kv4"), DelayedStart(input=500, kv=1000)])

    Args:
        weight: First optimizer step whose forward pass quantizes weights.
        input: The same for inputs ("activations").
        kv: The same for keys and values of attention.

    Raises:
        ValueError: A step is not a whole number from 0 on, or nothing is delayed.
    """

    def __init__(self, weight: int = 0, input: int = 0, kv: int = 0) -> None:
        super().__init__()
        given = {"weight": weight, "input": input, "kv": kv}
        self.starts = {role: check_step(f"DelayedStart.{role}", step) for role, step in given.items()}
        if not any(self.starts.values()):
            raise ValueError("DelayedStart: nothing is delayed; give weight, input or kv a step after 0")

    @property
    def settings(self) -> dict[str, Any]:
        """First step of each role."""
        return dict(self.starts)

    @property
    def last_step(self) -> int:
        """When everything is quantized."""
        return max(self.starts.values())

    @override
    def check(self, quantization: QuantizationCallback) -> None:
        """What is delayed has to be quantized at all."""
        scheme = quantization.scheme
        for role, step in self.starts.items():
            parts = [getattr(scheme, role), *(getattr(override, role) for override in scheme.overrides)]
            if step and all(part in (None, "inherit") for part in parts):
                raise MisconfigurationException(f"DelayedStart.{role}: got {step}, but the scheme has no {role}; leave it out")

    @override
    def phase(self, step: int) -> Hashable:
        """Which roles have begun."""
        return tuple(step >= start for start in self.starts.values())

    @override
    def apply(self, root: nn.Module, step: int) -> None:
        """Switch quantizers on and off."""
        for _, role, quantizer in quantizers_by_role(root):
            quantizer.enabled = step >= self.starts[role]

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """A gradient of zeros would still decay a weight and move momentum; none at all leaves the parameter alone."""
        if trainer.global_step >= self.last_step:
            return
        for _, _, quantizer in quantizers_by_role(quantization_root(pl_module)):
            if not quantizer.enabled:
                for parameter in quantizer.parameters():
                    parameter.grad = None
