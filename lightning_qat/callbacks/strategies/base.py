"""Strategies that hold a whole copy of the model in each process: a single device, and DDP."""

from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from torch import nn


class StrategyAdapter:
    """How quantizers live under a strategy; this one is for every strategy that leaves parameters whole.

    Attributes:
        strategies: The Lightning strategies it is for.
        keeps_weights: Whether quantized weights may be kept between calls; a kept copy of a sharded model would be a full one per rank.
    """

    strategies: ClassVar[tuple[type[Strategy], ...]] = ()
    keeps_weights: ClassVar[bool] = True

    def check(self, trainer: pl.Trainer, root: nn.Module) -> None:
        """Refuse, when training starts, what cannot work.

        Raises:
            MisconfigurationException: It cannot.
        """

    def optimized(self, trainer: pl.Trainer) -> set[int] | None:
        """The ids of the parameters that optimizers hold; None where optimizers hold something else in their place."""
        return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


def adapter_of(strategy: Strategy) -> StrategyAdapter:
    """The adapter of a strategy; of an unknown one, that of strategies that leave parameters whole."""
    found = (adapter for adapter in StrategyAdapter.__subclasses__() if isinstance(strategy, adapter.strategies))
    return next(found, StrategyAdapter)()
