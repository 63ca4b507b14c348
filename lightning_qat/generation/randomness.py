"""Counter-based randomness: a uniform number is a pure function of (seed, sample, position), whatever was drawn before it.

The mixer is splitmix64's finalizer (Steele, Lea, Flood 2014), applied once per coordinate; int64 arithmetic wraps as it should.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(seed: int, index: Tensor, position: int | Tensor) -> Tensor:
    """Numbers in [0, 1).

    Args:
        seed: Seed of the whole set.
        index: Sample indices, int64, any shape.
        position: Which draw of the sample; a tensor for another one of each sample.

    Returns:
        float64, shape of `index`.
    """
    state = _mix(torch.tensor(seed, dtype=torch.int64, device=index.device))
    state = _mix(_mix(state ^ index) ^ position)
    return _shift(state, 11).to(torch.float64) * 2.0**-53
