"""A key/value cache that is allocated once: a step writes one column and attention reads a slice, nothing is copied."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class SlicedLayer(DynamicLayer):
    """One layer's keys and values, [batch, kv heads, tokens, head_dim].

    Args:
        max_length: Tokens to allocate for.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.max_length)
            self.key_store = torch.empty(*shape, key_states.shape[-1], dtype=key_states.dtype, device=key_states.device)
            self.value_store = torch.empty(*shape, value_states.shape[-1], dtype=key_states.dtype, device=key_states.device)
            self.length = 0
        end = self.length + key_states.shape[-2]
        self.key_store[:, :, self.length : end] = key_states
        self.value_store[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_store[:, :, :end], self.value_store[:, :, :end]
        return self.keys, self.values


def sliced_cache(config: Any, max_length: int) -> DynamicCache:
    """The cache of transformers for this model with its growing layers replaced; sliding-window layers stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [SlicedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
