"""Which quantized layers a forward pass really goes through."""

from typing import Any

from torch import nn

from lightning_qat.modules.kv import KVQuantizer
from lightning_qat.modules.layer import QuantLayer


class ReachProbe:
    """Counts calls of quantized layers through forward pre-hooks, until removed.

    Torch's fused inference paths and attention that reads `layer.weight` skip the layer's forward. A module of experts
    counts as one layer, whichever of its experts were routed to (:func:`~lightning_qat.modules.experts.expert_coverage`).
    """

    def __init__(self, root: nn.Module) -> None:
        self._watched = {name: module for name, module in root.named_modules() if isinstance(module, QuantLayer | KVQuantizer)}
        self._seen: set[int] = set()
        self._handles = [module.register_forward_pre_hook(self._note) for module in self._watched.values()]

    @property
    def watching(self) -> bool:
        """Whether the hooks are still on."""
        return bool(self._handles)

    def _note(self, module: nn.Module, args: Any) -> None:
        self._seen.add(id(module))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def missed(self) -> list[str]:
        """Names of layers that were not called."""
        return [name for name, module in self._watched.items() if id(module) not in self._seen]
