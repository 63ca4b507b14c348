"""Quantization-aware training and post-training quantization inside Lightning.

The names below are imported when they are first used, so `import lightning_qat` costs next to nothing and needs no extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qat.callbacks import QuantizationCallback
    from lightning_qat.data import SyntheticDataModule
    from lightning_qat.distillation import DistillationModule, LoraSettings
    from lightning_qat.formats import export, load_quantized
    from lightning_qat.modules import insert_quantizers, merge_lora, named_quantizers, quantizers_disabled, remove_quantizers
    from lightning_qat.quantizers import fake_quantize, quantize_tensor
    from lightning_qat.scheme import QuantScheme
    from lightning_qat.specs import KVSpec, TensorSpec
    from lightning_qat.trained import load_trained

__version__ = "0.1.0.dev0"

_HOMES = {
    "DistillationModule": "distillation",
    "KVSpec": "specs",
    "LoraSettings": "distillation",
    "QuantScheme": "scheme",
    "QuantizationCallback": "callbacks",
    "SyntheticDataModule": "data",
    "TensorSpec": "specs",
    "export": "formats",
    "fake_quantize": "quantizers",
    "insert_quantizers": "modules",
    "load_quantized": "formats",
    "load_trained": "trained",
    "merge_lora": "modules",
    "named_quantizers": "modules",
    "quantize_tensor": "quantizers",
    "quantizers_disabled": "modules",
    "remove_quantizers": "modules",
}

__all__ = [
    "DistillationModule",
    "KVSpec",
    "LoraSettings",
    "QuantScheme",
    "QuantizationCallback",
    "SyntheticDataModule",
    "TensorSpec",
    "export",
    "fake_quantize",
    "insert_quantizers",
    "load_quantized",
    "load_trained",
    "merge_lora",
    "named_quantizers",
    "quantize_tensor",
    "quantizers_disabled",
    "remove_quantizers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_qat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lightning_qat.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
