"""LoRA adapters for a student: train two thin matrices per layer instead of its weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_qat.modules import scheme_of
from lightning_qat.modules.lora import check_adapters
from lightning_qat.registry import did_you_mean

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Which layers get an adapter, and its size (arXiv 2106.09685): the trained weight is W + alpha / rank * B A.

    Args:
        rank: Rows of A and columns of B.
        alpha: Scaling of the product, divided by the rank.
        targets: Names of layers (their end is enough: ``q_proj``), or ``all-linear`` for every `nn.Linear` but the output head.
        seed: What A is drawn with, the same on every rank; B begins at zero.

    Raises:
        ValueError: A value out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraSettings.rank: got {self.rank}, allowed are 1 and more")
        if not self.alpha > 0:
            raise ValueError(f"LoraSettings.alpha: got {self.alpha}, allowed is more than 0")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"LoraSettings.targets: got {self.targets!r}, expected a list of names or {ALL_LINEAR!r}")
        if not self.targets:
            raise ValueError(f"LoraSettings.targets: got {self.targets!r}, expected names of layers, or {ALL_LINEAR!r}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @classmethod
    def parse(cls, settings: "LoraSettings | Mapping[str, Any]") -> "LoraSettings":
        """Settings from themselves, or from plain data such as a checkpoint keeps."""
        return settings if isinstance(settings, LoraSettings) else cls(**settings)


def add_lora(student: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into a model, in place, and freeze everything else; quantizers come after it.

    The model computes what it computed before, for B is zero. Adapters are fp32 whatever the dtype of the weights.

    Args:
        student: A model of transformers without quantizers.
        settings: What to adapt.

    Raises:
        ValueError: PEFT is not installed, the model holds quantizers or adapters already, a target matches nothing, or a layer cannot be
            adapted (its weight is shared, or it is not an `nn.Linear`).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora: needs PEFT; pip install 'lightning-qat[lora]'") from error
    if scheme_of(student) is not None:
        raise ValueError("lora: the student holds quantizers already, and adapters on top of them would stay outside; add adapters first")
    if hasattr(student, "peft_config"):
        raise ValueError("lora: the student holds adapters already; merge them first (PEFT's merge_and_unload), or leave lora out")
    _check_targets(student, settings.targets)
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, student)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    check_adapters(student)


def _check_targets(student: nn.Module, targets: tuple[str, ...] | str) -> None:
    if isinstance(targets, str):
        return
    names = [name for name, _ in student.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = {name.rsplit(".", 1)[-1] for name in names}
            raise ValueError(f"LoraSettings.targets: {target!r} matches nothing; layer names end in: {did_you_mean(target, leaves)}")
