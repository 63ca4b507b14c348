"""Bit-width stages: a scheme for each part of a run."""

from collections.abc import Hashable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.quantization import QuantizationCallback, quantization_root
from lightning_qat.callbacks.schedule import Schedule, check_step
from lightning_qat.modules import scheme_of, use_int8_forward
from lightning_qat.modules.bit_change import change_bits, check_bit_change
from lightning_qat.scheme import QuantScheme, differences


class BitStages(Schedule):
    """Trains with more bits first.

    The last stage is the scheme of :class:`~lightning_qat.QuantizationCallback`: where a run leads is written there. The scheme on the
    model (:func:`~lightning_qat.modules.scheme_of`), in checkpoints of :class:`~lightning_qat.DistillationModule` and in exports is the
    stage that was trained last. Stages differ in bits only, and in the quantizers that these need (``mean_abs`` below 3 bits).

    Example::

        Trainer(callbacks=[QuantizationCallback("w4a8"), BitStages({0: "w8a8", 500: "w4a8"})])

    Args:
        stages: First optimizer step of each stage -> its scheme, as for :class:`~lightning_qat.QuantizationCallback`.

    Raises:
        ValueError: No stage at step 0, fewer than two, an unknown scheme, or schemes that differ in more than bits.
    """

    def __init__(self, stages: dict[int, str | QuantScheme]) -> None:
        super().__init__()
        if not isinstance(stages, Mapping) or len(stages) < 2 or 0 not in stages:
            raise ValueError(f"BitStages.stages: got {stages!r}, expected a scheme for step 0 and one for at least one later step")
        parsed = {check_step("BitStages.stages", step): QuantScheme.parse(scheme) for step, scheme in stages.items()}
        self.stages = dict(sorted(parsed.items()))
        *_, final = self.stages.values()
        for step, scheme in self.stages.items():
            try:
                check_bit_change(scheme, final)
            except ValueError as error:
                raise ValueError(f"BitStages.stages[{step}]: {error}") from error
        self._int8_forward = False

    @property
    def settings(self) -> dict[str, Any]:
        """Step -> scheme; the keys are strings, as in JSON."""
        return {str(step): scheme.to_dict() for step, scheme in self.stages.items()}

    @property
    def last_step(self) -> int:
        """When the last stage begins."""
        return max(self.stages)

    @override
    def check(self, quantization: QuantizationCallback) -> None:
        """The last stage is the scheme of the run."""
        final = self.stages[self.last_step]
        if changed := differences(quantization.scheme.to_dict(), final.to_dict(), "in QuantizationCallback"):
            raise MisconfigurationException(
                f"BitStages.stages[{self.last_step}]: the last stage has to be the scheme of QuantizationCallback:\n  "
                + "\n  ".join(changed)
            )
        self._int8_forward = quantization.int8_forward

    @override
    def phase(self, step: int) -> Hashable:
        """The step that the stage began with."""
        return max(start for start in self.stages if start <= step)

    @override
    def apply(self, root: nn.Module, step: int) -> None:
        """Change the quantizers."""
        change_bits(root, self.stages[max(start for start in self.stages if start <= step)])
        if self._int8_forward:
            use_int8_forward(root)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A model that is in an earlier stage gets the final scheme, under which quantizers are about to be inserted."""
        super().setup(trainer, pl_module, stage)
        present = scheme_of(pl_module)
        begun = next((step for step, scheme in self.stages.items() if scheme == present), None)
        if begun is None:
            return
        change_bits(quantization_root(pl_module), self.stages[self.last_step])
        self._phase = self.last_step
        self.active_step = None if stage == "fit" else begun

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to the stage that the model was in before `setup`."""
        self._return(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same."""
        self._return(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same."""
        self._return(pl_module)

    def _return(self, pl_module: pl.LightningModule) -> None:
        if self.active_step is not None:
            self._reach(pl_module, self.active_step)
