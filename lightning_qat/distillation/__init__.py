"""Distilling a full-precision teacher into its quantized student."""

from lightning_qat.distillation.lora import LoraSettings
from lightning_qat.distillation.module import DistillationModule

__all__ = ["DistillationModule", "LoraSettings"]
