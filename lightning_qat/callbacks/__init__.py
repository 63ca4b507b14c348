"""Lightning callbacks that quantize a model, and schedules for what they quantize."""

from lightning_qat.callbacks.checkpoint import AtomicModelCheckpoint
from lightning_qat.callbacks.delay import DelayedStart
from lightning_qat.callbacks.freezing import FreezeRanges
from lightning_qat.callbacks.quantization import QuantizationCallback
from lightning_qat.callbacks.stages import BitStages

__all__ = ["AtomicModelCheckpoint", "BitStages", "DelayedStart", "FreezeRanges", "QuantizationCallback"]
