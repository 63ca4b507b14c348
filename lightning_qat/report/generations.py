"""Statistics of the samples in a store; they are read one after the other."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.generation.sample import ASSISTANT, FORCED, USER
from lightning_qat.generation.scripts.base import digest
from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.teacher import fingerprint, start_tokens, tokenizer_fingerprint
from lightning_qat.report.agreement import TOP, Agreement
from lightning_qat.report.histograms import Histogram
from lightning_qat.report.marginals import compare, written

REPETITIVE = 0.5  # share of its runs of 4 tokens that occurred before, above which a sample counts as repeating itself
AT_ONCE = 5  # a sample that ends by itself after at most so many chosen tokens ended at once
ROLES = {FORCED: "given", USER: "user", ASSISTANT: "assistant"}


@dataclass(frozen=True, kw_only=True)
class StartTokens:
    """Which random tokens samples start with.

    Attributes:
        distinct: How many different ones there are.
        allowed: How many there may be; None where that is not known, which takes the teacher.
        by_chance: How many different ones as many draws would give on average; None likewise.
    """

    distinct: int
    allowed: int | None
    by_chance: float | None


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What samples take on disk.

    Attributes:
        total: Bytes of all its files.
        arrays: Bytes of each kind of array: ``tokens`` and, as far as there are any, ``roles``, ``tails``, ``targets``.
        targets: What is kept of the teacher's distributions, in words; None for nothing.
        entry_bytes: Bytes of one number of them; 0 for none.
    """

    total: int
    arrays: dict[str, int]
    targets: str | None
    entry_bytes: int


@dataclass(frozen=True, kw_only=True)
class GenerationStatistics:
    """What there is to know about the samples of a store.

    Attributes:
        identity: All that the samples depend on.
        requested: How many samples were asked for.
        samples: How many there are.
        tokens: Tokens in all of them.
        chosen: How many of those the teacher chose; the others were given.
        vocab_size: Number of token ids.
        lengths: Tokens per sample.
        ended: Share of the samples that ended by themselves; the others were cut at the maximum length.
        at_once: Share of the samples that did so after at most `AT_ONCE` tokens.
        repetition: Mean share of a sample's runs of 4 tokens that occurred before in it.
        repetitions: This share per sample.
        repetitive: Share of the samples with more than `REPETITIVE` of it.
        duplicates: Samples whose tokens an earlier sample has, too.
        perplexity: exp of the mean negative log-likelihood of chosen tokens, under the teacher itself; None if there are none.
        perplexities: The same per sample.
        distinct: Different tokens among the chosen ones.
        frequent: The most frequent chosen tokens and how often they occur.
        start: Random tokens at the start; None where samples start in another way.
        roles: Tokens by who wrote them; None if samples do not say.
        agreement: Frequencies of tokens against the teacher's; None if there is nothing to compare with.
        not_compared: Why not.
        storage: What samples take on disk.
        remarks: What else was seen, a sentence each.
    """

    identity: dict[str, Any]
    requested: int
    samples: int
    tokens: int
    chosen: int
    vocab_size: int
    lengths: Histogram
    ended: float
    at_once: float
    repetition: float
    repetitions: Histogram
    repetitive: float
    duplicates: int
    perplexity: float | None
    perplexities: Histogram | None
    distinct: int
    frequent: list[tuple[int, int]]
    start: StartTokens | None
    roles: dict[str, int] | None
    agreement: Agreement | None
    not_compared: str
    storage: Storage
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def collect(store: GenerationStore, *, tokenizer: Any = None, teacher: Any = None, scored: int = 64) -> GenerationStatistics:
    """Read all samples of a store once.

    Args:
        store: The samples.
        tokenizer: The teacher's; only with it are ids that it does not know left out as they were in generation.
        teacher: The model in eval mode that wrote the samples, to compare frequencies of tokens with.
        scored: How many samples to compare with it at most.

    Raises:
        ValueError: The store is empty or damaged, or the teacher is another one.
    """
    if not len(store.records):
        raise ValueError(f"store: got no samples in {str(store.folder)!r}, expected at least one; `lightning-qat generate` writes some")
    if scored < 0:
        raise ValueError(f"scored: got {scored}, expected 0 or more samples to compare with the teacher")
    agreement, why = compare(store, teacher, scored=scored, never=_never(store.identity, tokenizer))
    records, read = store.records, _Reading(store)
    nats, chosen = records["nll"].astype(np.float64), records["chosen"].astype(np.int64)
    perplexities = np.exp(np.minimum(nats[chosen > 0] / chosen[chosen > 0], 700))
    frequent = np.argsort(-read.counts, kind="stable")[:TOP]
    return GenerationStatistics(
        identity=store.identity,
        requested=store.requested,
        samples=len(records),
        tokens=int(records["tokens"].sum()),
        chosen=int(chosen.sum()),
        vocab_size=store.layout.vocab_size,
        lengths=Histogram.of_integers(records["tokens"]),
        ended=float(read.ended.mean()),
        at_once=float((read.ended & (chosen <= AT_ONCE)).mean()),
        repetition=float(records["repetition"].mean(dtype=np.float64)),
        repetitions=Histogram.of_shares(records["repetition"]),
        repetitive=float((records["repetition"] > REPETITIVE).mean()),
        duplicates=len(records) - len(np.unique(records["hash"])),
        perplexity=math.exp(min(nats.sum() / chosen.sum(), 700)) if chosen.any() else None,
        perplexities=Histogram.of_ratios(perplexities) if len(perplexities) else None,
        distinct=int((read.counts > 0).sum()),
        frequent=[(int(token), int(read.counts[token])) for token in frequent if read.counts[token]],
        start=_start(store.identity, read.starts, len(records), teacher, tokenizer),
        roles=None if not read.roles.any() else {name: int(read.roles[role]) for role, name in ROLES.items()},
        agreement=agreement,
        not_compared=why,
        storage=read.storage(),
        remarks=_remarks(store, teacher, tokenizer),
    )


