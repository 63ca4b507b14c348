"""Finding and loading a teacher and its tokenizer, with errors that name the field and the way out."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_qat.modules import scheme_of

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
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


def read_config(name: str | Path) -> Any:
    """The configuration of a causal language model.

    Raises:
        ValueError: Nothing is there, or it is not a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher: cannot read a model configuration from {str(name)!r}: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"teacher: {str(name)!r} is a {type(config).__name__}, which has no causal language model")
    return config


def load_causal_lm(name: str | Path, dtype: str = "float32") -> Any:
    """A causal language model of transformers, in eval mode.

    Args:
        name: Folder, hub id, or ``tiny-teacher``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the dtype it was saved in.

    Raises:
        ValueError: Nothing is there, or it is not a causal language model.
    """
    path = resolve(name)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: got {dtype!r}, expected 'float32', 'bfloat16', 'float16' or 'auto'")
    read_config(name)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval()
    except OSError as error:
        raise ValueError(f"teacher: cannot read weights from {str(name)!r}: {error}") from error


def check_causal_lm(model: Any, field: str) -> Any:
    """The model itself, if it is a causal language model in memory.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"{field}: got a {type(model).__name__}, expected a causal language model of transformers, a folder or a hub id")
    if field == "teacher" and scheme_of(model) is not None:
        raise ValueError("teacher: holds quantizers; pass the float model, or call remove_quantizers on it first")
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters in place; buffers such as rotary frequencies keep their dtype, as when a model is loaded in `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds tokenizer files; without any, transformers would make up an empty tokenizer."""
    return any(True for pattern in TOKENIZER_FILES for _ in Path(folder).glob(pattern))


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        ValueError: There is none.
    """
    path = resolve(name)
    if Path(path).is_dir() and not has_tokenizer(path):
        raise ValueError(f"tokenizer: none can be read from {str(name)!r}: there is no {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: none can be read from {str(name)!r}: {error}") from error


def fingerprint(model: nn.Module) -> str:
    """A short hash of all weights, their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A short hash of a tokenizer's vocabulary and special ids."""
    if tokenizer is None:
        return None
    content = (sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def max_positions(model: Any) -> int | None:
    """How many positions a model has; None where it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def end_tokens(model: Any) -> list[int]:
    """All ids that end a sequence; models may have none, one or several."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return sorted(ids) if isinstance(ids, list) else [ids] if ids is not None else []


def start_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids a sample may start with: those the tokenizer knows, without special ones.

    Raises:
        ValueError: None is left.
    """
    size = model.get_input_embeddings().weight.shape[0]
    config = model.config
    special = {*(tokenizer.all_special_ids if tokenizer is not None else ()), *end_tokens(model)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name, None)
        special |= set(ids) if isinstance(ids, list) else {ids}
    known = set(range(size)) if tokenizer is None else {token for token in tokenizer.get_vocab().values() if token < size}
    allowed = sorted(known - special)
    if not allowed:
        raise ValueError(f"start tokens: none of the {len(known)} token ids is neither special nor unused")
    return allowed
