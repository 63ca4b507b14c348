"""Models whose parameters are on the meta device: they cost no memory until they are filled."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_qat.generation.teacher import read_config


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
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


def causal_lm_skeleton(name: str, dtype: torch.dtype) -> Any:
    """A causal language model without weights, in eval mode; only its configuration is read.

    Args:
        name: Folder, hub id, or ``tiny-teacher``.
        dtype: Of its parameters.

    Raises:
        ValueError: Nothing is there, or it is not a causal language model.
    """
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(read_config(name), dtype=dtype).eval()
