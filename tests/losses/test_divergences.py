"""Losses of next-token distributions, each against its formula written out in float64."""

import math

import pytest
import torch
from torch.nn import functional

import lightning_qat.losses.base as base
from lightning_qat.losses import (
    ForwardKL,
    JensenShannon,
    LabelCrossEntropy,
    ReverseKL,
    SoftCrossEntropy,
    TopK,
    kl_divergence,
    next_token_labels,
    next_token_nll,
    soft_cross_entropy,
    sparse_soft_cross_entropy,
)


def logits(*shape, seed=0, dtype=torch.float64):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).to(dtype)


def top_k(teacher, k, dtype=torch.float64):
    p = teacher.double().softmax(-1)
    top, ids = p.topk(k, -1)
    return TopK(ids, top.to(dtype), p.scatter(-1, ids, 0).sum(-1).to(dtype))


def distributions(student, teacher, temperature, k):
    """(p, q); with k, over the top k tokens and one for all others."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if k is None:
        return p, q
    ids = p.topk(k, -1).indices
    return tuple(torch.cat([x.gather(-1, ids), x.scatter(-1, ids, 0).sum(-1, keepdim=True)], -1) for x in (p, q))


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def jensen_shannon(p, q, beta=0.3):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


LOSSES = {
    SoftCrossEntropy: lambda p, q: -(p * q.log()).sum(-1),
    ForwardKL: kl,
    ReverseKL: lambda p, q: kl(q, p),
    JensenShannon: jensen_shannon,
}
each = pytest.mark.parametrize("loss_class", LOSSES, ids=lambda c: c.__name__)


def make(loss_class, **options):
    return loss_class(**({"beta": 0.3} if loss_class is JensenShannon else {}), **options)


def gradient(function, student):
    student = student.detach().clone().requires_grad_()
    function(student).backward()
    return student.grad


# ---------------------------------------------------------------- values and gradients


@each
@pytest.mark.parametrize(("temperature", "k"), [(1.0, None), (2.5, None), (0.5, None), (1.0, 1), (1.0, 4)])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=str)
def test_the_formula(loss_class, temperature, k, dtype, rel):
    student, teacher = logits(3, 7, 30, dtype=dtype), logits(3, 7, 30, seed=1, dtype=dtype)
    mask = torch.tensor([[i < length for i in range(7)] for length in (7, 2, 5)]).long()

    def oracle(s):
        tokens = LOSSES[loss_class](*distributions(s.double(), teacher.double(), temperature, k))
        return temperature**2 * tokens[mask.bool()].mean()

    loss, target = make(loss_class, temperature=temperature), teacher if k is None else top_k(teacher, k, dtype)
    got = loss(student, target, mask)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(oracle(student).item(), rel=rel)
    expected = gradient(oracle, student.double())
    torch.testing.assert_close(gradient(lambda s: loss(s, target, mask), student).double(), expected, rtol=10 * rel, atol=rel)


@each
@pytest.mark.parametrize("k", [None, 3])
def test_a_total_is_the_sum_over_rows(loss_class, k, monkeypatch):
    student, teacher = logits(5, 6), logits(5, 6, seed=1)
    loss, target = make(loss_class), teacher if k is None else top_k(teacher, k)
    expected = LOSSES[loss_class](*distributions(student, teacher, 1.0, k)).sum()
    for elements in (1, 6 * 2, 6 * 5):
        monkeypatch.setattr(base, "ROW_ELEMENTS", {"cpu": elements})
        assert loss.total(student, target).item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.autograd.gradcheck(lambda s: loss.total(s, target), (student.clone().requires_grad_(),))


def test_the_papers_loss_stays_what_it_was():
    student, teacher, mask = logits(2, 5, 11, dtype=torch.float32), logits(2, 5, 11, seed=1, dtype=torch.float32), torch.ones(2, 5)
    mask[0, 3:] = 0
    assert torch.equal(SoftCrossEntropy()(student, teacher, mask), soft_cross_entropy(student, teacher, mask))
    top = top_k(teacher, 3, torch.float32)
    assert torch.equal(SoftCrossEntropy()(student, top, mask), sparse_soft_cross_entropy(student, top, mask))
    assert ForwardKL()(student, teacher, mask).item() == pytest.approx(kl_divergence(student, teacher, mask).item(), rel=1e-5)


def test_the_factor_keeps_gradients_of_one_size():
    """At high temperature T^2 times the gradient of the tempered cross-entropy tends to (student - teacher) / vocabulary."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (logits(1, 4, 9), logits(1, 4, 9, seed=1)))
    got = gradient(lambda s: SoftCrossEntropy(temperature=1e5).total(s[0], teacher[0]), student)
    torch.testing.assert_close(got, (student - teacher) / 9, rtol=1e-3, atol=1e-4)


def test_the_ends_of_the_generalised_divergence():
    student, teacher = logits(4, 9) / 3, logits(4, 9, seed=1) / 3
    small = 1e-6
    forward = JensenShannon(beta=small).total(student, teacher) / small
    assert forward.item() == pytest.approx(ForwardKL().total(student, teacher).item(), rel=1e-4)
    reverse = JensenShannon(beta=1 - small).total(student, teacher) / small
    assert reverse.item() == pytest.approx(ReverseKL().total(student, teacher).item(), rel=1e-4)
    apart = torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]])
    assert JensenShannon().total(*apart).item() == pytest.approx(math.log(2), rel=1e-6)


