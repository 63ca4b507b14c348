"""What every schedule over optimizer steps shares: when it acts, what it saves, and what it refuses."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.quantization import QuantizationCallback, quantization_root
from lightning_qat.modules import QuantLayer
from lightning_qat.modules.kv import KVQuantizer
from lightning_qat.quantizers import Quantizer
from lightning_qat.scheme import differences

STATE_VERSION = 1

Role = Literal["weight", "input", "kv"]


class Schedule(Callback, ABC):
    """Base class of schedules; they stand beside :class:`~lightning_qat.QuantizationCallback`, in any order.

    A step is an optimizer step (``trainer.global_step``). What is due at a step is in force before its first batch. Validation, test,
    prediction and checkpoints find the state of the last step that was trained, which a checkpoint remembers. Outside of ``fit`` a
    schedule changes nothing but what a checkpoint asks for.
    """

    def __init__(self) -> None:
        self.active_step: int | None = None  # the step whose state is in force, None where no run has told yet
        self._phase: Hashable = None
        self._module: pl.LightningModule | None = None

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments as plain data."""

    @property
    @abstractmethod
    def last_step(self) -> int:
        """The step of the last change."""

    @abstractmethod
    def check(self, quantization: QuantizationCallback) -> None:
        """Refuse a scheme that this schedule cannot work on, before anything is built.

        Raises:
            MisconfigurationException: Why, and the way out.
        """

    @abstractmethod
    def phase(self, step: int) -> Hashable:
        """What is in force at a step; :meth:`apply` is called when it changes."""

    @abstractmethod
    def apply(self, root: nn.Module, step: int) -> None:
        """Put the quantized model into the state of a step."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be checked without a model."""
        name = type(self).__name__
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        quantization = next((callback for callback in callbacks if isinstance(callback, QuantizationCallback)), None)
        if quantization is None:
            raise MisconfigurationException(f"{name}: the Trainer has no QuantizationCallback; add QuantizationCallback(scheme) beside it")
        self.check(quantization)
        if stage == "fit" and 0 <= trainer.max_steps <= self.last_step:
            rank_zero_warn(f"{name}: step {self.last_step} is never reached, the Trainer stops at max_steps={trainer.max_steps}")
        self.active_step, self._phase, self._module = None, None, pl_module

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._module = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module."""
        self._module = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the sanity check: the state of a checkpoint that was loaded by now, else that of the Trainer's step."""
        self._reach(pl_module, trainer.global_step if self.active_step is None else self.active_step)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The only place where a run goes on to another state."""
        self._reach(pl_module, trainer.global_step)

    def _reach(self, pl_module: pl.LightningModule, step: int) -> None:
        self.active_step = step
        if self.phase(step) == self._phase:
            return
        self._phase = self.phase(step)
        self.apply(quantization_root(pl_module), step)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain data: the settings, for comparison when a checkpoint is loaded; the step whose state is in force; the last one."""
        steps = {"active_step": self.active_step, "last_step": self.last_step}
        return {"format_version": STATE_VERSION, "settings": self.settings, **steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; refuse one that was trained on another schedule."""
        name = type(self).__name__
        if state_dict.get("format_version") != STATE_VERSION:
            raise MisconfigurationException(
                f"{name}: the checkpoint's state has version {state_dict.get('format_version')!r}, expected {STATE_VERSION}"
            )
        if changed := differences(state_dict["settings"], self.settings, "in the checkpoint", name):
            raise MisconfigurationException(f"{name}: the checkpoint was trained on another schedule:\n  " + "\n  ".join(changed))
        self.active_step = state_dict["active_step"]
        if self._module is not None and self.active_step is not None:
            self._reach(self._module, self.active_step)


def quantizers_by_role(root: nn.Module) -> Iterator[tuple[str, Role, Quantizer]]:
    """(name, role, quantizer) of every fake quantizer of layers and attention."""
    for name, module in root.named_modules():
        for child, quantizer in module.named_children():
            if not isinstance(quantizer, Quantizer):
                continue
            role: Role = "input"
            if isinstance(module, KVQuantizer):
                role = "kv"
            elif isinstance(module, QuantLayer) and child.removesuffix("_quantizer") in module.weight_names:
                role = "weight"
            yield f"{name}.{child}".lstrip("."), role, quantizer


def check_step(owner: str, value: Any) -> int:
    """A step as it was given, if it is one.

    Raises:
        ValueError: It is not a whole number from 0 on.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{owner}: got {value!r}, expected an optimizer step, a whole number from 0 on")
    return value
