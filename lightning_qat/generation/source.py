"""A teacher in this process as a source of samples."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lightning_qat.generation.engine import Progress, generate
from lightning_qat.generation.sample import Sample
from lightning_qat.generation.scripts import build_script, resolve_bos
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.slots import BLOCK
from lightning_qat.generation.steppers import CallableStepper, CallableTeacher, ModelStepper, Stepper
from lightning_qat.generation.teacher import end_tokens, fingerprint, max_positions, start_tokens, tokenizer_fingerprint

VERSION = 2  # of the engine: raised whenever the same settings give other samples


class TeacherSource:
    """Samples of a teacher in this process (a :class:`~lightning_qat.generation.sample.SampleSource`).

    Args:
        teacher: A causal language model of transformers in eval mode on its device, or a :class:`CallableTeacher`.
        settings: How samples are written.
        tokenizer: The teacher's, where there is one: ids it does not know are never drawn, special ones never start a sample.
        prompts: ``prefix``: token ids to continue.
        bos: Whether samples start with the BOS token; None does as the tokenizer does.
        system: ``chat``: a system message.
        compiled: Run the model under ``torch.compile``: for GPUs; on CPUs it was seen to be slower.

    Raises:
        ValueError: The teacher cannot write samples with these settings.
    """

    def __init__(
        self,
        teacher: Any,
        settings: GenerationSettings,
        tokenizer: Any = None,
        prompts: list[list[int]] | None = None,
        bos: bool | None = None,
        system: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.teacher, self.settings, self.compiled = teacher, settings, compiled
        known = None if tokenizer is None else set(tokenizer.get_vocab().values())
        if isinstance(teacher, CallableTeacher):
            self.vocab_size, ends = teacher.vocab_size, list(teacher.end_tokens)
            allowed = sorted((known or set(range(self.vocab_size))) - {*ends, teacher.bos_token})
            if not allowed:
                raise ValueError(f"start tokens: none of the {self.vocab_size} ids of {teacher.name} is neither an end token nor its BOS")
            name, bos_token = teacher.name, teacher.bos_token if bos is not False else None
        else:
            limit = max_positions(teacher)
            if limit is not None and settings.max_length > limit:
                raise ValueError(f"max_length: got {settings.max_length}, the teacher has {limit} positions")
            self.vocab_size, ends = teacher.get_input_embeddings().weight.shape[0], end_tokens(teacher)
            allowed = start_tokens(teacher, tokenizer) if settings.mode in ("hybrid", "greedy", "sample") else []
            name, bos_token = fingerprint(teacher), resolve_bos(tokenizer, teacher, bos)
        if isinstance(settings.logits, int) and settings.logits > self.vocab_size:
            raise ValueError(f"logits: got {settings.logits}, the teacher has {self.vocab_size} tokens; at most that many, or 'full'")
        self.never = [] if known is None else sorted(set(range(self.vocab_size)) - known)
        self.script = build_script(
            settings,
            allowed=allowed,
            ends=ends,
            bos=bos_token,
            tokenizer=tokenizer,
            prompts=prompts,
            vocab_size=self.vocab_size,
            system=system,
        )
        self.identity: dict[str, Any] = {
            "engine": "transformers",
            "engine_version": VERSION,
            "teacher": name,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "dtype": "callable" if isinstance(teacher, CallableTeacher) else str(teacher.dtype).removeprefix("torch."),
            "block": BLOCK,
            "vocab_size": self.vocab_size,
            "end_tokens": ends,
            "script": self.script.identity,
            **settings.to_dict(),
        }
        self._stepper: Stepper | None = None

    def samples(self, indices: Iterable[int], progress: Progress | None = None) -> Iterator[Sample]:
        """The samples of these numbers, in the order in which they are finished."""
        if self._stepper is None:
            self._stepper = self._build_stepper()
        yield from generate(self._stepper, self.script, self.settings, self.vocab_size, indices, self.never, progress)

    @torch.no_grad()
    def _build_stepper(self) -> Stepper:
        if isinstance(self.teacher, CallableTeacher):
            return CallableStepper(self.teacher, self.settings.rows, self.settings.max_length)
        return ModelStepper(self.teacher, self.settings.rows, self.settings.max_length, self.compiled)
