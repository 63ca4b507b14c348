"""The verb `load_quantized`."""

from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.formats.base import check_packages, formats
from lightning_qat.formats.manifest import read_manifest


def load_quantized(path: str | Path, model: nn.Module | None = None) -> Any:
    """A model from its export, read as its runtime reads it.

    The native format gives a model with packed codes: float weights of quantized layers are never built. Others give what the runtime's
    own library makes of the folder.

    Args:
        path: A folder that :func:`export` wrote.
        model: For a native export of a model that is not one of transformers: an instance of its class, whose weights are replaced.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: Not an export, another format version, a damaged file, or `model` missing or of another shape.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    writer = formats.get(manifest.get("target", "native"))
    check_packages(writer)
    return writer().load(folder, manifest, model)
