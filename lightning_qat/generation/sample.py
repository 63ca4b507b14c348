"""What generation produces, whoever runs it: one sample, and the protocol of everything that makes samples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

FORCED, USER, ASSISTANT = 0, 1, 2  # who wrote a token: the template or prompt, the teacher as user, the teacher as assistant


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One generated sequence, on the CPU.

    Attributes:
        index: Its number in the set.
        tokens: Token ids, int64 [tokens].
        roles: Who wrote each token (``FORCED``, ``USER``, ``ASSISTANT``), uint8 [tokens]; None where that is of no interest.
        targets: The teacher's distribution after each token but the last: with top-k targets packed words int32 [tokens - 1, k]
            (:mod:`lightning_qat.generation.targets`), with full ones logits float16 [tokens - 1, vocabulary]; None for none.
        tails: With top-k targets, the probability of all other tokens, float32 [tokens - 1].
        nll: Negative log-likelihood in nats of the tokens that the teacher chose, under its own softmax (temperature 1), summed.
        chosen: How many tokens the teacher chose; all others were given to it.
    """

    index: int
    tokens: Tensor
    roles: Tensor | None = None
    targets: Tensor | None = None
    tails: Tensor | None = None
    nll: float = 0.0
    chosen: int = 0


class SampleSource(Protocol):
    """Anything that writes samples: a teacher in this process or a server."""

    identity: dict[str, Any]  # plain data: all that samples depend on, the store's fingerprint
    vocab_size: int

    def samples(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The samples of these numbers, each as soon as it is finished, in any order."""
        ...
