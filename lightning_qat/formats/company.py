"""What goes along with the weights of a transformers model: configuration, generation settings, tokenizer and chat template."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_qat.generation import has_tokenizer, load_tokenizer


def find_tokenizer(model: nn.Module, given: Any) -> Any:
    """The tokenizer of a model: the one given (an object, a folder or a hub id), or what lies where the model came from; else None."""
    if given is not None:
        return load_tokenizer(given) if isinstance(given, str | Path) else given
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    source = model.config._name_or_path
    if not source or (Path(source).is_dir() and not has_tokenizer(source)):
        return None
    try:
        return load_tokenizer(source)
    except ValueError as error:
        warnings.warn(f"export: {error}; pass tokenizer= to export", stacklevel=3)
        return None


def save_company(model: nn.Module, tokenizer: Any, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write config, generation config and tokenizer of a transformers model; other models have none.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None.
        folder: Where.
        config: Entries to add to the written config, such as ``quantization_config``.
    """
    if not isinstance(model, PreTrainedModel):
        return
    written = type(model.config).from_dict(model.config.to_dict() | (config or {}))
    written.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the floating-point parameters have."""
    counted: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counted[parameter.dtype] = counted.get(parameter.dtype, 0) + max(parameter.numel(), 1)
    return max(counted, key=lambda dtype: counted[dtype], default=torch.float32)
