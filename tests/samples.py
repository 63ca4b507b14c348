"""Samples that are a function of their number, for tests of whatever keeps samples."""

import numpy as np
import torch

from lightning_qat.generation.sample import Sample

IDENTITY = {"vocab_size": 300, "teacher": "abc", "seed": 0, "greedy_tokens": [3, 5], "script": {"mode": "hybrid", "bos": None}}
ARRAYS = ("tokens", "roles", "tails", "targets")


def known(index, kind="plain", length=None, vocab_size=300):
    """Sample `index` of a set: ``plain``, ``chat`` with roles, ``top_k`` with targets and tails, ``logits`` with all of them."""
    draw = np.random.default_rng([index, 7])
    length = int(draw.integers(1, 12)) if length is None else length
    arrays = {}
    if kind != "plain":
        arrays["roles"] = torch.from_numpy(draw.integers(0, 3, length, dtype=np.uint8))
    if kind == "top_k":
        arrays["targets"] = torch.from_numpy(draw.integers(-(2**31), 2**31, (length - 1, 5), dtype=np.int32))
        arrays["tails"] = torch.from_numpy(draw.random(length - 1, dtype=np.float32))
    if kind == "logits":
        arrays["targets"] = torch.from_numpy(draw.normal(size=(length - 1, 30)).astype(np.float16))
    tokens = torch.from_numpy(draw.integers(0, vocab_size, length))
    return Sample(index=index, tokens=tokens, nll=index / 4, chosen=length // 2, **arrays)


def same(one, other):
    """Whether two samples hold the same bits."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in ARRAYS]
    alike = all((a is b is None) or (a is not None and b is not None and _bits(a) == _bits(b)) for a, b in pairs)
    return alike and (one.index, one.nll, one.chosen) == (other.index, other.nll, other.chosen)


def _bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()
