"""Weights that are read when a model is already distributed: a model too large for each process's memory is never whole in any but one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_qat.generation import load_causal_lm


class DeferredWeights:
    """Hands out the weights of a causal language model on disk; only rank 0 reads them, and all ranks must ask for the same ones.

    Args:
        name: Folder, hub id, or ``tiny-teacher``.
        device: Where this process computes.

    Raises:
        ValueError: The files cannot be read.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.alone = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1
        self.tensors: dict[str, Tensor] = {}
        about: list[Any] = [None]
        if self.alone or distributed.get_rank() == 0:
            try:
                self.tensors = dict(load_causal_lm(name, "auto").named_parameters(remove_duplicate=False))
                about = [{key: (tensor.shape, tensor.dtype) for key, tensor in self.tensors.items()}]
            except ValueError as error:
                about = [error]
        if not self.alone:
            distributed.broadcast_object_list(about, src=0)
        if isinstance(about[0], ValueError):  # on all ranks, or the others would wait for rank 0
            raise about[0]
        self.about: dict[str, tuple[torch.Size, torch.dtype]] = about[0]

    def fill(self, model: nn.Module, part: nn.Module) -> None:
        """Give the parameters of a part of `model` that are on the meta device their values; tied ones stay tied.

        Raises:
            ValueError: The files do not hold one of them in this shape.
        """
        wanted = {id(parameter) for parameter in part.parameters() if parameter.is_meta}
        filled: dict[int, nn.Parameter] = {}
        for name, owner, key, parameter in _places(model):
            if id(parameter) in wanted:
                if id(parameter) not in filled:
                    values = self._read(name, parameter.shape).to(parameter.dtype)
                    filled[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                owner._parameters[key] = filled[id(parameter)]

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        there, dtype = self.about.get(name, (None, torch.float32))
        if there != shape:
            raise ValueError(f"weights: {name} has shape {tuple(shape)} in the model and {there and tuple(there)} in its files")
        if self.tensors:
            tensor = self.tensors[name].detach().to(self.device, copy=True)  # teacher and student may both ask
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if not self.alone:  # as bytes: not every backend sends every dtype
            tensor = tensor.contiguous()
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        return tensor


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, attribute, parameter) of every place that holds a parameter, tied ones several times."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".lstrip("."), module, key, parameter
