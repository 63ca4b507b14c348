"""Generation as a run of ``Trainer.predict``: any number of devices, under any strategy, with Lightning's progress bar."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from lightning_qat.data.filling import Filling, TokenBar
from lightning_qat.data.ranks import Ranks

Chunk = tuple[int, list[int]]  # which of the stores, and the numbers of the samples to write

ROUNDS = 8  # samples of a chunk over rows: at a chunk's end rows stand empty until the last one is finished


class Chunks:
    """This rank's share of what is missing in some stores, which are held for writing until this is closed.

    It is no ``DataLoader``, so that Lightning does not spread it over the ranks once more.

    Args:
        fillings: The stores.
        ranks: This process among others.
    """

    def __init__(self, fillings: list[Filling], ranks: Ranks) -> None:
        self.fillings = fillings
        self.chunks: list[Chunk] = []
        try:
            for which, filling in enumerate(fillings):
                share, size = filling.begin(ranks), ROUNDS * filling.group
                self.chunks += [(which, list(share[start : start + size])) for start in range(0, len(share), size)]
        except BaseException:
            self.close()
            raise
        self.meet = ranks.meeting()

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)

    def write(self, chunk: Chunk) -> int:
        """Write a chunk; returns how many samples that were."""
        which, numbers = chunk
        self.fillings[which].write(numbers, TokenBar())
        return len(numbers)

    def close(self) -> None:
        """Let go of the stores and the teacher."""
        for filling in self.fillings:
            filling.close()
        self.fillings = []


class GenerationModule(pl.LightningModule):
    """Lets the teacher of a :class:`~lightning_qat.SyntheticDataModule` write, in ``Trainer.predict``.

    Every rank writes its own share of what is missing in the store. A prediction is the number of samples written in a step.

    Example:
        >>> data = SyntheticDataModule("tiny-teacher", num_samples=8, max_length=16, store="gen")  # doctest: +SKIP
        >>> Trainer(devices=4).predict(GenerationModule(), datamodule=data, return_predictions=False)  # doctest: +SKIP
    """

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Write the samples of a batch."""
        chunks = getattr(getattr(self.trainer, "datamodule", None), "chunks", None)
        if not isinstance(chunks, Chunks):
            raise ValueError("datamodule: got none that generates, expected Trainer.predict(..., datamodule=SyntheticDataModule(...))")
        return chunks.write(batch)
