"""A transformers model without its weights: parameters on the meta device, buffers computed as usual."""

from pathlib import Path
from typing import Any

import transformers

from lightning_qat.generation.skeleton import parameters_on_meta


def transformers_class(name: str) -> type[transformers.PreTrainedModel]:
    """The model class that a manifest names.

    Raises:
        ValueError: The installed version of transformers has no such model class.
    """
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"path: the manifest names the class {name!r}, which this version of transformers does not have")
    return cls


def build_transformers_model(folder: Path, class_name: str) -> Any:
    """An instance of a transformers model class for the config in `folder`.

    Raises:
        ValueError: transformers has no such model class, or the folder no valid config.
    """
    cls: Any = transformers_class(class_name)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"path: cannot read a configuration from {str(folder)!r}: {error}") from error
    if cls.config_class is not None and not isinstance(config, cls.config_class):
        raise ValueError(
            f"path: the manifest in {str(folder)!r} names the class {class_name!r}, its configuration is a {type(config).__name__}"
        )
    with parameters_on_meta():
        model = cls(config)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
