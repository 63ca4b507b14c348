"""Quantized layers and the verbs that put quantizers into a model and take them out again."""

from lightning_qat.modules.insertion import insert_quantizers, remove_quantizers, scheme_of
from lightning_qat.modules.layer import QuantLayer, cached_weights, named_quantizers, quantizers_disabled
from lightning_qat.modules.report import InsertionReport

__all__ = [
    "InsertionReport",
    "QuantLayer",
    "cached_weights",
    "insert_quantizers",
    "named_quantizers",
    "quantizers_disabled",
    "remove_quantizers",
    "scheme_of",
]
