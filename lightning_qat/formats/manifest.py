"""`manifest.json`: what an export holds, how it was trained, what was left out, what was verified, and the checksums of its files."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, Job
from lightning_qat.modules.weights import layer_weights

FORMAT, FORMAT_VERSION = "lightning_qat", 1
MANIFEST = "manifest.json"


def write_manifest(job: Job, writer: Format, folder: Path, entries: dict[str, Any]) -> None:
    """Write the manifest of a complete folder.

    Args:
        job: What was written.
        writer: The format that wrote it.
        folder: Where; all files in it get a checksum.
        entries: What else the manifest is to hold.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "target": writer.name,
        "model": model_kind(job.model),
        "scheme": job.scheme.to_dict(),
        "effective_bits": _effective_bits(job),
        "dropped": list(job.fit.dropped),
        "notes": list(job.fit.notes),
        **entries,
        "sha256": {file.relative_to(folder).as_posix(): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()},
        "versions": {
            name: version(name.replace("_", "-")) for name in ("lightning_qat", "torch", "transformers", "safetensors", *writer.packages)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def model_kind(model: nn.Module) -> dict[str, str]:
    """Which class a model is of."""
    library = "transformers" if isinstance(model, PreTrainedModel) else "torch"
    return {"library": library, "class": type(model).__name__}


def _effective_bits(job: Job) -> float | None:
    weights = [weight for weight in layer_weights(job.model) if weight.quantizer is not None]
    return job.scheme.effective_bits(job.model) if weights else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files are all there and undamaged.

    Raises:
        ValueError: No manifest, a damaged one, another version, or a file whose checksum differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"path: no {MANIFEST} in {str(folder)!r}; expected a folder written by lightning_qat.export")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {str(path)!r} is damaged: {error}") from error
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} is {manifest.get('format')!r} version {manifest.get('format_version')!r}; this library reads "
            f"{FORMAT!r} version {FORMAT_VERSION}"
        )
    for name, digest in manifest["sha256"].items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"path: the manifest names a file outside its folder: {name!r}")
        if not file.is_file() or _sha256(file) != digest:
            raise ValueError(f"path: {str(file)!r} is missing or damaged (checksum differs from the manifest); export again")
    return manifest


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
