"""Datasets over generated samples and over windows of real text: items are dictionaries that :mod:`lightning_qat.data.collate` batches."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from lightning_qat.generation.sample import ASSISTANT, Sample
from lightning_qat.generation.store import GenerationStore

Item = dict[str, Any]
LossOn = Literal["all", "assistant"]


def as_item(sample: Sample, source: str, loss_on: LossOn = "all") -> Item:
    """A sample as an item of a dataset.

    Args:
        sample: The sample.
        source: Where it comes from.
        loss_on: Which tokens are trained on: ``all``, or ``assistant`` for those that the teacher wrote as assistant.

    Returns:
        ``input_ids`` [tokens] and ``source``; ``loss_mask`` [tokens], 1 where the distribution over the next token counts, unless all do;
        ``targets`` [tokens, ...] and ``tails`` [tokens] if there are any, padded after the last token, for which there are none.
    """
    item: Item = {"input_ids": sample.tokens, "source": source}
    answers = loss_on == "assistant" and sample.roles is not None
    if sample.targets is not None or answers:
        item["loss_mask"] = torch.ones_like(sample.tokens)
        item["loss_mask"][-1] = 0
    if answers:
        item["loss_mask"][:-1] = sample.roles[1:] == ASSISTANT  # type: ignore[index]
    if sample.targets is not None:
        item["targets"] = pad(sample.targets, (0, 0, 0, 1))
    if sample.tails is not None:
        item["tails"] = pad(sample.tails, (0, 1))
    return item


class StoredSamples(Dataset[Item]):
    """Samples of a store.

    Args:
        store: Holds them.
        numbers: Their numbers, a sequence or array.
        loss_on: As in :func:`as_item`.
    """

    def __init__(self, store: GenerationStore, numbers: Any, loss_on: LossOn = "all") -> None:
        self.store, self.numbers, self.loss_on = store, numbers, loss_on

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> Item:
        return as_item(self.store.read(int(self.numbers[item])), "generated", self.loss_on)


class HeldSamples(Dataset[Item]):
    """Samples in memory; arguments as in :class:`StoredSamples`."""

    def __init__(self, samples: Sequence[Sample], loss_on: LossOn = "all") -> None:
        self.samples, self.loss_on = samples, loss_on

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: int) -> Item:
        return as_item(self.samples[item], "generated", self.loss_on)


class TextWindows(Dataset[Item]):
    """Windows of real text.

    Args:
        windows: Token ids.
        store: Holds the same windows with the teacher's targets; None for no targets.
    """

    def __init__(self, windows: Sequence[Tensor], store: GenerationStore | None = None) -> None:
        self.windows, self.store = windows, store

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, item: int) -> Item:
        return as_item(Sample(index=item, tokens=self.windows[item]) if self.store is None else self.store.read(item), "text")


class PackedRows(Dataset[Item]):
    """Rows of several samples each, with ``position_ids`` that begin at 0 for each sample.

    Args:
        samples: The samples.
        rows: For each row, the places of its samples (:func:`~lightning_qat.data.packing.pack`).
    """

    def __init__(self, samples: Dataset[Item], rows: Sequence[Sequence[int]]) -> None:
        self.samples, self.rows = samples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> Item:
        parts = [self.samples[place] for place in self.rows[item]]
        row: Item = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "source"}
        row["position_ids"] = torch.cat([torch.arange(len(part["input_ids"])) for part in parts])
        return {**row, "source": parts[0]["source"]}
