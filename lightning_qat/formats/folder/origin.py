"""What a model was made from, as far as the files at hand tell: nothing is asked over the network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError
from torch import nn
from transformers import PreTrainedModel

from lightning_qat.formats.folder.manifest import CARD

LONGEST = 2**20  # bytes of a model card that are read


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The base of a model.

    Attributes:
        name: Its id on the hub; None where it has none. Names of local folders are nobody's business.
        license: Its license as the hub writes it, such as ``apache-2.0``; None if unknown.
        license_name: The name of a license that the hub does not know.
        license_link: Where that license is.
        task: Its pipeline tag.
    """

    name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    task: str | None = None


def origin_of(model: nn.Module) -> Origin:
    """The base of a model: from the model card in the folder, or in the hub's cache, that it was loaded from."""
    source = next((module.config._name_or_path for module in model.modules() if isinstance(module, PreTrainedModel)), "")
    if not source:
        return Origin()
    if Path(source).is_dir():
        card = _front_matter(Path(source) / CARD)
        tags = card.get("tags")
        is_export = isinstance(tags, list) and "lightning_qat" in tags  # its base is ours
        return _origin(_word(card, "base_model") if is_export else None, card)
    return _origin(source, _front_matter(found) if (found := _cached(source, CARD)) else {}) if _cached(source, "config.json") else Origin()


def _origin(name: str | None, card: dict[str, Any]) -> Origin:
    words = {field: _word(card, field) for field in ("license", "license_name", "license_link")}
    return Origin(name=name, task=_word(card, "pipeline_tag"), **words)


def _cached(repository: str, file: str) -> Path | None:
    """A file of the hub's cache; a name that no repository has, such as that of a folder that is gone, is in no cache."""
    try:
        found = try_to_load_from_cache(repository, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _word(card: dict[str, Any], key: str) -> str | None:
    value = card.get(key)
    return value if isinstance(value, str) and value else None


def _front_matter(file: Path) -> dict[str, Any]:
    """The YAML between the first two lines of three dashes; nothing where there is none or it cannot be read."""
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(LONGEST)
        found = yaml.safe_load(text[4 : text.index("\n---", 3)]) if text.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
