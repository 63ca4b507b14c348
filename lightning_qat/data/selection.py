"""Which samples of a store are trained on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.data.datasets import LossOn
from lightning_qat.generation import GenerationStore
from lightning_qat.generation.filters import FilterReport, SampleFilters
from lightning_qat.generation.sample import ASSISTANT


def select(store: GenerationStore, count: int, filters: SampleFilters | None, loss_on: LossOn) -> FilterReport:
    """Choose among the first samples of a store.

    Args:
        store: Holds them.
        count: How many of them to look at.
        filters: Drop some.
        loss_on: With ``assistant``, samples in which it wrote nothing are dropped too: there is nothing to learn from them.

    Raises:
        ValueError: Nothing is left.
    """
    records = store.records[store.records["index"] < count]
    report = (filters or SampleFilters()).apply(records)
    if loss_on == "all":
        return report
    answered = np.array([bool((store.view(int(number))["roles"][1:] == ASSISTANT).any()) for number in report.kept])
    if not answered.any():
        raise ValueError("loss_on: got 'assistant', but it wrote nothing in any sample; raise max_length, or use loss_on='all'")
    silent = {} if answered.all() else {"in which the assistant wrote nothing": int((~answered).sum())}
    return FilterReport(report.kept[answered], report.total, report.dropped | silent)


def token_counts(store: GenerationStore, numbers: NDArray[Any]) -> list[int]:
    """How many tokens each of these samples has."""
    return store.records["tokens"][np.searchsorted(store.records["index"], numbers)].tolist()
