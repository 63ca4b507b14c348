"""Prompts that the teacher continues."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_qat.generation.sample import ASSISTANT
from lightning_qat.generation.scripts.base import Span, digest


class Prompts:
    """Prompts that the teacher continues by samples; sample i continues prompt i modulo their number.

    Args:
        prompts: Token ids of each.
        ends: Ids that end a sample.
        bos: Token in front of each prompt that does not start with it.
        vocab_size: Of the teacher.
        max_length: Tokens per sample, the prompt included.

    Raises:
        ValueError: There is no prompt, or one of them cannot be continued.
    """

    keeps_roles = True

    def __init__(self, prompts: Sequence[Sequence[int]], ends: Sequence[int], bos: int | None = None, *, vocab_size: int, max_length: int):
        if len(prompts) == 0:
            raise ValueError("prompts: got none, expected at least one; without prompts use another mode, for example 'hybrid'")
        head = [] if bos is None else [bos]
        self.prompts = [[*(head if list(prompt[:1]) != head else []), *map(int, prompt)] for prompt in prompts]
        for number, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompts[{number}]: got no tokens, expected at least one; leave it out, or pass bos=True")
            if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
                raise ValueError(f"prompts[{number}]: got token {wrong[0]}, expected 0 to {vocab_size - 1}; is it the teacher's tokenizer?")
            if len(prompt) >= max_length:
                got = f"got {len(prompt)} tokens{' with BOS' * (bos is not None)}"
                raise ValueError(f"prompts[{number}]: {got}, expected fewer than max_length={max_length}; cut it, or raise max_length")
        self.ends = frozenset(ends)
        self.identity: dict[str, Any] = {"prompts": digest(self.prompts), "end_tokens": sorted(self.ends)}  # BOS is in the prompts

    def spans(self, index: int) -> Iterator[Span]:
        """One span."""
        yield Span(self.prompts[index % len(self.prompts)], ASSISTANT, 0, self.ends)


def read_prompts(path: str | Path, tokenizer: Any) -> list[list[int]]:
    """Prompts as token ids without BOS; blank lines are skipped.

    Args:
        path: A .txt file with one prompt a line, or a .jsonl file with a ``text``, ``prompt`` or ``input_ids`` field a line.
        tokenizer: A transformers tokenizer; may be None when all prompts are ``input_ids``.

    Raises:
        ValueError: No such file, or a line that is no prompt.
    """
    file = Path(path)
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: no file at {str(path)!r} that ends in .txt or .jsonl")
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {str(path)!r} is not UTF-8: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = line.removesuffix("\r") if file.suffix == ".txt" else _prompt(line, f"prompts: line {number} of {str(path)!r}")
            if isinstance(prompt, str) and tokenizer is None:
                raise ValueError(f"tokenizer: needed for the text in {str(path)!r}; pass one, or prompts as `input_ids`")
            ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
            prompts.append(list(ids))
    return prompts


def _prompt(line: str, place: str) -> str | list[int]:
    """The one prompt in a line of JSON."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    found = [data[key] for key in ("text", "prompt", "input_ids") if key in data] if isinstance(data, dict) else []
    if len(found) == 1 and (isinstance(found[0], str) or (isinstance(found[0], list) and all(type(token) is int for token in found[0]))):
        return found[0]
    raise ValueError(f"{place}: got {line[:60]!r}, expected an object with a string as 'text' or 'prompt', or integers as 'input_ids'")
