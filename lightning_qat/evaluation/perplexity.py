"""Perplexity: exp of the mean negative log-likelihood over tokens, every token weighted alike.

Protocol: the windows of :func:`~lightning_qat.evaluation.text.text_windows`, each scored on its own. Results do not depend on the batch
size beyond rounding, since padding is masked and sums run in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.losses import next_token_nll
from lightning_qat.modules import cached_weights


class TokenPerplexity(Metric):
    """Token-weighted perplexity, reduced over ranks by summing nats and tokens."""

    full_state_update = False
    higher_is_better = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        """Add a sum of negative log-likelihoods over so many tokens, as :func:`~lightning_qat.losses.next_token_nll` gives them."""
        self.nats += nats
        self.tokens += tokens

    def compute(self) -> Tensor:
        """exp(nats / tokens)."""
        return torch.exp(self.nats / self.tokens)


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What one model makes of one text.

    Attributes:
        perplexity: exp of nats per token.
        nats: Sum of negative log-likelihoods.
        tokens: Tokens scored.
        bits_per_byte: The same, free of the tokenizer: bits per byte of text; None without the text's size.
    """

    perplexity: float
    nats: float
    tokens: int
    bits_per_byte: float | None


def pad_batch(windows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask), [batch, longest]; padded on the right with 0."""
    ids = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True)
    lengths = torch.tensor([len(window) for window in windows])
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)).long()


@torch.inference_mode()
def score_text(
    model: Any,
    windows: Sequence[Tensor],
    batch_size: int = 16,
    text_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TextScore:
    """Score windows of tokens with a causal language model.

    Args:
        model: The model; it is put in eval mode for the call and back.
        windows: Token ids of 2 or more tokens each.
        batch_size: Windows per forward pass.
        text_bytes: Size of the text in bytes, for bits per byte.
        progress: Called with the number of windows done in each step.

    Raises:
        ValueError: No windows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    config = getattr(model, "config", None)
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and windows and (longest := max(len(window) for window in windows)) > limit:
        raise ValueError(f"context: got windows of {longest} tokens, the model has {limit} positions")
    if not windows:
        raise ValueError("text: no window has two tokens or more; nothing can be scored")
    metric, training = TokenPerplexity(), model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with cached_weights(model):
            for start in range(0, len(windows), batch_size):
                ids, mask = (part.to(device) for part in pad_batch(windows[start : start + batch_size]))
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                metric.update(*next_token_nll(logits.cpu(), ids.cpu(), mask.cpu()))
                if progress is not None:
                    progress(len(ids))
    finally:
        model.train(training)
    nats, tokens = metric.nats.item(), int(metric.tokens)
    bits = None if text_bytes is None else nats / math.log(2) / text_bytes
    return TextScore(perplexity=math.exp(nats / tokens), nats=nats, tokens=tokens, bits_per_byte=bits)
