"""The teacher writes the data: LLM-QAT (arXiv 2305.17888), section 3.1.

A random start token, the most probable token for the next 3 to 5 steps, then samples from the full softmax (temperature 1, no top-k)
until the end token or the maximum length.

A sample is a pure function of (teacher, settings, seed, index): randomness is keyed (seed, index, position), and rows are always
computed in tiles of the same size on a cache of the same length, because matrix products are not bitwise the same for other batch sizes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qat.generation.cache import sliced_cache
from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.teacher import end_tokens

_START, _GREEDY, _FIRST_TOKEN = 0, 1, 2  # which draw of a sample is which


def sample_token(logits: Tensor, draw: Tensor) -> Tensor:
    """Inverse-CDF sampling from the full softmax.

    Args:
        logits: [rows, vocabulary].
        draw: Uniform numbers in [0, 1), [rows].

    Returns:
        Token ids, [rows].
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(-1)
    total = cumulative[:, -1]
    # Strictly below the total, so that the token found has a probability above 0 even where the draw rounds up to 1.
    target = torch.minimum(draw.to(cumulative.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)


@torch.inference_mode()
def generate_rows(
    model: Any, settings: GenerationSettings, first_index: int, allowed: list[int], progress: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Samples `first_index` to `first_index + rows - 1`.

    Args:
        model: A causal language model in eval mode.
        settings: What to generate.
        first_index: Index of the first row's sample.
        allowed: Ids a sample may start with.
        progress: Called after each step.

    Returns:
        (tokens [rows, max_length], lengths [rows]), int64; what follows the end token is 0.

    Raises:
        ValueError: The teacher's logits are NaN or inf, or the maximum length exceeds its positions.
    """
    _check_positions(model, settings.max_length)
    device = next(model.parameters()).device
    index = torch.arange(first_index, first_index + settings.rows, device=device)
    low, high = settings.greedy_tokens
    pool = torch.tensor(allowed, device=device)
    token = pool[(uniform(settings.seed, index, _START) * len(allowed)).long()]
    greedy = low + (uniform(settings.seed, index, _GREEDY) * (high - low + 1)).long()
    ends = torch.tensor(end_tokens(model), dtype=torch.int64, device=device)
    tokens = torch.zeros(settings.rows, settings.max_length, dtype=torch.int64, device=device)
    lengths = torch.ones(settings.rows, dtype=torch.int64, device=device)
    alive = torch.ones(settings.rows, dtype=torch.bool, device=device)
    tokens[:, 0] = token
    cache = sliced_cache(model.config.get_text_config(), settings.max_length)
    for position in range(1, settings.max_length):
        logits = model(input_ids=token.unsqueeze(-1), past_key_values=cache, use_cache=True).logits[:, -1]
        if not bool(torch.isfinite(logits[alive]).all()):
            raise ValueError(f"generation: the teacher's logits are not finite at position {position} from sample {first_index} on")
        drawn = sample_token(logits, uniform(settings.seed, index, _FIRST_TOKEN + position))
        token = torch.where(greedy >= position, logits.argmax(-1), drawn)
        tokens[:, position] = torch.where(alive, token, 0)
        lengths += alive
        alive &= ~torch.isin(token, ends)
        if progress is not None:
            progress()
        if not bool(alive.any()):
            break
    return tokens, lengths


def _check_positions(model: Any, max_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length: got {max_length}, the teacher has {limit} positions")
