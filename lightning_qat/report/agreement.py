"""Whether tokens are as frequent as the teacher says they should be.

Each token was drawn from the teacher's distribution at its position. Over the same positions the average of those distributions is the
frequency to expect, and as the positions are the very ones that were visited, nothing but chance may separate the two. How much chance
may do is found by drawing every one of these tokens again, several times.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWS = 20  # times that all tokens are drawn again
TOP, EXTREME = 30, 8  # tokens shown by frequency, and on either side by how far they are off

Source = Literal["teacher", "targets"]
Counts = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TokenFrequency:
    """How often one token occurs.

    Attributes:
        token: Its id; None for all tokens that the stored targets do not name.
        observed: Occurrences among the positions compared.
        expected: Sum of its probabilities there.
        deviation: The difference in standard deviations of chance. One is added to the variance, so that a rare token which occurs once
            is no news.
    """

    token: int | None
    observed: int
    expected: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Observed frequencies of tokens against the teacher's.

    Attributes:
        source: Where the teacher's distributions come from: itself, or the targets in the store.
        samples: Samples compared.
        positions: Tokens compared.
        distance: Total variation distance of the frequencies, 0 to 1.
        distance_by_chance: What it would be on average if every token was drawn again.
        distance_spread: Standard deviation of that.
        kl: KL(observed || expected) in nats; None if it is infinite.
        kl_by_chance: What it would be on average by chance.
        top: The most frequent tokens.
        over: The most over-represented tokens, the worst first.
        under: The most under-represented tokens, the worst first.
    """

    source: Source
    samples: int
    positions: int
    distance: float
    distance_by_chance: float
    distance_spread: float
    kl: float | None
    kl_by_chance: float
    top: list[TokenFrequency]
    over: list[TokenFrequency]
    under: list[TokenFrequency]

    @property
    def is_far(self) -> bool:
        """Whether the distance is clearly more than chance; a thousandth is left to logits that round in another way."""
        return self.distance > self.distance_by_chance + 5 * self.distance_spread + 0.001


class FrequencyCounts:
    """Sums over positions, from which an :class:`Agreement` follows.

    Args:
        vocab_size: Number of token ids; one category more stands for all tokens that are not named.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.samples, self.positions = vocab_size, 0, 0
        self.observed, self.expected, self.variance = np.zeros((3, vocab_size + 1))
        self.drawn = np.zeros((DRAWS, vocab_size + 1))

    def add(self, probabilities: Tensor, following: Tensor, ids: Tensor | None = None) -> None:
        """Add positions.

        Args:
            probabilities: Of each category, float32 [positions, categories].
            following: The token that came next, int64 [positions].
            ids: Which token each category is, or `vocab_size` for all others, int64 [positions, categories]; None where category i is
                token i.
        """
        generator = torch.Generator(probabilities.device).manual_seed(self.positions)  # fixed, and another one for each part
        drawn = torch.multinomial(probabilities, DRAWS, replacement=True, generator=generator)
        variance = probabilities * (1 - probabilities)
        if ids is None:
            self.expected[:-1] += probabilities.sum(0).double().cpu().numpy()
            self.variance[:-1] += variance.sum(0).double().cpu().numpy()
        else:
            following = torch.where((ids == following.unsqueeze(-1)).any(-1), following, self.vocab_size)
            drawn = ids.gather(-1, drawn)
            np.add.at(self.expected, ids.cpu().numpy(), probabilities.double().cpu().numpy())
            np.add.at(self.variance, ids.cpu().numpy(), variance.double().cpu().numpy())
        np.add.at(self.observed, following.cpu().numpy(), 1)
        for counts, tokens in zip(self.drawn, drawn.T.cpu().numpy(), strict=True):
            np.add.at(counts, tokens, 1)
        self.positions += len(following)

    def agreement(self, source: Source) -> Agreement:
        """What the sums say."""
        by_chance = [distance(drawn, self.expected) for drawn in self.drawn]
        nats = kl(self.observed, self.expected)
        return Agreement(
            source=source,
            samples=self.samples,
            positions=self.positions,
            distance=distance(self.observed, self.expected),
            distance_by_chance=float(np.mean(by_chance)),
            distance_spread=float(np.std(by_chance)),
            kl=nats if math.isfinite(nats) else None,
            kl_by_chance=float(np.mean([kl(drawn, self.expected) for drawn in self.drawn])),
            **self._tokens(),
        )

    def _tokens(self) -> dict[str, Any]:
        larger = np.maximum(self.observed, self.expected)
        deviation = (self.observed - self.expected) / np.sqrt(self.variance + 1)

        def listed(order: NDArray[np.int64], show: NDArray[np.bool_]) -> list[TokenFrequency]:
            tokens = [int(i) for i in order if show[i]]
            return [
                TokenFrequency(
                    token=i if i < self.vocab_size else None,
                    observed=int(self.observed[i]),
                    expected=float(self.expected[i]),
                    deviation=float(deviation[i]),
                )
                for i in tokens
            ]

        order = np.argsort(-deviation, kind="stable")
        return {
            "top": listed(np.argsort(-larger, kind="stable")[:TOP], larger >= 0.5),
            "over": listed(order[:EXTREME], deviation > 0),
            "under": listed(order[::-1][:EXTREME], deviation < 0),
        }


def distance(counts: Counts, expected: Counts) -> float:
    """Total variation distance of the frequencies behind two sets of counts."""
    return float(np.abs(counts / counts.sum() - expected / expected.sum()).sum() / 2)


def kl(counts: Counts, expected: Counts) -> float:
    """KL(counts || expected) of the frequencies in nats; infinite where a token occurs that is not expected at all."""
    there = counts > 0
    share = counts[there] / counts.sum()
    with np.errstate(divide="ignore"):
        return float((share * np.log(share / (expected[there] / expected.sum()))).sum())
