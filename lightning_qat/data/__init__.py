"""Data that the teacher writes: the store of generated tokens and its LightningDataModule."""

from lightning_qat.data.datamodule import SyntheticDataModule
from lightning_qat.data.store import GenerationStore

__all__ = ["GenerationStore", "SyntheticDataModule"]
