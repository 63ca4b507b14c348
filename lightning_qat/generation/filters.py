"""Which generated samples are worth training on."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


def repetition(tokens: Tensor | np.ndarray) -> float:
    """The share of a sample's 4-grams that occurred before in the same sample; 0 with fewer than 5 tokens.

    Args:
        tokens: Token ids on the CPU, none negative, [tokens].
    """
    ids = np.asarray(tokens).astype(np.int64)
    if len(ids) < 5:
        return 0.0
    # A 4-gram is a pair of pairs; pairs are numbered first, so that no key exceeds 64 bits.
    _, pairs = np.unique((ids[:-1] << 32) + ids[1:], return_inverse=True)
    grams = pairs[:-2] * len(pairs) + pairs[2:]
    return 1 - len(np.unique(grams)) / len(grams)


@dataclass(frozen=True, eq=False)
class FilterReport:
    """What filters left.

    Attributes:
        kept: Numbers of the samples that are kept, in order, uint64.
        total: How many samples there were.
        dropped: How many were dropped for each reason, reasons that never hit left out.
    """

    kept: np.ndarray
    total: int
    dropped: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"kept {len(self.kept):,} of {self.total:,} samples" + (f": {reasons}" if reasons else "")


@dataclass(frozen=True, kw_only=True)
class SampleFilters:
    """Which samples are dropped; by default none.

    Args:
        min_length: Fewest tokens of a sample, whatever it starts with included.
        max_repetition: Largest share of 4-grams that occurred before in the same sample.
        drop_duplicates: Keep only the first of samples with the same tokens.

    Raises:
        ValueError: A filter that cannot work.
    """

    min_length: int | None = None
    max_repetition: float | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.min_length is not None and self.min_length < 1:
            raise ValueError(f"min_length: got {self.min_length}, expected at least 1, or None to keep samples of any length")
        if self.max_repetition is not None and not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition: got {self.max_repetition}, expected a share from 0 to 1, or None to keep all")

    def apply(self, records: np.ndarray) -> FilterReport:
        """Choose samples; one that several filters would drop counts for the first of them.

        Args:
            records: One per sample, sorted by ``index``, with the fields ``index`` (its number), ``tokens`` (their number), ``repetition``
                (:func:`repetition`) and ``hash`` (of the tokens).

        Raises:
            ValueError: Nothing is left.
        """
        kept, dropped = records, {}
        if self.min_length is not None:
            kept = kept[kept["tokens"] >= self.min_length]
            dropped[f"shorter than {self.min_length:,} tokens"] = len(records) - len(kept)
        if self.max_repetition is not None:
            before, kept = len(kept), kept[kept["repetition"] <= np.float32(self.max_repetition)]
            dropped[f"repetitive (> {self.max_repetition:.2f})"] = before - len(kept)
        if self.drop_duplicates:
            before, kept = len(kept), kept[np.sort(np.unique(kept["hash"], return_index=True)[1])]
            dropped["duplicates" if before - len(kept) > 1 else "duplicate"] = before - len(kept)
        report = FilterReport(kept["index"], len(records), {reason: count for reason, count in dropped.items() if count})
        if len(kept) == 0:
            raise ValueError(f"filters: {report}; expected some to be left; loosen min_length or max_repetition, or look at the samples")
        return report
