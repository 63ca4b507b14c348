"""What a sample starts with and how it goes on, as data: which tokens the teacher is given, and which it writes in between."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch

from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.sample import ASSISTANT

ALL = 2**31 - 1  # greedy for the whole span
_START, _GREEDY = 0, 1  # which draw of a sample is which; those from 2 on choose its tokens


class Span(NamedTuple):
    """What comes next in a sample: some tokens that are given, then some that the teacher writes.

    Attributes:
        forced: Tokens given to the teacher; never empty in a sample's first span, possibly empty later.
        role: Who writes the free tokens that follow, ``USER`` or ``ASSISTANT``.
        greedy: How many of the free tokens, from the first on, are the most probable ones; ``ALL``: all of them.
        ends: Tokens that end the free part; the one that does is kept in the sample.
    """

    forced: list[int]
    role: int
    greedy: int
    ends: frozenset[int]


class Script(Protocol):
    """How samples are laid out.

    Attributes:
        identity: Plain data for the store's fingerprint: all that the spans depend on and that the settings do not hold.
        keeps_roles: Whether samples carry roles.
    """

    identity: dict[str, Any]
    keeps_roles: bool

    def spans(self, index: int) -> Iterator[Span]:
        """The spans of sample `index`, which is finished when they run out or it has reached its maximum length."""
        ...


def digest(data: object) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


class StartTokens:
    """One random start token, then the teacher writes.

    Args:
        allowed: Ids a sample may start with.
        ends: Ids that end a sample.
        seed: Seed of the whole set.
        greedy_tokens: ``hybrid``: smallest and largest number of most probable tokens; drawn per sample.
        bos: Token in front of the start token.
        mode: ``hybrid``, ``greedy`` (always the most probable token) or ``sample`` (never).
    """

    keeps_roles = False

    def __init__(
        self,
        allowed: Sequence[int],
        ends: Sequence[int],
        seed: int,
        greedy_tokens: tuple[int, int],
        bos: int | None = None,
        mode: Literal["hybrid", "greedy", "sample"] = "hybrid",
    ) -> None:
        self.allowed, self.ends, self.seed = list(allowed), frozenset(ends), seed
        self.greedy_tokens = {"hybrid": greedy_tokens, "greedy": (ALL, ALL), "sample": (0, 0)}[mode]
        self.head = [] if bos is None else [bos]
        self.identity: dict[str, Any] = {"start_tokens": digest(self.allowed), "end_tokens": sorted(self.ends), "bos": bos}

    def spans(self, index: int) -> Iterator[Span]:
        """One span."""
        low, high = self.greedy_tokens
        start = self.allowed[int(self._draw(index, _START) * len(self.allowed))]
        greedy = low + int(self._draw(index, _GREEDY) * (high - low + 1))
        yield Span([*self.head, start], ASSISTANT, greedy, self.ends)

    def _draw(self, index: int, which: int) -> float:
        return float(uniform(self.seed, torch.tensor(index), which))


def resolve_bos(tokenizer: Any, model: Any, bos: bool | None) -> int | None:
    """The token in front of a sample.

    Args:
        tokenizer: The teacher's tokenizer, or None.
        model: The teacher.
        bos: True for its BOS, False for none, None to do as the tokenizer does by itself. LLM-QAT used none, but teachers such as
            Gemma and Llama 3 write nonsense without one.

    Raises:
        ValueError: `bos` is True and there is none.
    """
    known = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return known if known is not None and tokenizer("a")["input_ids"][:1] == [known] else None
    if not bos:
        return None
    known = model.config.get_text_config().bos_token_id if known is None else known
    if known is None:
        raise ValueError("bos: got True, but neither the teacher's tokenizer nor its configuration has a BOS token; use bos=False")
    return int(known)
