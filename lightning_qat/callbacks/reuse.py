"""Quantize a weight once while it does not change: over the micro-batches of one optimizer step, and over an evaluation loop."""

from contextlib import ExitStack

import lightning.pytorch as pl
from torch import nn

from lightning_qat.callbacks.strategies import adapter_of
from lightning_qat.modules import cached_weights


class WeightReuse:
    """The scopes in which the quantized weights of one model are kept; an evaluation loop may run inside training."""

    def __init__(self) -> None:
        self._training, self._evaluation = ExitStack(), ExitStack()

    def start(self, trainer: pl.Trainer, root: nn.Module, training: bool = False) -> None:
        """Keep quantized weights from here on; nothing happens under sharding, where a kept copy would be a full one on each rank."""
        if adapter_of(trainer.strategy).keeps_weights:
            scopes = self._training if training else self._evaluation
            scopes.enter_context(cached_weights(root, training=training))

    def stop(self, evaluation: bool = False) -> None:
        """Leave the scope of evaluation, or all of them."""
        self._evaluation.close()
        if not evaluation:
            self._training.close()
