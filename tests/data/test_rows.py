"""Rows nobody asked for: as many as fit, by hand."""

import pytest
import torch
from models import gpt2, llama, opt, qwen3

from lightning_qat.data.rows import cache_bytes, default_rows, target_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("token_bytes", "max_length", "num_samples", "rows"),
    [
        (1, 128, 100_000, 256),  # never more
        (16 * 1024, 1024, 100_000, 256),  # 4 GiB to the byte
        (16 * 1024 + 1, 1024, 100_000, 128),
        (128 * 1024, 2048, 100_000, 16),
        (128 * 1024, 8192, 100_000, 8),  # 8 GiB, but 8 at least
        (1, 128, 1, 8),
        (1, 128, 8, 8),
        (1, 128, 9, 16),
        (1, 128, 64, 64),
        (1, 128, 65, 128),
        (128 * 1024, 2048, 9, 16),
        (0, 128, 1000, 256),
        (4 * GIB, 128, 1000, 8),
    ],
)
def test_rows(token_bytes, max_length, num_samples, rows):
    assert default_rows(token_bytes, max_length, num_samples) == rows


@pytest.mark.parametrize("build", [llama, gpt2, opt, qwen3])
def test_bytes_of_keys_and_values_are_those_of_the_cache(build):
    model = build()
    cache = model(torch.ones(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    for dtype in (torch.float32, torch.bfloat16):
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert cache_bytes(model.config, dtype) == elements * dtype.itemsize


def test_bytes_of_targets():
    assert [target_bytes(kept, 1000) for kept in (None, 1, 32, "full")] == [0, 8, 132, 2000]
