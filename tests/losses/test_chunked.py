"""Sums over chunks of rows against the same sums all at once."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lightning_qat.losses.base as base
from lightning_qat import QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.losses import ForwardKL, JensenShannon, SoftCrossEntropy, chunked_sums, row_sums
from lightning_qat.modules import cached_weights


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(d, vocabulary, seed=0, dtype=torch.float64, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(d, vocabulary, bias=bias, dtype=dtype)


def cross_entropy(head, target):
    """[cross-entropy, something for the log] of some rows."""

    def sums(rows, hidden):
        logits = head(hidden)
        loss = -(target[rows] * logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)).sum()
        return torch.stack([loss, logits.detach().argmax(-1).sum().to(loss.dtype)])

    return sums


def gradients(total, hidden, parameters):
    return torch.autograd.grad(total, [hidden, *parameters], allow_unused=True)


def both_ways(function, hidden, parameters, chunk, factor=1.0):
    """Values and gradients: in chunks, and all at once."""
    hidden = hidden.detach().clone().requires_grad_()
    chunked, plain = chunked_sums(function, hidden, parameters, chunk), function(slice(0, len(hidden)), hidden)
    return (chunked, gradients(chunked[0] * factor, hidden, parameters)), (plain, gradients(plain[0] * factor, hidden, parameters))


def assert_same(pair, rel):
    for got, expected in zip(tree_leaves(pair[0]), tree_leaves(pair[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=rel, atol=rel * expected.abs().max().item())


# ---------------------------------------------------------------- the same as all at once


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 30), st.integers(1, 25), st.booleans(), st.sampled_from([1.0, 1 / 7]))
def test_values_and_gradients(rows, d, vocabulary, chunk, bias, factor):
    head, target = linear(d, vocabulary, bias=bias), normal(rows, vocabulary).softmax(-1)
    assert_same(both_ways(cross_entropy(head, target), normal(rows, d, seed=1), list(head.parameters()), chunk, factor), 1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 100])
def test_values_and_gradients_in_fp32(chunk):
    head, target = linear(8, 50, dtype=torch.float32), normal(16, 50, dtype=torch.float32).softmax(-1)
    assert_same(both_ways(cross_entropy(head, target), normal(16, 8, dtype=torch.float32), list(head.parameters()), chunk), 1e-6)


def test_gradcheck():
    head, target = linear(3, 5), normal(7, 5).softmax(-1)

    def first(hidden, weight, bias):
        return chunked_sums(cross_entropy(lambda h: functional.linear(h, weight, bias), target), hidden, [weight, bias], 3)[0].exp()

    assert torch.autograd.gradcheck(first, (normal(7, 3).requires_grad_(), head.weight, head.bias))


def test_without_gradients_nothing_is_computed_but_sums():
    head, hidden, target = linear(4, 9), normal(7, 4).requires_grad_(), normal(7, 9).softmax(-1)
    function = cross_entropy(head, target)
    expected = function(slice(0, 7), hidden)
    seen = []

    def watched(rows, part):
        seen.append((rows, torch.is_grad_enabled()))
        return function(rows, part)

    with torch.no_grad():
        torch.testing.assert_close(chunked_sums(watched, hidden, [head.weight, head.bias], 3), expected.detach())
    assert seen == [(slice(0, 3), False), (slice(3, 6), False), (slice(6, 7), False)]
    with torch.inference_mode():
        torch.testing.assert_close(chunked_sums(function, hidden, [head.weight, head.bias], 3), expected.detach())
    head.requires_grad_(False)
    assert not chunked_sums(function, hidden.detach(), [head.weight], 3).requires_grad


def test_who_needs_no_gradient_gets_none():
    head, target = linear(4, 9), normal(7, 9).softmax(-1)
    function, parameters = cross_entropy(head, target), [head.weight, head.bias]
    head.weight.requires_grad_(False)
    hidden = normal(7, 4).requires_grad_()
    expected = gradients(function(slice(0, 7), hidden)[0], hidden, [head.bias])
    chunked_sums(function, hidden, parameters, 3)[0].backward()
    assert head.weight.grad is None
    torch.testing.assert_close((hidden.grad, head.bias.grad), expected)
    head.bias.grad = None
    chunked_sums(function, hidden.detach(), parameters, 3)[0].backward()
    torch.testing.assert_close(head.bias.grad, expected[1])
    unused = nn.Parameter(torch.ones(2))
    chunked_sums(function, hidden, [*parameters, unused], 3)[0].backward()
    assert unused.grad is None


def test_only_the_first_sum_has_a_gradient():
    head, hidden = linear(4, 9), normal(7, 4).requires_grad_()
    sums = chunked_sums(lambda rows, h: torch.stack([head(h).sum(), head(h).square().sum()]), hidden, list(head.parameters()), 3)
    sums.sum().backward()
    torch.testing.assert_close(hidden.grad, head.weight.sum(0).expand(7, 4))


def test_backward_twice_and_no_second_derivative():
    head, hidden = linear(4, 9), normal(7, 4).requires_grad_()
    total = chunked_sums(cross_entropy(head, normal(7, 9).softmax(-1)), hidden, list(head.parameters()), 3)[0]
    first, second = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="create_graph=True: chunked sums have no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


# ---------------------------------------------------------------- inside a model


class Tied(nn.Module):
    """Embedding, a block, a head; the weight of the first is that of the last."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.block, self.head = nn.Embedding(12, 4), nn.Linear(4, 4), nn.Linear(4, 12)
        self.head.weight = self.embedding.weight
        self.double()
        self.checkpointed = checkpointed

    def forward(self, ids):
        hidden = self.embedding(ids)
        return checkpoint(self.block, hidden, use_reentrant=False) if self.checkpointed else self.block(hidden)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tied_weights(checkpointed):
    model, plain, ids = Tied(checkpointed), Tied(), torch.arange(11)
    target = normal(11, 12).softmax(-1)
    for _ in range(2):  # gradients of several micro-batches add up
        chunked_sums(cross_entropy(model.head, target), model(ids), list(model.head.parameters()), 4)[0].backward()
        cross_entropy(plain.head, target)(slice(0, 11), plain(ids))[0].backward()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_all_of_it(reentrant):
    model, plain, ids, target = Tied(), Tied(), torch.arange(11), normal(11, 12).softmax(-1)
    start = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # the reentrant kind wants an input with a gradient

    def total(shift):
        return chunked_sums(cross_entropy(model.head, target), model(ids) + shift, list(model.head.parameters()), 4)[0]

    checkpoint(total, start, use_reentrant=reentrant).backward()
    cross_entropy(plain.head, target)(slice(0, 11), plain(ids))[0].backward()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "weight", [TensorSpec(bits=4), TensorSpec(bits=3, granularity="group", group_size=4, symmetric=False)], ids=["row", "group"]
)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept weights"])
def test_a_fake_quantized_head(weight, kept):
    model = nn.Sequential(linear(8, 8), linear(8, 24, seed=1))
    insert_quantizers(model, QuantScheme(weight=weight, input=TensorSpec(bits=8, granularity="token")))
    head = model[1]
    function = cross_entropy(head, normal(13, 24).softmax(-1))
    with cached_weights(model) if kept else nullcontext():
        pair = both_ways(function, model[0](normal(13, 8)), list(head.parameters()), 5)
    assert_same(pair, 1e-12)
    assert pair[0][1][1].count_nonzero() == 24 * 8


