"""The verb `load_quantized`."""

from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.formats.base import check_packages, formats
from lightning_qat.formats.folder.manifest import read_manifest
from lightning_qat.formats.folder.quiet import no_progress_bars
from lightning_qat.modules.unpacking import Scales, make_trainable
from lightning_qat.registry import did_you_mean


def load_quantized(path: str | Path, model: nn.Module | None = None, *, trainable: bool = False, scales: Scales = "kept") -> Any:
    """A model from its export, read as its runtime reads it.

    The native format gives a model with packed codes: float weights of quantized layers are never built. Others give what the runtime's
    own library makes of the folder.

    Args:
        path: A folder that :func:`export` wrote.
        model: For a native export of a model that is not one of transformers: an instance of its class, whose weights are replaced.
        trainable: Turn codes into float weights on their grid under fake quantizers, to train on from a native export; the model is in
            training mode then.
        scales: What trainable weights are quantized with: ``kept`` are the scales of the export, ``found`` are those of the weights
            at every step (:func:`~lightning_qat.modules.unpacking.make_trainable`).

    Returns:
        The model in eval mode.

    Raises:
        ValueError: Not an export, another format version, a damaged file, `model` missing or of another shape, or
            `trainable` for a format of another runtime.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    writer = formats.get(_target(folder, manifest))
    check_packages(writer)
    if trainable and writer.name != "native":
        raise ValueError(f"trainable: {str(path)!r} is a {writer.name!r} export, for its runtime only; train on from a native one")
    with no_progress_bars():
        loaded = writer().load(folder, manifest, model)
    return make_trainable(loaded, scales) if trainable else loaded


def _target(folder: Path, manifest: dict[str, Any]) -> str:
    """The format that wrote a folder; the first exports do not say it, they are native."""
    target: str = manifest.get("target", "native")
    if target not in formats:
        made_by = manifest["versions"].get("lightning_qat")
        raise ValueError(
            f"path: {str(folder)!r} was written for the target {target!r} by lightning-qat {made_by}, "
            f"{did_you_mean(target, formats.names())}; update this library: pip install -U lightning-qat"
        )
    return target
