"""Finding and loading a teacher and its tokenizer, with errors that name the field and the way out."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY_TEACHER = "tiny-teacher"  # the bundled teacher's name wherever a path or hub id is expected


def resolve(name: str | Path) -> str:
    """The path or hub id behind a name.

    Raises:
        ValueError: A path that does not exist.
    """
    text = os.fspath(name)
    if text == TINY_TEACHER:
        return str(ASSETS / "tiny_teacher")
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).suffix != ""
    path = Path(text).expanduser()
    if looks_local and not path.is_dir():
        raise ValueError(
            f"teacher: no folder at {text!r} (seen from {Path.cwd()}); expected a folder with config.json, a hub id 'owner/name', "
            f"or {TINY_TEACHER!r} for the bundled one"
        )
    return str(path) if path.is_dir() else text


def load_causal_lm(name: str | Path, dtype: str = "float32") -> Any:
    """A causal language model of transformers, in eval mode.

    Args:
        name: Folder, hub id, or ``tiny-teacher``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the dtype it was saved in.

    Raises:
        ValueError: Nothing is there, or it is not a causal language model.
    """
    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher: cannot read a model configuration from {str(name)!r}: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"teacher: {str(name)!r} is a {type(config).__name__}, which has no causal language model")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        ValueError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: none can be read from {str(name)!r}: {error}") from error


def fingerprint(model: nn.Module) -> str:
    """A short hash that changes when any weight does; cheap beside one generated batch."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().to(torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}{values.sum().item()!r}{values.abs().sum().item()!r}".encode())
    return digest.hexdigest()[:16]


def start_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids a sample may start with: those the tokenizer knows, without special ones.

    Raises:
        ValueError: None is left.
    """
    size = model.get_input_embeddings().weight.shape[0]
    config = model.config
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name, None)
        special |= set(ids) if isinstance(ids, list) else {ids}
    known = min(size, len(tokenizer)) if tokenizer is not None else size
    allowed = [token for token in range(known) if token not in special]
    if not allowed:
        raise ValueError(f"start tokens: none of the {known} token ids is neither special nor unused")
    return allowed
