"""The commands besides those of the Trainer, each a function whose arguments are its options."""

import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import jsonargparse
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lightning_qat.cli.demo import demo
from lightning_qat.cli.errors import CommandParser, brief
from lightning_qat.cli.fit import run_trainer_command
from lightning_qat.cli.generate import generate, report
from lightning_qat.cli.plan import plan
from lightning_qat.distillation import DistillationModule
from lightning_qat.evaluation import HELD_OUT, read_documents, score_text, text_windows
from lightning_qat.formats import export as export_model
from lightning_qat.formats import load_quantized
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.modules import cached_weights, insert_quantizers, merge_lora


def quantize(model: str, scheme: str, out: str, allow_partial: bool = False) -> None:
    """Round a model to the nearest codes, without training, and export it.

    Args:
        model: Folder, hub id, or tiny-teacher.
        scheme: Scheme string such as w4a8kv4, or a preset's name.
        out: Folder to create.
        allow_partial: Accept that less than 90 % of the matrix weights can be quantized.
    """
    network = load_causal_lm(model)
    print(insert_quantizers(network, scheme, allow_partial=allow_partial))
    print(f"written to {export_model(network, out)}")


def evaluate(
    model: str,
    text: str = HELD_OUT,
    scheme: str | None = None,
    context: int = 512,
    batch_size: int = 16,
    out: str | None = None,
    prompt: str | None = None,
) -> None:
    """Perplexity and bits per byte of a model, an export or a training checkpoint on real text.

    Args:
        model: Folder or hub id of a transformers model, a folder written by export, a .ckpt (or .ckpt.consolidated) file, or tiny-teacher.
        text: A .txt or .jsonl file, or held-out for the bundled text.
        scheme: Round the model's weights to this scheme first (only for a full-precision model).
        context: Tokens per window; each token is scored once.
        batch_size: Windows per forward pass; does not change the result.
        out: JSON file to write the figures to.
        prompt: Text to continue greedily, as a sample to read.
    """
    network, tokenizer = _load_any(model)
    if scheme is not None:
        insert_quantizers(network, scheme)
    documents = read_documents(text)
    windows = text_windows(tokenizer, documents, context)
    score = score_text(network, windows, batch_size, text_bytes=sum(len(document.encode()) for document in documents))
    figures = {"model": model, "scheme": scheme, "text": text, "context": context, **vars(score)}
    table = Table("model", "scheme", "perplexity", "bits per byte", "tokens")
    table.add_row(model, scheme or "as it is", f"{score.perplexity:.4f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}")
    console = Console()
    console.print(table)
    if prompt is not None:
        figures["continuation"] = _continue(network, tokenizer, prompt)
        console.print(figures["continuation"], markup=False, highlight=False)
    if out is not None:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _continue(network: Any, tokenizer: Any, prompt: str, tokens: int = 48) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with cached_weights(network):
        out = network.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def export(checkpoint: str, out: str, format: str = "native") -> None:
    """Write the student of a training checkpoint with exactly the integers that were trained.

    Args:
        checkpoint: A .ckpt file of a DistillationModule.
        out: Folder to create.
        format: Registered name of the format.
    """
    print(f"written to {export_model(_load_checkpoint(checkpoint).student, out, format=format)}")


def _load_checkpoint(path: str) -> DistillationModule:
    if Path(path).is_dir():
        raise ValueError(
            f"checkpoint: {path!r} is a folder with one file per process; make a file of it with\n"
            f"  python -m lightning.fabric.utilities.consolidate_checkpoint {path}\nwhich writes {path}.consolidated"
        )
    if not Path(path).is_file():
        raise ValueError(f"checkpoint: no file at {path!r}")
    try:
        module = DistillationModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith("student: needed"):
            raise
        raise ValueError(
            f"checkpoint: {path!r} names neither its teacher nor its student, which were models in memory; load it in Python with "
            "DistillationModule.load_from_checkpoint(path, teacher=model)"
        ) from error
    except (RuntimeError, KeyError, UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path!r} is not a checkpoint of a DistillationModule: {error}") from error
    if module.hparams.get("lora"):
        merge_lora(module.student)
    return module


def _load_any(model: str) -> tuple[Any, Any]:
    """(model, tokenizer) of whatever the user named."""
    if model.endswith((".ckpt", ".ckpt.consolidated")):
        module = _load_checkpoint(model)
        return module.student, load_tokenizer(module.hparams["teacher"] or module.hparams["student"])
    if (Path(model) / "manifest.json").is_file():
        return load_quantized(model), load_tokenizer(model)
    return load_causal_lm(model), load_tokenizer(model)


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "quantize": quantize,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "demo": demo,
    "plan": plan,
}


def _with_switches(function: Callable[..., None], args: Sequence[str]) -> list[str]:
    """``--resume`` means ``--resume true`` where that is an option of type bool."""
    if "fit_config" in inspect.signature(function).parameters:  # jsonargparse keeps --config to itself
        args = [re.sub("^--config(?==|$)", "--fit_config", arg) for arg in args]
    switches = {f"--{name}" for name, parameter in inspect.signature(function).parameters.items() if parameter.annotation is bool}
    following = [*args, "--"][1:]
    return [part for arg, after in zip(args, following, strict=True) for part in ([arg, "true"] if _bare(arg, after, switches) else [arg])]


def _bare(arg: str, after: str, switches: set[str]) -> bool:
    return arg in switches and after.startswith("-")


def run(command: str, args: Sequence[str]) -> int:
    """Run one command; a user's mistake becomes one message and exit status 2.

    LIGHTNING_QAT_TRACEBACK=1 in the environment shows where an error comes from instead.
    """
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # between Lightning and torch, nothing a user can change
    try:
        if command in COMMANDS:
            prog = f"lightning-qat {command}"
            jsonargparse.auto_cli(
                COMMANDS[command], args=_with_switches(COMMANDS[command], args), as_positional=False, parser_class=CommandParser, prog=prog
            )
        else:
            run_trainer_command([command, *args])
    except (ValueError, MisconfigurationException) as error:
        if os.environ.get("LIGHTNING_QAT_TRACEBACK"):
            raise
        print(f"lightning-qat {command}: error: {brief(str(error))}", file=sys.stderr)
        return 2
    return 0
