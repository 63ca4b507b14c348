"""Which quantized layers a forward pass really goes through, and in which dtype they see their weights."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_qat.modules.kv import KVQuantizer
from lightning_qat.modules.layer import QuantLayer


class ReachProbe:
    """Counts calls of quantized layers through forward pre-hooks, until removed.

    Torch's fused inference paths and attention that reads `layer.weight` skip the layer's forward. A module of experts
    counts as one layer, whichever of its experts were routed to (:func:`~lightning_qat.modules.experts.expert_coverage`).

    Args:
        root: Where the layers are.
        eager: Suspend ``torch.compile`` meanwhile. A graph keeps the hooks of its trace, also when another module of the same code uses it.
    """

    def __init__(self, root: nn.Module, eager: bool = False) -> None:
        self._watched = {name: module for name, module in root.named_modules() if isinstance(module, QuantLayer | KVQuantizer)}
        self._seen: set[int] = set()
        self._dtypes: dict[QuantLayer, torch.dtype] = {}
        self.eager, self._stance = eager, ExitStack()
        if eager:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._handles = [module.register_forward_pre_hook(self._note) for module in self._watched.values()]

    @property
    def watching(self) -> bool:
        """Whether the hooks are still on."""
        return bool(self._handles)

    def _note(self, module: nn.Module, args: Any) -> None:
        self._seen.add(id(module))
        if isinstance(module, QuantLayer):
            self._dtypes[module] = module.stored_weight().dtype

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stance.close()

    def note_rounded_weights(self) -> None:
        """A strategy may hand layers a rounded copy of their weights; then that is what is quantized, here and wherever they are loaded."""
        for layer, dtype in self._dtypes.items():
            if dtype != layer.stored_weight().dtype:
                layer.weight_dtype = dtype

    def missed(self) -> list[str]:
        """Names of layers that were not called."""
        return [name for name, module in self._watched.items() if id(module) not in self._seen]
