"""The stores of a data module: those that are there, and those that are to be filled."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_qat.data.filling import Filling
from lightning_qat.data.ranks import Ranks
from lightning_qat.data.teachers import own_names
from lightning_qat.data.text import FOLDER, TextTargets, text_identity
from lightning_qat.generation import GenerationStore
from lightning_qat.generation.sample import SampleSource


def fillings(
    source: SampleSource, folder: Path, num_samples: int, windows: Sequence[Tensor], max_length: int, ranks: Ranks
) -> list[Filling]:
    """The store of generated samples, and that of the teacher's targets for real text where targets are kept.

    Args:
        source: Writes the samples.
        folder: The store.
        num_samples: How many samples it shall hold.
        windows: Real text to train on.
        max_length: Most tokens of a sample and of a window.
        ranks: This process among others.

    Raises:
        ValueError: A store is damaged or holds something else, or the source cannot score text.
    """
    work: list[tuple[SampleSource, Path, int, str]] = [(source, folder, num_samples, "Generating")]
    if windows and source.identity.get("logits") is not None:
        work.append((TextTargets(source, windows), folder / FOLDER, len(windows), "Scoring text"))
    found = []
    for writer, place, count, title in work:
        with own_names():
            store = ranks.first_rank_0(partial(GenerationStore(place).open, writer.identity, count))
        _refuse_damage(store)
        found.append(Filling(writer, store, count, max_length, title))
    return found


def existing_store(folder: Path, num_samples: int | None) -> GenerationStore:
    """A store that holds all its samples, or the first `num_samples` of them.

    Raises:
        ValueError: There is none, it is damaged, or it holds fewer.
    """
    store = GenerationStore.existing(folder)
    _refuse_damage(store)
    wanted = store.requested if num_samples is None else num_samples
    if missing := store.missing(wanted):
        raise ValueError(
            f"num_samples: got {wanted}, {str(folder)!r} holds {len(store.records)} samples and lacks sample {missing[0]}; ask for "
            "fewer, or name the teacher, so that it writes the rest"
        )
    return store


def existing_targets(store: GenerationStore, windows: Sequence[Tensor], text: str | None, max_length: int) -> list[GenerationStore]:
    """The store of targets for real text, if there are windows and targets are kept.

    Raises:
        ValueError: It does not hold them all.
    """
    if not windows or store.identity.get("logits") is None:
        return []
    way_out = "name the teacher, so that it writes them"
    folder = store.folder / FOLDER
    if not (folder / "store.json").is_file():
        raise ValueError(f"text: {str(store.folder)!r} holds the teacher's targets for its samples, but none for {text!r}; {way_out}")
    targets = GenerationStore.existing(folder)
    _refuse_damage(targets)
    if targets.identity != text_identity(store.identity, windows, max_length) or targets.missing(len(windows)):
        raise ValueError(f"text: {str(folder)!r} holds targets, but not those of all of {text!r}; {way_out}")
    return [targets]


def stored_rows(folder: Path) -> Any:
    """The rows of a store that can be read; None otherwise."""
    with contextlib.suppress(ValueError):
        return GenerationStore.existing(folder).identity.get("rows")
    return None


def _refuse_damage(store: GenerationStore) -> None:
    if store.damage:
        way_out = f"`lightning-qat generate --resume --store {store.folder}` drops what is damaged and writes it again"
        raise ValueError(f"store: {store.damage[0]} (in {str(store.folder)!r}); {way_out}")
