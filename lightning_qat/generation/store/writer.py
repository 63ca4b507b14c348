"""Appending to a store: data first, its records after it, each on disk before the next step."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.store.durable import replace_file, sync, write_error
from lightning_qat.generation.store.records import RECORD, ShardFormat
from lightning_qat.generation.store.shards import Shard, find_shards


class ShardWriter:
    """Appends samples to the shards of one writer; made by :meth:`GenerationStore.writing`, which holds the locks.

    Args:
        folder: The store's.
        layout: How samples are laid out.
        writer: Number of this writer.
        limit: Bytes of data after which the next shard begins; a single sample may be larger.
        count: How many samples the store holds, for errors.
    """

    def __init__(self, folder: Path, layout: ShardFormat, writer: int, limit: int, count: Callable[[], int]) -> None:
        self.folder, self.layout, self.writer, self.limit, self._count = folder, layout, writer, limit, count
        self._number = 0
        self._index: FileIO | None = None
        self._data: FileIO | None = None
        self._safe = (0, 0)  # where what is safe ends in index and data
        self._end = 0  # of the data, with samples whose records are pending
        self._pending: list[NDArray[Any]] = []
        with self._on_disk():
            self._resume()

    def append(self, samples: Iterable[Sample]) -> None:
        """Write a group: when this returns it is on disk; if it is cut short, at most this group is lost.

        Args:
            samples: Any number of samples; only those of a full shard are committed before the last one is there.

        Raises:
            ValueError: The disk is full, the folder cannot be written, or a sample is not what :class:`Sample` says. The files are cut
                back to what is safe and the writer can be used again.
        """
        try:
            for sample in samples:
                record, blob = self.layout.encode(sample)
                with self._on_disk():
                    if self._data is None or (self._end and self._end + len(blob) > self.limit):
                        self._commit()
                        self._begin_shard()
                    record["offset"] = self._end
                    _write(self._data, blob, self._end)
                self._end += len(blob)
                self._pending.append(record)
            with self._on_disk():
                self._commit()
        except BaseException:
            self._cut_back()
            raise

    def close(self) -> None:
        """Close the files."""
        for file in (self._index, self._data):
            if file is not None:
                file.close()
        self._index = self._data = None

    def _resume(self) -> None:
        """Go on behind the last intact record of the last shard, or in a new shard if that one cannot take more."""
        for torn in self.folder.glob(f"shard-{self.writer:03d}-*.part"):  # an index that was to be replaced in a run that was killed
            torn.unlink()
        shards = [shard for shard in find_shards(self.folder, self.layout) if shard.writer == self.writer]
        if not shards:
            return
        contents = shards[-1].load()
        self._number = shards[-1].number + (not contents.appendable)
        if contents.appendable:
            ends = contents.records["offset"].astype(np.int64) + self.layout.sizes(contents.records)
            self._safe = (contents.end, int(ends.max(initial=0)))
            self._open(shards[-1])
            self._cut_back()

    def _begin_shard(self) -> None:
        self._number += self._data is not None
        self.close()
        shard = Shard(self.folder, self.writer, self._number, self.layout)
        replace_file(shard.index, self.layout.header)
        self._safe, self._end = (len(self.layout.header), 0), 0
        self._open(shard)
        sync(self.folder)

    def _open(self, shard: Shard) -> None:
        shard.data.touch()
        self._index = FileIO(shard.index, "r+")
        self._data = FileIO(shard.data, "r+")

    def _commit(self) -> None:
        if not self._pending:
            return
        assert self._index is not None
        assert self._data is not None
        os.fsync(self._data.fileno())
        records = self.layout.seal(np.array(self._pending, RECORD)).tobytes()
        _write(self._index, records, self._safe[0])
        os.fsync(self._index.fileno())
        self._safe, self._pending = (self._safe[0] + len(records), self._end), []

    def _cut_back(self) -> None:
        """Cut the files to what is safe; what cannot be cut now is cut by the next one who opens them."""
        self._pending, self._end = [], self._safe[1]
        for file, end in zip((self._index, self._data), self._safe, strict=True):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.truncate(end)

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """What the disk refuses is told with what is safe and the way out."""
        try:
            yield
        except OSError as error:
            self._cut_back()
            raise write_error(self.folder, error, self._count()) from error


def _write(file: FileIO | None, content: bytes, offset: int) -> None:
    """Write all of it: one call of the operating system may take less."""
    assert file is not None
    rest = memoryview(content)
    while rest:
        written = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written


@contextlib.contextmanager
def locked(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Hold the locks of a store, at once or not at all.

    Raises:
        ValueError: Another process holds one, or the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        for name in names:
            try:
                held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
            except Timeout as error:
                raise ValueError(
                    f"store: another process writes to {str(folder)!r} (it holds {name}.lock); wait until it ends or choose another folder "
                    "for `store`"
                ) from error
            except OSError as error:
                raise write_error(folder, error) from error
        yield


def lock_names(writer: int) -> list[str]:
    """The locks of a writer: its own, and for the first writer of a run that of the store, which keeps other runs out."""
    return [*(["store"] if writer == 0 else []), f"writer-{writer:03d}"]
