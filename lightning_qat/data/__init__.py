"""Data that the teacher writes, as a LightningDataModule and as a run of ``Trainer.predict``."""

from lightning_qat.data.datamodule import SyntheticDataModule
from lightning_qat.data.predict import GenerationModule
from lightning_qat.generation import GenerationStore

__all__ = ["GenerationModule", "GenerationStore", "SyntheticDataModule"]
