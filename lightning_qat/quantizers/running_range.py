"""The range that a static quantizer remembers: a moving average of the ranges of training batches.

A forward pass in training only widens the range of the batch at hand, so that recomputed activations and accumulated micro-batches count
once; :func:`merge_ranges` then folds it in, over all ranks. Until then the range of the tensor at hand is used.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RunningRange(nn.Module):
    """Running (low, high) of one tensor.

    Args:
        momentum: Weight of the past.

    Attributes:
        frozen: Whether batches leave the range as it is (:func:`freeze_ranges`).
    """

    low: Tensor
    high: Tensor
    batches: Tensor
    batch_low: Tensor
    batch_high: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum, self.frozen = momentum, False
        for name in ("low", "high", "batches"):
            self.register_buffer(name, torch.zeros(1))
        self.register_buffer("batch_low", torch.full((1,), torch.inf), persistent=False)
        self.register_buffer("batch_high", torch.full((1,), -torch.inf), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "RunningRange":
        """Move, but never cast: a rounded range would be another grid."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            assert buffer is not None
            now = getattr(self, name)
            setattr(self, name, now.to(buffer.dtype) if buffer.is_meta else buffer.to(now.device))
        return self

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range to use for a tensor with range (low, high), each [1, 1]; not finite if that is not."""
        finite = low.isfinite() & high.isfinite()
        if self.training and not self.frozen:
            self.batch_low.copy_(torch.where(finite, torch.minimum(self.batch_low, low), self.batch_low).view(1))
            self.batch_high.copy_(torch.where(finite, torch.maximum(self.batch_high, high), self.batch_high).view(1))
        known = finite & (self.batches > 0)
        return torch.where(known, self.low.to(low.dtype), low), torch.where(known, self.high.to(high.dtype), high)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the batch at hand into the running range, the widest over all ranks; nothing happens where no rank has seen one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.batch_low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(self.batch_high, torch.distributed.ReduceOp.MAX)
        if not bool(self.batch_low.isfinite()):
            return
        momentum = self.momentum if bool(self.batches > 0) else 0.0
        self.low.mul_(momentum).add_(self.batch_low, alpha=1 - momentum)
        self.high.mul_(momentum).add_(self.batch_high, alpha=1 - momentum)
        self.batches.add_(1)
        self._forget_batch()

    def _forget_batch(self) -> None:
        self.batch_low.fill_(torch.inf)
        self.batch_high.fill_(-torch.inf)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What was seen before and not merged, as in the trial runs of Lightning's finders, is no part of the loaded range."""
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_batch()


def merge_ranges(model: nn.Module) -> None:
    """End of a training batch: every static quantizer in `model` takes over the ranges it has seen, all ranks together."""
    for module in model.modules():
        if isinstance(module, RunningRange):
            module.merge()


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Every static quantizer in `model` keeps its range from now on, also in training; with `frozen=False` it follows again."""
    for module in model.modules():
        if isinstance(module, RunningRange):
            module.frozen = frozen
