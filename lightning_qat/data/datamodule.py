"""The teacher's generations as training data: LLM-QAT (arXiv 2305.17888), section 3.1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_qat.data.arguments import check_agreement, check_arguments, check_split
from lightning_qat.data.collate import Collate
from lightning_qat.data.datasets import HeldSamples, LossOn, StoredSamples, TextWindows
from lightning_qat.data.order import EpochOrder, MixedOrder, ResumableLoader, StreamOrder, StreamPlan
from lightning_qat.data.packing import in_rows
from lightning_qat.data.predict import Chunks
from lightning_qat.data.ranks import Ranks
from lightning_qat.data.selection import select, token_counts
from lightning_qat.data.stores import existing_store, existing_targets, fillings, stored_rows
from lightning_qat.data.stream import SampleStream, StreamedSamples
from lightning_qat.data.teachers import Recipe, free_memory, is_source, own_names
from lightning_qat.data.text import read_windows, shown_per_epoch
from lightning_qat.data.worker import open_stream
from lightning_qat.evaluation import read_documents, text_windows
from lightning_qat.generation import CallableTeacher, GenerationSettings, GenerationStore, SampleFilters, load_tokenizer
from lightning_qat.generation.filters import FilterReport
from lightning_qat.generation.sample import SampleSource
from lightning_qat.generation.teacher import tokenizer_fingerprint
from lightning_qat.twin import warn_of_twin


class SyntheticDataModule(pl.LightningDataModule):
    """Samples that the teacher wrote; no training data is needed.

    In ``setup`` the store is filled with what it does not hold yet (every rank writes its own share), and the teacher is freed before
    training. Sample i depends on the teacher, the settings of its generation and i, on nothing else.

    Args:
        teacher: Folder, hub id, ``tiny-teacher``, a causal language model in memory, a
            :class:`~lightning_qat.generation.CallableTeacher`, or anything that writes samples itself
            (:class:`~lightning_qat.generation.sample.SampleSource`). None only reads a store that is complete.
        num_samples: Samples for training and validation together; with ``mode="stream"``, per epoch.
        max_length: Tokens per sample.
        batch_size: Samples per batch and process.
        seed: Seed of the whole set and of the order of training batches.
        store: Folder of the generated tokens; reused when it holds the same samples.
        val_samples: The last samples, kept for validation; default one in twenty, at most 64.
        validation: Real text beside them: a .txt or .jsonl file, ``held-out`` for the bundled text, or None.
        tokenizer: Folder or hub id, or a tokenizer; default the teacher's own. A teacher in memory, or none, does without one unless
            `validation` or `text` is given.
        greedy_tokens: Smallest and largest number of most probable tokens after the random start token.
        rows: Samples computed together; part of what a sample depends on. Default: those of the store, or what fits into 4 GiB.
        dtype: Dtype the teacher runs in while generating; ``auto`` for the one it was saved in or has.
        num_workers: Worker processes of the loaders.
        mode: ``store``: generate, then train; ``stream``: generate while training, store nothing, and never repeat a sample in any
            epoch; ``mix``: like ``store``, with windows of real text in between.
        generation: How samples are written (:class:`~lightning_qat.generation.GenerationSettings`): ``hybrid`` (the paper's rule),
            ``greedy``, ``sample``, ``prefix`` or ``chat``.
        temperature: Divides the logits before a token is drawn.
        top_k: Draw from so many most probable tokens; 0 for all.
        top_p: Draw from the most probable tokens that together hold this probability.
        turns: ``chat``: pairs of a user's message and an answer.
        prompts: ``prefix``: a .txt or .jsonl file of prompts.
        bos: Whether samples start with the BOS token; None does as the tokenizer does.
        system: ``chat``: a system message.
        teacher_logits: Keep the teacher's distribution after each token, for training without the teacher: so many most probable
            tokens, ``full``, or None.
        filters: Which samples are left out of training and validation.
        text: ``mix``: a .txt or .jsonl file, or ``held-out``.
        text_ratio: ``mix``: share of the training tokens that is real text.
        packing: Put several samples into a row, as many as `max_length` holds.
        loss_on: ``all`` tokens, or what the ``assistant`` wrote (``chat``, and what follows the prompts of ``prefix``).
        engine: What runs the teacher: ``transformers`` in this process, ``vllm`` in this process, or the address of a server.
        stream_worker: ``stream``: generate ``inline``, when a sample is wanted, or ahead of training in another ``process``.
        stream_device: ``stream``: where the teacher computes; default where the student does.
        buffer: ``stream``: most samples kept ready, at least `rows`.
        compile: Run the teacher under ``torch.compile``; for GPUs.

    Attributes:
        vocab_size: Number of the teacher's token ids, known after ``setup``.
        filter_report: What was left out, known after ``setup``; None if nothing could be.
        prepare_store: Called on rank 0 when the store is open and before anything is written to it, for whoever keeps something beside it.

    Raises:
        ValueError: At construction, for a setting that cannot work; in ``setup``, for a teacher, text or store that cannot.
    """

    def __init__(
        self,
        teacher: str | nn.Module | CallableTeacher | SampleSource | None = None,
        num_samples: int | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        store: str | Path = "generations",
        val_samples: int | None = None,
        validation: str | None = None,
        tokenizer: Any = None,
        greedy_tokens: tuple[int, int] = (3, 5),
        rows: int | None = None,
        dtype: str = "auto",
        num_workers: int = 0,
        mode: Literal["store", "stream", "mix"] = "store",
        generation: Literal["hybrid", "greedy", "sample", "prefix", "chat"] = "hybrid",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        turns: int = 1,
        prompts: str | None = None,
        bos: bool | None = None,
        system: str | None = None,
        teacher_logits: int | Literal["full"] | None = None,
        filters: SampleFilters | None = None,
        text: str | None = None,
        text_ratio: float = 0.5,
        packing: bool = False,
        loss_on: LossOn = "all",
        engine: str = "transformers",
        stream_worker: Literal["inline", "process"] = "inline",
        stream_device: str | None = None,
        buffer: int = 1024,
        compile: bool = False,
    ) -> None:
        super().__init__()
        warn_of_twin()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # of little that is missing, some ranks may have nothing to write
        # The three that are Any are numbers from setup on.
        self.num_samples: Any = num_samples
        self.max_length: Any = max_length
        self.val_samples: Any = val_samples if val_samples is not None or num_samples is None else _one_in_twenty(num_samples)
        self.teacher, self.batch_size, self.seed = teacher, batch_size, seed
        self.folder, self.validation, self.tokenizer, self.num_workers = Path(store), validation, tokenizer, num_workers
        self.rows, self.dtype, self.mode, self.filters, self.text, self.text_ratio = rows, dtype, mode, filters, text, text_ratio
        self.packing, self.loss_on, self.engine, self.compile = packing, loss_on, engine, compile
        self.prompts, self.bos, self.system = prompts, bos, system
        self.stream_worker, self.stream_device, self.buffer = stream_worker, stream_device, buffer
        with own_names():
            self.settings = GenerationSettings(
                max_length=2 if max_length is None else max_length,
                mode=generation,
                seed=seed,
                greedy_tokens=greedy_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                turns=turns,
                logits=teacher_logits,
                **({} if rows is None else {"rows": rows}),
            )
        check_arguments(self)
        self.vocab_size: int | None = None
        self.filter_report: FilterReport | None = None
        self.prepare_store: Callable[[], None] | None = None
        self.train_dataset: Any = None
        self.val_dataset: Any = None
        self.text_dataset: TextWindows | None = None
        self.chunks: Chunks | None = None
        self._mix: tuple[int, int, int] | None = None
        self._stream: SampleStream | None = None

    def setup(self, stage: str | None = None) -> None:
        """Generate what is missing, then read from the store; for ``predict`` only find out what is missing."""
        done = self.val_dataset if self.mode == "stream" and stage == "validate" else self.train_dataset
        if stage == "test" or (stage != "predict" and done is not None):
            return
        if stage == "predict" and (self.mode == "stream" or self.teacher is None):
            raise ValueError("Trainer.predict: fills a store, which needs a teacher and mode='store' or 'mix'; use Trainer.fit or validate")
        ranks = Ranks(self.trainer)
        store = existing_store(self.folder, self.num_samples) if self.teacher is None else None
        self._complete(store, ranks)
        windows = self._read_texts()
        if self.mode == "stream":
            self._set_up_stream(ranks, stage)
        elif store is not None:
            self._read([store, *existing_targets(store, windows, self.text, self.max_length)], windows)
        else:
            self._fill(ranks, windows, stage)

    def _complete(self, store: GenerationStore | None, ranks: Ranks) -> None:
        """What was not given: taken from the samples that are there, or from whoever writes them."""
        source: Any = store if store is not None else self.teacher
        if store is not None or is_source(source):
            check_agreement(self, source.identity, "the teacher has" if store is None else "the samples in the store have")
            self.max_length = source.identity.get("max_length", self.max_length)
        if store is not None and self.num_samples is None:
            self.num_samples = store.requested
        self.val_samples = _one_in_twenty(self.num_samples) if self.val_samples is None else self.val_samples
        check_split(self.num_samples, self.val_samples)
        count, what = (self.num_samples - self.val_samples, "training samples") if self.mode == "stream" else (self.num_samples, "samples")
        if count < ranks.world:
            raise ValueError(f"num_samples: got {count} {what} for {ranks.world} processes, expected at least one each")
        self._read_tokenizer(store)

    def _read_tokenizer(self, store: GenerationStore | None) -> None:
        source = self.tokenizer if self.tokenizer is not None else self.teacher
        if isinstance(source, str | Path):
            self.tokenizer = load_tokenizer(source)
        if self.tokenizer is None:
            if needing := [name for name in ("validation", "text") if getattr(self, name) is not None]:
                raise ValueError(f"tokenizer: needed with `{needing[0]}` when the teacher is not named; pass the teacher's tokenizer too")
        elif store is not None and store.identity.get("tokenizer") not in (None, tokenizer_fingerprint(self.tokenizer)):
            raise ValueError(f"tokenizer: is not the one of the samples in {str(self.folder)!r}; pass the teacher's own")

    def _read_texts(self) -> list[Tensor]:
        """Windows of real text to train on; those to validate on are kept."""
        if self.validation is not None:
            self.text_dataset = TextWindows(text_windows(self.tokenizer, read_documents(self.validation), self.max_length))
        return [] if self.text is None else read_windows(self.tokenizer, self.text, self.max_length, self.validation)

    def _recipe(self, rows: int | None) -> Recipe:
        same = {name: getattr(self, name) for name in ("teacher", "settings", "tokenizer", "dtype", "engine", "prompts", "bos", "system")}
        return Recipe(**same, num_samples=self.num_samples, rows=rows, compiled=self.compile)

    def _fill(self, ranks: Ranks, windows: list[Tensor], stage: str | None) -> None:
        """Write what the store lacks."""
        source = self._recipe(self.rows or stored_rows(self.folder)).build(ranks.device)
        work = fillings(source, self.folder, self.num_samples, windows, self.max_length, ranks)
        if ranks.rank == 0 and self.prepare_store is not None:
            self.prepare_store()
        if stage == "predict":
            self.chunks = Chunks(work, ranks)
            return
        for filling in work:
            filling.run(ranks)
        stores = [filling.store for filling in work]
        del source, work, filling
        free_memory()
        self._read(stores, windows)

    def _read(self, stores: list[GenerationStore], windows: list[Tensor]) -> None:
        """Make datasets of stores that are complete: generated samples, then the targets of text if there are any."""
        store = stores[0]
        report = select(store, self.num_samples, self.filters, self.loss_on)
        if self.filters is not None or self.loss_on != "all":
            self.filter_report = report
            rank_zero_info(f"filters: {report}")
        first_val = len(report.kept) - self.val_samples
        if first_val < 1:
            raise ValueError(f"filters: {report}, none of which is left for training with val_samples={self.val_samples}; loosen them")
        self.vocab_size = int(store.identity["vocab_size"])
        self.val_dataset = StoredSamples(store, report.kept[first_val:], self.loss_on)
        lengths = token_counts(store, report.kept[:first_val])
        train = self._in_rows(StoredSamples(store, report.kept[:first_val], self.loss_on), lengths, "samples")
        if windows:
            sizes = [len(window) for window in windows]
            text = self._in_rows(TextWindows(windows, *stores[1:]), sizes, "windows of text")
            self._mix = (len(train), len(text), shown_per_epoch(self.text_ratio, sum(lengths), sum(sizes), len(text)))
            train = ConcatDataset([train, text])
        self.train_dataset = train

    def _in_rows(self, samples: Any, lengths: list[int], what: str) -> Any:
        return in_rows(samples, lengths, self.max_length, what) if self.packing else samples

    def _set_up_stream(self, ranks: Ranks, stage: str | None) -> None:
        plan = StreamPlan(self.num_samples - self.val_samples, self.val_samples, ranks.world, ranks.rank)
        device = torch.device(self.stream_device or ranks.device)
        # The Trainer may move, cast or shard what it trains with.
        trained = getattr(self.trainer, "lightning_module", None)
        private = trained is not None and any(module is self.teacher for module in trained.modules())
        self._stream = open_stream(self._recipe(self.rows), plan, self.buffer, device, self.stream_worker, private)
        self.vocab_size = self._stream.generation.vocab_size
        if self.val_dataset is None:
            self.val_dataset = HeldSamples(self._stream.these(range(plan.size, self.num_samples)), self.loss_on)
        self.train_dataset = StreamedSamples(self._stream, plan.size, self.loss_on)
        if stage == "validate":
            self._close()

    def teardown(self, stage: str | None = None) -> None:
        """Let go of the teacher, of its process and of the store."""
        if self.chunks is not None:
            self.chunks.meet()  # not in a hook of the loop, which ranks with nothing to write do not enter
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """As :meth:`teardown`."""
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self.train_dataset = None  # reads from the stream
        for holder in (self._stream, self.chunks):
            if holder is not None:
                holder.close()
                free_memory()
        self._stream = self.chunks = None

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in an order that depends on `seed` and the epoch; a resumed epoch goes on where it was left."""
        ranks = Ranks(self.trainer)
        if self._stream is not None:
            order: EpochOrder = StreamOrder(self._stream.plan, self._place)
        elif self._mix is not None:
            order = MixedOrder(*self._mix, self.seed, self._place, ranks.world, ranks.rank)
        else:
            order = EpochOrder(len(self.train_dataset), self.seed, self._place, ranks.world, ranks.rank)
        return self._loader(self.train_dataset, sampler=order)

    def _place(self) -> tuple[int, int] | None:
        """The epoch, and this rank's samples of it that were trained on before the run was interrupted."""
        if self.trainer is None or not self.trainer.training:
            return None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return self.trainer.current_epoch, int(done) * self.batch_size

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Generated samples that are never trained on, and windows of real text; each where there are any."""
        datasets = [self.val_dataset, self.text_dataset]
        return [self._loader(dataset) for dataset in datasets if dataset is not None and len(dataset) > 0]

    def predict_dataloader(self) -> Chunks:
        """What is missing in the store, for :class:`~lightning_qat.data.GenerationModule`."""
        assert self.chunks is not None
        return self.chunks

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader[dict[str, Any]]:
        assert self.vocab_size is not None
        collate = Collate(self.vocab_size)
        return ResumableLoader(dataset, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers, **kwargs)


def _one_in_twenty(num_samples: int) -> int:
    return min(64, num_samples // 20)
