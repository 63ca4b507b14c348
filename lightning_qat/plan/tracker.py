"""Counts the bytes that are alive while code runs on fake tensors: what an allocator would hand out, without an allocator."""

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS = "gradients"


class MemoryTracker(TorchDispatchMode):
    """Sees every operation, counts each new storage under the category of the moment, and keeps the highest moment of each phase.

    Storages that were there before are not counted: weights and whatever else lasts is known without running anything.

    Args:
        gradient_share: The part of a finished gradient that this process keeps; less than 1 where gradients are sharded.

    Attributes:
        phase: Where the step is now; peaks are kept by phase. None counts but keeps no peak.
        category: What new storages are counted as.
        peaks: Of each phase, the bytes by category at its highest moment.
    """

    def __init__(self, gradient_share: float = 1.0) -> None:
        super().__init__()
        self.gradient_share = gradient_share
        self.phase: str | None = None
        self.category = "activations"
        self.peaks: dict[str, Counter[str]] = {}
        self._alive: Counter[str] = Counter()
        self._entries: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._known: set[int] = set()

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Never count the storages of these."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._entries and key not in self._known:
            self._count(storage, key, self.category, storage.nbytes())

    def _count(self, storage: Any, key: int, category: str, size: int) -> None:
        self._entries[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, category)
        self._alive[category] += size
        self._note()

    def _forget(self, key: int) -> None:
        _, size, category = self._entries.pop(key)
        self._alive[category] -= size

    def _note(self) -> None:
        if self.phase is not None and self._alive.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = Counter(self._alive)

    def enter(self, phase: str | None, category: str | None = None) -> None:
        """Go on to the next phase; what is alive already counts in it."""
        self.phase = phase
        self.category = category or self.category
        self._note()

    def keep_gradient(self, gradient: Tensor) -> None:
        """A gradient is finished: only its share stays."""
        storage = gradient.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            self._forget(key)
        self._count(storage, key, GRADIENTS, int(storage.nbytes() * self.gradient_share))
