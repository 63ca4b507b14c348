"""Quantized layers and the verbs that put quantizers into a model and take them out again."""

from lightning_qat.modules.experts import expert_coverage
from lightning_qat.modules.insertion import insert_quantizers, remove_quantizers, scheme_of
from lightning_qat.modules.int8 import use_int8_forward
from lightning_qat.modules.layer import QuantLayer, named_quantizers, quantizers_disabled
from lightning_qat.modules.lora import merge_lora
from lightning_qat.modules.report import InsertionReport
from lightning_qat.modules.weight_cache import cached_weights, forget_weights

__all__ = [
    "InsertionReport",
    "QuantLayer",
    "cached_weights",
    "expert_coverage",
    "forget_weights",
    "insert_quantizers",
    "merge_lora",
    "named_quantizers",
    "quantizers_disabled",
    "remove_quantizers",
    "scheme_of",
    "use_int8_forward",
]
