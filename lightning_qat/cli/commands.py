"""The commands besides those of the Trainer, each a function whose arguments are its options."""

import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lightning_qat.cli.demo import demo
from lightning_qat.cli.errors import CommandParser, brief
from lightning_qat.cli.export import export, names_in
from lightning_qat.cli.fit import run_trainer_command
from lightning_qat.cli.generate import generate, report
from lightning_qat.cli.plan import plan
from lightning_qat.evaluation import HELD_OUT, read_documents, score_text, text_windows
from lightning_qat.formats import export as export_model
from lightning_qat.formats import load_quantized
from lightning_qat.formats.folder.hub import UploadError
from lightning_qat.formats.folder.quiet import no_progress_bars
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.modules import cached_weights, insert_quantizers
from lightning_qat.scheme import QuantScheme
from lightning_qat.trained import is_checkpoint, load_module


def quantize(
    model: str,
    scheme: str,
    out: str,
    allow_partial: bool = False,
    target: str | None = None,
    format: str = "native",
    drop: str = "",
    inexact: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Round a model to the nearest codes, without training, and export it.

    Args:
        model: Folder, hub id, or tiny-teacher.
        scheme: Scheme string such as w4a8kv4, or a preset's name.
        out: Folder to create.
        allow_partial: Accept that less than 90 % of the matrix weights can be quantized.
        target: Runtime whose conventions the scheme gets, such as compressed-tensors or gguf.
        format: What to write: native, compressed-tensors, vllm, gguf, torchao or onnx.
        drop: Parts of the scheme that the format may leave out, separated by commas, such as input,kv.
        inexact: Allow a runtime that computes codes by other conventions; the difference is measured.
        tokenizer: Folder or hub id of the tokenizer to write along; by default that of the model.
    """
    fitted = QuantScheme.parse(scheme, target=target)
    network = _plain_model(model)
    print(insert_quantizers(network, fitted, allow_partial=allow_partial))
    options: dict[str, Any] = {"format": format, "drop": names_in(drop), "inexact": inexact, "tokenizer": tokenizer}
    print(f"written to {export_model(network, out, **options)}")


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
        model: Folder or hub id of a transformers model, a folder written by export, a training checkpoint, or tiny-teacher.
        text: A .txt or .jsonl file, or held-out for the bundled text.
        scheme: Round the model's weights to this scheme first (only for a full-precision model).
        context: Tokens per window; each token is scored once.
        batch_size: Windows per forward pass; does not change the result.
        out: JSON file to write the figures to.
        prompt: Text to continue greedily, as a sample to read.
    """
    network, tokenizer = _load_any(model)
    if prompt is not None and not hasattr(network, "generate"):
        raise ValueError(
            f"prompt: {model!r} is loaded as {type(network).__name__}, which scores text but does not continue it; leave prompt out"
        )
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


def _plain_model(name: str) -> Any:
    try:
        return load_causal_lm(name)
    except ValueError as error:  # it is a teacher in other commands
        raise ValueError(re.sub("^teacher: ", "model: ", str(error))) from error


def _tokenizer_in(folder: Path) -> Any:
    """The tokenizer of an export; that of a GGUF file is in it."""
    if (file := folder / "model.gguf").is_file():
        return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return load_tokenizer(folder)


def _load_any(model: str) -> tuple[Any, Any]:
    """(model, tokenizer) of whatever the user named."""
    if is_checkpoint(model):
        module = load_module(model)
        return module.student, load_tokenizer(module.hparams["teacher"] or module.hparams["student"])
    if (Path(model) / "manifest.json").is_file():
        return load_quantized(model), _tokenizer_in(Path(model))
    return _plain_model(model), load_tokenizer(model)


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
            given = _with_switches(COMMANDS[command], args)
            with no_progress_bars():
                jsonargparse.auto_cli(COMMANDS[command], args=given, as_positional=False, parser_class=CommandParser, prog=prog)
        else:
            run_trainer_command([command, *args])
    except (ValueError, MisconfigurationException, UploadError) as error:
        if os.environ.get("LIGHTNING_QAT_TRACEBACK"):
            raise
        print(f"lightning-qat {command}: error: {brief(str(error))}", file=sys.stderr)
        return 2
    return 0