def test_compiled():
    head, target = linear(4, 9), normal(7, 9).softmax(-1)
    hidden, parameters = normal(7, 4).requires_grad_(), list(head.parameters())
    function = cross_entropy(head, target)
    total = torch.compile(lambda h: chunked_sums(function, h * 2, parameters, 3)[0], backend="eager")(hidden)
    expected = gradients(function(slice(0, 7), hidden * 2)[0], hidden, parameters)
    torch.testing.assert_close(gradients(total, hidden, parameters), expected)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("poisoned", [False, True])
def test_autocast(cache, poisoned):
    """Also after a forward pass without gradients, whose cast weights autocast keeps without a graph."""
    head, target = linear(8, 50, dtype=torch.float32), normal(16, 50, dtype=torch.float32).softmax(-1)
    function, parameters, start = cross_entropy(head, target), list(head.parameters()), normal(16, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        if poisoned:
            with torch.no_grad():
                head(start)
        hidden = start.clone().requires_grad_()
        chunked = chunked_sums(function, hidden, parameters, 5)
        assert torch.is_autocast_cache_enabled() == cache
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        plain = function(slice(0, 16), hidden)
    torch.testing.assert_close(chunked, plain.detach(), rtol=1e-5, atol=0)
    for got, expected in zip(gradients(chunked[0], hidden, parameters), gradients(plain[0], hidden, parameters), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-7 * expected.abs().max().item())  # sums in bf16, other parts


def test_a_weight_that_changes_inside_autocast_is_cast_again():
    head, target = linear(8, 20, dtype=torch.float32), normal(6, 20, dtype=torch.float32).softmax(-1)
    function, hidden = cross_entropy(head, target), normal(6, 8, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = chunked_sums(function, hidden, list(head.parameters()), 4)[0].item()
        with torch.no_grad():
            head.weight.mul_(3)
        after = chunked_sums(function, hidden, list(head.parameters()), 4)[0].item()
        expected = cross_entropy(copy.deepcopy(head), target)(slice(0, 6), hidden)[0].item()
    assert after == pytest.approx(expected, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


def test_gradients_of_bf16_parameters_are_added_in_fp32():
    """1,024 rows of 1 each: adding 1 to 256 changes nothing in bf16."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    chunked_sums(lambda rows, h: (h @ weight).sum().reshape(1), torch.ones(1024, 1, dtype=torch.bfloat16), [weight], 1)[0].backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.item() == 1024


def test_small_gradients_survive_in_fp16():
    """Those of a mean over 8,192 tokens are below fp16, until the gradient scaler's factor is applied."""
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[12.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    head.half()
    target = torch.tensor([1.0, 0.0, 0.0]).expand(8192, 3)
    scale = 2.0**18 / 8192
    hidden = torch.ones(8192, 2).half()
    half, _ = both_ways(cross_entropy(head, target), hidden, [head.weight], 1000, scale)
    _, exact = both_ways(cross_entropy(head.double(), target.double()), hidden.double(), [head.weight], 8192, scale)
    assert exact[1][0].abs().max() / 2**18 < 2**-24
    for got, expected in zip(half[1], exact[1], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


# ---------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """The largest tensor that any operation made, in elements, and the most bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self._count(x.untyped_storage())
        return result

    def _count(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key):
        self.now -= self.sizes.pop(key)


def peak_of(rows, d, vocabulary, chunk, losses, metrics=(), autocast=True):
    student, teacher = (linear(d, vocabulary, seed, torch.float32, bias=False) for seed in (0, 1))
    hidden, other = (normal(rows, d, seed=seed, dtype=torch.float32) for seed in (0, 1))
    hidden.requires_grad_()
    with Memory() as memory, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        function = row_sums(losses, student, lambda rows: teacher(other[rows]), metrics=metrics)
        (chunked_sums(function, hidden, [student.weight], chunk)[0] / rows).backward()
    return memory


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("losses", "metrics"), [([SoftCrossEntropy()], ("kl", "top1")), ([JensenShannon(), ForwardKL()], ())], ids=["1", "2"]
)
def test_the_bound_of_the_header(losses, metrics, autocast, monkeypatch):
    elements = 2**14
    monkeypatch.setattr(base, "ROW_ELEMENTS", {"cpu": elements})
    rows, d, vocabulary, chunk, b = 512, 16, 2000, 128, 2 if autocast else 4
    memory = peak_of(rows, d, vocabulary, chunk, losses, metrics, autocast)
    bound = (2 + len(losses)) * b * chunk * vocabulary + (8 + 2 * b) * vocabulary * d + 12 * rows * d + 12 * 4 * elements
    assert memory.largest == chunk * vocabulary  # never rows x vocabulary
    assert bound / 2 < memory.peak <= bound


def test_more_rows_need_only_their_own_gradient():
    few, many = (peak_of(rows, 8, 500, 32, [SoftCrossEntropy()]).peak for rows in (64, 1024))
    assert many - few <= 12 * 8 * (1024 - 64) + 1000


# ---------------------------------------------------------------- bad input


def test_bad_input():
    head, hidden = linear(4, 9), normal(7, 4).requires_grad_()
    function = cross_entropy(head, normal(7, 9).softmax(-1))
    with pytest.raises(ValueError, match=r"hidden: no rows, shape \(0, 4\)"):
        chunked_sums(function, hidden[:0], [head.weight, head.bias], 3)
    with pytest.raises(ValueError, match="chunk: 0; rows at a time, 1 or more"):
        chunked_sums(function, hidden, [head.weight, head.bias], 0)
    with pytest.raises(ValueError, match=r"parameters: a tensor \(9,\) that function uses needs a gradient but is not listed"):
        chunked_sums(function, hidden, [head.weight], 3)
    with pytest.raises(ValueError, match="first sum needs no gradient"):
        chunked_sums(lambda rows, h: h.detach().sum().reshape(1), hidden, [], 3)


def test_tensors_with_a_history_can_be_listed():
    scale, head, hidden = nn.Parameter(torch.ones(1, dtype=torch.float64)), linear(4, 9), normal(7, 4).requires_grad_()
    weight, target = head.weight * scale, normal(7, 9).softmax(-1)
    function = cross_entropy(lambda h: functional.linear(h, weight), target)
    chunked, plain = chunked_sums(function, hidden, [weight], 3), function(slice(0, 7), hidden)
    got, expected = (torch.autograd.grad(sums[0], [hidden, head.weight, scale], retain_graph=True) for sums in (chunked, plain))
    torch.testing.assert_close(got, expected)


def test_hooks_that_would_see_chunks_are_refused():
    head, hidden = linear(4, 9), normal(7, 4).requires_grad_()
    function, parameters = cross_entropy(head, normal(7, 9).softmax(-1)), list(head.parameters())
    handle = head.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ValueError, match=r"number 0, \(9, 4\), has a hook .* register_post_accumulate_grad_hook"):
        chunked_sums(function, hidden, parameters, 3)
    handle.remove()
    seen = []
    head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    chunked_sums(function, hidden, parameters, 3)[0].backward()
    torch.testing.assert_close(seen, [gradients(function(slice(0, 7), hidden)[0], hidden, parameters)[1]])
