"""Draws from the softmax: against the plain definition, and at the edges where sums round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.generation.sampling import Softmax


def draw(logits, *numbers, **kept):
    softmax = Softmax.of(logits.expand(len(numbers), -1))
    return softmax.kept(kept.get("top_k", 0), kept.get("top_p", 1.0)).draw(torch.tensor(numbers, dtype=torch.float64)).tolist()


@pytest.mark.parametrize("number", [0.0, 0.2499, 0.25, 0.7499, 1 - 2**-53])
def test_inverse_cdf_by_hand(number):
    """Probabilities 1/4, 0, 1/2, 1/4."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 1.0]]).log()
    assert draw(logits, number) == [0 if number < 0.25 else 2 if number < 0.75 else 3]


@pytest.mark.parametrize("place", [0, 2, 127, 128, 300])
def test_impossible_tokens_are_never_drawn(place):
    logits = torch.full((1, 301), float("-inf"))
    logits[0, place] = 0.0
    assert draw(logits, 0.0, 0.5, 1 - 2**-53) == [place] * 3


@given(st.integers(1, 700), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16", "float64"]))
@settings(max_examples=60, deadline=None)
def test_a_draw_inverts_the_cumulative_distribution(vocabulary, number, seed, dtype):
    logits = (torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4).to(getattr(torch, dtype))
    token = Softmax.of(logits).draw(torch.full((3,), number, dtype=torch.float64))
    probabilities = logits.double().softmax(-1)
    above = probabilities.cumsum(-1).gather(-1, token[:, None])[:, 0]
    below = above - probabilities.gather(-1, token[:, None])[:, 0]
    assert bool((below - 1e-5 <= number).all())
    assert bool((number <= above + 1e-5).all())


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = Softmax.of(logits)
    for row in (0, 17, 63):
        alone = Softmax.of(logits[row : row + 1])
        assert torch.equal(alone.total, together.total[row : row + 1])
        assert torch.equal(alone.draw(numbers[row : row + 1]), together.draw(numbers)[row : row + 1])


def test_the_likelihood_of_a_draw():
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(5) * 40
    wanted = -logits.log_softmax(-1)[torch.arange(5), tokens]
    assert torch.allclose(Softmax.of(logits).nll(tokens), wanted, atol=1e-12)


def reference_kept(logits, top_k, top_p):
    """The tokens that top-k, then top-p, leave: sorted, counted, summed."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    weights = torch.tensor([logits[token] for token in order], dtype=torch.float64).softmax(-1).tolist()
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p:
            break
        kept.add(token)
        mass += weight
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.5), (0, 0.95), (20, 0.8), (0, 1e-9), (10_000, 1.0)])
def test_top_k_and_top_p(top_k, top_p):
    logits = torch.randn(150, generator=torch.Generator().manual_seed(5)) * 2
    kept = Softmax.of(logits[None]).kept(top_k, top_p).exps[0, :150].nonzero().flatten().tolist()
    assert set(kept) == reference_kept(logits.tolist(), top_k, top_p)
    assert set(draw(logits[None], *torch.linspace(0, 0.999, 50).tolist(), top_k=top_k, top_p=top_p)) <= set(kept)


def test_logits_that_are_not_finite_show_in_the_total():
    logits = torch.zeros(4, 300)
    logits[0, 3], logits[1, 250], logits[2, 7] = float("nan"), float("inf"), float("-inf")
    assert Softmax.of(logits).total.isfinite().tolist() == [False, False, True, True]


def test_temperature_divides_the_logits():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    softmax = Softmax.of(logits, temperature=0.5)
    probabilities = softmax.exps[:, :50] / softmax.total[:, None]
    assert torch.allclose(probabilities, (logits / 0.5).softmax(-1), atol=1e-6)
