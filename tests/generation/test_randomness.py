"""Draws are uniform and independent of each other."""

import math

import pytest
import torch

from lightning_qat.generation.randomness import uniform


def chi_square(observed, probabilities):
    expected = observed.sum(-1, keepdim=True) * probabilities
    return ((observed - expected) ** 2 / expected).sum().item()


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    numbers = torch.stack([uniform(seed, torch.arange(20_000), position) for seed in (0, 1, 2**62) for position in (0, 1, 2000)])
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(-1) - 1 / 2).abs().max() < 5 * math.sqrt(1 / 12 / 20_000)
    assert (numbers.var(-1) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 20_000)
    assert numbers.unique().numel() == numbers.numel()


NEIGHBOURS = {
    "index": lambda i: (uniform(0, i, 5), uniform(0, i + 1, 5)),
    "position": lambda i: (uniform(0, i, 5), uniform(0, i, 6)),
    "seed": lambda i: (uniform(0, i, 5), uniform(1, i, 5)),
    "far-index": lambda i: (uniform(0, i, 5), uniform(0, i + 2**40, 5)),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbouring_draws_are_independent(pair):
    first, second = pair(torch.arange(20_000))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 5 / math.sqrt(20_000)
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100).float()
    assert chi_square(cells, torch.full((100,), 0.01)) < 99 + 5 * math.sqrt(2 * 99)
