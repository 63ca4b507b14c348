"""The order of training samples: a pure function of (seed, epoch), resumed from the trainer's own count of completed batches.

The count is asked for when an epoch begins, after Lightning has restored or reset it, so nothing of ours has to be saved.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


class EpochOrder(Sampler[int]):
    """A permutation per epoch.

    Args:
        size: Number of samples.
        seed: Seed of all epochs.
        consumed: Called when an epoch begins; how many of its samples were used up before.
    """

    def __init__(self, size: int, seed: int, consumed: Callable[[], int]) -> None:
        self.size, self.seed, self.consumed = size, seed, consumed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.size, generator=generator)[self.consumed() :].tolist()


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A loader that tells Lightning it can resume; its position is the trainer's, so it has none to save."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
