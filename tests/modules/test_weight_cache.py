"""Kept weights: computed once while nothing changes them, and dropped by everything that does."""

from collections import Counter

import pytest
import torch
from models import mlp

from lightning_qat import insert_quantizers, named_quantizers
from lightning_qat.modules import cached_weights, forget_weights


@pytest.fixture
def counted():
    """A quantized model with a count of how often its weights were quantized."""
    model, calls = mlp().train(), Counter()
    insert_quantizers(model, "w4a8")
    for name, quantizer in named_quantizers(model):
        if name.endswith("weight_quantizer"):
            quantizer.register_forward_hook(lambda *_: calls.update(["weight"]))
    return model, calls


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def gradients(model):
    model.zero_grad()
    model(X).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_micro_batches_share_one_quantization_and_have_the_same_gradients(counted):
    model, calls = counted
    wanted = gradients(model)
    per_pass = calls["weight"]
    calls.clear()
    with cached_weights(model, training=True):
        for _ in range(3):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(model), wanted, strict=True))
    assert calls["weight"] == per_pass


@pytest.mark.parametrize("kind", ["sgd", "fused", "foreach"])
def test_a_step_of_any_optimizer_drops_them(counted, kind):
    model, _ = counted
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    }[kind](model.parameters())
    with cached_weights(model, training=True):
        gradients(model)
        optimizer.step()
        inside = model(X)
    assert torch.equal(inside, model(X))


@pytest.mark.parametrize("change", ["load", "mode", "cast", "forget"])
def test_what_else_drops_them(counted, change):
    model, _ = counted
    with cached_weights(model, training=True):
        model(X)
        with torch.no_grad():
            if change == "load":
                model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})
            else:
                model[0].weight.data.neg_()
        if change == "mode":
            model.eval()
        if change == "cast":
            model.double().float()
        if change == "forget":
            forget_weights(model)
        inside = model(X)
    assert torch.equal(inside, model(X))


def test_inference_mode_leaves_nothing_that_training_cannot_use(counted):
    model, _ = counted
    with cached_weights(model, training=True):
        with torch.inference_mode():
            model(X)
        gradients(model)


def test_nothing_is_kept_after_the_block_and_the_hook_is_gone(counted):
    model, calls = counted
    with cached_weights(model, training=True):
        gradients(model)
    calls.clear()
    gradients(model)
    gradients(model)
    assert calls["weight"] == 2 * sum(name.endswith("weight_quantizer") for name, _ in named_quantizers(model))
    assert all(layer.kept_weight is None for layer in model.modules() if hasattr(layer, "kept_weight"))


def test_autocast_and_fp32_do_not_serve_each_other(counted):
    model, _ = counted
    with torch.no_grad(), cached_weights(model):
        plain = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(X)
        assert torch.equal(model(X), plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), half)
