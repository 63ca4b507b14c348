"""FSDP2 and tensor parallelism: the module shards itself in ``configure_model``, after quantizers are in place."""

from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_qat.callbacks.strategies.base import StrategyAdapter
from lightning_qat.modules import named_quantizers


class ModelParallelAdapter(StrategyAdapter):
    """A parameter that is not sharded is not kept equal on all ranks by anybody."""

    strategies: ClassVar[tuple[type[Strategy], ...]] = (ModelParallelStrategy,)
    keeps_weights: ClassVar[bool] = False

    @override
    def check(self, trainer: pl.Trainer, root: nn.Module) -> None:
        """Learned parameters of quantizers must be sharded like all others."""
        if trainer.world_size == 1:
            return
        learned = ((f"{name}.{key}", p) for name, q in named_quantizers(root) for key, p in q.named_parameters() if p.requires_grad)
        if loose := [name for name, p in learned if not isinstance(p, DTensor)]:
            raise MisconfigurationException(
                f"{len(loose)} parameters of quantizers are not sharded and would differ between ranks, the first is {loose[0]!r}: apply "
                "fully_shard to the module that holds them, after the quantizers are inserted"
            )
