"""One page about a store: nothing but this file is needed to read it."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_qat.report.agreement import Agreement, TokenFrequency
from lightning_qat.report.generations import GenerationStatistics, Storage
from lightning_qat.report.style import STYLE
from lightning_qat.report.svg import Bar, bar_chart, histogram_chart
from lightning_qat.report.verdict import verdict, warnings
from lightning_qat.report.wording import label, number, percent, printable, size

_READING = "Tokens that were given are grey, special tokens are framed, what the teacher wrote as the user has a colour of its own."


def render(found: GenerationStatistics, samples: str, *, name: str, tokenizer: Any = None) -> str:
    """The page.

    Args:
        found: What it is about.
        samples: Samples to read, as HTML.
        name: Of the store.
        tokenizer: The teacher's, to show tokens as text.
    """
    sections = [
        ("Length, repetition, likelihood", _charts(found)),
        ("Frequencies of tokens", _frequencies(found, tokenizer)),
        ("Start tokens", _start(found)),
        ("Who wrote the tokens", _roles(found)),
        ("Samples to read", f'<p class="muted">{_READING}</p>\n{samples}' if samples else ""),
        ("The store", _store(found)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}\n</section>" for title, content in sections if content)
    data = json.dumps(found.to_dict(), allow_nan=False)
    for character in "<>&":  # or a string could end the element
        data = data.replace(character, f"\\u{ord(character):04x}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Generated samples: {escape(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Generated samples <code>{escape(name)}</code></h1>
<p class="verdict">{escape(verdict(found))}</p>
{_warnings(found)}
</header>
<main>
{body}
</main>
<script type="application/json" id="statistics">{data}</script>
</body>
</html>
"""


def _warnings(found: GenerationStatistics) -> str:
    items = "".join(f"<li>{escape(printable(text))}</li>" for text in warnings(found))
    if not items:
        return '<p class="fine">Nothing looks wrong.</p>'
    return f'<div class="warning" role="note"><strong>Worth a look</strong><ul>{items}</ul></div>'


def _charts(found: GenerationStatistics) -> str:
    charts = [histogram_chart("Length of samples", found.lengths, "tokens per sample")]
    charts.append(histogram_chart("Repetition", found.repetitions, "share of runs of four tokens that occurred before in the sample"))
    if found.perplexities is not None:
        charts.append(
            histogram_chart("Perplexity of the teacher on its own samples", found.perplexities, "perplexity of a sample (logarithmic)")
        )
    return f'<div class="charts">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'


def _frequencies(found: GenerationStatistics, tokenizer: Any) -> str:
    used = (
        f"{found.distinct:,} of the {found.vocab_size:,} tokens of the vocabulary occur among the {found.chosen:,} that the teacher chose."
    )
    if found.agreement is None:
        rows = [Bar(label(token, tokenizer), [count]) for token, count in found.frequent]
        chart = bar_chart("Most frequent tokens", rows, ["observed"], "occurrences") if rows else ""
        return f"<p>{used} There is nothing to compare them with: {escape(found.not_compared)}.</p><figure class='wide'>{chart}</figure>"
    agreement = found.agreement
    rows = [Bar(label(token.token, tokenizer), [token.observed, token.expected]) for token in agreement.top]
    chart = bar_chart("Most frequent tokens", rows, ["observed", "expected"], "occurrences among the tokens compared")
    off = _table("Over-represented", agreement.over, tokenizer) + _table("Under-represented", agreement.under, tokenizer)
    return f"<p>{used}</p>{_agreement(agreement, found.identity)}<figure class='wide'>{chart}</figure><div class='charts'>{off}</div>"


def _agreement(found: Agreement, identity: dict[str, Any]) -> str:
    source = "from the teacher itself" if found.source == "teacher" else "from the distributions kept in the store"
    left_out = ""
    if identity.get("mode") == "hybrid":
        left_out = " The first tokens of each, which may be the most probable ones instead of draws, are left out."
    rows = [
        ("total variation distance", f"{found.distance:.4f}", f"{found.distance_by_chance:.4f}\u00a0±\u00a0{found.distance_spread:.4f}"),
        ("KL divergence, nats per token", "infinite" if found.kl is None else f"{found.kl:.4f}", f"{found.kl_by_chance:.4f}"),
    ]
    return (
        f"<p>Expected are the averages of the teacher's distributions over the same {found.positions:,} positions of {found.samples:,} "
        f"samples, {source}.{left_out} By chance is what the figures are if every one of these tokens is drawn again.</p>"
        + _rows(("", "measured", "by chance"), rows)
    )


def _table(title: str, tokens: Sequence[TokenFrequency], tokenizer: Any) -> str:
    rows = [(label(token.token, tokenizer), f"{token.observed:,}", number(token.expected), f"{token.deviation:+.1f}") for token in tokens]
    return f"<div><h3>{title}</h3>{_rows(('token', 'observed', 'expected', 'standard deviations'), rows)}</div>"


def _start(found: GenerationStatistics) -> str:
    start = found.start
    if start is None:
        return ""
    if start.allowed is None or start.by_chance is None:
        return f"<p>{start.distinct:,} different tokens start {found.samples:,} samples.</p>"
    return (
        f"<p>{start.distinct:,} different tokens out of {start.allowed:,} start {found.samples:,} samples; "
        f"{start.by_chance:,.0f} are expected from chance.</p>"
    )


def _roles(found: GenerationStatistics) -> str:
    if found.roles is None:
        return ""
    rows = [Bar(f"{role} ({percent(count / found.tokens)})", [count]) for role, count in found.roles.items()]
    return f"<figure class='wide'>{bar_chart('Tokens by who wrote them', rows, ['tokens'], 'tokens')}</figure>"


def _store(found: GenerationStatistics) -> str:
    settings = [(name, json.dumps(value, ensure_ascii=False)) for name, value in _flat(found.identity)]
    return (
        f"<div class='charts'><div><h3>On disk</h3>{_storage(found.storage, found.tokens)}</div>"
        f"<div><h3>Generated from</h3>{_rows(('setting', 'value'), settings)}</div></div>"
    )


def _storage(storage: Storage, tokens: int) -> str:
    arrays = {name: (size(count), f"{count / tokens:.3g}") for name, count in storage.arrays.items()}
    rows = [("all files", size(storage.total), f"{storage.total / tokens:.3g}"), *((name, *cells) for name, cells in arrays.items())]
    kept = "Nothing is kept of the teacher's distributions."
    if storage.targets is not None:
        kept = f"With each token are kept {storage.targets}, {storage.entry_bytes} bytes each."
    return f"{_rows(('', 'size', 'bytes per token'), rows)}<p>{kept}</p>"


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested data as rows."""
    rows: list[tuple[str, Any]] = []
    for name, value in data.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
    return rows


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{escape(printable(first))}</th>{"".join(f"<td>{escape(printable(cell))}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
