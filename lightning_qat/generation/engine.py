"""The teacher writes the data: LLM-QAT (arXiv 2305.17888), section 3.1.

A fixed number of rows is computed in each step, every row at a position of its own; a row that is finished is refilled with the next
sample at once. A sample is a pure function of (teacher, settings, seed, index): randomness is keyed (seed, index, position), and what
a row computes does not depend on the other rows (see `slots.py`).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.sample import FORCED, Sample
from lightning_qat.generation.sampling import Softmax
from lightning_qat.generation.scripts import Script, Span
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.steppers import Stepper
from lightning_qat.generation.targets import top_targets_from

_FIRST_TOKEN = 2  # draws 0 and 1 of a sample are its start token and its number of greedy tokens
_NOTHING = -1

Progress = Callable[[int], None]


class Rows:
    """What is known of the samples being written, a row each.

    Args:
        stepper: Computes logits.
        script: What samples start with and how they go on.
        settings: How tokens are chosen.
        vocab_size: Number of token ids.
        never: Ids that are never drawn.
    """

    def __init__(self, stepper: Stepper, script: Script, settings: GenerationSettings, vocab_size: int, never: Tensor) -> None:
        self.stepper, self.script, self.settings, self.vocab_size, self.never = stepper, script, settings, vocab_size, never
        rows, device = stepper.rows, stepper.device
        shape = (rows, settings.max_length)

        def integers(*size: int, fill: int = 0) -> Tensor:
            return torch.full(size, fill, dtype=torch.int64, device=device)

        self.row = torch.arange(rows, device=device)
        self.index, self.position = integers(rows, fill=_NOTHING), integers(rows)
        self.tokens, self.forced = integers(*shape), integers(*shape, fill=_NOTHING)
        self.roles = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.role, self.greedy_until, self.end_set = integers(rows), integers(rows), integers(rows)
        self.nll, self.chosen = torch.zeros(rows, dtype=torch.float64, device=device), integers(rows)
        self.ends = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.end_sets: dict[frozenset[int], int] = {}
        self.spans: list[Iterator[Span]] = [iter(()) for _ in range(rows)]
        self.lengths = [0] * rows  # tokens written, on the host; 0 for an empty row
        self.targets = self.tails = None
        if settings.logits == "full":
            self.targets = torch.zeros(*shape, vocab_size, dtype=torch.float16, device=device)
        elif settings.logits is not None:
            self.targets = torch.zeros(*shape, settings.logits, dtype=torch.int32, device=device)
            self.tails = torch.zeros(shape, device=device)

    def fill(self, row: int, index: int) -> None:
        """Begin a sample in an empty row."""
        self.index[row], self.position[row], self.lengths[row] = index, 0, 1
        self.nll[row], self.chosen[row] = 0.0, 0
        self.forced[row] = _NOTHING
        self.spans[row] = self.script.spans(index)
        self._next_span(row, 0)
        self.tokens[row, 0], self.roles[row, 0] = self.forced[row, 0], FORCED

    def clear(self, row: int) -> None:
        """Leave a row empty."""
        self.index[row], self.position[row], self.lengths[row] = _NOTHING, 0, 0

    def _next_span(self, row: int, start: int) -> bool:
        """Put the next span's tokens at `start`; False where the script has no more."""
        span = next(self.spans[row], None)
        if span is None:
            return False
        forced = span.forced[: self.settings.max_length - start]
        self.forced[row, start : start + len(forced)] = torch.tensor(forced, dtype=torch.int64)
        self.role[row], self.greedy_until[row] = span.role, min(start + len(forced) + span.greedy, self.settings.max_length)
        if span.ends not in self.end_sets:
            ends = self.ends.new_zeros(1, self.vocab_size)
            ends[0, torch.tensor(sorted(span.ends), dtype=torch.int64)] = True
            self.end_sets[span.ends], self.ends = len(self.end_sets), torch.cat([self.ends, ends])
        self.end_set[row] = self.end_sets[span.ends]
        return True

    def step(self) -> list[int]:
        """Write one more token in every row; returns the rows that are finished."""
        settings, row, alive = self.settings, self.row, self.index >= 0
        logits = self.stepper.step(self.tokens[row, self.position], self.position, max([*self.lengths, 1]))
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(f"teacher: gives {logits.shape[-1]} logits, its vocabulary has {self.vocab_size} tokens")
        if len(self.never):
            logits[:, self.never] = -torch.inf
        softmax = Softmax.of(logits)
        following = self.position + 1
        given = self.forced[row, following]
        token = torch.where(given >= 0, given, self._choose(logits, softmax, following, alive & (given < 0)))
        chosen = alive & (given < 0)
        self.nll += torch.where(chosen, softmax.nll(token), 0)
        self.chosen += chosen
        self.tokens[row, following] = token
        self.roles[row, following] = torch.where(chosen, self.role, FORCED).to(torch.uint8)
        self._keep_targets(logits, softmax)
        ended = chosen & self.ends[self.end_set, token]
        full = alive & (following == settings.max_length - 1)
        events = torch.stack([alive & ~softmax.total.isfinite(), ended, full]).cpu()  # the only wait of a step
        if bool(events[0].any()):
            first = int(events[0].nonzero()[0])
            where = f"position {self.lengths[first]} of sample {int(self.index[first])}"
            raise ValueError(f"generation: the teacher's logits are not finite at {where}; try another dtype, for example float32")
        self.lengths = [length + (length > 0) for length in self.lengths]
        self.position = torch.where(alive & ~full, following, self.position)
        finished = [i for i in (events[1] | events[2]).nonzero().flatten().tolist() if bool(events[2][i]) or not self._goes_on(i)]
        return finished

    def _goes_on(self, row: int) -> bool:
        """After an end token: whether the script has more for this row."""
        return self._next_span(row, self.lengths[row])

    def _choose(self, logits: Tensor, softmax: Softmax, following: Tensor, free: Tensor) -> Tensor:
        """The teacher's choice for each row, [rows]."""
        settings = self.settings
        draw = uniform(settings.seed, self.index, _FIRST_TOKEN + following)
        other = softmax if settings.temperature == 1 else Softmax.of(logits, settings.temperature)
        token = other.kept(settings.top_k, settings.top_p).draw(draw)
        greedy = (free & (following < self.greedy_until)).nonzero().flatten()
        if len(greedy):
            token[greedy] = logits[greedy].argmax(-1)
        return token

    def _keep_targets(self, logits: Tensor, softmax: Softmax) -> None:
        """The teacher's distribution after the token at the present position; uses up the softmax."""
        if self.targets is None:
            return
        if self.tails is None:
            self.targets[self.row, self.position] = logits.to(torch.float16)
            return
        words, tails = top_targets_from(softmax.exps[:, : self.vocab_size], softmax.total, self.targets.shape[-1])
        self.targets[self.row, self.position], self.tails[self.row, self.position] = words, tails

    def take(self, row: int) -> Sample:
        """The finished sample of a row."""
        length = self.lengths[row]

        def kept(values: Tensor | None, size: int) -> Tensor | None:
            return None if values is None else values[row, :size].to("cpu", copy=True)

        return Sample(
            index=int(self.index[row]),
            tokens=self.tokens[row, :length].to("cpu", copy=True),
            roles=kept(self.roles, length) if self.script.keeps_roles else None,
            targets=kept(self.targets, length - 1),
            tails=kept(self.tails, length - 1),
            nll=float(self.nll[row]),
            chosen=int(self.chosen[row]),
        )


