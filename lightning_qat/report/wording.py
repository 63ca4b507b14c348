"""Numbers and tokens as people read them."""

import re
from typing import Any

LONGEST_LABEL = 24
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def number(value: float) -> str:
    """Thousands with commas, fractions with three digits."""
    is_long = 1000 <= abs(value) < 1e12
    return f"{value:,.0f}" if is_long else f"{value:.3g}"


def percent(share: float) -> str:
    """A share that is not all does not read as all, and one that is not nothing does not read as nothing."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %" if 0 < share < 0.0995 or 0.9905 < share < 1 else f"{share * 100:.0f} %"


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} TB"


def amount(count: int, noun: str) -> str:
    """``1 sample``, ``2,000 samples``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Control characters as pictures: they have no place in a page."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


def label(token: int | None, tokenizer: Any = None) -> str:
    """A short name of a token, with its white space visible."""
    if token is None:
        return "all other tokens"
    if tokenizer is None:
        return f"token {token}"
    text, raw = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if raw is None:
        return f"token {token} (unknown)"
    if not text or "\ufffd" in text:  # part of a character, or nothing
        text = raw
    elif raw.startswith("▁") and not text.startswith(" "):  # sentencepiece drops the first space of what it decodes
        text = f" {text}"
    text = "".join(_VISIBLE.get(character, character) for character in printable(text))
    text = re.sub(r"(.)\1{4,}", lambda run: f"{run[1]}×{len(run[0])}", text)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
