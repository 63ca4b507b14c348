"""The files of a store: pairs of files that only grow, an index of fixed-size records and the samples they point to.

    shard-000-00001.index   a header of 64 bytes, then one record of 56 bytes a sample (:mod:`lightning_qat.generation.store.records`)
    shard-000-00001.data    samples: tokens, roles, tails, targets, as far as there are any, little-endian, each on a multiple of 8 bytes

The first number is the writer's, the second counts its shards. Data is on disk before its records are written: what a record points to
is whole, and what is behind the last record belongs to a write that was cut short.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.generation.store.records import HEADER, RECORD, ShardFormat, aligned

_NAME = re.compile(r"shard-(\d{3,})-(\d{5,})\.(?:index|data)")


@dataclass(kw_only=True)
class Contents:
    """What an index says.

    Attributes:
        records: Its intact records whose data is there, in the order in which they were written.
        damage: What is wrong with the two files, a sentence each.
        appendable: Whether samples may be appended.
        end: Where the last intact record ends in the index.
    """

    records: NDArray[Any] = field(default_factory=lambda: np.zeros(0, RECORD))
    damage: list[str] = field(default_factory=list)
    appendable: bool = False
    end: int = HEADER.size


class Shard:
    """One pair of files.

    Args:
        folder: Where they lie.
        writer: Who writes them.
        number: Which of the writer's shards this is.
        layout: How samples are laid out.
    """

    def __init__(self, folder: Path, writer: int, number: int, layout: ShardFormat) -> None:
        self.writer, self.number, self.layout = writer, number, layout
        self.index = folder / f"shard-{writer:03d}-{number:05d}.index"
        self.data = self.index.with_suffix(".data")
        self._map: NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def load(self) -> Contents:
        """Read the index; a record that is cut off at its end belongs to a write in flight and is no damage."""
        try:
            raw = self.index.read_bytes()
            length = self._length()
        except FileNotFoundError:
            return Contents(damage=[f"{self.index.name} is missing, without it {self.data.name} cannot be read"])
        except OSError as error:
            return Contents(damage=[f"{self.index.name} or its data cannot be read ({error.strerror})"])
        if (fault := self.layout.header_fault(raw[: HEADER.size])) is not None:
            return Contents(damage=[f"{self.index.name} cannot be used: {fault}"])
        records, places = self.intact_records(raw)
        damage = []
        if lost := (len(raw) - HEADER.size) // RECORD.itemsize - len(records):
            damage.append(f"{self.index.name} holds damaged records ({lost} of them), whose samples count as missing")
        there = records["offset"].astype(np.int64) + self.layout.sizes(records) <= (length or 0)
        if not there.all():
            state = "is missing" if length is None else "is shorter than its index says"
            damage.append(f"{self.data.name} {state}, with it these samples: {_some(records['index'][~there])}")
        end = HEADER.size + RECORD.itemsize * (int(places[-1]) + 1 if len(places) else 0)
        return Contents(records=records[there], damage=damage, appendable=bool(there.all()), end=end)

    def intact_records(self, raw: bytes) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The intact records of an index, whatever its header says, and their places among all."""
        count = max(0, (len(raw) - HEADER.size) // RECORD.itemsize)
        records = np.frombuffer(raw, RECORD, count, HEADER.size if count else 0)
        places = np.flatnonzero(self.layout.intact(records))
        return records[places], places

    def read(self, record: Any) -> dict[str, NDArray[Any]] | str:
        """The arrays of a sample as views of the data file, or what is wrong with it; an OSError where nobody can tell."""
        arrays = [(*array, array[1].itemsize * math.prod(array[2])) for array in self.layout.arrays(record)]
        start, size = int(record["offset"]), sum(aligned(length) for *_, length in arrays)
        # Touching mapped pages beyond the end of a file kills the process, so the file is asked each time.
        if (length := self._length()) is None or length < start + size:
            return "missing" if length is None else "cut off"
        if (mapped := self._map) is None:
            mapped = self._map = np.asarray(np.memmap(self.data, np.uint8, "r"))
        blob = mapped[start : start + size]
        if self.layout.crc(blob) != record["data_crc"]:
            return "damaged (its checksum differs)"
        views, place = {}, 0
        for name, dtype, shape, length in arrays:
            views[name] = blob[place : place + length].view(dtype).reshape(shape)
            place += aligned(length)
        return views

    def _length(self) -> int | None:
        try:
            return self.data.stat().st_size
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Let go of the data file; views that somebody holds keep it for themselves."""
        self._map = None


def find_shards(folder: Path, layout: ShardFormat) -> list[Shard]:
    """All shards of a folder, by writer and number, whether or not they can be read."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("shard-*"))
    return [Shard(folder, *key, layout) for key in sorted({(int(name[1]), int(name[2])) for name in names if name})]


def _some(numbers: NDArray[Any]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
