"""A Lightning checkpoint as plain data: a file, or a folder with a part of the weights from each process. No code in it is ever run.

A folder is what `torch.distributed.checkpoint` writes. Its index, ``.metadata``, is a pickle that torch's own reader unpickles without
limits; here it may name nothing but the classes that torch writes into it. Everything else is read with ``weights_only=True``.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

INDEX, REST = ".metadata", "meta.pt"
WEIGHTS = ("state_dict", "model")  # where FSDP2 and FSDP keep the weights
_RECORDS = {
    "pathlib": ("PosixPath", "WindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    ),
}


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path looks like a checkpoint: a .ckpt file (or what Lightning made of a folder), or a folder of several processes."""
    return str(path).endswith((".ckpt", ".ckpt.consolidated")) or (Path(path) / INDEX).is_file()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU.

    Args:
        path: A file of Lightning, or a folder as `ModelParallelStrategy` writes.

    Returns:
        ``state_dict``, ``callbacks``, ``hyper_parameters`` and so on; of a folder without the states of optimizers.

    Raises:
        ValueError: Nothing is there, it is no checkpoint or a damaged one, or it holds pickled objects.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"checkpoint: no file at {str(path)!r}, and no folder")
    saved = _read_folder(place) if place.is_dir() else _read_file(place)
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise ValueError(f"checkpoint: {str(path)!r} is not a checkpoint of Lightning: it holds no 'state_dict'")
    return saved


def _read_file(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # states of optimizers stay on the disk
    except pickle.UnpicklingError as error:
        if (found := re.search(r"GLOBAL ([\w.]+)", str(error))) is None:
            raise ValueError(f"checkpoint: {str(file)!r} is not a checkpoint: it is damaged, or a file of another kind") from error
        raise ValueError(
            f"checkpoint: {str(file)!r} holds a pickled object of {found[1]}, and unpickling can run any code. Train again with plain "
            "values in save_hyperparameters and in the states of callbacks; or, if you trust the file, allow this class in Python first: "
            f"torch.serialization.add_safe_globals([{found[1].rpartition('.')[2]}])"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, OSError) and not zipfile.is_zipfile(file):
            reason = "it is no whole archive, which torch.save writes"  # torch speaks of mmap or of its zip library
        raise ValueError(f"checkpoint: {str(file)!r} is not a checkpoint, or a damaged one: {reason}") from error


def _read_folder(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file() or not (folder / REST).is_file():
        inside = [entry.name for entry in sorted(folder.iterdir()) if is_checkpoint(entry)]
        raise ValueError(
            f"checkpoint: the folder {str(folder)!r} holds no {INDEX} and {REST}; expected what ModelParallelStrategy (FSDP2) writes, or a "
            f".ckpt file (a folder written by export is read by load_quantized){f'; in it is {inside[-1]!r}' if inside else ''}"
        )
    saved: dict[str, Any] = _read_file(folder / REST)
    reader = _Reader(folder)
    try:
        index = reader.read_metadata()
        names = {place[-1]: key for key, place in (index.planner_data or {}).items() if place[0] in WEIGHTS}
        for name, key in names.items():
            if not isinstance(index.state_dict_metadata[key], TensorStorageMetadata):
                raise ValueError(f"checkpoint: {name} in {str(folder)!r} is not a tensor but a pickled object, which is not read")
        tensors = {key: _empty(index.state_dict_metadata[key]) for key in names.values()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        distributed_checkpoint.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    except (CheckpointException, pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError, KeyError) as error:
        raise ValueError(f"checkpoint: {str(folder)!r} is not a checkpoint, or a damaged one: {error}") from error
    return saved | {"state_dict": {name: tensors[key] for name, key in names.items()}}


def _empty(entry: Any) -> torch.Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


class _Reader(FileSystemReader):
    """Reads the index with names that torch writes, and no others."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as stream:
            index = _Unpickler(stream).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(index).__name__}")
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which is not a part of an index; it is refused")
