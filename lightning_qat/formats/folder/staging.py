"""A folder that is whole or not there: written under a hidden name beside its place, renamed when it is complete."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lightning_qat.generation.store.durable import FULL, sync

LEAST_FREE = 2**16  # bytes; a disk with less is what stopped a library that tells nothing


def check_folder(path: str | Path) -> Path:
    """The folder that is to be created.

    Raises:
        ValueError: It is a file, a folder with something in it, the working directory, or cannot be looked at.
    """
    target = Path(path)
    try:
        target = target.resolve() if target.is_symlink() else target
        taken = os.path.lexists(target) and (not target.is_dir() or any(target.iterdir()))
        here = target.exists() and target.samefile(Path.cwd())
    except (OSError, ValueError) as error:  # a ValueError is a zero byte in the name
        raise _refused(target, error) from error
    if taken:
        raise ValueError(f"path: {str(target)!r} exists and is not an empty folder; choose another one")
    if here or not target.name:
        raise ValueError(f"path: {str(target)!r} is the working directory, which cannot be replaced; name a folder in it")
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` at the end of the block, or vanishes if the block fails.

    While it is written it is called ``.<name>.<process>.part`` and locked. What a killed process left under such a name is removed first.

    Args:
        target: A folder of :func:`check_folder`; it may exist if it is empty.

    Raises:
        ValueError: The disk is full or refuses; or another process made `target` meanwhile.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary.mkdir()
        lock = _lock(temporary)
    except (OSError, ValueError) as error:
        raise _refused(target, error) from error
    try:
        yield temporary
        _sync_all(temporary)
        os.replace(temporary, target)  # of an empty folder it takes the place, of another one it is refused
        sync(target.parent)
    except Exception as error:
        if (reason := _disk_error(error, temporary)) is not None:
            raise _refused(target, reason, left="; nothing was left behind") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or the process dies; None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(target: Path) -> None:
    for folder in target.parent.iterdir():
        name = folder.name
        middle = name.removeprefix(f".{target.name}.").removesuffix(".part")
        if name != f".{target.name}.{middle}.part" or not middle.isdecimal() or folder.is_symlink() or not folder.is_dir():
            continue
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _sync_all(folder: Path) -> None:
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)


def _disk_error(error: Exception, folder: Path) -> Exception | None:
    """What the disk said, if it is why a library failed: some put it into words of their own, some do not tell."""
    if isinstance(error, OSError) or (isinstance(error, SafetensorError) and "os error" in str(error)):
        return error
    try:
        is_full = shutil.disk_usage(folder).free < LEAST_FREE
    except OSError:
        return None
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else None


def _refused(target: Path, error: Exception, left: str = "") -> ValueError:
    code = error.errno if isinstance(error, OSError) else None
    way_out = "; free space there and export again" if code in FULL else ""
    if left and code in (errno.ENOTEMPTY, errno.EEXIST):
        way_out = "; another process wrote there meanwhile, choose another folder"
    return ValueError(f"path: cannot write to {str(target)!r}: {error}{left}{way_out}")
