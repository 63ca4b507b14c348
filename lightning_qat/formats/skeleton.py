"""A transformers model without its weights: parameters on the meta device, buffers computed as usual."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Unlike `torch.device("meta")`, keeps buffers such as rotary frequencies, which no checkpoint holds."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def build_transformers_model(folder: Path, class_name: str) -> Any:
    """An instance of a transformers model class for the config in `folder`.

    Raises:
        ValueError: transformers has no such model class, or the folder no valid config.
    """
    cls = getattr(transformers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"path: the manifest names the class {class_name!r}, which this version of transformers does not have")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"path: cannot read a configuration from {str(folder)!r}: {error}") from error
    with _parameters_on_meta():
        model = cls(config)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
