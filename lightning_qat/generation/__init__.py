"""Sampling from a teacher: torch and transformers only."""

from lightning_qat.generation.filters import SampleFilters
from lightning_qat.generation.sample import Sample, SampleSource
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.source import TeacherSource
from lightning_qat.generation.steppers import CallableTeacher
from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.teacher import (
    TINY_TEACHER,
    cast_parameters,
    check_causal_lm,
    end_tokens,
    fingerprint,
    has_tokenizer,
    load_causal_lm,
    load_tokenizer,
    start_tokens,
)

__all__ = [
    "TINY_TEACHER",
    "CallableTeacher",
    "GenerationSettings",
    "GenerationStore",
    "Sample",
    "SampleFilters",
    "SampleSource",
    "TeacherSource",
    "cast_parameters",
    "check_causal_lm",
    "end_tokens",
    "fingerprint",
    "has_tokenizer",
    "load_causal_lm",
    "load_tokenizer",
    "start_tokens",
]
