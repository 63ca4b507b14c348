"""The codec of the teacher's most probable tokens against a softmax in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.generation.targets import bytes_per_token, pack_targets, top_targets, top_targets_from, unpack_targets

STEPS = {4096: 1.91e-5, 32768: 1.53e-4, 65536: 3.06e-4, 131072: 6.11e-4, 262144: 1.23e-3, 524288: 2.45e-3}  # the table in the header


def logits(rows, vocab_size, scale=4.0, seed=0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def exact(x, k):
    """(ids, probabilities of all tokens, tail) in float64."""
    p = x.double().softmax(-1)
    ids = p.topk(k, -1).indices
    return ids, p, p.scatter(-1, ids, 0).sum(-1)


# ---------------------------------------------------------------- there and back


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3000), st.sampled_from([0.0, 0.3, 2.0, 8.0, 40.0]), st.integers(0, 10**6))
def test_round_trip(data, vocab_size, scale, seed):
    k = data.draw(st.integers(1, min(vocab_size, 64)))
    x = logits(5, vocab_size, scale, seed)
    words, tails = top_targets(x, k)
    ids, found = unpack_targets(words, tails, vocab_size)
    expected, p, tail = exact(x, k)
    assert (words.dtype, tails.dtype, ids.dtype, found.dtype) == (torch.int32, torch.float32, torch.int64, torch.float32)
    assert all(len(set(row)) == k for row in ids.tolist())
    # Equal ids up to tokens so close that fp32 cannot tell which one is more probable.
    wanted, got = p.gather(-1, expected), p.gather(-1, ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(tails.double(), tail, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(found.double().sum(-1) + tails.double(), torch.ones(5, dtype=torch.float64), rtol=0, atol=4e-7)
    # A step, the rounding of fp32 logarithms, and that of 1 - tail.
    error = (found.double().log() - got.log()).abs() - 2e-7 / (1 - tail).unsqueeze(-1)
    assert error[got > math.exp(-20)].max() < 1.91e-5 * 1.3
    torch.testing.assert_close(found.double(), got, rtol=3e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(2, 2000), st.floats(0.01, 20.0))
def test_tokens_come_back_in_their_order(data, vocab_size, gap):
    k = data.draw(st.integers(1, min(vocab_size, 64, 1 + int(80 / gap))))  # fp32 exponentials reach 87 nats down
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    x = torch.empty(1, vocab_size)
    x[0, order] = -gap * torch.arange(vocab_size)
    ids, found = unpack_targets(*top_targets(x, k), vocab_size)
    assert ids[0].tolist() == order[:k].tolist()
    assert (found.diff() <= 0).all()


@pytest.mark.parametrize("vocab_size", STEPS)
def test_the_error_is_that_of_the_header(vocab_size):
    x = logits(4, vocab_size, scale=3)
    words, tails = top_targets(x, 64)
    ids, found = unpack_targets(words, tails, vocab_size)
    expected, p, _ = exact(x, 64)
    assert torch.equal(p.gather(-1, ids), p.gather(-1, expected))
    error = (found.double().log() - p.gather(-1, ids).log()).abs().max().item()
    assert STEPS[vocab_size] / 4 < error < STEPS[vocab_size]


@pytest.mark.parametrize("vocab_size", [65536, 524288])
def test_the_last_token_of_a_power_of_two(vocab_size):
    """All bits of the id are 1, and those of an improbable token's code too: the word is -1."""
    x = torch.full((1, vocab_size), -1e4)
    x[0, 0], x[0, -1] = 0, -30
    words, tails = top_targets(x, 2)
    assert words.tolist() == [[0, -1]]
    ids, found = unpack_targets(words, tails, vocab_size)
    assert ids.tolist() == [[0, vocab_size - 1]]
    assert found[0].tolist() == pytest.approx([1, math.exp(-20)], rel=1e-6)


def test_a_word_by_hand():
    words, tails = top_targets(torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]]).log(), 2)
    codes = [round(-math.log(p) / 20 * (2**20 - 1)) for p in (0.5, 0.25)]
    assert words.tolist() == [[codes[0] * 8 + 1, codes[1] * 8 + 2]]  # 3 bits hold 5 tokens
    assert tails.tolist() == pytest.approx([0.25])


def test_leading_axes_are_free():
    x = logits(6, 50)
    words, tails = top_targets(x, 5)
    ids, found = unpack_targets(words.view(2, 3, 5), tails.view(2, 3), 50)
    flat = unpack_targets(words, tails, 50)
    assert torch.equal(ids.view(6, 5), flat[0])
    assert torch.equal(found.view(6, 5), flat[1])


# ---------------------------------------------------------------- the tail


def test_the_tail_of_a_sure_teacher_is_no_rounding():
    x = logits(8, 300, scale=0.5)
    x[:, 7] = 25  # the others share e^-25 * 300
    _, tails = top_targets(x, 1)
    tail = exact(x, 1)[2]
    assert tail.max() < 1e-8
    torch.testing.assert_close(tails.double(), tail, rtol=1e-5, atol=0)


def test_the_whole_vocabulary_leaves_no_tail():
    x = logits(3, 40)
    words, tails = top_targets(x, 40)
    assert tails.tolist() == [0, 0, 0]
    ids, found = unpack_targets(words, tails, 40)
    torch.testing.assert_close(torch.zeros(3, 40).scatter(-1, ids, found), x.softmax(-1), rtol=3e-5, atol=3e-9)


# ---------------------------------------------------------------- other ways in


def test_from_exponentials_of_a_wider_buffer():
    x = logits(4, 30)
    buffer = torch.full((4, 50), 7.0)
    buffer[:, :30] = (x - x.amax(-1, keepdim=True)).exp()
    words, tails = top_targets_from(buffer[:, :30], buffer[:, :30].sum(-1), 6)
    expected = top_targets(x, 6)
    assert torch.equal(words, expected[0])
    torch.testing.assert_close(tails, expected[1])
    assert (buffer[:, 30:] == 7).all()


def test_half_precision_is_computed_in_fp32():
    x = logits(4, 300).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(top_targets(x, 9), top_targets(x.float(), 9), strict=True))


def test_logits_are_left_alone():
    x = logits(4, 30)
    before = x.clone()
    top_targets(x, 6)
    assert torch.equal(x, before)


def test_known_probabilities_are_packed_alike():
    x = logits(4, 300)
    words, _ = top_targets(x, 8)
    ids, p, _ = exact(x, 8)
    codes = [pack_targets(ids, p.gather(-1, ids).log().float(), 300), words]
    assert torch.equal(codes[0] & 511, codes[1] & 511)
    assert ((codes[0] >> 9) - (codes[1] >> 9)).abs().max() <= 1  # a logarithm in fp32 may round to the other side
    assert pack_targets(torch.tensor([5]), torch.tensor([-torch.inf]), 65536).tolist() == [5 - 65536]


@pytest.mark.parametrize("k", [1, 32])
def test_bytes_per_token(k):
    words, tails = top_targets(logits(7, 100), k)
    assert bytes_per_token(k) * 7 == words.numel() * words.element_size() + tails.numel() * tails.element_size()


@pytest.mark.parametrize("k", [0, 41])
def test_more_tokens_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"logits: got {k}, the teacher has 40 tokens; .*at most 40, or 'full'"):
        top_targets(logits(2, 40), k)
