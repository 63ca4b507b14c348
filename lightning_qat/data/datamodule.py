"""The teacher's generations as training data: LLM-QAT (arXiv 2305.17888), section 3.1."""

import contextlib
import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat.data.datasets import GeneratedSamples, TextWindows, collate
from lightning_qat.data.order import EpochOrder, ResumableLoader
from lightning_qat.data.store import GenerationStore
from lightning_qat.evaluation import read_documents, text_windows
from lightning_qat.generation import (
    GenerationSettings,
    cast_parameters,
    check_causal_lm,
    end_tokens,
    fingerprint,
    generate_rows,
    load_causal_lm,
    load_tokenizer,
    start_tokens,
)


class SyntheticDataModule(pl.LightningDataModule):
    """Streams samples that the teacher wrote; no training data is needed.

    Samples are generated in ``setup`` if the store does not hold them yet (every rank writes its own share of the tiles), and the teacher
    is freed before training. Sample i depends on the teacher, these settings and i, on nothing else.

    Args:
        teacher: Folder, hub id, ``tiny-teacher``, or a causal language model in memory.
        num_samples: Samples for training and validation together.
        max_length: Tokens per sample.
        batch_size: Samples per batch and process.
        seed: Seed of the whole set and of the order of training batches.
        store: Folder of the generated tokens; reused when it holds the same samples.
        val_samples: The last samples, kept for validation; default one in twenty, at most 64.
        validation: Real text beside them: a .txt or .jsonl file, ``held-out`` for the bundled text, or None.
        tokenizer: Folder or hub id, or a tokenizer; default the teacher's own. A teacher in memory without one is fine unless
            `validation` is given.
        greedy_tokens: Smallest and largest number of most-probable tokens after the random start token.
        rows: Samples computed together; part of what a sample depends on.
        dtype: Dtype the teacher runs in while generating.
        num_workers: Worker processes of the loaders.

    Raises:
        ValueError: At construction, for a setting that cannot work; in ``setup``, for a teacher, text or store that cannot.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        num_samples: int,
        max_length: int,
        batch_size: int = 8,
        seed: int = 0,
        store: str | Path = "generations",
        val_samples: int | None = None,
        validation: str | None = None,
        tokenizer: Any = None,
        greedy_tokens: tuple[int, int] = (3, 5),
        rows: int = 64,
        dtype: str = "float32",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.settings = GenerationSettings(max_length=max_length, seed=seed, greedy_tokens=greedy_tokens, rows=rows)
        self.val_samples = min(64, num_samples // 20) if val_samples is None else val_samples
        if num_samples < 1 or not 0 <= self.val_samples < num_samples:
            raise ValueError(f"num_samples: got {num_samples} with val_samples={self.val_samples}; at least one must be left for training")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: got {dtype!r}, expected 'float32', 'bfloat16' or 'float16'")
        self.teacher, self.num_samples, self.batch_size, self.dtype = teacher, num_samples, batch_size, dtype
        self.folder, self.validation, self.tokenizer, self.num_workers = Path(store), validation, tokenizer, num_workers
        self.vocab_size: int | None = None
        self.train_dataset: GeneratedSamples | None = None
        self.val_dataset: GeneratedSamples | None = None
        self.text_dataset: TextWindows | None = None

    @property
    def tiles(self) -> int:
        """Tiles that hold `num_samples` samples."""
        return math.ceil(self.num_samples / self.settings.rows)

    def setup(self, stage: str | None = None) -> None:
        """Generate what is missing, then read from the store."""
        if self.train_dataset is not None:
            return
        tokenizer = self._tokenizer()
        if self.validation is not None:
            self.text_dataset = TextWindows(text_windows(tokenizer, read_documents(self.validation), self.settings.max_length))
        model = self._teacher()
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        allowed = start_tokens(model, tokenizer)
        store = GenerationStore(
            self.folder,
            {
                "teacher": fingerprint(model),
                "dtype": self.dtype,
                "start_tokens": hashlib.sha256(repr(allowed).encode()).hexdigest()[:16],
                "end_tokens": end_tokens(model),
                **self.settings.to_dict(),
            },
        )
        store.open()
        self._generate(model, store, allowed)
        first_val = self.num_samples - self.val_samples
        self.train_dataset = GeneratedSamples(store, range(first_val), self.settings.rows)
        self.val_dataset = GeneratedSamples(store, range(first_val, self.num_samples), self.settings.rows)

    def _tokenizer(self) -> Any:
        if self.tokenizer is not None and not isinstance(self.tokenizer, str | Path):
            return self.tokenizer
        source = self.tokenizer if self.tokenizer is not None else self.teacher
        if isinstance(source, str | Path):
            return load_tokenizer(source)
        if self.validation is not None:
            raise ValueError("tokenizer: needed with `validation` when the teacher is a model in memory; pass the tokenizer too")
        return None

    def _teacher(self) -> Any:
        if isinstance(self.teacher, str):
            model = load_causal_lm(self.teacher, self.dtype)
        else:
            check_causal_lm(self.teacher, "teacher")
            model = cast_parameters(copy.deepcopy(self.teacher), getattr(torch, self.dtype)).eval()
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        return model.to(device)

    def _generate(self, model: Any, store: GenerationStore, allowed: list[int]) -> None:
        """Write this rank's share of the missing tiles; rank 0 holds the store, and all ranks come and leave together."""
        rank, world = self._place()
        with store.writing() if rank == 0 else contextlib.nullcontext():
            missing = store.missing(self.tiles) if self.trainer is None else self.trainer.strategy.broadcast(store.missing(self.tiles))
            self._write_tiles(model, store, allowed, missing[rank::world], visible=rank == 0)
            if self.trainer is not None:
                self.trainer.strategy.barrier("lightning_qat.generation")
        if (left := store.missing(self.tiles)) != []:
            raise ValueError(f"store: tiles {left[:5]} are missing from {str(store.folder)!r} after generation; is it a shared folder?")

    def _write_tiles(self, model: Any, store: GenerationStore, allowed: list[int], tiles: list[int], visible: bool) -> None:
        columns = (TextColumn("Generating"), BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn())
        rows = self.settings.rows
        with Progress(*columns, disable=not (visible and tiles), transient=True) as bar:
            task = bar.add_task("generate", total=len(tiles) * (self.settings.max_length - 1), tokens=0)
            for done, tile in enumerate(tiles):
                tokens, lengths = generate_rows(model, self.settings, tile * rows, allowed, lambda: bar.advance(task))
                if int(lengths.max()) < 2:
                    raise ValueError(f"generation: every sample of tile {tile} is one token long; is this a language model?")
                store.write(tile, tokens.cpu(), lengths.cpu())
                bar.update(task, completed=(done + 1) * (self.settings.max_length - 1), tokens=(done + 1) * int(lengths.sum()))

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled batches; the order depends on `seed` and the epoch, and a resumed epoch goes on where it was left."""
        assert self.train_dataset is not None
        rank, world = self._place()
        order = EpochOrder(len(self.train_dataset), self.settings.seed, self._consumed, world, rank)
        return self._loader(self.train_dataset, sampler=order)

    def _place(self) -> tuple[int, int]:
        """(rank, number of ranks)."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _consumed(self) -> int:
        """This rank's samples of the epoch that were trained on before the run was interrupted."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.completed) * self.batch_size

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Generated samples that are never trained on, and windows of real text; each where there are any."""
        datasets = [self.val_dataset, self.text_dataset]
        return [self._loader(dataset) for dataset in datasets if dataset is not None and len(dataset) > 0]

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader[dict[str, Any]]:
        return ResumableLoader(dataset, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers, **kwargs)
