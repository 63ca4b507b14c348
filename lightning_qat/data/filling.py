"""Writing what is missing of a store, every rank its own share."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_qat.data.ranks import Ranks
from lightning_qat.data.teachers import samples_of
from lightning_qat.generation import GenerationStore, TeacherSource
from lightning_qat.generation.sample import Sample, SampleSource
from lightning_qat.generation.store.writer import ShardWriter


class Filling:
    """A store and who writes it.

    Args:
        source: Writes the samples.
        store: Open, for the samples of this source.
        count: How many samples it shall hold.
        max_length: Most tokens of a sample.
        title: What happens, for the progress bar.
    """

    def __init__(self, source: SampleSource, store: GenerationStore, count: int, max_length: int, title: str) -> None:
        self.source, self.store, self.count, self.max_length, self.title = source, store, count, max_length, title
        self.group = int(source.identity.get("rows", 64))  # samples committed together: about as many as are under way anyway
        self._writer: ShardWriter | None = None
        self._held = contextlib.ExitStack()

    def run(self, ranks: Ranks) -> None:
        """Write this rank's share of what is missing; all ranks come and leave together.

        Raises:
            ValueError: The store cannot be written, another run writes to it, or it is no folder that all ranks share.
        """
        try:
            share, meet = self.begin(ranks), ranks.meeting()
            with TokenBar(self.title, len(share), self.max_length, visible=ranks.rank == 0) as bar:
                self.write(share, bar)
            meet()
        finally:
            self.close()
        self.store.refresh()
        if left := self.store.missing(self.count):
            raise ValueError(f"store: samples {left[:5]} are missing from {str(self.store.folder)!r} after generation; is it shared?")

    def begin(self, ranks: Ranks) -> Sequence[int]:
        """Hold the store for writing; returns this rank's share of what rank 0 finds missing. A whole store is not held."""
        if not ranks.broadcast(self.store.missing(self.count)):
            return []
        self._writer = ranks.first_rank_0(lambda: self._held.enter_context(self.store.writing(ranks.rank)))
        return ranks.share(ranks.broadcast(self.store.missing(self.count)))

    def write(self, numbers: Sequence[int], bar: "TokenBar") -> None:
        """Write samples; what is finished is on disk after every group, so an interrupted run loses little more than is under way."""
        if not numbers:
            return
        assert self._writer is not None
        samples = self._samples(numbers, bar)
        for first in samples:
            self._writer.append(itertools.chain([first], itertools.islice(samples, self.group - 1)))

    def _samples(self, numbers: Sequence[int], bar: "TokenBar") -> Iterator[Sample]:
        stepwise = isinstance(self.source, TeacherSource)
        for sample in samples_of(self.source, numbers, bar.wrote if stepwise else None):
            bar.finished(len(sample.tokens), counted=stepwise)
            yield sample

    def close(self) -> None:
        """Let go of the store."""
        self._writer = None
        self._held.close()


class TokenBar:
    """Progress in tokens; samples that end early count as if they had been written to the end.

    Args:
        title: What happens.
        samples: How many samples will be finished.
        max_length: Most tokens of each; the first one is given.
        visible: Whether to show anything.
    """

    def __init__(self, title: str = "", samples: int = 0, max_length: int = 1, visible: bool = False) -> None:
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} / s"))
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not (visible and samples), transient=True)
        self.task = self.bar.add_task(title, total=samples * (max_length - 1), tokens=0, speed=0.0)
        self.max_length, self.tokens, self.start = max_length, 0, time.monotonic()

    def __enter__(self) -> "TokenBar":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def wrote(self, tokens: int) -> None:
        """So many tokens more."""
        self.tokens += tokens
        speed = self.tokens / max(time.monotonic() - self.start, 1e-9)
        self.bar.update(self.task, advance=tokens, tokens=self.tokens, speed=speed)

    def finished(self, length: int, counted: bool) -> None:
        """A sample of so many tokens is finished.

        Args:
            length: Its tokens.
            counted: Whether :meth:`wrote` has counted them.
        """
        if not counted:
            self.wrote(length - 1)
        self.bar.update(self.task, advance=self.max_length - length)
