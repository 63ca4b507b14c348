"""Losses of hidden states and attention against loops over tokens in float64, and on real models."""

import pytest
import torch
from models import llama

from lightning_qat.losses import AttentionLoss, HiddenStateLoss

MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
REAL = [(b, t) for b in range(2) for t in range(5) if MASK[b, t]]


def states(layers, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(layers)]


def attention(layers, heads=3, seed=0, dtype=torch.float64):
    """Causal, and padding is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.ones(5, 5).tril().bool() & MASK[:, None, None, :].bool()
    scores = (torch.randn(2, heads, 5, 5, generator=generator, dtype=torch.float64) * 2 for _ in range(layers))
    return [s.masked_fill(~seen, -1e9).softmax(-1).to(dtype) for s in scores]


def hidden_oracle(metric, s, t):
    return sum(hidden_distance(metric, s[b, i], t[b, i]) for b, i in REAL) / len(REAL)


def hidden_distance(metric, a, b):
    if metric == "cosine":
        return 1 - (a @ b) / (a.norm() * b.norm())
    error = ((a - b) ** 2).mean()
    return error / (b**2).mean() if metric == "normalized_mse" else error


def attention_oracle(metric, s, t):
    rows = [(s[b, h, i], t[b, h, i], MASK[b].bool()) for b, i in REAL for h in range(s.shape[1])]
    if metric == "mse":
        return torch.cat([(a - b)[keys] ** 2 for a, b, keys in rows]).mean()
    return sum((b[b > 0] * (b[b > 0] / a[b > 0]).log()).sum() for a, b, _ in rows) / len(rows)


CASES = [(HiddenStateLoss, m, states, hidden_oracle) for m in ("mse", "normalized_mse", "cosine")]
CASES += [(AttentionLoss, m, attention, attention_oracle) for m in ("mse", "kl")]
each = pytest.mark.parametrize(("loss_class", "metric", "make", "oracle"), CASES, ids=[f"{c.__name__}-{m}" for c, m, *_ in CASES])


# ---------------------------------------------------------------- values and gradients


@each
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_sum_over_layers_of_means_over_real_tokens(loss_class, metric, make, oracle, dtype, rel):
    student, teacher = make(3, dtype=dtype), make(3, seed=1, dtype=dtype)

    def run(function, xs):
        xs = [x.detach().clone().requires_grad_() for x in xs]
        value = function(xs)
        return value, torch.autograd.grad(value, xs)

    got, gradients = run(lambda xs: loss_class(metric=metric)(xs, teacher, MASK), student)
    expected, wanted = run(
        lambda xs: sum(oracle(metric, s, t.double()) for s, t in zip(xs, teacher, strict=True)), [s.double() for s in student]
    )
    assert got.dtype == dtype
    assert got.item() == pytest.approx(expected.item(), rel=rel)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=10 * rel, atol=rel)
    assert gradients[0].flatten(-1)[..., 0].count_nonzero() > 0


@each
def test_padding_counts_nothing(loss_class, metric, make, oracle):
    student, teacher = make(2), make(2, seed=1)
    expected = loss_class(metric=metric)(student, teacher, MASK)
    for x in (*student, *teacher):
        if loss_class is HiddenStateLoss:
            x[~MASK.bool()] = torch.nan
        else:
            x[1, :, :2] = torch.nan  # queries
            x[1, :, :, :2] = torch.nan  # keys
    assert loss_class(metric=metric)(student, teacher, MASK).item() == pytest.approx(expected.item(), rel=1e-12)


@each
def test_the_teacher_itself_is_at_distance_zero(loss_class, metric, make, oracle):
    layers = make(3)
    assert loss_class(metric=metric)(layers, layers, MASK).item() == pytest.approx(0, abs=1e-12)


def test_without_a_mask_all_count():
    student, teacher = states(2), states(2, seed=1)
    expected = sum(((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True))
    assert HiddenStateLoss()(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    student, teacher = states(2, dtype=dtype), states(2, seed=1, dtype=dtype)
    got = HiddenStateLoss()(student, teacher, MASK)
    assert got.dtype == torch.float32
    assert torch.equal(got, HiddenStateLoss()([x.float() for x in student], [x.float() for x in teacher], MASK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_that_underflows_gives_finite_gradients(dtype):
    student, teacher = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=dtype), torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], dtype=dtype)
    student.requires_grad_()
    loss = AttentionLoss(metric="kl")([student], [teacher])
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


# ---------------------------------------------------------------- which layer with which


@pytest.mark.parametrize(
    ("student", "teacher", "blocks"),
    [
        (2, 4, {1: 2, 2: 4}),
        (3, 12, {1: 4, 2: 8, 3: 12}),
        (4, 6, {1: 2, 2: 3, 3: 5, 4: 6}),
        (3, 3, {1: 1, 2: 2, 3: 3}),
        (4, 2, {1: 1, 2: 1, 3: 2, 4: 2}),
    ],
)
def test_even_maps(student, teacher, blocks):
    assert HiddenStateLoss().even_map(student + 1, teacher + 1) == {0: 0} | blocks
    assert AttentionLoss().even_map(student, teacher) == {own - 1: other - 1 for own, other in blocks.items()}
    own, other = states(student + 1), states(teacher + 1, seed=1)
    expected = sum(hidden_oracle("mse", own[i], other[j]) for i, j in ({0: 0} | blocks).items())
    assert HiddenStateLoss()(own, other, MASK).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_map_of_ones_own():
    own, other = attention(2), attention(4, seed=1)
    expected = attention_oracle("mse", own[1], other[2]) + attention_oracle("mse", own[0], other[3])
    assert AttentionLoss({1: 2, 0: 3})(own, other, MASK).item() == pytest.approx(expected.item(), rel=1e-12)


def test_models_of_different_depth():
    models = [llama(num_hidden_layers=depth, attn_implementation="eager") for depth in (2, 4)]
    ids, mask = torch.arange(1, 11).view(2, 5), MASK
    student, teacher = (m(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True) for m in models)
    for loss in (HiddenStateLoss(metric="normalized_mse"), AttentionLoss(metric="kl")):
        value = loss(getattr(student, loss.needs), getattr(teacher, loss.needs), mask)
        assert 0 < value.item() < 10
        value.backward(retain_graph=True)
    assert models[0].model.layers[0].self_attn.q_proj.weight.grad.count_nonzero() > 0
    assert all(p.grad is None for p in models[1].parameters())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("loss_class", [HiddenStateLoss, AttentionLoss])
def test_bad_arguments(loss_class):
    with pytest.raises(ValueError, match=r"metric: 'l1'; must be one of mse"):
        loss_class(metric="l1")
    for layers in ({}, {-1: 0}, {0: -1}):
        with pytest.raises(ValueError, match=r"layers: .* counted from 0"):
            loss_class(layers)
    with pytest.raises(ValueError, match="weight: nan"):
        loss_class(weight=float("nan"))


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="the student's hidden states have 6 features, the teacher's 8"):
        HiddenStateLoss()(states(2), states(2, width=8), MASK)
    with pytest.raises(ValueError, match="the student has 3 heads, the teacher 4"):
        AttentionLoss()(attention(2), attention(2, heads=4), MASK)
    with pytest.raises(ValueError, match=r"layers: 1 to 4; the student has hidden_states 0 to 2, the teacher 0 to 3"):
        HiddenStateLoss({1: 4})(states(3), states(4), MASK)
    with pytest.raises(ValueError, match="no token counts"):
        HiddenStateLoss()(states(2), states(2), torch.zeros(2, 5))


@pytest.mark.parametrize("nothing", [None, (), (None, None)], ids=str)
def test_attention_that_was_not_returned(nothing):
    with pytest.raises(ValueError, match=r'the student returned no attentions; .*attn_implementation="eager"'):
        AttentionLoss()(nothing, attention(2), MASK)
    with pytest.raises(ValueError, match="the teacher returned no attentions"):
        AttentionLoss()(attention(2), nothing, MASK)