# ---------------------------------------------------------------- edges


@each
@pytest.mark.parametrize("form", ["logits", "top-k"])
def test_no_nan_where_probabilities_are_zero(loss_class, form):
    """Tokens that neither writes (1), and that the student writes but the teacher's kept probabilities round to 0."""
    student = torch.tensor([[2.0, -torch.inf, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, -torch.inf, 1.0, 0.5]])
    if form == "top-k":
        teacher = TopK(torch.tensor([[0, 2]]), torch.tensor([[0.4, 0.6]]), torch.zeros(1))
    got = gradient(lambda s: make(loss_class).total(s, teacher), student)
    assert make(loss_class).total(student, teacher).isfinite()
    assert got.isfinite().all()
    assert got[0, 1] == 0


@each
def test_the_whole_vocabulary_is_the_full_loss(loss_class):
    student, teacher = logits(6, 11, dtype=torch.float32), logits(6, 11, seed=1, dtype=torch.float32)
    top, loss = top_k(teacher, 11, torch.float32), make(loss_class)
    assert loss.total(student, top).item() == pytest.approx(loss.total(student, teacher).item(), rel=1e-5)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(loss_class, dtype):
    student, teacher = logits(5, 400, dtype=dtype), logits(5, 400, seed=1, dtype=dtype)
    loss = make(loss_class)
    got = loss.total(student, teacher)
    assert got.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, loss.total(student.float(), teacher.float()))
    half = gradient(lambda s: loss.total(s, teacher), student)
    assert half.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(half.float(), gradient(lambda s: loss.total(s, teacher), student.float()), rtol=rounding, atol=6e-8)


@each
def test_a_teacher_gets_no_gradient(loss_class):
    student, teacher = logits(5, 9).requires_grad_(), logits(5, 9, seed=1).requires_grad_()
    make(loss_class).total(student, teacher).backward()
    assert teacher.grad is None


@each
def test_bad_input(loss_class):
    with pytest.raises(ValueError, match=r"temperature: 0; must be a finite number above 0"):
        loss_class(temperature=0)
    with pytest.raises(ValueError, match=r"weight: -1; must be a finite number, 0 or more"):
        loss_class(weight=-1)
    loss = make(loss_class, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature: 2.0, but only .* cannot be tempered"):
        loss(logits(2, 5, 11), top_k(logits(2, 5, 11), 3))
    with pytest.raises(ValueError, match=r"student logits \(2, 5, 11\), teacher logits \(2, 5, 12\)"):
        loss(logits(2, 5, 11), logits(2, 5, 12))
    with pytest.raises(ValueError, match=r"student logits \(5, 11\), teacher's ids \(4, 3\)"):
        loss.total(logits(5, 11), top_k(logits(4, 11), 3))
    with pytest.raises(ValueError, match="no token counts"):
        loss(logits(2, 5, 11), logits(2, 5, 11), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="teacher is None"):
        loss(logits(2, 5, 11))


def test_a_mixture_without_one_side_is_refused():
    for beta in (0, 1, 1.5):
        with pytest.raises(ValueError, match=rf"beta: {beta}; .* ForwardKL and ReverseKL"):
            JensenShannon(beta=beta)


# ---------------------------------------------------------------- labels


def test_labels_are_torchs_cross_entropy():
    scores, ids, mask = logits(2, 6, 11), torch.randint(0, 11, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    labels = next_token_labels(ids, mask)
    assert labels[0].tolist() == [-100, -100, *ids[0, 3:].tolist(), -100]
    expected = functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
    assert LabelCrossEntropy()(scores, labels=labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert LabelCrossEntropy()(scores, mask=mask, labels=labels).item() == pytest.approx(expected.item(), rel=1e-12)
    total, tokens = next_token_nll(scores, ids, mask)
    assert LabelCrossEntropy()(scores, None, mask, labels).item() == pytest.approx((total / tokens).item(), rel=1e-12)
    want = gradient(lambda s: functional.cross_entropy(s.flatten(0, 1), labels.flatten()), scores)
    torch.testing.assert_close(gradient(lambda s: LabelCrossEntropy()(s, labels=labels), scores), want)


def test_labels_by_pairs_and_without_a_mask():
    ids = torch.arange(10).view(2, 5)
    assert next_token_labels(ids).tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]
    assert next_token_labels(ids[:1], torch.tensor([[1, 0, 1, 1]])).tolist() == [[1, -100, 3, 4, -100]]


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match=r"LabelCrossEntropy: labels None; must be int64 \(2, 5\)"):
        LabelCrossEntropy()(logits(2, 5, 11))
    with pytest.raises(ValueError, match=r"labels \(4,\); must be int64 \(5,\)"):
        LabelCrossEntropy().total(logits(5, 11), labels=torch.zeros(4, dtype=torch.long))
    none = torch.full((2, 5), -100)
    assert LabelCrossEntropy()(logits(2, 5, 11), labels=none).item() == 0
    assert gradient(lambda s: LabelCrossEntropy()(s, labels=none), logits(2, 5, 11)).count_nonzero() == 0