@torch.no_grad()
def generate(
    stepper: Stepper,
    script: Script,
    settings: GenerationSettings,
    vocab_size: int,
    indices: Iterable[int],
    never: Iterable[int] = (),
    progress: Progress | None = None,
) -> Iterator[Sample]:
    """Write samples, each given out as soon as it is finished.

    Args:
        stepper: Computes logits, a fixed number of rows at once.
        script: What samples start with and how they go on.
        settings: How tokens are chosen.
        vocab_size: Number of token ids.
        indices: Numbers of the samples, may be endless; asked for one at a time, when a row is free.
        never: Ids that are never drawn.
        progress: Called after each step with the number of tokens written in it.

    Yields:
        Samples in the order in which they are finished.

    Raises:
        ValueError: The teacher's logits are NaN or inf, or it gives nothing but end tokens.
    """
    forbidden = torch.tensor(sorted(never), dtype=torch.int64, device=stepper.device)
    rows, waiting = Rows(stepper, script, settings, vocab_size, forbidden), iter(indices)
    active = {row for row in range(stepper.rows) if _refill(rows, row, waiting)}
    held: list[Sample] = []  # as long as no row has got past its first token, so that a teacher without text leaves nothing behind
    speaks = settings.max_length == 2
    while active:
        finished = rows.step()
        if progress is not None:
            progress(len(active))
        speaks = speaks or bool((rows.chosen > 1).any())
        for row in finished:
            held.append(rows.take(row))
            if not _refill(rows, row, waiting):
                rows.clear(row)
                active.discard(row)
        if not speaks and len(held) > 1 and (len(held) >= stepper.rows or not active):
            raise ValueError(
                f"generation: the first {len(held)} samples hold nothing but the end token; is this a trained language model, and are its "
                "end tokens right?"
            )
        if speaks or not active:
            yield from held
            held = []


def _refill(rows: Rows, row: int, waiting: Iterator[int]) -> bool:
    index = next(waiting, None)
    if index is not None:
        rows.fill(row, index)
    return index is not None
