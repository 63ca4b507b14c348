"""What generated samples depend on besides the teacher: LLM-QAT (arXiv 2305.17888), section 3.1."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightning_qat.registry import did_you_mean

Mode = Literal["hybrid", "greedy", "sample", "prefix", "chat"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What a sample depends on besides the teacher.

    Args:
        max_length: Tokens per sample, whatever it starts with included.
        mode: ``hybrid``: a random start token, `greedy_tokens` most probable tokens, then samples (the paper's rule); ``greedy``: a
            random start token, then always the most probable token; ``sample``: a random start token, then samples; ``prefix``:
            prompts that are continued by samples; ``chat``: the teacher writes both sides of a conversation.
        seed: Seed of the whole set.
        greedy_tokens: ``hybrid``: smallest and largest number of most probable tokens after the start token; drawn per sample.
        temperature: Divides the logits before a token is drawn.
        top_k: Draw from the `top_k` most probable tokens; 0 draws from all.
        top_p: Draw from the most probable tokens that together hold this probability; 1 draws from all.
        turns: ``chat``: number of pairs of a user's message and an answer.
        logits: Teacher's probabilities kept with each token: a number of most probable tokens (with the mass of all others),
            ``full`` for the logits of the whole vocabulary, or None for none.
        rows: Samples computed together; part of a sample's identity, because matrix products of other sizes round differently.

    Raises:
        ValueError: A setting that cannot work.
    """

    max_length: int
    mode: Mode = "hybrid"
    seed: int = 0
    greedy_tokens: tuple[int, int] = (3, 5)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    turns: int = 1
    logits: int | Literal["full"] | None = None
    rows: int = 64

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: got {self.mode!r}, {did_you_mean(str(self.mode), get_args(Mode))}")
        low, high = self.greedy_tokens
        if not 0 <= low <= high:
            raise ValueError(f"greedy_tokens: got {self.greedy_tokens}, expected (low, high) with 0 <= low <= high")
        object.__setattr__(self, "greedy_tokens", (low, high))
        for field, least in (("max_length", 2), ("rows", 1), ("turns", 1), ("top_k", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: got {getattr(self, field)}, expected at least {least}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected more than 0; for the most probable token use mode='greedy'")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")
        if self.logits != "full" and self.logits is not None and (not isinstance(self.logits, int) or self.logits < 1):
            raise ValueError(f"logits: got {self.logits!r}, expected a number of tokens from 1, 'full' or None")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the store's fingerprint."""
        return {**asdict(self), "greedy_tokens": list(self.greedy_tokens)}
