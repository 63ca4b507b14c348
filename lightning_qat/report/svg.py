"""Charts as inline SVG: no script and no file beside the page. Colours are the page's, so that charts follow its light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightning_qat.report.histograms import Histogram
from lightning_qat.report.wording import amount, number, percent

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 260, 56, 16, 48, 44  # of a histogram, and the margins around its bars
ROW, LABELS, BARS, FIGURES = 26, 190, 440, 90  # of a bar chart: height of a row, widths of its columns
COLORS = ("one", "two")  # classes in the page's style sheet


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: its label and a value for each series."""

    label: str
    values: Sequence[float]


def histogram_chart(title: str, histogram: Histogram, x_label: str) -> str:
    """A histogram of samples.

    Args:
        title: Title.
        histogram: What to show.
        x_label: What its values are.
    """
    half = 0.5 if histogram.whole else 0.0  # bars of whole numbers stand around them
    scale = math.log if histogram.log else float
    low, high = (scale(histogram.edges[i] - half) for i in (0, -1))
    tallest, total, bottom = max(histogram.counts), sum(histogram.counts), HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - low) / (high - low)

    def y(count: float) -> float:
        return bottom - (bottom - TOP) * count / tallest

    parts = [part for tick in ticks(0, tallest, 4) if tick == int(tick) for part in _grid_line(tick, y(tick))]
    bins = list(zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False))
    for start, end, count in bins:
        if count:
            left, right = x(start - half), x(end - half)
            text = f"{_range(histogram, start, end)}: {amount(count, 'sample')} ({percent(count / total)})"
            parts.append(_rect(left + 0.5, y(count), max(1.0, right - left - 1), bottom - y(count), COLORS[0], text))
    ends = histogram.edges[0] - half, histogram.edges[-1] - half
    places = log_ticks(*ends) if histogram.log else [tick for tick in ticks(*ends) if not histogram.whole or tick == int(tick)]
    parts += [_text(x(tick), bottom + 17, number(tick), "middle") for tick in places]
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>')
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "muted"))
    parts.append(_text(0, TOP - 14, "samples", "start", "muted"))
    start, end, count = max(bins, key=lambda entry: entry[2])
    peak = f"{percent(count / total)} of {amount(total, 'sample')} in the tallest bar, {_range(histogram, start, end)}"
    return _svg(WIDTH, HEIGHT, title, f"{x_label}, {peak}", parts)


def bar_chart(title: str, rows: Sequence[Bar], series: Sequence[str], x_label: str) -> str:
    """Horizontal bars, those of a row below each other.

    Args:
        title: Title.
        rows: What to show, from top to bottom.
        series: A name for each value of a row, one or two.
        x_label: What the values are.
    """
    largest = max((value for row in rows for value in row.values), default=0) or 1
    top, height = 62 if len(series) > 1 else 40, (ROW - 8) / len(series)
    parts = []
    if len(series) > 1:
        for i, name in enumerate(series):
            parts.append(f'<rect class="{COLORS[i]}" x="{LABELS + 110 * i}" y="34" width="12" height="12" rx="2"/>')
            parts.append(_text(LABELS + 110 * i + 18, 44, name, "start"))
    for i, row in enumerate(rows):
        upper = top + i * ROW
        parts.append(_text(LABELS - 10, upper + ROW / 2 + 1, row.label, "end", "token"))
        figures = " / ".join(number(round(value)) if value >= 10 else number(value) for value in row.values)
        for j, value in enumerate(row.values):
            text = f"{row.label}: " + ", ".join(f"{name} {number(each)}" for name, each in zip(series, row.values, strict=True))
            parts.append(_rect(LABELS, upper + 3 + j * height, max(1.0, BARS * value / largest), height - 1, COLORS[j], text))
        parts.append(_text(LABELS + BARS * max(row.values) / largest + 8, upper + ROW / 2 + 1, figures, "start", "muted"))
    bottom = top + len(rows) * ROW
    parts.append(f'<line class="axis" x1="{LABELS}" y1="{top}" x2="{LABELS}" y2="{bottom}"/>')
    parts.append(_text(LABELS, bottom + 20, x_label, "start", "muted"))
    first = f"; {rows[0].label} comes first" if rows else ""
    return _svg(LABELS + BARS + FIGURES, bottom + 30, title, f"{x_label} of {len(rows)} rows{first}", parts)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two others, at most about `most` of them, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // 8))
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [round(factor * 10.0**power, 12) for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 4:
            break
    return found if len(found) > 1 else ticks(low, high, 4)


def _range(histogram: Histogram, start: float, end: float) -> str:
    if not histogram.whole:
        return f"{number(start)} to {number(end)}"
    return number(start) if end - start == 1 else f"{number(start)} to {number(end - 1)}"


def _grid_line(value: float, height: float) -> list[str]:
    line = f'<line class="grid" x1="{LEFT}" y1="{height:.1f}" x2="{WIDTH - RIGHT}" y2="{height:.1f}"/>'
    return [line, _text(LEFT - 8, height + 4, number(value), "end")]


def _rect(x: float, y: float, width: float, height: float, color: str, tooltip: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{color}" {place}><title>{escape(tooltip)}</title></rect>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    name = f'role="img" aria-label="{escape(f"{title}: {description}")}"'
    heading = f'<text class="title" x="0" y="16">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {name}>{heading}{"".join(parts)}</svg>'
