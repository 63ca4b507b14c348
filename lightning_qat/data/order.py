"""The order of training samples: a pure function of (seed, epoch, ranks), resumed from the trainer's own count of completed batches.

The count is asked for when an epoch begins, after Lightning has restored or reset it, so nothing of ours has to be saved.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class EpochOrder(DistributedSampler[int]):
    """A permutation per epoch, of which every rank takes its share; Lightning leaves a distributed sampler as it is.

    Args:
        size: Number of samples.
        seed: Seed of all epochs.
        consumed: Called when an epoch begins; how many of this rank's samples were used up before.
        world: Number of ranks.
        rank: This rank.
    """

    def __init__(self, size: int, seed: int, consumed: Callable[[], int], world: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.consumed = consumed

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.consumed(), None)


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A loader that tells Lightning it can resume; its position is the trainer's, so it has none to save."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
