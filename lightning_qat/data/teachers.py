"""From what a user names as teacher to a source of samples."""

import contextlib
import copy
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_qat.data.rows import cache_bytes, default_rows, target_bytes
from lightning_qat.generation import CallableTeacher, GenerationSettings, TeacherSource, cast_parameters, check_causal_lm, load_causal_lm
from lightning_qat.generation.sample import Sample, SampleSource
from lightning_qat.generation.scripts import Script, build_script, resolve_bos
from lightning_qat.generation.scripts.prompts import read_prompts
from lightning_qat.generation.served import ServedTeacher
from lightning_qat.generation.served.offline import OfflineVLLM
from lightning_qat.generation.teacher import end_tokens, resolve, start_tokens


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a source of samples is built from; it can be sent to another process, which builds the same.

    Attributes are the arguments of :class:`~lightning_qat.SyntheticDataModule` of these names, and:
        settings: How samples are written.
        rows: Overrides those of the settings; None for what fits.
        tokenizer: The teacher's tokenizer itself, or None.
    """

    teacher: Any
    settings: GenerationSettings
    num_samples: int
    rows: int | None = None
    tokenizer: Any = None
    dtype: str = "auto"
    engine: str = "transformers"
    prompts: str | None = None
    bos: bool | None = None
    system: str | None = None
    compiled: bool = False

    def build(self, device: torch.device, private: bool = False) -> SampleSource:
        """The source.

        Args:
            device: Where a teacher in this process computes.
            private: Copy a model in memory even if it could be used as it is.

        Raises:
            ValueError: The teacher cannot be loaded, or cannot write samples with these settings.
        """
        if is_source(self.teacher):
            return self.teacher
        with own_names():
            prompts = None if self.prompts is None else read_prompts(self.prompts, self.tokenizer)
            teacher = self._load(device, private)
            settings = replace(self.settings, rows=self.rows or self._fitting_rows(teacher))
            if self.engine == "transformers":
                return TeacherSource(teacher, settings, self.tokenizer, prompts, self.bos, self.system, self.compiled)
            script = self._script(teacher, settings, prompts)
            if self.engine == "vllm":
                return OfflineVLLM(resolve(self.teacher), settings, script, _vocab_size(teacher))
            return ServedTeacher(self.engine, settings, script, _vocab_size(teacher))

    def _load(self, device: torch.device, private: bool) -> Any:
        """The teacher; of one that another process runs, or vLLM, only its outline."""
        if isinstance(self.teacher, CallableTeacher):
            return self.teacher
        if isinstance(self.teacher, str | Path):
            return load_causal_lm(self.teacher, self.dtype).to(device) if self.engine == "transformers" else _outline(self.teacher)
        model = check_causal_lm(self.teacher, "teacher")
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        fits = model.device == device and all(dtype in (None, parameter.dtype) for parameter in model.parameters())
        if self.engine != "transformers" or (fits and not private):
            return model
        model = copy.deepcopy(model).eval()
        return (model if dtype is None else cast_parameters(model, dtype)).to(device)

    def _fitting_rows(self, teacher: Any) -> int:
        size = _vocab_size(teacher)
        # A callable returns the logits of all tokens, in fp32.
        used = 4 * size if isinstance(teacher, CallableTeacher) else cache_bytes(teacher.config, teacher.dtype)
        return default_rows(used + target_bytes(self.settings.logits, size), self.settings.max_length, self.num_samples)

    def _script(self, teacher: Any, settings: GenerationSettings, prompts: list[list[int]] | None) -> Script:
        return build_script(
            settings,
            allowed=start_tokens(teacher, self.tokenizer) if settings.mode in ("hybrid", "greedy", "sample") else [],
            ends=end_tokens(teacher),
            bos=resolve_bos(self.tokenizer, teacher, self.bos),
            vocab_size=_vocab_size(teacher),
            tokenizer=self.tokenizer,
            prompts=prompts,
            system=self.system,
        )


def is_source(teacher: Any) -> bool:
    """Whether this writes samples itself."""
    return all(hasattr(teacher, name) for name in ("samples", "identity", "vocab_size"))


def samples_of(source: SampleSource, numbers: Iterable[int], progress: Callable[[int], None] | None = None) -> Iterator[Sample]:
    """Samples of a source, computed as if nobody else was here: its model is in eval mode, no dtype is imposed by a Trainer's precision.

    Args:
        source: Writes them.
        numbers: Which.
        progress: Called with numbers of tokens that were written, by sources that tell before a sample is finished.
    """
    model = getattr(source, "teacher", None)
    running = iter(source.samples(numbers, progress) if isinstance(source, TeacherSource) else source.samples(numbers))
    while True:
        with undisturbed(model):
            sample = next(running, None)
        if sample is None:
            return
        yield sample


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """A model in eval mode, without autocast and with the usual default dtype; afterwards everything is as it was."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    kind, dtype = getattr(model, "device", torch.device("cpu")).type, torch.get_default_dtype()
    for module in training:
        module.training = False
    try:
        torch.set_default_dtype(torch.float32)
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for module in training:
            module.training = True


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Errors of generation with the names that its settings have in the data module, where ``mode`` is another one's."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bmode(?=[:=])", "generation", str(error))
        raise ValueError(re.sub(r"\blogits(?=[:=])", "teacher_logits", text)) from error


def free_memory() -> None:
    """Give back what nobody refers to any more: models hold cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _vocab_size(teacher: Any) -> int:
    return teacher.vocab_size if isinstance(teacher, CallableTeacher) else teacher.get_input_embeddings().weight.shape[0]


def _outline(name: str | Path) -> Any:
    """A model without weights: asked for are its configuration, its end tokens and the size of its vocabulary."""
    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher: cannot read a model configuration from {str(name)!r}: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model
