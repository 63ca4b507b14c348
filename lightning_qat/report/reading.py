"""Samples to read, as HTML: their text with special tokens visible and with who wrote what."""

import itertools
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.generation.sample import ASSISTANT, FORCED
from lightning_qat.generation.store import GenerationStore
from lightning_qat.report.generations import ROLES
from lightning_qat.report.marginals import written
from lightning_qat.report.wording import number, percent, printable

LONGEST = 4096  # tokens of a sample that are shown


def samples_to_read(store: GenerationStore, shown: int, tokenizer: Any = None) -> str:
    """The first samples, the one that repeats itself most and the one that its teacher finds least likely.

    Args:
        store: Where they are.
        shown: How many of the first to show.
        tokenizer: The teacher's; None shows token ids.
    """
    records = store.records
    why = dict.fromkeys(range(min(shown, len(records))), "")
    most = int(records["repetition"].argmax())
    if records["repetition"][most] > 0:
        why[most] = "the most repetitive one"
    nats = records["nll"] / np.maximum(records["chosen"], 1)
    least = int(nats.argmax())
    if nats[least] > 0:
        why[least] = " and ".join(filter(None, [why.get(least), "the least likely one"]))
    return "\n".join(_sample(store, records[place], reason, tokenizer) for place, reason in why.items())


def _sample(store: GenerationStore, record: Any, reason: str, tokenizer: Any) -> str:
    view = store.view(int(record["index"]))
    tokens, chosen = view["tokens"].astype(np.int64), int(record["chosen"])
    facts = [f"{len(tokens):,} tokens", f"repetition {percent(float(record['repetition']))}"]
    if chosen:
        facts.append(f"perplexity {number(float(np.exp(min(record['nll'] / chosen, 700))))}")
    title = f"Sample {int(record['index']):,}{f', {reason}' if reason else ''}"
    ids = " ".join(map(str, tokens[:LONGEST].tolist()))
    more = f'<p class="muted">… and {len(tokens) - LONGEST:,} more tokens</p>' if len(tokens) > LONGEST else ""
    roles = view.get("roles", np.where(written(len(tokens), chosen, None), ASSISTANT, FORCED))
    text = f'<pre dir="auto" tabindex="0">{_text(tokens[:LONGEST], roles, tokenizer)}</pre>' if tokenizer is not None else ""
    return (
        f'<article><h3>{title}</h3><p class="muted">{" · ".join(facts)}</p>{text}{more}'
        f"<details{'' if text else ' open'}><summary>token ids</summary><pre>{ids}</pre></details></article>"
    )


def _text(tokens: NDArray[np.int64], roles: NDArray[Any], tokenizer: Any) -> str:
    special = np.isin(tokens, tokenizer.all_special_ids)
    return "".join(
        f'<span class="{ROLES[role]}{" special" if is_special else ""}">{escape(printable(text))}</span>'
        for role, is_special, text in _runs(tokens, roles, special, tokenizer)
    )


def _runs(tokens: NDArray[np.int64], roles: NDArray[Any], special: NDArray[np.bool_], tokenizer: Any) -> Iterator[tuple[int, bool, str]]:
    """Stretches of one writer, special tokens apart: decoding is cut there only, since a character may be several tokens."""
    for (role, is_special), group in itertools.groupby(
        zip(tokens.tolist(), roles.tolist(), special.tolist(), strict=True), lambda t: t[1:]
    ):
        ids = [token for token, *_ in group]
        yield role, is_special, "".join(tokenizer.convert_ids_to_tokens(ids)) if is_special else tokenizer.decode(ids)