class _Reading:
    """What only the samples themselves say."""

    def __init__(self, store: GenerationStore) -> None:
        self.folder, size = store.folder, store.layout.vocab_size
        self.counts, self.starts = np.zeros(size, np.int64), np.zeros(size, np.bool_)
        self.roles, self.arrays = np.zeros(len(ROLES), np.int64), dict[str, int]()
        self.ended = np.zeros(len(store.records), np.bool_)
        self.targets: NDArray[Any] | None = None
        ends, limit = _ends(store.identity), store.identity.get("max_length")
        for place, record in enumerate(store.records):
            view, chosen = store.view(int(record["index"])), int(record["chosen"])
            tokens, roles = view["tokens"], view.get("roles")
            np.add.at(self.counts, tokens[written(len(tokens), chosen, roles)], 1)
            self.starts[tokens[max(0, len(tokens) - chosen - 1)]] = True
            # Only an end token makes a sample shorter, with a chat template even one that the model does not call so.
            self.ended[place] = int(tokens[-1]) in ends or (limit is not None and len(tokens) < limit)
            if roles is not None:
                self.roles += np.bincount(roles, minlength=len(ROLES))
            for name, array in view.items():
                self.arrays[name] = self.arrays.get(name, 0) + array.nbytes
            self.targets = view.get("targets", self.targets)

    def storage(self) -> Storage:
        """What samples take on disk."""
        patterns = ("store.json", "shard-*.index", "shard-*.data")  # no files that a writer is about to rename
        total = sum(path.stat().st_size for pattern in patterns for path in self.folder.glob(pattern))
        if self.targets is None:
            return Storage(total=total, arrays=self.arrays, targets=None, entry_bytes=0)
        kept = f"the {self.targets.shape[-1]} most probable tokens" if "tails" in self.arrays else "logits of the whole vocabulary"
        return Storage(total=total, arrays=self.arrays, targets=kept, entry_bytes=self.targets.itemsize)


def _ends(identity: dict[str, Any]) -> set[int]:
    """Tokens that end a sample."""
    script = identity.get("script")
    return set(identity.get("end_tokens") or (script.get("end_tokens", ()) if isinstance(script, dict) else ()))


def _never(identity: dict[str, Any], tokenizer: Any) -> list[int]:
    """Ids that generation never drew: those its tokenizer does not know."""
    if tokenizer is None or tokenizer_fingerprint(tokenizer) != identity.get("tokenizer"):
        return []
    return sorted(set(range(identity["vocab_size"])) - set(tokenizer.get_vocab().values()))


def _start(identity: dict[str, Any], starts: NDArray[np.bool_], samples: int, teacher: Any, tokenizer: Any) -> StartTokens | None:
    if identity.get("mode") not in ("hybrid", "greedy", "sample"):
        return None
    distinct, allowed = int(starts.sum()), start_tokens(teacher, tokenizer) if hasattr(teacher, "get_input_embeddings") else []
    if digest(allowed) != identity.get("script", {}).get("start_tokens"):
        return StartTokens(distinct=distinct, allowed=None, by_chance=None)
    by_chance = len(allowed) * (1 - (1 - 1 / len(allowed)) ** samples)
    return StartTokens(distinct=distinct, allowed=len(allowed), by_chance=by_chance)


def _remarks(store: GenerationStore, teacher: Any, tokenizer: Any) -> list[str]:
    """What does not fit together."""
    found, identity = list(store.damage), store.identity
    if tokenizer is not None and identity.get("tokenizer") not in (None, tokenizer_fingerprint(tokenizer)):
        found.append("The tokenizer given here is not the one that these samples were generated with: the texts below may be wrong.")
    if hasattr(teacher, "state_dict") and identity.get("engine") == "transformers" and fingerprint(teacher) != identity["teacher"]:
        dtype = str(getattr(teacher, "dtype", "")).removeprefix("torch.")
        found.append(
            f"The teacher given here is not the one that wrote these samples: its weights differ or their dtype does ({dtype} here, "
            f"{identity.get('dtype')} there)."
        )
    return found
