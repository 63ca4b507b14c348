"""Several losses and metrics of one head, summed over chunks, against the same on all logits at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_qat.losses import (
    ForwardKL,
    HiddenStateLoss,
    JensenShannon,
    LabelCrossEntropy,
    ReverseKL,
    RowLoss,
    SoftCrossEntropy,
    TopK,
    chunked_sums,
    divergence,
    row_sums,
)
from lightning_qat.losses.rows import METRICS

ROWS, D, VOCABULARY = 13, 4, 20


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return nn.Linear(D, VOCABULARY).double(), nn.Linear(D, VOCABULARY).double()


@pytest.fixture
def hidden():
    torch.manual_seed(1)
    return torch.randn(ROWS, D, dtype=torch.float64, requires_grad=True), torch.randn(ROWS, D, dtype=torch.float64)


@pytest.fixture
def labels():
    torch.manual_seed(2)
    return torch.randint(VOCABULARY, (ROWS,)).masked_fill(torch.arange(ROWS) % 3 == 0, -100)


def top_k(logits, k=5):
    p = logits.softmax(-1)
    top, ids = p.topk(k, -1)
    return TopK(ids, top, p.scatter(-1, ids, 0).sum(-1))


@pytest.mark.parametrize("chunk", [1, 4, 13, 1024])
@pytest.mark.parametrize("form", ["logits", "top-k"])
def test_sums_and_gradients(heads, hidden, labels, chunk, form):
    (own, other), (states, teacher_states) = heads, hidden
    losses = [SoftCrossEntropy(weight=2.0), ReverseKL(weight=0.5), LabelCrossEntropy(weight=3.0), JensenShannon(weight=0)]
    target = other(teacher_states).detach() if form == "logits" else top_k(other(teacher_states).detach())

    def teacher(rows):
        assert not torch.is_grad_enabled()
        return other(teacher_states[rows]) if form == "logits" else TopK(*(x[rows] for x in target))

    sums = chunked_sums(row_sums(losses, own, teacher, labels, METRICS), states, list(own.parameters()), chunk)
    logits = own(states)
    means = [loss(logits, target, labels=labels) for loss in losses]
    expected = sum(loss.weight * mean for loss, mean in zip(losses, means, strict=True))
    torch.testing.assert_close(sums[:5] / ROWS, torch.stack([expected, *means]).detach())
    kl, top1, nll = sums[5:].tolist()
    assert kl / ROWS == pytest.approx(divergence(logits, target).item(), rel=1e-12)
    best = (target if form == "logits" else other(teacher_states)).argmax(-1)
    assert top1 == (logits.argmax(-1) == best).sum()
    assert nll == pytest.approx(functional.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-12)
    got = torch.autograd.grad(sums[0] / ROWS, [states, *own.parameters()])
    torch.testing.assert_close(got, torch.autograd.grad(expected, [states, *own.parameters()]), rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in other.parameters())


def test_only_what_was_asked_for(heads, hidden, labels):
    function = row_sums([ForwardKL()], heads[0], lambda rows: heads[1](hidden[1][rows]))
    assert chunked_sums(function, hidden[0], list(heads[0].parameters()), 5).shape == (2,)
    function = row_sums([LabelCrossEntropy()], heads[0], labels=labels, metrics=["nll"])
    weighted, mean, nll = chunked_sums(function, hidden[0], list(heads[0].parameters()), 5)
    assert weighted.item() == mean.item() == pytest.approx(nll.item() * ROWS / (labels >= 0).sum().item(), rel=1e-12)


def test_metrics_alone(heads, hidden, labels):
    function = row_sums([], heads[0], lambda rows: heads[1](hidden[1][rows]), labels, ["nll", "top1"])
    with torch.no_grad():
        nothing, nll, top1 = chunked_sums(function, hidden[0], (), 5)
        logits, target = heads[0](hidden[0]), heads[1](hidden[1])
    assert nothing.item() == 0
    assert nll.item() == pytest.approx(functional.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-6)
    assert top1.item() == (logits.argmax(-1) == target.argmax(-1)).sum().item()


def test_a_loss_of_ones_own(heads, hidden):
    class Squares(RowLoss):
        name = "squares"

        def row_sum(self, student, teacher, labels):
            return (student - teacher).square().sum()

    sums = chunked_sums(row_sums([Squares()], heads[0], lambda rows: heads[1](hidden[1][rows])), hidden[0], list(heads[0].parameters()), 5)
    assert sums[0].item() == pytest.approx((heads[0](hidden[0]) - heads[1](hidden[1])).square().sum().item(), rel=1e-12)


def test_a_head_with_a_softcap(heads, hidden):
    def head(h):
        return 3 * (heads[0](h) / 3).tanh()

    sums = chunked_sums(row_sums([ForwardKL()], head, lambda rows: heads[1](hidden[1][rows])), hidden[0], list(heads[0].parameters()), 5)
    expected = ForwardKL().total(head(hidden[0]), heads[1](hidden[1]))
    torch.testing.assert_close(torch.autograd.grad(sums[0], hidden[0]), torch.autograd.grad(expected, hidden[0]))


def test_what_is_missing_is_named(heads):
    head, teacher = heads[0], lambda rows: None
    with pytest.raises(ValueError, match=r"losses: empty, and no metrics; pass at least one, such as SoftCrossEntropy\(\)"):
        row_sums([], head, teacher)
    with pytest.raises(ValueError, match=r"metrics: 'kll'; must be of kl, top1, nll"):
        row_sums([ForwardKL()], head, teacher, metrics=["kl", "kll"])
    with pytest.raises(ValueError, match="teacher: None, but forward_kl compares"):
        row_sums([LabelCrossEntropy(), ForwardKL()], head, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="teacher: None, but top1 compares"):
        row_sums([LabelCrossEntropy()], head, labels=torch.zeros(3), metrics=["top1"])
    with pytest.raises(ValueError, match="labels: None, but label_cross_entropy needs"):
        row_sums([LabelCrossEntropy()], head, teacher)
    with pytest.raises(ValueError, match="labels: None, but nll needs"):
        row_sums([ForwardKL()], head, teacher, metrics=["nll"])


def test_names_are_those_of_logs():
    losses = [SoftCrossEntropy(), ForwardKL(), ReverseKL(), JensenShannon(), LabelCrossEntropy(), HiddenStateLoss()]
    assert [loss.name for loss in losses] == [
        "soft_cross_entropy",
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "label_cross_entropy",
        "hidden_states",
    ]
