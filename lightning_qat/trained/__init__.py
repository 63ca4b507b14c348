"""Trained models back from their checkpoints: the room that knows both the callbacks and the distillation module."""

from lightning_qat.trained.loading import load_module, load_trained
from lightning_qat.trained.reading import is_checkpoint, read_checkpoint

__all__ = ["is_checkpoint", "load_module", "load_trained", "read_checkpoint"]
