"""`manifest.json`: what an export holds, how it was trained, what was left out, what was verified, and the checksums of its files.

Checksums find damage. They are no signature: whoever can write the folder can write a manifest that fits.
"""

import hashlib
import json
import math
import re
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, Job
from lightning_qat.modules.weights import layer_weights, stands_for_codes

FORMAT, FORMAT_VERSION = "lightning_qat", 1
MANIFEST, CARD = "manifest.json", "README.md"
LARGEST = 2**26  # bytes; those of the largest models are a thousandth of it


def write_manifest(job: Job, writer: Format, folder: Path, entries: dict[str, Any]) -> None:
    """Write the manifest of a complete folder.

    Args:
        job: What was written.
        writer: The format that wrote it.
        folder: Where; all files in it get a checksum, except for the model card, which people edit.
        entries: What else the manifest is to hold.
    """
    files = files_of(folder)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "target": writer.name,
        "model": model_kind(job.model),
        "scheme": job.scheme.to_dict(),
        **sizes(job.model),
        "size_on_disk": size_on_disk(folder),
        "dropped": list(job.fit.dropped),
        "notes": list(job.fit.notes),
        **entries,
        "sha256": {file.relative_to(folder).as_posix(): _sha256(file) for file in files},
        "versions": versions(writer),
    }
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    """All files of an export but its manifest and its model card."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file not in (folder / MANIFEST, folder / CARD)]


def size_on_disk(folder: Path) -> int:
    """Bytes of these files."""
    return sum(file.stat().st_size for file in files_of(folder))


def versions(writer: Format) -> dict[str, str]:
    """The versions of the libraries that made an export."""
    return {name: version(name.replace("_", "-")) for name in ("lightning_qat", "torch", "transformers", "safetensors", *writer.packages)}


def model_kind(model: nn.Module) -> dict[str, str]:
    """Which class a model is of."""
    library = "transformers" if isinstance(model, PreTrainedModel) else "torch"
    return {"library": library, "class": type(model).__name__}


def sizes(model: nn.Module) -> dict[str, Any]:
    """What a model takes at least, whatever it is written as; a weight that several layers share counts once.

    Returns:
        ``quantized_weights``, how many there are; ``quantized_bits``, their codes, scales and zero points; ``effective_bits``, bits per
        quantized weight (None where there is none); ``nominal_bits``, with every other tensor as it is.
    """
    quantized = elements = 0
    seen = set()
    for weight in layer_weights(model):
        tensor = getattr(weight.layer, weight.parameter)
        if weight.quantizer is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        elements += math.prod(weight.shape)
        quantized += weight.quantizer.spec.storage_bits(*weight.shape)
    coded = stands_for_codes(model)
    others = {(tensor.data_ptr(), tensor.numel()): tensor for name, tensor in model.state_dict().items() if not coded(name)}
    rest = sum(tensor.numel() * tensor.element_size() * 8 for tensor in others.values())
    return {
        "quantized_weights": elements,
        "quantized_bits": quantized,
        "effective_bits": quantized / elements if elements else None,
        "nominal_bits": quantized + rest,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files are all there and undamaged.

    Files that it does not list are left alone: a model card, what a hub adds. Nothing is read outside the folder, except where a listed
    file is a link, as in the hub's cache; its content must have the checksum all the same.

    Raises:
        ValueError: No manifest, a damaged one, another version, or a file whose checksum differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(_no_export(folder))
    manifest = _parse(path)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(_another_version(path, manifest))
    if "target" in manifest or "checksum" in manifest:  # what the first exports of this version do not have
        _check(isinstance(manifest.get("target"), str), path, "target")
        _check(manifest.get("checksum") == _checksum(manifest), path, "checksum")
    for key in ("model", "scheme", "sha256", "versions"):
        _check(isinstance(manifest.get(key), dict), path, key)
    _check(all(isinstance(manifest["model"].get(key), str) for key in ("library", "class")), path, "model")
    for name, digest in manifest["sha256"].items():
        _check_file(folder, name, digest)
    return manifest


def _no_export(folder: Path) -> str:
    if not folder.is_dir():
        hint = "that is a file; load_trained reads checkpoints" if folder.is_file() else f"nothing is there, seen from {Path.cwd()}"
    elif (folder / "config.json").is_file():
        hint = "a folder of transformers is read by from_pretrained"
    else:
        hint = "lightning-qat export makes one from a checkpoint"
    return f"path: no {MANIFEST} in {str(folder)!r}; expected a folder written by lightning_qat.export ({hint})"


def _parse(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"it has {size} bytes, more than any that export writes")
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(path)!r} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"path: {str(path)!r} is damaged: it holds a {type(manifest).__name__} and no entries")
    return manifest


def _another_version(path: Path, manifest: dict[str, Any]) -> str:
    found = manifest.get("format_version")
    text = f"path: {str(path)!r} is {manifest.get('format')!r} version {found!r}; this library reads {FORMAT!r} version {FORMAT_VERSION}"
    if manifest.get("format") != FORMAT or type(found) is not int:
        return text
    made_by = manifest.get("versions")
    there = made_by.get("lightning_qat") if isinstance(made_by, dict) else None
    if found > FORMAT_VERSION:
        return f"{text}; update it: pip install -U lightning-qat (the export was written by {there or 'a newer one'})"
    return f"{text}; load it with lightning-qat {there or 'of that time'}, or export again from the checkpoint"


def _check(holds: bool, path: Path, key: str) -> None:
    if not holds:
        raise ValueError(f"path: {str(path)!r} is damaged: {key!r} is missing or wrong; export again")


def _check_file(folder: Path, name: str, digest: Any) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or not name.isprintable():
        raise ValueError(f"path: the manifest names a file outside its folder: {name!r}")
    file = folder / name
    _check(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None, folder / MANIFEST, "sha256")
    try:
        same = file.is_file() and _sha256(file) == digest
    except OSError as error:
        raise ValueError(f"path: cannot read {str(file)!r}: {error}") from error
    if not same:
        raise ValueError(f"path: {str(file)!r} is missing or damaged (checksum differs from the manifest); export again")


def _checksum(manifest: dict[str, Any]) -> str:
    """Of everything else in the manifest."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
