"""Samples that are generated while they are trained on, and never stored.

A source finishes its samples in an order of its own; training wants them in the order of their numbers, so that it can be resumed from a
count. What is finished early waits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch.utils.data import Dataset

from lightning_qat.data.datasets import Item, LossOn, as_item
from lightning_qat.data.order import StreamPlan
from lightning_qat.data.teachers import samples_of
from lightning_qat.generation.sample import Sample, SampleSource

Request = int | Sequence[int]  # a number and all that follow it in the plan, or just these


class Generation(Protocol):
    """Whoever writes the samples of a stream, here or in another process."""

    vocab_size: int

    def samples(self, request: Request) -> Iterator[Sample]:
        """The samples of a request, in its order; the one before it is given up."""
        ...

    def close(self) -> None:
        """Free the teacher."""
        ...


class GenerationHere:
    """The teacher writes in this process, whenever a sample is asked for that is not there yet.

    Args:
        source: Writes samples.
        plan: Which samples this rank trains on.
        buffer: As in :func:`in_order`.
    """

    def __init__(self, source: SampleSource, plan: StreamPlan, buffer: int) -> None:
        rows = int(source.identity.get("rows", 1))
        if buffer < rows:
            raise ValueError(f"buffer: got {buffer}, expected at least rows={rows}, which are written together")
        self.source: SampleSource | None = source
        self.vocab_size, self.plan, self.buffer = source.vocab_size, plan, buffer

    def samples(self, request: Request) -> Iterator[Sample]:
        """See :class:`Generation`."""
        assert self.source is not None
        return in_order(self.source, self.plan.onwards(request) if isinstance(request, int) else iter(request), self.buffer)

    def close(self) -> None:
        """See :class:`Generation`."""
        self.source = None


def in_order(source: SampleSource, numbers: Iterator[int], buffer: int) -> Iterator[Sample]:
    """The samples of `numbers`, which may be endless, in that order.

    Args:
        source: Writes them.
        numbers: Which.
        buffer: Most samples that are under way or waiting. While the first sample in line is long, short ones overtake it without end;
            at this bound the source gets no more numbers and comes to its end, and starts anew when the line is empty.
    """
    line: deque[int] = deque()  # given to the source and not given out, in order
    ready: dict[int, Sample] = {}
    running: Iterator[Sample] = iter(())

    def given() -> Iterator[int]:
        while len(line) < buffer and (number := next(numbers, None)) is not None:
            line.append(number)
            yield number

    while True:
        if line and line[0] in ready:
            yield ready.pop(line.popleft())
            continue
        sample = next(running, None)
        if sample is None:
            running = samples_of(source, given())
            sample = next(running, None)
        if sample is None:
            return
        ready[sample.index] = sample


class SampleStream:
    """Gives samples by their numbers, and starts anew where a number is not the one that follows: at a resumed or a shortened epoch.

    Args:
        plan: Which samples this rank trains on.
        generation: Writes them.
    """

    def __init__(self, plan: StreamPlan, generation: Generation) -> None:
        self.plan, self.generation = plan, generation
        self._expected: Iterator[int] = iter(())
        self._samples: Iterator[Sample] = iter(())

    def read(self, number: int) -> Sample:
        """The sample of this number.

        Raises:
            ValueError: The source ended without it.
        """
        if next(self._expected, None) != number:
            self._expected = self.plan.onwards(number)
            self._samples = self.generation.samples(next(self._expected))
        sample = next(self._samples, None)
        if sample is None:
            raise ValueError(f"teacher: its samples ended before sample {number}; a source must give every sample that it is asked for")
        return sample

    def these(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of these numbers."""
        self._expected = iter(())
        return list(islice(self.generation.samples(numbers), len(numbers)))

    def close(self) -> None:
        """Free the teacher."""
        self._expected, self._samples = iter(()), iter(())
        self.generation.close()


class StreamedSamples(Dataset[Item]):
    """The training samples of a stream; unlike in other datasets, items are asked for by their numbers, which grow from epoch to epoch.

    Args:
        stream: Gives samples.
        size: How many make an epoch.
        loss_on: As in :func:`~lightning_qat.data.datasets.as_item`.
    """

    def __init__(self, stream: SampleStream, size: int, loss_on: LossOn = "all") -> None:
        self.stream, self.size, self.loss_on = stream, size, loss_on

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Item:
        return as_item(self.stream.read(number), "generated", self.loss_on)
