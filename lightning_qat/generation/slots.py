"""Decoding in slots: every row of a batch is at a position of its own, so that a finished row can be refilled at once.

Keys and values lie in blocks of `BLOCK` positions, block-major, and attention is computed block by block with fixed shapes. What a row
gets therefore depends neither on the other rows nor on how many blocks they need: blocks that are masked out add exact zeros. That is what
makes a sample a pure function of its number.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

BLOCK = 64  # positions; part of what a sample depends on


class Slots:
    """Where each row is, and the masks that follow from it.

    Args:
        rows: Rows computed together.
        max_length: Positions to keep.
        device: Where the rows are computed.
    """

    def __init__(self, rows: int, max_length: int, device: torch.device) -> None:
        self.rows, self.blocks = rows, math.ceil(max_length / BLOCK)
        self.row = torch.arange(rows, device=device)
        self.column = torch.arange(self.blocks * BLOCK, device=device).view(self.blocks, 1, BLOCK)
        self.place(torch.zeros(rows, dtype=torch.int64, device=device), 1)

    def place(self, positions: Tensor, longest: int) -> None:
        """Put the rows at `positions` [rows]; `longest` is the largest position and one."""
        self.positions, self.active = positions, math.ceil(longest / BLOCK)
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """0 where a row may look and -inf elsewhere, float32 [blocks, rows, 1, 1, BLOCK]."""
        if window not in self._masks:
            column, position = self.column[: self.active], self.positions.view(1, -1, 1)
            hidden = column > position
            if window is not None:
                hidden |= column <= position - window
            mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask.view(self.active, self.rows, 1, 1, BLOCK)
        return self._masks[window]

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one new token per row, as an attention function of transformers.

        Args:
            module: The attention layer.
            query: [rows, heads, 1, head_dim].
            key: As :class:`SlotLayer` returns it, [blocks, rows * key heads, BLOCK, head_dim].
            value: Likewise.
            attention_mask: Not used: rows are masked by their positions.
            scaling: Factor of the scores; default 1 / sqrt(head_dim).
            sliding_window: How many positions a row sees.
            softcap: Bound of the scores (Gemma 2).
            s_aux: A score per head that only takes probability away (GPT-OSS).
            kwargs: What other layers pass and decoding does not need.

        Returns:
            ([rows, 1, heads, value's head_dim], None).
        """
        rows, heads, _, dim = query.shape
        kv_heads = key.shape[1] // rows
        grouped = (self.active, rows, kv_heads, heads // kv_heads, BLOCK)
        query = query * (dim**-0.5 if scaling is None else scaling)
        query = query.view(rows * kv_heads, -1, dim).expand(self.active, -1, -1, -1).reshape(-1, heads // kv_heads, dim)
        scores = torch.bmm(query, key.flatten(0, 1).mT).float().view(grouped)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + self.mask(sliding_window)
        top = scores.amax(-1).amax(0)
        if s_aux is not None:
            top = torch.maximum(top, s_aux.float().view(kv_heads, -1))
        weights = scores.sub_(top.unsqueeze(-1)).exp_()
        values = torch.bmm(weights.to(value.dtype).flatten(0, 2), value.flatten(0, 1)).float().view(*grouped[:4], -1)
        # One after the other: the order of a sum over blocks must not depend on their number.
        total, out = weights[0].sum(-1), values[0]
        for block in range(1, self.active):
            total, out = total + weights[block].sum(-1), out + values[block]
        if s_aux is not None:
            total = total + (s_aux.float().view(kv_heads, -1) - top).exp()
        return (out / total.unsqueeze(-1)).to(query.dtype).view(rows, 1, heads, -1), None


class SlotLayer(DynamicLayer):
    """One layer's keys and values, [blocks, rows, key heads, BLOCK, head_dim]."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, [rows, key heads, 1, head_dim], and return the blocks in use for :meth:`Slots.attention`."""
        slots = self.slots
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (slots.blocks, slots.rows, key_states.shape[1], BLOCK)
            # Zeros: what was never written must be finite, since a weight of 0 times NaN is NaN.
            self.stored = (key_states.new_zeros(*shape, key_states.shape[-1]), value_states.new_zeros(*shape, value_states.shape[-1]))
        (keys, values), block, offset = self.stored, slots.positions // BLOCK, slots.positions % BLOCK
        keys[block, slots.row, :, offset] = key_states[:, :, 0]
        values[block, slots.row, :, offset] = value_states[:, :, 0]
        return keys[: slots.active].flatten(1, 2), values[: slots.active].flatten(1, 2)

    def get_seq_length(self) -> int:
        """0: positions are given to the model explicitly."""
        return 0


def slot_cache(config: Any, slots: Slots) -> DynamicCache:
    """The cache of transformers for this model, with all its layers in slots."""
    cache = DynamicCache(config=config)
    cache.layers = [SlotLayer(slots) for _ in range(len(cache.layers) or config.num_hidden_layers)]
    return cache
