"""How many samples a teacher writes together when nobody says so."""

from typing import Any

import torch

from lightning_qat.generation.targets import bytes_per_token

FEWEST, MOST = 8, 256  # beyond, a step takes longer in proportion and nothing is gained
BUDGET = 2**32  # bytes for what is kept of all tokens while they are written


def default_rows(token_bytes: int, max_length: int, num_samples: int) -> int:
    """Rows of the engine.

    Args:
        token_bytes: Kept of each token while its sample is written: keys and values, and targets.
        max_length: Tokens per sample.
        num_samples: Samples in the set.

    Returns:
        The largest power of two, 8 to 256, with which everything kept fits into 4 GiB (8 even if it does not), but no more than hold the
        whole set.
    """
    fitting = BUDGET // (max_length * max(token_bytes, 1))
    wanted = 1 << (num_samples - 1).bit_length()  # the next power of two
    return min(MOST, max(FEWEST, wanted), max(FEWEST, 1 << fitting.bit_length() - 1 if fitting else 0))


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in bytes.

    Args:
        config: A configuration of transformers.
        dtype: Of the model.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers * 2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim * dtype.itemsize


def target_bytes(logits: int | str | None, vocab_size: int) -> int:
    """What is kept of the teacher's distribution at one token, in bytes."""
    if logits is None:
        return 0
    return 2 * vocab_size if logits == "full" else bytes_per_token(int(logits))
