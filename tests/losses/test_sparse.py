"""Losses of the most probable tokens against dense ones in float64 with the tail merged by hand."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_qat.losses.sparse as sparse
from lightning_qat.losses import (
    SoftCrossEntropy,
    TopK,
    divergence,
    kl_divergence,
    most_probable,
    soft_cross_entropy,
    sparse_kl_divergence,
    sparse_soft_cross_entropy,
)

BOTH = {"soft_cross_entropy": sparse_soft_cross_entropy, "kl_divergence": sparse_kl_divergence}
both = pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)


def logits(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def top_k(teacher, k, dtype=torch.float64):
    p = teacher.double().softmax(-1)
    top, ids = p.topk(k, -1)
    return TopK(ids, top.to(dtype), p.scatter(-1, ids, 0).sum(-1).to(dtype))


def merged(student, teacher, k):
    """Per-token (cross-entropy, KL) of the distributions over the top k tokens and one token for all others."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    ids = p.topk(k, -1).indices
    p, q = (torch.cat([x.gather(-1, ids), x.scatter(-1, ids, 0).sum(-1, keepdim=True)], -1) for x in (p, q))
    return -(torch.xlogy(p, q)).sum(-1), (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def gradient(loss, student, *args):
    student = student.detach().clone().requires_grad_()
    loss(student, *args).backward()
    return student.grad


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_values_and_gradients_are_those_of_the_merged_distributions(dtype, rel, k):
    student, teacher = logits(3, 7, 30, dtype=dtype), logits(3, 7, 30, seed=1)
    for index, loss in enumerate(BOTH.values()):
        got = loss(student, top_k(teacher, k, dtype))
        assert got.dtype == dtype
        assert got.item() == pytest.approx(merged(student, teacher, k)[index].mean().item(), rel=rel)
        expected = gradient(lambda s, index=index: merged(s, teacher, k)[index].mean(), student.double())
        torch.testing.assert_close(gradient(loss, student, top_k(teacher, k, dtype)).double(), expected, rtol=rel * 10, atol=rel)


def test_the_gradient_by_the_formula_of_the_header():
    student, teacher, k = logits(1, 4, 12), logits(1, 4, 12, seed=1), 3
    p, q, top = teacher.softmax(-1), student.softmax(-1), top_k(teacher, 3)
    inside = torch.zeros_like(q).scatter(-1, top.ids, 1).bool()
    shrunk = q * (1 - top.tail / q.masked_fill(inside, 0).sum(-1)).unsqueeze(-1)
    torch.testing.assert_close(gradient(sparse_soft_cross_entropy, student, top), torch.where(inside, q - p, shrunk) / 4)
    assert inside.sum() == 4 * k


@both
def test_gradcheck(loss):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    student, teacher = logits(2, 3, 6).requires_grad_(), top_k(logits(2, 3, 6, seed=1), 2)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), (student,))
    assert torch.autograd.gradcheck(lambda s: 3 * loss(s.exp(), teacher), (student,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_whole_vocabulary_is_the_full_loss(dtype):
    student, teacher = logits(2, 5, 11, dtype=dtype), logits(2, 5, 11, seed=1, dtype=dtype)
    top = top_k(teacher, 11, dtype)
    rel = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    for loss, full in ((sparse_soft_cross_entropy, soft_cross_entropy), (sparse_kl_divergence, kl_divergence)):
        assert loss(student, top).item() == pytest.approx(full(student, teacher).item(), rel=rel)
        torch.testing.assert_close(gradient(loss, student, top), gradient(full, student, teacher), rtol=rel * 10, atol=rel)


@both
@pytest.mark.parametrize("chunk", [1, 11 * 4, 11 * 20, 11 * 21, 11 * 22])
def test_chunks_change_nothing(loss, chunk, monkeypatch):
    student, teacher = logits(3, 7, 11), top_k(logits(3, 7, 11, seed=1), 4)
    whole, expected = loss(student, teacher), gradient(loss, student, teacher)
    monkeypatch.setattr(sparse, "CHUNKS", {"cpu": chunk})
    torch.testing.assert_close(loss(student, teacher), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, student, teacher), expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- what a token counts


@both
def test_tokens_that_do_not_count(loss):
    student, teacher = logits(3, 7, 11), top_k(logits(3, 7, 11, seed=1), 4)
    lengths = (7, 2, 5)
    mask = torch.tensor([[i < length for i in range(7)] for length in lengths]).long()
    pieces = [loss(student[i : i + 1, :n], TopK(*(x[i : i + 1, :n] for x in teacher))) * n for i, n in enumerate(lengths)]
    expected = sum(pieces) / sum(lengths)
    student[mask == 0] = torch.nan
    teacher.ids[mask == 0], teacher.probabilities[mask == 0], teacher.tail[mask == 0] = 0, torch.nan, torch.inf
    for form in (mask, mask.bool()):
        torch.testing.assert_close(loss(student, teacher, form), expected, rtol=1e-12, atol=0)
    grad = gradient(loss, student, teacher, mask)
    assert grad[mask == 0].count_nonzero() == 0
    assert grad.isfinite().all()
    with pytest.raises(ValueError, match="no token counts; the attention mask is 0 everywhere"):
        loss(student, teacher, torch.zeros(3, 7))


@both
@pytest.mark.parametrize("part", TopK._fields)
def test_shapes_that_differ_are_refused(loss, part):
    teacher = top_k(logits(2, 5, 11), 3)
    with pytest.raises(ValueError, match=r"student logits \(2, 5, 11\), teacher's ids \(2, .* the tail \[batch, tokens\]"):
        loss(logits(2, 5, 11), teacher._replace(**{part: getattr(teacher, part)[:, 1:]}))
    with pytest.raises(ValueError, match=r"student logits \(2, 4, 11\)"):
        loss(logits(2, 4, 11), teacher)


# ---------------------------------------------------------------- precision


@both
def test_a_student_that_leaves_nothing_to_the_tail(loss):
    """Its mass there underflows, 1 - sum would be 0: loss and gradient are those of float64."""
    student = torch.tensor([[[200.0, -100.0, -101.0, 0.0]]])
    teacher = torch.tensor([[[0.5, 0.3, 0.1, 0.1]]]).log()
    top = top_k(teacher, 1, torch.float32)
    wide = student.double()
    q = wide.log_softmax(-1)
    tail = q[..., 1:].logsumexp(-1)
    entropy = 2 * 0.5 * math.log(2) if loss is sparse_kl_divergence else 0
    assert loss(student, top).item() == pytest.approx(-0.5 * (q[..., 0] + tail).item() - entropy, rel=1e-6)
    expected = torch.cat([q[..., :1].exp() - 0.5, -0.5 * wide[..., 1:].softmax(-1)], -1)
    torch.testing.assert_close(gradient(loss, student, top).double(), expected, rtol=1e-6, atol=1e-12)


@both
def test_no_token_left_in_the_tail(loss):
    """What the student never writes may be all of the tail."""
    student = torch.tensor([[[1.0, 0.0, -torch.inf, -torch.inf]]])
    top = TopK(torch.tensor([[[1, 0]]]), torch.tensor([[[0.75, 0.25]]]), torch.zeros(1, 1))
    expected = loss(student[..., :2], top)
    assert loss(student, top).item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient(loss, student, top)[0, 0, 2:].tolist() == [0, 0]


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(loss, dtype):
    student, teacher = logits(2, 5, 400, dtype=dtype), top_k(logits(2, 5, 400, seed=1), 8, torch.float32)
    got = loss(student, teacher)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(student.float(), teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, loss(student, teacher))
    half = gradient(loss, student, teacher)
    assert half.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(half.float(), gradient(loss, student.float(), teacher), rtol=2 * rounding, atol=6e-8)


def test_a_scaled_loss_keeps_small_gradients_in_fp16():
    """1/4096 of a probability of 1e-4 is below fp16, as long as the gradient scaler's factor has not been applied."""
    tokens, scale = 4096, 2.0**16
    student = torch.tensor([9.0, 0.0, -1.0, 0.5]).half().expand(1, tokens, 4)
    top = TopK(torch.zeros(1, tokens, 1, dtype=torch.long), torch.ones(1, tokens, 1), torch.zeros(1, tokens))
    got = gradient(lambda s: sparse_soft_cross_entropy(s, top) * scale, student)
    expected = gradient(lambda s: sparse_soft_cross_entropy(s, top) * scale, student.double())
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=0)


@both
def test_other_graphs(loss):
    student, teacher = logits(2, 5, 40, dtype=torch.float32), top_k(logits(2, 5, 40, seed=1), 8, torch.float32)
    expected, leaf = gradient(loss, student, teacher), student.clone().requires_grad_()
    value = loss(leaf, teacher)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    with torch.inference_mode():
        assert torch.equal(loss(student, teacher), value.detach())


def test_one_gradient_is_all_that_is_kept():
    saved = []
    student = logits(4, 16, 500, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.dtype, x.numel())) or x, lambda x: x):
        sparse_soft_cross_entropy(student, top_k(logits(4, 16, 500, seed=1), 8, torch.float32))
    assert saved == [(torch.bfloat16, 4 * 16 * 500)]


