"""The processes of a run, as far as data is concerned; without a trainer there is one."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch


class Ranks:
    """This process among those of a trainer.

    Args:
        trainer: The trainer, or None for this process alone on the CPU.
    """

    def __init__(self, trainer: "pl.Trainer | None" = None) -> None:
        self.trainer = trainer
        self.rank, self.world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        self.device = torch.device("cpu") if trainer is None else trainer.strategy.root_device

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        return value if self.trainer is None else self.trainer.strategy.broadcast(value)

    def barrier(self, name: str) -> None:
        """Wait for all ranks."""
        if self.trainer is not None:
            self.trainer.strategy.barrier(f"lightning_qat.{name}")

    def share(self, work: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of the work: neighbours, of all ranks about as many, of the first ones one more."""
        size, more = divmod(len(work), self.world)
        start = self.rank * size + min(self.rank, more)
        return work[start : start + size + (self.rank < more)]
