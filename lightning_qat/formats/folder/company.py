"""What goes along with the weights of a transformers model: configuration, generation settings, tokenizer and chat template."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from lightning_qat.generation import has_tokenizer, load_tokenizer


def find_tokenizer(whole: nn.Module, model: nn.Module, given: Any) -> Any:
    """The tokenizer to write; a warning, at the line that calls the caller's caller, where a model that generates text has none.

    Args:
        whole: The module that the user handed over.
        model: What is written of it.
        given: A tokenizer, or the folder or hub id of one; it wins.

    Returns:
        What is given; else what `whole` has as its ``tokenizer``; else what lies where the model came from; else None.

    Raises:
        ValueError: Nothing can be read from the folder or hub id that is given, or it is no tokenizer.
    """
    if given is not None:
        given = load_tokenizer(given) if isinstance(given, str | Path) else given
        if not hasattr(given, "save_pretrained"):
            raise ValueError(f"tokenizer: got {given!r}, expected a tokenizer of transformers, a folder or a hub id")
        return given
    if isinstance(own := getattr(whole, "tokenizer", None), PreTrainedTokenizerBase):
        return own
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    source, reason = model.config._name_or_path, ""
    if source and (not Path(source).is_dir() or has_tokenizer(source)):
        try:
            return load_tokenizer(source)
        except ValueError as error:
            reason = f" ({error})"
    text = f"export: no tokenizer is known for this model{reason}, so none is written; pass tokenizer= to export"
    warnings.warn(text, stacklevel=4)
    return None


def save_company(model: nn.Module, tokenizer: Any, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write config and generation config, which only models of transformers have, and the tokenizer with its chat template.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None.
        folder: Where.
        config: Entries to add to the written config, such as ``quantization_config``.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not isinstance(model, PreTrainedModel):
        return
    written = type(model.config).from_dict(model.config.to_dict() | (config or {}))
    written.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        # Not save_pretrained, which refuses settings that contradict each other, as some published models have them.
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the floating-point parameters have."""
    counted: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counted[parameter.dtype] = counted.get(parameter.dtype, 0) + max(parameter.numel(), 1)
    return max(counted, key=lambda dtype: counted[dtype], default=torch.float32)


def dtype_name(model: nn.Module) -> str:
    """The same as a config writes it, such as ``float32``."""
    return str(model_dtype(model)).removeprefix("torch.")
