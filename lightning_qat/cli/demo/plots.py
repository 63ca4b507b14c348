"""The demo's pictures."""

import csv
from pathlib import Path
from typing import Any

INK, GRID, COLORS = "#222222", "#dddddd", ("#8a8f98", "#d1495b", "#2a6f97")


def _axes(title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def plot_loss(metrics: Path, out: Path, scheme: str) -> None:
    """The distance to the teacher in one run, from Lightning's CSV logger."""
    with open(metrics, encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["train/kl"])) for row in csv.DictReader(file) if row.get("train/kl")]
    figure, axes = _axes(f"Distillation, {scheme}")
    axes.plot([step for step, _ in rows], [loss for _, loss in rows], color=COLORS[2], linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("KL(teacher || student), nats per token")
    axes.set_ylim(bottom=0)
    figure.savefig(out)


def plot_perplexity(runs: list[dict[str, Any]], out: Path) -> None:
    """Held-out perplexity per scheme, as bars."""
    figure, axes = _axes("Held-out perplexity (lower is better)")
    labels = {"full_precision": "full precision", "round_to_nearest": "round to nearest", "llm_qat": "LLM-QAT"}
    for i, (key, label) in enumerate(labels.items()):
        places = [run + (i - 1) * 0.27 for run in range(len(runs))]
        bars = axes.bar(places, [run["perplexity"][key] for run in runs], width=0.25, color=COLORS[i], label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, color=INK)
    axes.set_xticks(range(len(runs)), [run["scheme"] for run in runs])
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)
