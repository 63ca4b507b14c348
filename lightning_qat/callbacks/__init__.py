"""Lightning callbacks that quantize a model."""

from lightning_qat.callbacks.quantization import QuantizationCallback

__all__ = ["QuantizationCallback"]
