"""The processes of a run, as far as data is concerned; without a trainer there is one."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import distributed

T = TypeVar("T")


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

    def first_rank_0(self, work: Callable[[], T]) -> T:
        """Work that every rank does, rank 0 before the others; where it fails there, it fails everywhere instead of letting others wait."""
        if self.rank == 0:
            try:
                result = work()
            except ValueError as error:
                self.broadcast(error)
                raise
            self.broadcast(None)
            return result
        if (problem := self.broadcast(None)) is not None:
            raise problem
        return work()

    def meeting(self) -> Callable[[], None]:
        """A barrier for work that takes some ranks much longer than others: those of the strategy give up after minutes.

        Made by all ranks before the work, and called after it.
        """
        if self.world == 1 or not distributed.is_initialized():
            return lambda: None
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
        return lambda: distributed.monitored_barrier(group)

    def share(self, work: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of the work: neighbours, of all ranks about as many, of the first ones one more."""
        size, more = divmod(len(work), self.world)
        start = self.rank * size + min(self.rank, more)
        return work[start : start + size + (self.rank < more)]
