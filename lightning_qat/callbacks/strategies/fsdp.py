"""FSDP1: whole modules are flattened and sharded after quantizers are in place; needs a GPU."""

from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.strategies.base import StrategyAdapter


class FSDPAdapter(StrategyAdapter):
    """Parameters keep their names and ids only with ``use_orig_params``, Lightning's default."""

    strategies: ClassVar[tuple[type[Strategy], ...]] = (FSDPStrategy,)
    keeps_weights: ClassVar[bool] = False

    @override
    def check(self, trainer: pl.Trainer, root: nn.Module) -> None:
        """Refuse flat parameters, and what Lightning would refuse after the first backward pass."""
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
            raise MisconfigurationException(
                "FSDPStrategy(use_orig_params=False): flat parameters hide the quantizers' own from the optimizer; leave it out"
            )
        clips_by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm")
        if clips_by_norm and "configure_gradient_clipping" not in _overridden(trainer.lightning_module):
            raise MisconfigurationException(
                "gradient_clip_val: FSDP cannot clip by norm through the Trainer, whose ranks each see a part of the gradient. Take "
                "gradient_clip_algorithm='value', ModelParallelStrategy (FSDP2), or add to the module:\n"
                "    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):\n"
                "        self.trainer.model.clip_grad_norm_(gradient_clip_val)"
            )


def _overridden(module: pl.LightningModule) -> set[str]:
    classes = type(module).__mro__[: type(module).__mro__.index(pl.LightningModule)]
    return {name for cls in classes for name in vars(cls)}
