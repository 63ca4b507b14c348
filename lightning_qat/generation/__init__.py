"""Sampling from a teacher: torch and transformers only."""

from lightning_qat.generation.engine import GenerationSettings, generate_rows
from lightning_qat.generation.teacher import TINY_TEACHER, fingerprint, load_causal_lm, load_tokenizer, start_tokens

__all__ = [
    "TINY_TEACHER",
    "GenerationSettings",
    "fingerprint",
    "generate_rows",
    "load_causal_lm",
    "load_tokenizer",
    "start_tokens",
]
