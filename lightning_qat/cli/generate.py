"""`lightning-qat generate` and `lightning-qat report`: the teacher's samples as a tool of its own."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from lightning_qat.data import GenerationModule, GenerationStore, SyntheticDataModule
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.report import write_generation_report

ARGUMENTS = "generate.json"  # beside the store: what `--resume` goes on with


def generate(
    store: str,
    teacher: str | None = None,
    num_samples: int = 64,
    max_length: int = 128,
    seed: int = 0,
    generation: str = "hybrid",
    greedy_tokens: tuple[int, int] = (3, 5),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    turns: int = 1,
    prompts: str | None = None,
    bos: bool | None = None,
    system: str | None = None,
    teacher_logits: int | str | None = None,
    rows: int | None = None,
    dtype: str = "auto",
    engine: str = "transformers",
    compile: bool = False,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    resume: bool = False,
    jsonl: str | None = None,
    report: str | None = None,
    show: int = 2,
) -> None:
    """Let a teacher write samples into a store; a store that holds some of them already is completed.

    Args:
        store: Folder for the generated tokens.
        teacher: Folder, hub id, or tiny-teacher for the bundled one.
        num_samples: How many samples the store shall hold.
        max_length: Tokens per sample.
        seed: Seed of the whole set.
        generation: hybrid (the paper's rule), greedy, sample, prefix (continues prompts), or chat.
        greedy_tokens: hybrid: smallest and largest number of most probable tokens after the random start token.
        temperature: Divides the logits before a token is drawn.
        top_k: Draw from so many most probable tokens; 0 for all.
        top_p: Draw from the most probable tokens that together hold this probability.
        turns: chat: pairs of a user's message and an answer.
        prompts: prefix: a .txt or .jsonl file.
        bos: Whether samples start with the BOS token; left out: as the tokenizer does.
        system: chat: a system message.
        teacher_logits: Keep the teacher's probabilities with each token, for training without the teacher: how many, or full.
        rows: Samples computed together; left out: as many as fit, up to 256.
        dtype: float32, bfloat16, float16, or auto for the dtype the teacher was saved in.
        engine: transformers, vllm, or the address of an OpenAI-compatible server.
        compile: Run the teacher under torch.compile; on CPUs it was seen to be slower.
        accelerator: Of the Trainer.
        devices: Of the Trainer; each writes its own share.
        strategy: Of the Trainer.
        resume: Check the store, drop what is damaged, and complete it with the settings that it was started with.
        jsonl: Also write all samples as lines of JSON, with their text.
        report: Also write a page of statistics.
        show: How many samples to print.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("store", "resume", "jsonl", "report", "show")}
    if resume:
        arguments = _resumed(store, arguments)
    if arguments["teacher"] is None:
        raise ValueError("teacher: got none, expected a folder, a hub id, or tiny-teacher; only --resume knows it from the store")
    _fill(store, arguments)
    if _first():
        _after(GenerationStore.existing(store), arguments["teacher"], jsonl, report, show)


def _first() -> bool:
    """Whether this is the process that speaks for all."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _resumed(store: str, given: dict[str, Any]) -> dict[str, Any]:
    """Repair the store; returns the arguments it was started with."""
    if _first():
        for done in GenerationStore.existing(store).repair():
            Console().print(done, markup=False, highlight=False)
    path = Path(store) / ARGUMENTS
    if not path.is_file():
        if given["teacher"] is not None:
            return given
        raise ValueError(
            f"store: {str(path)!r} is missing, so the settings are not known; give --teacher and all other settings as the first time, or "
            "start the training run again that wrote the store: it completes it too"
        )
    kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
    machine = ("accelerator", "devices", "strategy", "compile")  # how it is computed may change, what is computed may not
    return {**kept, **{name: given[name] for name in machine}}


def _fill(store: str, arguments: dict[str, Any]) -> None:
    machine = {name: arguments[name] for name in ("accelerator", "devices", "strategy")}
    settings = {name: value for name, value in arguments.items() if name not in machine}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which accelerators this machine lacks is of no interest here
    warnings.filterwarnings("ignore", message="Total length of `Chunks`")  # a store that is complete already
    data = SyntheticDataModule(store=store, val_samples=0, **settings)
    trainer = pl.Trainer(**machine, logger=False, enable_checkpointing=False, enable_model_summary=False)
    path = Path(store) / ARGUMENTS
    data.prepare_store = lambda: _remember(path, arguments)
    trainer.predict(GenerationModule(), datamodule=data, return_predictions=False)


def _remember(path: Path, arguments: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _after(store: GenerationStore, teacher: str, jsonl: str | None, page: str | None, show: int) -> None:
    tokenizer, console = load_tokenizer(teacher), Console()
    console.print(f"{len(store.records):,} samples, {int(store.records['tokens'].sum()):,} tokens in {store.folder}")
    for index in store.records["index"][:show].tolist():
        console.rule(f"sample {index}")
        console.print(tokenizer.decode(store.read(index).tokens), markup=False, highlight=False)
    if jsonl is not None:
        store.to_jsonl(jsonl, tokenizer)
        console.print(f"text written to {jsonl}")
    if page is not None:
        report(str(store.folder), page, teacher)


def report(
    store: str, out: str = "report.html", teacher: str | None = None, tokenizer: str | None = None, shown: int = 6, scored: int = 64
) -> None:
    """Write a page of statistics about generated samples.

    Args:
        store: Folder that lightning-qat generate or a training run wrote.
        out: HTML file to write.
        teacher: Compare with the token frequencies of this teacher: folder, hub id, or tiny-teacher; left out: with the probabilities
            kept in the store, if there are any.
        tokenizer: Folder or hub id of the tokenizer that shows samples as text; left out: the teacher's.
        shown: How many samples to show.
        scored: How many samples the teacher reads.
    """
    there = GenerationStore.existing(store)
    known = tokenizer or teacher
    # In the dtype of the samples: in another one it would be another teacher.
    model = None if teacher is None else load_causal_lm(teacher, there.identity.get("dtype", "auto"))
    text = None if known is None else load_tokenizer(known)
    statistics = write_generation_report(there, Path(out), tokenizer=text, teacher=model, shown=shown, scored=scored)
    Console().print(f"{statistics.samples:,} samples; written to {out}")
