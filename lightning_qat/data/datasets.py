"""Datasets over generated samples and over windows of real text, and how they are put into batches."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_qat.data.store import GenerationStore
from lightning_qat.evaluation import pad_batch


class GeneratedSamples(Dataset[dict[str, Any]]):
    """Samples `indices` of a store; item i is ``{"input_ids": int64 [tokens]}``."""

    def __init__(self, store: GenerationStore, indices: range, rows: int) -> None:
        self.store, self.indices, self.rows = store, indices, rows
        self._tile = lru_cache(maxsize=64)(store.read)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        return {"input_ids": self._tile(index // self.rows)[index % self.rows], "source": "generated"}

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "indices": self.indices, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class TextWindows(Dataset[dict[str, Any]]):
    """Windows of real text."""

    def __init__(self, windows: Sequence[Tensor]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {"input_ids": self.windows[item], "source": "text"}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pad on the right.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [batch, longest], and ``source``, where the samples come from.
    """
    ids, mask = pad_batch([sample["input_ids"] for sample in samples])
    return {"input_ids": ids, "attention_mask": mask, "source": samples[0]["source"]}