# ---------------------------------------------------------------- what merging the tail leaves out

shapes = st.tuples(st.integers(2, 40), st.integers(0, 10**6))
scales = st.floats(0.01, 5.0)


@settings(deadline=None, max_examples=60)
@given(st.data(), shapes, scales, scales)
def test_the_rest_of_the_divergence_is_inside_the_tail(data, shape, scale, change):
    vocab_size, seed = shape
    k = data.draw(st.integers(1, vocab_size - 1))
    teacher = logits(1, 3, vocab_size, seed=seed, scale=scale)
    student = teacher + logits(1, 3, vocab_size, seed=seed + 1, scale=change)
    top = top_k(teacher, k)
    others = torch.ones_like(teacher).scatter(-1, top.ids, 0).bool()
    p_bar, q_bar = (x[others].view(3, -1).log_softmax(-1) for x in (teacher, student))
    inside = (p_bar.exp() * (p_bar - q_bar)).sum(-1)
    entropy = -(p_bar.exp() * q_bar).sum(-1)
    gap = (kl_divergence(student, teacher) - sparse_kl_divergence(student, top)).item()
    assert gap == pytest.approx((top.tail[0] * inside).mean().item(), rel=1e-6, abs=1e-12)
    difference = (student - teacher)[others].view(3, -1)
    eps = (difference.amax(-1) - difference.amin(-1)) / 2  # after the best shift
    assert gap <= (top.tail[0] * eps**2 / 2).mean().item() + 1e-12
    assert sparse_kl_divergence(student, top).item() >= -1e-12
    full = soft_cross_entropy(student, teacher) - sparse_soft_cross_entropy(student, top)
    assert full.item() == pytest.approx((top.tail[0] * entropy).mean().item(), rel=1e-6, abs=1e-12)


