"""Models to be filled from a file: of transformers without weights (parameters on the meta device, buffers as usual), others as copies."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lightning_qat.generation.skeleton import parameters_on_meta
from lightning_qat.modules import remove_quantizers
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.modules.weights import layer_weights


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


def plain_copy(model: nn.Module) -> nn.Module:
    """The same module without quantizers, to be filled: instead of packed codes it has weights without memory."""
    copied = copy.deepcopy(model)
    for weight in layer_weights(copied):
        if isinstance(weight.quantizer, PackedWeight):
            empty = torch.empty(weight.shape, dtype=weight.quantizer.dtype, device="meta")
            setattr(weight.layer, weight.parameter, nn.Parameter(empty, requires_grad=False))
            setattr(weight.layer, f"{weight.parameter}_quantizer", None)
    remove_quantizers(copied)
    return copied
