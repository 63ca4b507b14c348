"""Distillation losses against vector V17 and one-line oracles."""

import math

import pytest
import torch
from torch.nn import functional

import lightning_qat.losses.logits as losses
from lightning_qat.losses import SoftCrossEntropy, kl_divergence, next_token_nll, soft_cross_entropy

TEACHER = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
STUDENT = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]])
ENTROPIES = torch.tensor([0.8323956, 1.0986123])
BOTH = {"soft_cross_entropy": soft_cross_entropy, "kl_divergence": kl_divergence}
both = pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)


def reference_loss(student, teacher):
    """The reference code: summed over tokens, divided by the batch size."""
    return functional.kl_div(student.log_softmax(2), teacher.softmax(2), reduction="batchmean")


def logits(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


# ---------------------------------------------------------------- vector V17


def test_v17_values():
    assert reference_loss(STUDENT, TEACHER).item() == pytest.approx(0.3857158, rel=2e-6)
    assert kl_divergence(STUDENT, TEACHER).item() == pytest.approx(0.1928579, rel=2e-6)  # ours is the mean over tokens
    assert soft_cross_entropy(STUDENT, TEACHER).item() == pytest.approx(2.3167238 / 2, rel=2e-6)
    for i, expected in enumerate((0.2662167, 0.1194991)):
        assert kl_divergence(STUDENT[:, i : i + 1], TEACHER[:, i : i + 1]).item() == pytest.approx(expected, rel=2e-6)
        own = soft_cross_entropy(TEACHER[:, i : i + 1], TEACHER[:, i : i + 1])
        assert own.item() == pytest.approx(ENTROPIES[i].item(), rel=2e-6)


@both
def test_v17_gradient(loss):
    student = STUDENT.clone().requires_grad_()
    loss(student, TEACHER).backward()
    expected = torch.tensor([[[-0.3319076, 0.0886048, 0.2433028], [0.2427836, -0.1213918, -0.1213918]]]) / 2
    torch.testing.assert_close(student.grad, expected, rtol=2e-6, atol=1e-7)
    other = STUDENT.clone().requires_grad_()
    reference_loss(other, TEACHER).backward()
    torch.testing.assert_close(student.grad * 2, other.grad, rtol=1e-6, atol=1e-7)  # T = 2 tokens, batch 1


# ---------------------------------------------------------------- what a token counts


@both
def test_padding_counts_nothing(loss):
    student, teacher = logits(3, 7, 11), logits(3, 7, 11, seed=1)
    lengths = (7, 2, 5)
    mask = torch.tensor([[i < length for i in range(7)] for length in lengths]).long()
    pieces = [loss(student[i : i + 1, :n], teacher[i : i + 1, :n]) * n for i, n in enumerate(lengths)]
    expected = sum(pieces) / sum(lengths)
    torch.testing.assert_close(loss(student, teacher, mask), expected, rtol=1e-6, atol=0)
    student[mask == 0], teacher[mask == 0] = float("nan"), float("inf")
    student.requires_grad_()
    loss(student, teacher, mask).backward()
    assert student.grad[mask == 0].count_nonzero() == 0
    assert student.grad.isfinite().all()
    torch.testing.assert_close(loss(student, teacher, mask.bool()), expected, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("chunk", [1, 5, 20, 21, 22])
def test_chunks_change_nothing(loss, chunk, monkeypatch):
    student, teacher = logits(3, 7, 11, dtype=torch.float64), logits(3, 7, 11, seed=1, dtype=torch.float64)
    whole = loss(student, teacher)
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.testing.assert_close(loss(student, teacher), whole, rtol=1e-12, atol=0)


@both
def test_gradcheck(loss):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    student, teacher = logits(2, 3, 5, dtype=torch.float64).requires_grad_(), logits(2, 3, 5, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), (student,))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(loss, dtype):
    student, teacher = logits(2, 5, 400, dtype=dtype), logits(2, 5, 400, seed=1, dtype=dtype)
    got = loss(student, teacher)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(student.float(), teacher.float()))
    exact = loss(student.double(), teacher.double())
    assert exact.dtype == torch.float64
    assert got.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_divergence_is_zero_only_for_the_same_distribution():
    x = logits(2, 5, 11)
    assert kl_divergence(x, x + 3.0).item() == pytest.approx(0, abs=1e-6)
    assert kl_divergence(x, logits(2, 5, 11, seed=1)) > 0.1


