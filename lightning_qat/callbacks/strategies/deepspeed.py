"""DeepSpeed ZeRO: the engine's optimizer holds flat partitions in place of parameters; needs a GPU."""

from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from typing_extensions import override

from lightning_qat.callbacks.strategies.base import StrategyAdapter


class DeepSpeedAdapter(StrategyAdapter):
    """Stage 3 gathers a weight only inside its layer's forward pass."""

    strategies: ClassVar[tuple[type[Strategy], ...]] = (DeepSpeedStrategy,)
    keeps_weights: ClassVar[bool] = False

    @override
    def optimized(self, trainer: pl.Trainer) -> set[int] | None:
        """Partitions are no parameters, so nothing can be told from them."""
        return None
