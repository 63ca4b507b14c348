"""Real text for evaluation: documents, and windows of token ids in which every token is scored exactly once."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_OUT = "held-out"  # the bundled held-out text's name wherever a path is expected


def read_documents(path: str | Path) -> list[str]:
    """Documents of a text file (one document) or of JSON lines with a ``text`` field.

    Args:
        path: ``.txt``, ``.jsonl``, or ``held-out`` for the bundled text.

    Raises:
        ValueError: No such file, or no text in it.
    """
    name = os.fspath(path)
    file = Path(__file__).resolve().parent.parent / "assets" / "held_out" / "text.jsonl" if name == HELD_OUT else Path(name)
    if not file.is_file():
        raise ValueError(f"text: no file at {name!r}; expected a .txt or .jsonl file, or {HELD_OUT!r} for the bundled text")
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {name!r} is not UTF-8: {error}") from error
    if file.suffix == ".jsonl":
        try:
            documents = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"text: {name!r} must hold one JSON object with a 'text' field a line: {error}") from error
        if not all(isinstance(document, str) for document in documents):
            raise ValueError(f"text: {name!r} must hold one JSON object with a 'text' field a line: a text is not a string")
    else:
        documents = [content]
    if not any(document.strip() for document in documents):
        raise ValueError(f"text: {name!r} holds no text")
    return documents


def text_windows(tokenizer: Any, documents: Sequence[str], length: int) -> list[Tensor]:
    """Cut documents into windows.

    A document starts with the tokenizer's BOS token, if it has one. Neighbouring windows share one token, so that each token but a
    document's first is scored exactly once; the last window of a document may be short.

    Args:
        tokenizer: A transformers tokenizer.
        documents: Texts.
        length: Tokens per window.

    Returns:
        int64 tensors of 2 to `length` tokens.
    """
    if length < 2:
        raise ValueError(f"context: got {length}, expected at least 2 tokens")
    windows = []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for document in documents:
        ids = torch.tensor(bos + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        windows += [ids[start : start + length] for start in range(0, max(len(ids) - 1, 0), length - 1)]
    return windows