def test_logits_far_apart_stay_finite():
    student, teacher = torch.tensor([[[0.0, 200.0]]]), torch.tensor([[[200.0, 0.0]]])
    for loss in BOTH.values():
        assert loss(student, teacher).item() == pytest.approx(200.0)


def test_tokens_that_the_teacher_never_writes_add_nothing():
    student, teacher = logits(2, 5, 11), logits(2, 5, 11, seed=1)
    teacher[..., [0, 7]] = -torch.inf
    rest = [i for i in range(11) if i not in (0, 7)]
    p, log_q = teacher[..., rest].softmax(-1), student.log_softmax(-1)[..., rest]
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(-(p * log_q).sum(-1).mean().item(), rel=1e-6)
    assert kl_divergence(student, teacher).item() == pytest.approx((p * (p.log() - log_q)).sum(-1).mean().item(), rel=1e-6)


@both
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(ValueError, match=r"student logits \(1, 2, 3\), teacher logits \(1, 2, 4\)"):
        loss(STUDENT, torch.zeros(1, 2, 4))


@both
def test_a_mask_of_zeros_is_refused(loss):
    with pytest.raises(ValueError, match="no token counts"):
        loss(STUDENT, TEACHER, torch.zeros(1, 2))


def test_the_module_is_the_function():
    mask = torch.tensor([[1, 0]])
    assert torch.equal(SoftCrossEntropy()(STUDENT, TEACHER, mask), soft_cross_entropy(STUDENT, TEACHER, mask))
    assert list(SoftCrossEntropy().parameters()) == []


# ---------------------------------------------------------------- next tokens


def test_next_token_nll_is_torchs_cross_entropy():
    scores, ids = logits(2, 6, 11), torch.randint(0, 11, (2, 6))
    nats, tokens = next_token_nll(scores, ids)
    expected = functional.cross_entropy(scores[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1), reduction="sum")
    assert tokens == 10
    assert nats.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_scored(side):
    scores, ids = logits(2, 6, 11), torch.randint(0, 11, (2, 6))
    lengths, mask = (6, 3), torch.zeros(2, 6, dtype=torch.long)
    expected = 0.0
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(6 - length, 6)
        mask[row, where] = 1
        expected += functional.cross_entropy(scores[row, where][:-1], ids[row, where][1:], reduction="sum").item()
    scores[mask == 0] = float("nan")
    nats, tokens = next_token_nll(scores, ids, mask)
    assert tokens == 5 + 2
    assert nats.item() == pytest.approx(expected, rel=1e-6)


def test_pairs_of_strangers_are_not_scored():
    """Two samples in a row, of 2 and 4 tokens: the third token is not scored by the logits at the second."""
    scores, ids = logits(1, 6, 11), torch.randint(0, 11, (1, 6))
    pairs = torch.tensor([[1, 0, 1, 1, 1]])
    expected = sum(functional.cross_entropy(scores[0, a:b][:-1], ids[0, a:b][1:], reduction="sum") for a, b in ((0, 2), (2, 6)))
    nats, tokens = next_token_nll(scores, ids, pairs)
    assert tokens == 1 + 3
    assert nats.item() == pytest.approx(expected.item(), rel=1e-6)


def test_nats_of_a_uniform_model_by_hand(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 3)
    nats, tokens = next_token_nll(torch.zeros(4, 5, 7, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.long))
    assert nats.dtype == torch.float64
    assert nats.item() == pytest.approx(tokens.item() * math.log(7), rel=1e-6)
