"""Checkpoints that are whole or not there, whatever kills the run, as files and as folders."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path
from weakref import proxy

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.generation.store.durable import sync as _sync

PART, OLD = ".part", ".old"  # a checkpoint that is being written or deleted, and one that is being replaced
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class AtomicModelCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` whose files and folders have their final names only while they are complete.

    Each checkpoint is written beside its place, flushed to the disk and then renamed; one that is overwritten is exchanged, so there is
    always one of the two. A folder of a distributed checkpoint is treated in the same way. What a killed run left half-written is
    removed when the next one starts.

    Lightning's own callback writes folders in place, and lets files through the system's temporary folder, which is a copy where that is
    another disk.

    Example::

        AtomicModelCheckpoint(dirpath="runs/first", save_last=True, every_n_train_steps=500)
        trainer.fit(module, data, ckpt_path="last")   # the first time too: without a checkpoint it starts at the beginning

    Args:
        dirpath: A local folder, for one run at a time. This and all other arguments are those of ``ModelCheckpoint``.

    Raises:
        MisconfigurationException: At the start of training, where files are written by another thread (``AsyncCheckpointIO``) or to a
            remote file system, neither of which this callback can rename at the right moment.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and clear away what a killed run left."""
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise MisconfigurationException(
                "AtomicModelCheckpoint: AsyncCheckpointIO writes while training goes on, so nobody knows when a checkpoint is complete; "
                "use ModelCheckpoint, or leave the plugin out"
            )
        if not _is_local_file_protocol(str(self.dirpath)):
            raise MisconfigurationException(
                f"AtomicModelCheckpoint.dirpath: got {str(self.dirpath)!r}, expected a local folder; object stores show no half-written "
                "files, use ModelCheckpoint there"
            )
        if stage == "fit":
            if trainer.is_global_zero:
                clear_leftovers(Path(str(self.dirpath)))
            trainer.strategy.barrier()

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        folder = str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        if _is_local_file_protocol(folder):
            put_back(Path(folder))
        return super()._find_last_checkpoints(trainer)

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        path = Path(filepath)
        part = beside(path, PART)
        trainer.save_checkpoint(str(part), self.save_weights_only)  # ends with a barrier: all ranks have written
        if trainer.is_global_zero:
            flush(part)
            replace(part, path)
        trainer.strategy.barrier()
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @override
    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            path = Path(filepath)
            for name in path.parent.iterdir():
                if name.is_symlink() and name != path and name.resolve() == path.resolve():
                    link(Path(self._last_checkpoint_saved), name)  # the last checkpoint; it would point nowhere for a moment
            remove(path)

    @staticmethod
    @override
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()


def beside(path: Path, suffix: str) -> Path:
    """The hidden neighbour of a checkpoint; the name is not one that Lightning takes for a checkpoint."""
    return path.with_name(f".{path.name}{suffix}")


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for item in (*(path.rglob("*") if path.is_dir() else ()), path):
        _sync(item)


def replace(part: Path, path: Path) -> None:
    """Give a complete checkpoint its final name; one that has it already is there until the other one is."""
    if not _is_folder(part) and not _is_folder(path):
        part.replace(path)
    elif not os.path.lexists(path):
        part.rename(path)
    elif exchange(part, path):
        _delete(part)
    else:  # two steps; whoever finds only the first one done does the other (put_back)
        old = beside(path, OLD)
        _delete(old)
        path.rename(old)
        part.rename(path)
        _delete(old)
    _sync(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change their names in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def link(path: Path, name: Path) -> None:
    """Let a symbolic link point to a checkpoint, in place of whatever has its name."""
    part = beside(name, PART)
    _delete(part)
    part.symlink_to(os.path.relpath(path, name.parent))
    replace(part, name)


def remove(path: Path) -> None:
    """Delete a checkpoint; its name is gone before its content."""
    if os.path.lexists(path):
        part = beside(path, PART)
        _delete(part)
        path.rename(part)
        _delete(part)


def put_back(folder: Path) -> None:
    """Finish the replacing of folders that a kill interrupted; all ranks may do it at once."""
    for old in folder.glob(f".*{OLD}"):
        path = old.with_name(old.name[1 : -len(OLD)])
        if not os.path.lexists(path):
            with contextlib.suppress(OSError):  # another rank was faster
                part = beside(path, PART)  # complete, else the other one would have its name still
                (part if os.path.lexists(part) else old).rename(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run has left in a folder of checkpoints, apart from its checkpoints."""
    if folder.is_dir():
        put_back(folder)
        for suffix in (PART, OLD):
            for path in folder.glob(f".*{suffix}"):
                _delete(path)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
