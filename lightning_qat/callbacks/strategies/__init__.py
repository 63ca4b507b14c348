"""What the callback must know of a strategy: one small adapter each.

To support another strategy, subclass :class:`StrategyAdapter`, name the class it is for, and import the file here.
"""

from lightning_qat.callbacks.strategies import deepspeed, fsdp, model_parallel  # noqa: F401  they register their adapters
from lightning_qat.callbacks.strategies.base import StrategyAdapter, adapter_of

__all__ = ["StrategyAdapter", "adapter_of"]
