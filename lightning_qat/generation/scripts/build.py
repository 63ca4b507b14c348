"""The one place that turns a mode into a script."""

from collections.abc import Sequence
from typing import Any

from lightning_qat.generation.scripts.base import Script, StartTokens
from lightning_qat.generation.scripts.chat import Chat, ChatTemplate
from lightning_qat.generation.scripts.prompts import Prompts
from lightning_qat.generation.settings import GenerationSettings


def build_script(
    settings: GenerationSettings,
    *,
    allowed: Sequence[int],
    ends: Sequence[int],
    bos: int | None,
    vocab_size: int,
    tokenizer: Any = None,
    prompts: Sequence[Sequence[int]] | None = None,
    system: str | None = None,
) -> Script:
    """The script of a mode.

    Args:
        settings: What to generate.
        allowed: Ids a sample may start with.
        ends: Ids that end a sequence (:func:`~lightning_qat.generation.end_tokens`).
        bos: Token in front of a sample (:func:`resolve_bos`); with ``chat`` the template says.
        vocab_size: Of the teacher.
        tokenizer: Needed with ``chat``.
        prompts: Needed with ``prefix``, and only there (:func:`~lightning_qat.generation.scripts.prompts.read_prompts`).
        system: System message of ``chat``; None leaves it to the template.

    Raises:
        ValueError: The mode and the rest do not belong together.
    """
    for field, value, mode in (("prompts", prompts, "prefix"), ("system", system, "chat")):
        if value is not None and settings.mode != mode:
            raise ValueError(f"{field}: got some with mode={settings.mode!r}, which has no use for it; leave it out, or use mode={mode!r}")
    if settings.mode == "prefix":
        if prompts is None:
            raise ValueError("prompts: got none with mode='prefix', expected prompts to continue; without any use mode='hybrid'")
        return Prompts(prompts, ends, bos, vocab_size=vocab_size, max_length=settings.max_length)
    if settings.mode == "chat":
        template = ChatTemplate.from_tokenizer(tokenizer, system)
        return Chat(template, settings.turns, ends, vocab_size=vocab_size, max_length=settings.max_length)
    if bos is not None and settings.max_length < 3:
        raise ValueError(f"max_length: got {settings.max_length}, expected at least 3: BOS, a start token, one that the teacher writes")
    return StartTokens(allowed, ends, settings.seed, settings.greedy_tokens, bos, settings.mode)
