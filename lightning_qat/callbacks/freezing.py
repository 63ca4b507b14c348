"""Ranges of static quantizers that stop following the data."""

from collections.abc import Hashable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.quantization import QuantizationCallback, quantization_root
from lightning_qat.callbacks.schedule import Schedule, check_step, quantizers_by_role
from lightning_qat.quantizers.running_range import freeze_ranges
from lightning_qat.specs import TensorSpec


class FreezeRanges(Schedule):
    """Keeps the running ranges of static quantizers (``dynamic=False``) as they are from a step on.

    Step 0 is for a model that was calibrated before: forward passes in train mode, then
    :func:`~lightning_qat.quantizers.running_range.merge_ranges`.

    Args:
        step: First optimizer step whose batches no longer change a range.

    Raises:
        ValueError: Not a whole number from 0 on.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = check_step("FreezeRanges.step", step)
        self._checked = False

    @property
    def settings(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    @property
    def last_step(self) -> int:
        """The step."""
        return self.step

    @override
    def check(self, quantization: QuantizationCallback) -> None:
        """There has to be a range to freeze."""
        scheme = quantization.scheme
        parts = [scheme.weight, scheme.input, *(part for override in scheme.overrides for part in (override.weight, override.input))]
        if all(not isinstance(part, TensorSpec) or part.dynamic for part in parts):
            raise MisconfigurationException(
                "FreezeRanges: every range of the scheme is taken from the tensor at hand; give weight or input "
                "`granularity: tensor, dynamic: false`, or leave FreezeRanges out"
            )

    @override
    def phase(self, step: int) -> Hashable:
        """Whether ranges are frozen."""
        return step >= self.step

    @override
    def apply(self, root: nn.Module, step: int) -> None:
        """Freeze, or let go."""
        freeze_ranges(root, step >= self.step)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """A range that was frozen before it saw anything would never be used."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._checked or trainer.global_step < self.step:
            return
        self._checked = True
        quantizers = quantizers_by_role(quantization_root(pl_module))
        unseen = [name for name, _, quantizer in quantizers if quantizer.running is not None and not bool(quantizer.running.batches > 0)]
        if unseen:
            raise MisconfigurationException(
                f"FreezeRanges.step: got {self.step}, but {len(unseen)} ranges have seen no batch by then, the first is {unseen[0]!r}; "
                "choose a later step, or calibrate the model first"
            )
