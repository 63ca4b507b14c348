"""What a training batch holds, and what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.losses import TopK


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A batch, read.

    Attributes:
        ids: int64 [batch, tokens].
        mask: 1 where a token is real, [batch, tokens].
        counts: 1 where the distribution over the next token is trained on, [batch, tokens].
        positions: Of each token in its sample, where several samples share a row, [batch, tokens]; None where none do.
        teacher: The teacher's distributions over the next token, logits or the most probable tokens; None without.
        is_text: Whether this is real text.
    """

    ids: Tensor
    mask: Tensor
    counts: Tensor
    positions: Tensor | None
    teacher: Tensor | TopK | None
    is_text: bool

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with; transformers looks for restarting positions only where there is no attention mask."""
        if self.positions is None:
            return {"input_ids": self.ids, "attention_mask": self.mask}
        return {"input_ids": self.ids, "position_ids": self.positions}

    @property
    def scored(self) -> Tensor:
        """1 where a token is scored by the logits before it, from position 1 on, [batch, tokens - 1]."""
        pairs = self.counts[:, :-1] * self.mask[:, 1:]
        return pairs if self.positions is None else pairs * (self.positions[:, 1:] > 0)


def read_batch(batch: Any) -> Batch:
    """Check and complete a batch; without masks every token counts.

    Raises:
        MisconfigurationException: It is no dictionary with ``input_ids``.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise MisconfigurationException(
            f"data: got a batch of type {type(batch).__name__}, expected a dictionary with 'input_ids' and 'attention_mask'"
        )
    mask, counts = batch.get("attention_mask"), batch.get("loss_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return Batch(
        ids=batch["input_ids"],
        mask=mask,
        counts=mask if counts is None else counts,
        positions=batch.get("position_ids"),
        teacher=batch.get("teacher"),
        is_text=batch.get("source") == "text",
    )


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Try whether a sample in a row is blind to its neighbour: not every model masks by restarting positions.

    Args:
        model: A causal language model of transformers; left as it was.

    Raises:
        MisconfigurationException: It is not.
    """
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 3, 4]], device=model.device)  # the second sample is the same, the first is not
    positions = torch.tensor([[0, 1, 0, 1]] * 2, device=model.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        here, there = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 2:]
    finally:
        for module, mode in modes:
            module.training = mode
    if not torch.allclose(here, there, rtol=0, atol=0.01 * here.abs().max().item()):
        raise MisconfigurationException(
            f"data: rows hold several samples (position_ids), and {type(model).__name__} with {model.config._attn_implementation!r} "
            "attention lets a sample see the one before it; put one sample in a row, or 'sdpa' in place of a flash attention"
        )