def test_the_bound_is_nearly_reached():
    """Two tail tokens, one logit up and one down by eps: the bound exceeds the gap by a factor that tends to 1."""
    teacher, eps = torch.tensor([[[1e-9, 0, 0]]], dtype=torch.float64), 0.01
    student = teacher + torch.tensor([0, eps, -eps])
    gap = kl_divergence(student, teacher) - sparse_kl_divergence(student, top_k(teacher, 1))
    assert gap.item() == pytest.approx(2 / 3 * eps**2 / 2, rel=1e-3)


def test_the_divergence_of_a_teacher_from_itself_is_zero():
    teacher = logits(2, 5, 50, dtype=torch.float32)
    assert sparse_kl_divergence(teacher + 3, top_k(teacher, 8, torch.float32)).item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- the two forms of a teacher


def test_both_forms_go_through_one_door():
    student, teacher, mask = logits(1, 2, 9), logits(1, 2, 9, seed=1), torch.tensor([[1, 0]])
    top = top_k(teacher, 3)
    loss = SoftCrossEntropy()
    assert torch.equal(loss(student, top, mask), sparse_soft_cross_entropy(student, top, mask))
    assert torch.equal(loss(student, teacher, mask), soft_cross_entropy(student, teacher, mask))
    assert torch.equal(divergence(student, top, mask), sparse_kl_divergence(student, top, mask))
    assert torch.equal(divergence(student, teacher, mask), kl_divergence(student, teacher, mask))
    assert torch.equal(most_probable(top), most_probable(teacher))
    assert torch.equal(pickle.loads(pickle.dumps(top)).ids, top.ids)
