"""The order of training samples: a pure function of (seed, epoch, ranks), resumed from the trainer's own count of completed batches.

The count is asked for when an epoch begins, after Lightning has restored or reset it, so nothing of ours has to be saved.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler

Place = tuple[int, int]  # an epoch, and how many of this rank's samples of it were used up before


class EpochOrder(DistributedSampler[int]):
    """A permutation per epoch, of which every rank takes its share; Lightning leaves a distributed sampler as it is.

    Args:
        size: Number of samples.
        seed: Seed of all epochs.
        place: Called when an epoch begins; where it begins. None where nobody counts: then it is the epoch that was set, from its start.
        world: Number of ranks.
        rank: This rank.
        options: Of the distributed sampler.
    """

    def __init__(self, size: int, seed: int, place: Callable[[], Place | None], world: int = 1, rank: int = 0, **options: Any) -> None:
        super().__init__(range(size), num_replicas=world, rank=rank, seed=seed, **options)  # type: ignore[arg-type]
        self.place = place

    def __iter__(self) -> Iterator[int]:
        # Lightning sets the number of a resumed epoch one too high where `max_steps` is set and the checkpoint is of an epoch's end.
        epoch, used = self.place() or (self.epoch, 0)
        self.set_epoch(epoch)
        return itertools.islice(super().__iter__(), used, None)


class MixedOrder(EpochOrder):
    """In every epoch all of one kind and some of another that stands behind it, shuffled together.

    Args:
        size: How many there are of the first kind, all of which are shown.
        others: How many there are of the other, all in one endless round.
        shown: How many of these an epoch takes from the round.
        seed: Seed of all epochs and of the round.
        options: As in :class:`EpochOrder`.
    """

    def __init__(self, size: int, others: int, shown: int, seed: int, *options: Any) -> None:
        super().__init__(size + shown, seed, *options)
        self.size, self.shown = size, shown
        self.round = torch.randperm(others, generator=torch.Generator().manual_seed(seed)).tolist()

    def __iter__(self) -> Iterator[int]:
        places = super().__iter__()
        first = self.epoch * self.shown - self.size
        for place in places:
            yield place if place < self.size else self.size + self.round[(first + place) % len(self.round)]


class StreamPlan(NamedTuple):
    """Which samples a rank trains on when no epoch repeats another: position p of epoch e is the (e * size + p)-th sample there is.

    Attributes:
        size: Training samples in an epoch.
        held_back: Samples for validation, the numbers from `size` on, which are left out.
        world: Number of ranks; what does not divide by it at the end of an epoch is left out.
        rank: This rank.
    """

    size: int
    held_back: int
    world: int = 1
    rank: int = 0

    def number(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        count = epoch * self.size + position
        return count if count < self.size else count + self.held_back

    def onwards(self, number: int) -> Iterator[int]:
        """The numbers of this rank from `number` on, without end."""
        epoch, position = divmod(number if number < self.size else number - self.held_back, self.size)
        while True:
            yield from (self.number(epoch, place) for place in range(position, self.size - self.size % self.world, self.world))
            epoch, position = epoch + 1, self.rank


class StreamOrder(EpochOrder):
    """The numbers of a stream, one epoch after the other.

    Args:
        plan: Which samples this rank trains on.
        place: As in :class:`EpochOrder`.
    """

    def __init__(self, plan: StreamPlan, place: Callable[[], Place | None]) -> None:
        super().__init__(plan.size, 0, place, plan.world, plan.rank, shuffle=False, drop_last=True)
        self.plan = plan

    def __iter__(self) -> Iterator[int]:
        positions = super().__iter__()
        return (self.plan.number(self.epoch, position) for position in positions)


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A loader that tells Lightning it can resume; its position is the trainer's, so it has none to save.

    It draws no random number of the process, so that a resumed run, which needs one iterator more, draws what the whole run drew.

    Args:
        options: As in :class:`~torch.utils.data.DataLoader`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"generator": torch.Generator(), **options})

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Nothing happens before the first batch is wanted.

        Worker processes would begin at once, and Lightning makes the iterator before it knows where a resumed epoch goes on.
        """
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
