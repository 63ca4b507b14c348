"""A frozen model whose weights stay in CPU memory: each block's are on the device only while it computes.

The device holds one block's weights at a time (or the embedding's, or the head's), at the price of copying all weights on every pass.
A model computes where its inputs are, so nothing has to be told which device that is. Only for models without gradients: a backward pass
would find weights that are gone.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

HOOKS, HOMES = "_offload_hooks", "_offload_homes"


def offload_weights(model: Any) -> Any:
    """Keep a frozen model's weights in CPU memory, in place; buffers are small and follow the inputs.

    Blocks are what transformers calls so (``_no_split_modules``); any other module that owns weights is brought in on its own. CPU memory
    is pinned when the first pass on a GPU needs it.

    Args:
        model: A causal language model of transformers, in CPU memory.

    Raises:
        ValueError: A parameter is trained, or is not in CPU memory.
    """
    if is_offloaded(model):
        return model
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.device.type != "cpu":
            what = "is trained" if parameter.requires_grad else f"is on {parameter.device}"
            raise ValueError(f"offload: got a model whose {name!r} {what}, expected a frozen one in CPU memory")
    handles = []
    for module, whole in _units(model, set(model._no_split_modules or ())):
        handles.append(module.register_forward_pre_hook(partial(_bring, whole), with_kwargs=True))
        handles.append(module.register_forward_hook(_release, always_call=True))
    vars(model)[HOOKS] = handles
    return model


def bring_back(model: Any) -> Any:
    """Undo :func:`offload_weights`, in place."""
    for handle in vars(model).pop(HOOKS, ()):
        handle.remove()
    return model


def is_offloaded(model: Any) -> bool:
    """Whether the weights of a model stay in CPU memory."""
    return HOOKS in vars(model)


def _units(module: nn.Module, blocks: set[str]) -> Iterator[tuple[nn.Module, bool]]:
    """What is brought in at once: whole blocks; of other modules only the tensors they own themselves."""
    if type(module).__name__ in blocks:
        yield module, True
        return
    if module._parameters or module._buffers:
        yield module, False
    for child in module.children():
        yield from _units(child, blocks)


def _bring(whole: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
    device = next((leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), torch.device("cpu"))
    owners = list(module.modules()) if whole else [module]
    homes = [(owner._parameters, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None]
    vars(module)[HOMES] = homes
    for store, name, parameter in homes:
        store[name] = _on_device(parameter, device)
    for owner in owners:
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)


def _release(module: nn.Module, args: Any, output: Any) -> None:
    for store, name, parameter in vars(module).pop(HOMES, ()):
        store[name] = parameter


def _on_device(parameter: Any, device: torch.device) -> Any:
    """A copy for one pass; from pinned memory, which alone is copied without waiting."""
    if device.type == "cuda" and not parameter.is_pinned():
        with torch.inference_mode(False):  # a tensor born in it could not be used outside
            parameter.data = parameter.data.pin_memory()
    return parameter.to(device, non_blocking=True)
