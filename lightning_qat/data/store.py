"""Generated token ids on disk: one safetensors file a tile of samples, and `store.json` with what they were generated from.

A tile is written under another name and then renamed, so a file that is there is whole: killing the writer loses at most the tile in
flight, and resuming means writing the tiles that are missing. Tiles carry a checksum; a store of another teacher or other settings is
refused.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1


class GenerationStore:
    """A folder of tiles.

    Args:
        folder: Where the tiles lie; created when the store is opened for writing.
        settings: Plain data that identifies the samples: teacher fingerprint, generation settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = {"format_version": FORMAT_VERSION, **settings}

    def open(self) -> None:
        """Create the folder or check that it holds these very samples.

        Raises:
            ValueError: The folder cannot be written, or holds samples of another teacher or other settings.
        """
        index = self.folder / "store.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not index.exists():
                _write(index, (json.dumps(self.settings, indent=1) + "\n").encode())
        except OSError as error:
            raise ValueError(f"store: cannot write to {str(self.folder)!r}: {error}") from error
        try:
            present = json.loads(index.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"store: {str(index)!r} is damaged ({error}); delete the folder or choose another one") from error
        if not isinstance(present, dict):
            raise ValueError(f"store: {str(index)!r} is damaged (not an object); delete the folder or choose another one")
        wanted = self.settings.items()
        changed = [f"{key}: {present.get(key)!r} there, {value!r} here" for key, value in wanted if present.get(key) != value]
        if changed:
            raise ValueError(
                f"store: {str(self.folder)!r} holds samples of other settings ({'; '.join(changed)}); choose another folder for `store`"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for writing.

        Raises:
            ValueError: Another process writes to it.
        """
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"store: another process writes to {str(self.folder)!r}; wait for it or choose another folder") from error
        try:
            for torn in self.folder.glob("*.part"):
                torn.unlink()
            yield
        finally:
            lock.release()

    def path(self, tile: int) -> Path:
        """The file of a tile."""
        return self.folder / f"tile-{tile:06d}.safetensors"

    def missing(self, tiles: int) -> list[int]:
        """Which of the first `tiles` tiles are not there."""
        return [tile for tile in range(tiles) if not self.path(tile).exists()]

    def write(self, tile: int, tokens: Tensor, lengths: Tensor) -> None:
        """Write one tile: tokens [rows, max_length], of which each row's first `lengths` count."""
        flat = torch.cat([row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]).to(torch.int32)
        tensors = {"tokens": flat, "lengths": lengths.to(torch.int32)}
        temporary = self.path(tile).with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path(tile))

    def read(self, tile: int) -> list[Tensor]:
        """The samples of a tile, int64.

        Raises:
            ValueError: The file is missing or damaged; it can be deleted and will be generated again.
        """
        path = self.path(tile)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("tokens", "lengths")}
                intact = (file.metadata() or {}).get("sha256") == _digest(tensors)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"store: cannot read {str(path)!r} ({error}); delete it and it is generated again") from error
        if not intact:
            raise ValueError(f"store: {str(path)!r} is damaged (checksum differs); delete it and it is generated again")
        return list(tensors["tokens"].long().split(tensors["lengths"].tolist()))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
