"""Items into batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_qat.data.datasets import Item
from lightning_qat.evaluation import pad_batch
from lightning_qat.generation.targets import unpack_targets
from lightning_qat.losses import TopK


class Collate:
    """Pads items on the right (a plain object, so that it reaches the worker processes of a loader).

    Args:
        vocab_size: Number of the teacher's token ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """A batch.

        Returns:
            int64 [batch, longest]: ``input_ids``; ``attention_mask``, 1 where a token is real; ``loss_mask``, 1 where the distribution
            over the next token counts, if that is not everywhere; ``position_ids`` if rows hold several samples, of which padding is
            one. ``teacher``, if targets are kept: the distributions there, a :class:`~lightning_qat.losses.TopK` or logits
            [batch, longest, vocabulary]. ``source``: ``generated``, ``text`` or ``mixed``.

        Raises:
            ValueError: No token of the batch counts.
        """
        ids, mask = pad_batch([item["input_ids"] for item in items])
        sources = {item["source"] for item in items}
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if any("loss_mask" in item for item in items):
            counts = [item.get("loss_mask", torch.ones_like(item["input_ids"])) for item in items]
            batch["loss_mask"] = pad_sequence(counts, batch_first=True)
            if not bool(batch["loss_mask"].any()):
                raise ValueError("loss_on: got 'assistant', but it wrote nothing in this batch; raise max_length or batch_size")
        if "position_ids" in items[0]:
            batch["position_ids"] = _restarting([item["position_ids"] for item in items], mask)
        if "targets" in items[0]:
            batch["teacher"] = self._teacher(items, batch["loss_mask"])
        return {**batch, "source": sources.pop() if len(sources) == 1 else "mixed"}

    def _teacher(self, items: Sequence[Item], counts: Tensor) -> Tensor | TopK:
        targets = pad_sequence([item["targets"] for item in items], batch_first=True)
        if "tails" not in items[0]:
            return targets
        tails = pad_sequence([item["tails"] for item in items], batch_first=True)
        ids, probabilities = unpack_targets(targets, tails, self.vocab_size)
        counted = counts.bool()  # elsewhere nothing is known, which is written as all mass in the tail
        return TopK(ids, probabilities * counted.unsqueeze(-1), torch.where(counted, tails, 1.0))


def _restarting(positions: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Positions in padded rows; padding is a sample of its own, so that nobody attends to it or from it to others."""
    behind = torch.arange(mask.shape[1]) - mask.sum(-1, keepdim=True)
    return torch.where(mask.bool(), pad_sequence(list(positions), batch_first=True), behind)
