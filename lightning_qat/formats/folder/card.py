"""The model card: what was trained, what the folder holds, what was verified, and how to load it. The hub reads its first lines."""

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from lightning_qat.formats.base import Format, Job
from lightning_qat.formats.exactness.fitting import quantized_places
from lightning_qat.formats.folder.manifest import CARD, size_on_disk, sizes, versions
from lightning_qat.formats.folder.origin import Origin, origin_of
from lightning_qat.runtime import PARTS

TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "image-text-to-text",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
UNKNOWN_LICENSE = "Unknown: that of the base model applies."
CODE = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>()#+!|~$&"})


def check_results(results: Any) -> None:
    """Refuse figures for the model card that are no numbers with names.

    Raises:
        ValueError: They are not.
    """
    if results is None:
        return
    if not isinstance(results, Mapping):
        raise ValueError(f"results: got {results!r}, expected names and numbers, such as {{'perplexity': 12.2}}")
    for name, value in results.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"results: got {name!r}: {value!r}, expected a name and a number; of a tensor give .item()")


def write_card(job: Job, writer: Format, folder: Path, entries: dict[str, Any]) -> None:
    """Write `README.md`, after all other files but the manifest.

    Args:
        job: What was written.
        writer: The format that wrote it.
        folder: Where.
        entries: Those of the manifest: ``difference`` and ``verification`` are told.
    """
    origin, figures = origin_of(job.model), sizes(job.model)
    head = yaml.safe_dump(_metadata(job, writer, origin, figures), sort_keys=False, allow_unicode=True, width=math.inf)
    sections = {
        f"{plain(type(job.model).__name__)}, quantized": _introduction(job, writer, origin),
        "How to load it": ["```python", writer.usage(job), "```"],
        "What was trained": [*_table(("part", "where", "how"), _specs(job)), "", _scheme_line(figures)],
        "Size": _size(folder, figures),
        "What differs from training": _differences(job, entries.get("difference")),
        "What was verified": _verification(entries.get("verification") or {}),
        "Results": _table(("figure", "value"), ((plain(name), _number(value)) for name, value in (job.results or {}).items())),
        "License": [_license(origin)],
        "Versions": _table(("library", "version"), versions(writer).items()),
    }
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(body) for title, body in sections.items() if body)
    (folder / CARD).write_text(f"---\n{head}---\n\n{text[1:]}\n", encoding="utf-8", errors="replace")


def plain(text: object) -> str:
    """Text that stays text in Markdown, whatever is in it."""
    return " ".join(str(text).split()).translate(CODE)


def _metadata(job: Job, writer: Format, origin: Origin, figures: dict[str, Any]) -> dict[str, Any]:
    name = type(job.model).__name__
    task = origin.task or next((task for end, task in TASKS.items() if name.endswith(end)), None)
    bits = sorted({spec.bits for _, part, spec in quantized_places(job.model) if part == "weight"})
    entries = {
        "base_model": origin.name,
        "base_model_relation": "quantized" if origin.name else None,
        "license": origin.license or "other",
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "library_name": writer.library,
        "pipeline_tag": task,
        "tags": ["lightning_qat", "quantization-aware-training", writer.name, *(f"{bit}-bit" for bit in bits)],
        "quantization": {
            "target": writer.name,
            "scheme": {part: _in_words(spec) for part in PARTS if (spec := getattr(job.scheme, part)) is not None},
            "effective_bits": figures["effective_bits"],
        },
    }
    lines = {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in entries.items()}
    return {key: value for key, value in lines.items() if value is not None}


def _introduction(job: Job, writer: Format, origin: Origin) -> list[str]:
    base = f" of {plain(origin.name)}" if origin.name else ""
    return [
        f"A {plain(type(job.model).__name__)}{base}, quantized by lightning_qat and written for the target `{writer.name}`. The integers "
        "in this folder are exactly those of the model's fake quantizers; nothing was quantized again on the way out."
    ]


def _specs(job: Job) -> Iterator[tuple[str, str, str]]:
    """One row for each spec: the part, how many places have it, and the spec in words."""
    places: dict[tuple[str, Any], list[str]] = {}
    for name, part, spec in quantized_places(job.model):
        places.setdefault((part, spec), []).append(name)
    for (kind, spec), names in places.items():
        where = plain(names[0]) if len(names) == 1 else f"{len(names)} places, the first is {plain(names[0])}"
        yield kind, where, plain(_in_words(spec))


def _in_words(spec: Any) -> str:
    per = f"group of {spec.group_size}" if getattr(spec, "group_size", None) else spec.granularity.replace("token_head", "token and head")
    words = [f"{spec.bits} bits", f"one scale per {per}", "symmetric" if spec.symmetric else f"asymmetric, {spec.zero_point} zero point"]
    words += [spec.position.replace("_rope", "-RoPE")] if hasattr(spec, "position") else []
    words += [] if getattr(spec, "dynamic", True) else ["static range"]
    conventions = ("quantizer", "code_range", "divisor", "scale_dtype", "scale_rounding", "round_via", "arithmetic")
    return ", ".join([*words, *(f"{name} {getattr(spec, name)}" for name in conventions)])


def _scheme_line(figures: dict[str, Any]) -> str:
    if figures["effective_bits"] is None:
        return "No weights are quantized."
    return (
        f"{figures['quantized_weights']:,} quantized weights take {figures['quantized_bits']:,} bits with their scales and zero points: "
        f"**{figures['effective_bits']:.7g} bits per weight**."
    )


def _size(folder: Path, figures: dict[str, Any]) -> list[str]:
    nominal, disk = figures["nominal_bits"] / 8, size_on_disk(folder)
    return [
        f"{disk:,} bytes on disk, all files but this card and the manifest. Packed without gaps, codes, scales and all other tensors are "
        f"{nominal:,.0f} bytes."
    ]


def _differences(job: Job, measured: Mapping[str, float] | None) -> list[str]:
    if job.fit.is_exact:
        return ["Nothing: all that was trained is there, and the runtime computes on the grids of training."]
    lines = [f"- {plain(note)}" for note in job.fit.notes]
    if measured is None:
        return [*lines, "", "The difference was not measured, because no example input was known."]
    rows = ((plain(name), _number(value)) for name, value in measured.items())
    return [*lines, "", "Measured on outputs for example inputs, against the trained model:", "", *_table(("difference", "value"), rows)]


def _verification(found: Mapping[str, Any]) -> list[str]:
    rows = ((plain(name), "not compared" if value is None else _number(value)) for name, value in found.items())
    return [
        "Before the folder got its name it was read back with the libraries named below and compared with the model: codes and scales of "
        "weights bit for bit, outputs by their largest difference.",
        "",
        *_table(("compared", "found"), rows),
    ]


def _license(origin: Origin) -> str:
    if origin.license is None:
        return UNKNOWN_LICENSE
    more = [plain(text) for text in (origin.license_name, origin.license_link) if text]
    return f"Of the base model: {', '.join([plain(origin.license), *more])}."


def _number(value: Any) -> str:
    return f"{float(value):.6g}" if isinstance(value, Real) and not isinstance(value, int) else plain(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines] if lines else []
