"""The chart of ratios, one panel per workload and mode."""

import importlib.util
from pathlib import Path
from typing import Any

PEER, OURS, PLAIN = "tab:orange", "tab:blue", "lightgray"


def draw(result: dict[str, Any], path: Path) -> bool:
    """Bars are medians, whiskers the quartiles; False where there is nothing to draw or nothing to draw with."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in [*result.get("layer", []), *result.get("step", [])]:
        panels.setdefault(f"{row['workload']}, {row['mode']}", []).append(row)
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    chart = Figure(figsize=(6.5 * columns, 0.6 + 3.2 * lines), layout="constrained")
    axes = chart.subplots(lines, columns, squeeze=False).flat
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for ax, (title, rows) in zip(axes, panels.items(), strict=False):
        medians = [row["ratio"]["median"] for row in rows]
        below = [m - row["ratio"]["q1"] for m, row in zip(medians, rows, strict=True)]
        above = [row["ratio"]["q3"] - m for m, row in zip(medians, rows, strict=True)]
        names = [row["variant"] for row in rows]
        peers = ("formula", "torchao")
        colors = [PLAIN if n == "unquantized" else PEER if n.startswith(peers) else OURS for n in names]
        ax.barh(names, medians, xerr=[below, above], color=colors, capsize=2)
        for y, (median, high) in enumerate(zip(medians, above, strict=True)):
            ax.annotate(f"{median:.2f}", (median + high, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.margins(x=0.12)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("time / unquantized", fontsize=8)
    chart.suptitle(f"{result['device'].get('gpu', result['device']['cpu'])}: blue ours, orange peers; whiskers are quartiles", fontsize=10)
    chart.savefig(path, dpi=110)
    return True
