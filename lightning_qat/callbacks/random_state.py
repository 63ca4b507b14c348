"""The random numbers of a resumed run are those the uninterrupted run would have drawn: Lightning's checkpoints hold no generators."""

import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed

CHECKPOINT_KEY = "random_states"
_VERSION = 1


class RandomState:
    """The generators of torch, numpy and Python, of every rank, in and out of checkpoints.

    They are put back when training starts, after Lightning has made an iterator of the data loader (which draws a seed), and before the
    first batch is fetched.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Put the states of all ranks into a checkpoint, as plain data; called by all ranks, and draws nothing."""
        states: list[Any] = [_current(trainer.strategy.root_device)]
        if distributed.is_available() and distributed.is_initialized():
            states *= distributed.get_world_size()
            distributed.all_gather_object(states, states[0])
        checkpoint[CHECKPOINT_KEY] = {"format_version": _VERSION, "ranks": states}

    def load(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's state for :meth:`restore`; where there is none, say so."""
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None or saved["format_version"] != _VERSION:
            rank_zero_warn(
                "The checkpoint holds no states of random number generators (it was written without QuantizationCallback, or by another "
                "version); the resumed run is right, but draws other random numbers than the uninterrupted run would have drawn"
            )
        elif len(saved["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(saved['ranks'])} processes and this run has {trainer.world_size}: the states of their "
                "random number generators are not restored, and the run goes on with those it has"
            )
        else:
            self._loaded = saved["ranks"][trainer.global_rank]

    def restore(self, trainer: pl.Trainer) -> None:
        """Put this rank's state back, if there is one; called when training starts."""
        if self._loaded is None:
            return
        restore_loader_position(trainer)
        self.restore_numbers(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _renew_iterator(trainer)

    def restore_numbers(self, trainer: pl.Trainer) -> None:
        """Put back the generators only: enough for the checkpoint of a finished run, from which no training starts."""
        if self._loaded is not None:
            _set(self._loaded, trainer.strategy.root_device)
            self._loaded = None

    def forget(self) -> None:
        """Drop what was loaded."""
        self._loaded = None


def restore_loader_position(trainer: pl.Trainer) -> None:
    """Give the data loader the position that Lightning has loaded and lost.

    It loads the position while it makes the iterator, and that happens too early where `configure_optimizers` reads
    `trainer.estimated_stepping_batches` (Lightning's issue 20550).
    """
    loop = trainer.fit_loop
    if loop.restarting and any(loop._combined_loader_states_to_load) and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def _renew_iterator(trainer: pl.Trainer) -> None:
    """After the last batch of an epoch the uninterrupted run makes a new iterator; Lightning made the resumed run's before it started."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None and fetcher.length is not None:  # without a length, the first batch has been fetched already
        fetcher.iterator = _NextEpoch(fetcher)


class _NextEpoch(Iterator[Any]):
    """Makes the iterator of an epoch when its first batch is wanted; dropped where Lightning makes one itself."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher = fetcher

    def __next__(self) -> Any:
        self.fetcher.iterator = iter(self.fetcher.combined_loader)
        return next(self.fetcher.iterator)


def _current(device: torch.device) -> dict[str, Any]:
    """States as tensors and numbers, which `torch.load(weights_only=True)` takes."""
    version, words, gauss = random.getstate()
    of_numpy: Any = numpy.random.get_state()
    _, key, position, has_gauss, cached = of_numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (torch.tensor(key.astype("int64")), int(position), int(has_gauss), float(cached)),
        "python": (version, torch.tensor(words), gauss),
    }


def _set(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    key, *rest = state["numpy"]
    numpy.random.set_state(("MT19937", key.numpy().astype("uint32"), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
