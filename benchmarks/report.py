"""Results as JSON, as a page of tables that is made from the JSON alone, and as a chart."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import figure, models, op

ABOUT = """Ratios are medians over rounds. In a round every variant runs once, one after the other, and is divided by the unquantized run
(for the operation: the copy) of the same round; below 1 is faster or smaller than unquantized. The spread is minimum .. maximum; quartiles
are in the JSON file."""
PARTS = {
    "op": "One fake quantization",
    "layer": "One decoder layer, forward and backward",
    "step": "One training step",
    "memory": "Peak memory of one training step",
}


def device_of(device: str) -> dict[str, Any]:
    """What ran it, without the name of a machine."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"cpu": name, "cpu_threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        found = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **found}
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def head(device: str, command: str) -> dict[str, Any]:
    """When, where and with what."""
    packages = ("torch", "transformers", "torchao", "triton", "lightning-qat")
    return {
        "date": date.today().isoformat(),
        "command": command,
        "device": device_of(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def write(result: dict[str, Any], folder: Path, stem: str) -> None:
    """All three files; called after every part, so that an interrupted run leaves what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = figure.draw(result, folder / f"{stem}.png")
    (folder / f"{stem}.md").write_text("\n".join(page(result, f"{stem}.png" if drawn else None)) + "\n", encoding="utf-8")


def page(result: dict[str, Any], picture: str | None) -> Iterator[str]:
    device, versions = result["device"], result["versions"]
    yield f"# Speed and memory on {'a GPU' if 'gpu' in device else 'a CPU'}\n"
    yield f"```bash\n{result['command']}\n```\n"
    where = f"{device['gpu']}, CUDA {device['cuda']}; " if "gpu" in device else ""
    yield f"Run on {result['date']}: {where}{device['cpu']}, {device['cpu_threads']} CPU threads, {device['cpu_capability']}."
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}.\n"
    yield f"{ABOUT}\n"
    if picture:
        yield f"![Time of each variant as a ratio to unquantized]({picture})\n"
    for part, title in PARTS.items():
        if result.get(part):
            yield f"## {title}\n"
            yield from (_op(result["op"]) if part == "op" else _memory(result[part]) if part == "memory" else _times(result[part], result))
    yield from _legend(result)
    if result.get("skipped"):
        yield "## Not run\n"
        for row in result["skipped"]:
            yield f"- {row['workload']}, {row['mode']}, {row['variant']}: {row['reason']}"
        yield ""
    yield f"Minutes: {', '.join(f'{part} {seconds / 60:.1f}' for part, seconds in result['part_seconds'].items())}."


def _span(spread: dict[str, float]) -> str:
    return f"{spread['min']:.2f} .. {spread['max']:.2f}"


def _op(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"Bandwidth counts what has to be read and written once; {rows[0]['rounds']} rounds.\n"
    yield "| tensor | shape | dtypes | variant | GB/s | time / copy | spread |\n|---|---|---|---|---|---|---|"
    for row in rows:
        shape, dtypes = " x ".join(map(str, row["shape"])), " to ".join(row["dtypes"])
        bandwidth, ratio = row["gigabytes_per_second"]["median"], row["ratio"]
        yield f"| {row['case']} | {shape} | {dtypes} | {row['variant']} | {bandwidth:.1f} | {ratio['median']:.2f} | {_span(ratio)} |"
    yield ""


def _times(rows: list[dict[str, Any]], result: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys(row["workload"] for row in rows):
        yield f"{name}: {result['workloads'][name]}.\n"
        yield "| mode | variant | time / unquantized | spread | seconds | tokens/s | rounds |\n|---|---|---|---|---|---|---|"
        for row in rows:
            if row["workload"] == name:
                times = f"{row['seconds']['median']:.4g} | {row['tokens_per_second']:,.0f} | {row['rounds']}"
                yield f"| {row['mode']} | {row['variant']} | **{row['ratio']['median']:.2f}** | {_span(row['ratio'])} | {times} |"
        yield ""


def _memory(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "Each in a process of its own, after one step of warm-up; *before* is parameters and optimizer state.\n"
    yield "| model | mode | variant | peak / unquantized | peak MiB | before MiB |\n|---|---|---|---|---|---|"
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"**{row['ratio']:.2f}**"
        sizes = f"{row['peak'] / 2**20:,.0f} | {row['before'] / 2**20:,.0f}"
        yield f"| {row['workload']} | {row['mode']} | {row['variant']} | {ratio} | {sizes} |"
    yield ""


def _legend(result: dict[str, Any]) -> Iterator[str]:
    yield "## What the rows mean\n"
    if result.get("op"):
        yield from (f"- {name} (operation): {meaning}" for name, meaning in op.VARIANTS.items())
    named = {row["variant"] for part in ("layer", "step", "memory") for row in result.get(part, [])}
    yield from (f"- {variant.name}: {variant.meaning}" for variant in models.VARIANTS if variant.name in named)
    yield "- eager, compiled: without torch.compile, and with torch.compile of what is between inputs and loss, for every row alike"
    yield ""
