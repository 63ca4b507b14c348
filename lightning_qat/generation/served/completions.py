"""Samples out of completions: what to ask a completion engine for, and what to make of its answers.

Written for vLLM's server and vLLM's offline engine alike: the names of the sampling parameters are the same in both.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.sample import FORCED, Sample
from lightning_qat.generation.scripts import Script, Span
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.targets import pack_targets

_SEEDS = 1 << 40  # draws from here on seed requests: far from those that lay out a sample
_MODEL_DEFAULTS_OFF = {"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


class Request(NamedTuple):
    """One completion to ask for.

    Attributes:
        prompt: Token ids so far.
        sampling: vLLM's sampling parameters, by their names there.
    """

    prompt: list[int]
    sampling: dict[str, Any]


class Completion(NamedTuple):
    """One answer.

    Attributes:
        tokens: The tokens written, the one that ended them included.
        logprobs: Their log-probabilities.
        top: Log-probabilities by token id at each of them: the most probable ones and the chosen one.
        prompt_top: The same at each token of the prompt, None at the first; empty where it was not asked for.
        reason: Why it ended, for error messages.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]
    prompt_top: list[dict[int, float] | None]
    reason: str


Writer = Generator[Request, Completion, Sample]


def check_settings(settings: GenerationSettings, vocab_size: int) -> None:
    """Refuse what a completion engine cannot do.

    Raises:
        ValueError: It cannot write samples with these settings.
    """
    if settings.logits == "full":
        raise ValueError(
            "logits: got 'full', expected a number of tokens or None: vLLM gives log-probabilities of the most probable tokens only; "
            "use for example logits=32, or a teacher in this process"
        )
    if settings.logits is not None and settings.logits > vocab_size:
        raise ValueError(f"logits: got {settings.logits}, the teacher has {vocab_size} tokens; use at most that many")
    if not 0.01 <= settings.temperature <= 2:
        raise ValueError(f"temperature: got {settings.temperature}, expected 0.01 to 2 as in vLLM; or use a teacher in this process")


def with_stop(tokens: list[int], finish_reason: str | None, stop_reason: object, request: Request) -> list[int]:
    """The tokens of an answer with the one that ended them, which some servers leave out."""
    ends = request.sampling["stop_token_ids"]
    if finish_reason != "stop" or (tokens and tokens[-1] in (*ends, stop_reason)):
        return tokens
    if isinstance(stop_reason, int):
        return [*tokens, stop_reason]
    return [*tokens, *ends] if len(ends) == 1 else tokens


def writing(index: int, script: Script, settings: GenerationSettings, vocab_size: int) -> Writer:
    """Write one sample: yields requests, is sent their completions, and returns the sample.

    Raises:
        ValueError: An answer is not what was asked for.
    """
    draft = _Draft(index, settings, vocab_size)
    for number, span in enumerate(script.spans(index)):
        draft.give(span.forced)
        ended = False
        for greedy in (True, False):
            room = min(draft.room, span.greedy) if greedy else draft.room
            if room and not ended:
                request = draft.request(span, number, room, greedy)
                ended = draft.take(request, (yield request), span)
        if not draft.room:
            break
    if draft.untargeted:  # what stands last was given, so that no request has covered it yet
        request = Request(draft.tokens[:-1], draft.sampling(max_tokens=1))
        draft.take_targets(request, (yield request), 1)
    return draft.sample(script.keeps_roles)


def advance(writer: Writer, answer: Completion | None = None) -> Request | Sample:
    """The writer's next request, or its sample."""
    try:
        return next(writer) if answer is None else writer.send(answer)
    except StopIteration as finished:
        return finished.value


