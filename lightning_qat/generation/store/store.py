"""Generated samples on disk: hundreds of thousands of them, written by runs that may be killed at any time, and never a wrong token.

A folder holds `store.json`, which says what the samples were generated from, and shards (`shards.py`). Samples are appended in groups,
and a group that is on disk is never touched again. Everything has a checksum: what is damaged is named when it is read, counts as missing
after :meth:`GenerationStore.repair`, and is generated again.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.store import repair, views
from lightning_qat.generation.store.durable import write_error
from lightning_qat.generation.store.manifest import Manifest
from lightning_qat.generation.store.records import RECORD, ShardFormat
from lightning_qat.generation.store.shards import Shard, find_shards
from lightning_qat.generation.store.writer import ShardWriter, lock_names, locked

if TYPE_CHECKING:
    import datasets

OPEN_SHARDS = 64  # data files mapped at once; each costs a file descriptor
_READ_AS = {"u2": np.int64, "u4": np.int64, "u1": np.uint8, "f4": np.float32, "i4": np.int32, "f2": np.float16}


class GenerationStore:
    """A folder of samples; :meth:`open` or :meth:`existing` comes first.

    It can be pickled, for the worker processes of a data loader: a copy reads the same samples.

    Args:
        folder: Where they lie.
        shard_bytes: Size at which a data file is full.

    Attributes:
        identity: Plain data, all that the samples depend on.
        requested: How many samples were asked for.
        records: One record per sample that is there, by number (fields: :data:`lightning_qat.generation.store.records.RECORD`). Where a
            number is there twice, the last one counts, in the order of the files' names and then of writing.
        damage: What is wrong with the files as far as their indices tell, a sentence each.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = 2**30) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes: got {shard_bytes}, expected at least 1")
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.identity: dict[str, Any] = {}
        self.requested = 0
        self.records: NDArray[Any] = np.zeros(0, RECORD)
        self.damage: list[str] = []
        self._layout: ShardFormat | None = None
        self._shards: list[Shard] = []
        self._owners: NDArray[np.int64] = np.zeros(0, np.int64)  # for each record, which of the shards holds it
        self._mapped: dict[int, None] = {}  # shards whose data is mapped, the oldest first

    def open(self, identity: dict[str, Any], requested: int) -> "GenerationStore":
        """Create the store, or check that it holds samples of this identity.

        A `store.json` that was lost is written anew if the shards belong to this identity.

        Args:
            identity: Plain data with everything that samples depend on; ``vocab_size`` must be among it.
            requested: How many samples are wanted; the store remembers the largest number.

        Raises:
            ValueError: The folder holds samples of another identity (nothing in it is changed), or cannot be written.
        """
        identity = json.loads(json.dumps(identity))
        layout = ShardFormat.of(identity)
        there = Manifest.matching(self.folder, identity)
        self.requested = max(requested, there.requested if there else 0)
        if there is None or there.requested != self.requested:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                Manifest(identity, self.requested).write(self.folder)
            except OSError as error:
                raise write_error(self.folder, error) from error
        self.identity, self._layout = identity, layout
        self.refresh()
        return self

    @classmethod
    def existing(cls, folder: str | Path, shard_bytes: int = 2**30) -> "GenerationStore":
        """The store in a folder, of the identity it was written with; nothing is changed.

        Raises:
            ValueError: There is none, or its `store.json` is damaged.
        """
        store = cls(folder, shard_bytes)
        manifest = Manifest.existing(store.folder)
        store.identity, store.requested = manifest.identity, manifest.requested
        store._layout = ShardFormat.of(manifest.identity)
        store.refresh()
        return store

    def refresh(self) -> None:
        """Look again what is there: other processes may have written."""
        self._shards, self._mapped = find_shards(self.folder, self.layout), {}
        contents = [shard.load() for shard in self._shards]
        self.damage = [text for content in contents for text in content.damage]
        records = np.concatenate([np.zeros(0, RECORD), *(content.records for content in contents)])
        owners = np.repeat(np.arange(len(contents)), [len(content.records) for content in contents])
        # The first of equal numbers in reverse order is the last one written.
        _, last = np.unique(records["index"][::-1], return_index=True)
        chosen = len(records) - 1 - last
        self.records, self._owners = records[chosen], owners[chosen]

    @property
    def layout(self) -> ShardFormat:
        """How samples are laid out in the files."""
        if self._layout is None:
            raise RuntimeError("store: call open() first, or use GenerationStore.existing(folder)")
        return self._layout

    def missing(self, count: int) -> list[int]:
        """Which of the samples 0 to `count` - 1 are not there."""
        there = np.zeros(count, np.bool_)
        numbers = self.records["index"]
        there[numbers[numbers < count]] = True
        return np.flatnonzero(~there).tolist()

    @contextlib.contextmanager
    def writing(self, writer: int = 0) -> Iterator[ShardWriter]:
        """Append samples: ``with store.writing() as writer: writer.append(samples)``.

        Args:
            writer: Number of this writer; of the processes of a run each has its own, and 0 keeps other runs out.

        Raises:
            ValueError: Another process is that writer, or the folder cannot be written.
        """
        with locked(self.folder, lock_names(writer)):
            self.refresh()  # what another process wrote before it let go
            shards = ShardWriter(self.folder, self.layout, writer, self.shard_bytes, self._count)
            try:
                yield shards
            finally:
                shards.close()
                self.refresh()

    def _count(self) -> int:
        self.refresh()
        return len(self.records)

    def view(self, index: int) -> dict[str, NDArray[Any]]:
        """The arrays of a sample as they lie in the data file, without a copy: read-only, tokens in 16 or 32 bits without sign.

        Args:
            index: The sample's number.

        Returns:
            `tokens` and, as far as there are any, `roles`, `tails` and `targets`; shapes as in :class:`Sample`.

        Raises:
            ValueError: The sample is missing or damaged.
        """
        place = self._place(index)
        owner = int(self._owners[place])
        shard = self._shards[owner]
        try:
            found = shard.read(self.records[place])
        except OSError as error:
            found = f"not readable ({error.strerror})"
        if isinstance(found, str):
            raise ValueError(f"store: sample {index} in {str(shard.data)!r} is {found}; {self._way_out}")
        if owner not in self._mapped:
            self._mapped[owner] = None
            for old in list(self._mapped)[:-OPEN_SHARDS]:
                self._mapped.pop(old, None)
                self._shards[old].close()
        return found

    def _place(self, index: int) -> int:
        """Which of the records is that of a sample."""
        numbers = self.records["index"]
        place = int(np.searchsorted(numbers, np.uint64(index))) if 0 <= index < 2**64 else len(numbers)
        if place == len(numbers) or numbers[place] != index:
            damage = f" ({self.damage[0]})" if self.damage else ""
            raise ValueError(f"store: sample {index} is not in {str(self.folder)!r}{damage}; {self._way_out}")
        return place

    @property
    def _way_out(self) -> str:
        return f"`lightning-qat generate --resume --store {self.folder}` generates what is missing or damaged again"

    def read(self, index: int) -> Sample:
        """A sample, as it was written.

        Args:
            index: Its number.

        Raises:
            ValueError: It is missing or damaged.
        """
        tensors = {name: torch.from_numpy(array.astype(_READ_AS[array.dtype.str[1:]])) for name, array in self.view(index).items()}
        record = self.records[self._place(index)]
        return Sample(index=index, nll=float(record["nll"]), chosen=int(record["chosen"]), **tensors)

    def digest(self, count: int) -> str:
        """SHA-256 over all arrays of the samples 0 to `count` - 1: equal for stores that hold the same, however it was written."""
        digest = hashlib.sha256()
        for index in range(count):
            for name, array in self.view(index).items():
                digest.update(f"{index} {name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(array.data)
        return digest.hexdigest()

    def verify(self) -> list[str]:
        """Read everything and check all checksums: what is wrong, a sentence each; see :meth:`repair`."""
        self.refresh()
        return self.damage + repair.damaged_samples(self._shards)

    def repair(self) -> list[str]:
        """Drop what is damaged, so that :meth:`missing` names it and it can be generated again; no intact sample is touched.

        Returns:
            What was done, a sentence each.

        Raises:
            ValueError: A process writes to the store, or the folder cannot be written.
        """
        self.refresh()
        writers = sorted({0, *(shard.writer for shard in self._shards)})
        with locked(self.folder, [name for writer in writers for name in lock_names(writer)]):
            try:
                done = [text for shard in find_shards(self.folder, self.layout) for text in repair.repair_shard(shard)]
            except OSError as error:
                raise write_error(self.folder, error) from error
        self.refresh()
        return done

    def to_jsonl(self, path: str | Path, tokenizer: Any = None) -> None:
        """All samples as lines of JSON; see :func:`lightning_qat.generation.store.views.to_jsonl`."""
        views.to_jsonl(self, Path(path), tokenizer)

    def to_dataset(self, tokenizer: Any = None) -> "datasets.Dataset":
        """All samples as a data set of Hugging Face; see :func:`lightning_qat.generation.store.views.to_dataset`."""
        return views.to_dataset(self, tokenizer)