class _Draft:
    """A sample while it is being written."""

    def __init__(self, index: int, settings: GenerationSettings, vocab_size: int) -> None:
        self.index, self.settings, self.vocab_size = index, settings, vocab_size
        self.width = settings.logits if isinstance(settings.logits, int) else 0
        self.tokens: list[int] = []
        self.roles: list[int] = []
        self.top: list[dict[int, float]] = []  # after each token but the last, as far as it is known
        self.nll = 0.0
        self.chosen = 0

    @property
    def room(self) -> int:
        return self.settings.max_length - len(self.tokens)

    def give(self, forced: list[int]) -> None:
        forced = forced[: self.room]
        self.tokens += forced
        self.roles += [FORCED] * len(forced)

    @property
    def untargeted(self) -> bool:
        """Whether the teacher's probabilities are wanted and not known yet after some token but the last."""
        return self.width > 0 and len(self.top) < len(self.tokens) - 1

    def sampling(self, **changes: Any) -> dict[str, Any]:
        """Sampling parameters of the most probable tokens; a model's own defaults must not change what the teacher writes."""
        fixed = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "logprobs": self.width, "stop_token_ids": []}
        prompt_logprobs = {"prompt_logprobs": self.width} if self.untargeted else {}
        return {**_MODEL_DEFAULTS_OFF, **fixed, **prompt_logprobs, **changes}

    def request(self, span: Span, number: int, room: int, greedy: bool) -> Request:
        changes: dict[str, Any] = {"max_tokens": room, "stop_token_ids": sorted(span.ends)}
        if not greedy:
            settings = self.settings
            changes |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
            changes["seed"] = int(uniform(settings.seed, torch.tensor(self.index), _SEEDS + number) * 2**31)
        return Request(list(self.tokens), self.sampling(**changes))

    def take(self, request: Request, answer: Completion, span: Span) -> bool:
        """Append what the teacher wrote; whether it reached one of the span's ends."""
        end = next((i + 1 for i, token in enumerate(answer.tokens) if token in span.ends), None)
        written, room = answer.tokens[:end], request.sampling["max_tokens"]
        if end is None and len(written) != room:
            raise ValueError(
                f"sample {self.index}: got {len(written)} tokens that end with {answer.reason}, expected {room} or one of the ends "
                f"{sorted(span.ends)}; does the engine stop at tokens of its own, or hold fewer than {self.settings.max_length} positions?"
            )
        if wrong := [token for token in written if not 0 <= token < self.vocab_size]:
            raise ValueError(f"vocab_size: got {self.vocab_size}, but the teacher wrote token {wrong[0]}; pass the teacher's own size")
        self.take_targets(request, answer, len(written))
        self.tokens += written
        self.roles += [span.role] * len(written)
        self.nll -= sum(answer.logprobs[: len(written)])
        self.chosen += len(written)
        return end is not None

    def take_targets(self, request: Request, answer: Completion, written: int) -> None:
        """Keep the probabilities at the request's given tokens and at the first `written` ones of the answer."""
        if "prompt_logprobs" in request.sampling:
            wanted = len(request.prompt) - 1 - len(self.top)
            given = [row for row in answer.prompt_top[len(request.prompt) - wanted : len(request.prompt)] if row is not None]
            if len(given) != wanted:
                raise ValueError(
                    f"logits: got log-probabilities at {len(given)} given tokens, expected them at {wanted} (prompt_logprobs); "
                    "serve the teacher with vLLM, or use logits=None"
                )
            self.top += given
        if self.width:
            self.top += answer.top[:written]

    def sample(self, keeps_roles: bool) -> Sample:
        roles = torch.tensor(self.roles, dtype=torch.uint8) if keeps_roles else None
        targets, tails = _packed(self.top[: len(self.tokens) - 1], self.width, self.vocab_size) if self.width else (None, None)
        return Sample(
            index=self.index,
            tokens=torch.tensor(self.tokens),
            roles=roles,
            targets=targets,
            tails=tails,
            nll=self.nll,
            chosen=self.chosen,
        )


def _packed(rows: list[dict[int, float]], width: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(targets, tails) of a sample; a tail is what the most probable tokens leave of 1, so it holds their rounding."""
    best = [sorted(row.items(), key=lambda item: (-item[1], item[0]))[:width] for row in rows]
    if short := [len(row) for row in best if len(row) < width]:
        raise ValueError(f"logits: got {short[0]} log-probabilities, expected {width}; start the server with --max-logprobs {width}")
    table = torch.tensor(best, dtype=torch.float64)  # holds ids exactly, too
    ids, logprobs = table[..., 0].long(), table[..., 1]
    return pack_targets(ids, logprobs.float(), vocab_size), (1 - logprobs.exp().sum(-1)).clamp(min=0).float()
