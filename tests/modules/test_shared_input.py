"""Siblings that read one input (q/k/v, gate/up) quantize it once, and nothing else changes."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from models import llama, token_ids
from torch import nn

from lightning_qat import QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.modules import QuantLayer
from lightning_qat.scheme import Override


def shared_inputs(model):
    return [module.shared_input for module in model.modules() if getattr(module, "shared_input", None) is not None]


def unshare(model):
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.shared_input = None
    return model


def quantized_llama(scheme="w4a8"):
    model = llama()
    insert_quantizers(model, scheme)
    return model


def step(model):
    """Logits and gradients of one training step."""
    model.zero_grad()
    logits = model(token_ids(), use_cache=False).logits
    logits.logsumexp(-1).square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_identical(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(got[1][name], gradient), name


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.q_proj(x).sigmoid() * self.k_proj(y) + self.v_proj(y)


@pytest.fixture
def cross():
    attention = CrossAttention()
    insert_quantizers(attention, "w8a4")
    return attention


def test_groups_are_qkv_and_gate_up():
    layer = quantized_llama().model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.shared_input is attention.k_proj.shared_input is attention.v_proj.shared_input is not None
    assert mlp.gate_proj.shared_input is mlp.up_proj.shared_input is not None
    assert attention.q_proj.shared_input is not mlp.gate_proj.shared_input
    assert attention.o_proj.shared_input is None
    assert mlp.down_proj.shared_input is None


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
def test_each_input_is_quantized_once(shared):
    model, calls = quantized_llama(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            kind = name.rsplit(".", 1)[-1]
            module.input_quantizer.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    if not shared:
        unshare(model)
    model(token_ids())
    groups = [calls["q_proj"] + calls["k_proj"] + calls["v_proj"], calls["gate_proj"] + calls["up_proj"]]
    assert groups == ([2, 2] if shared else [6, 4])  # two decoder layers
    assert calls["o_proj"] == calls["down_proj"] == 2


def test_results_and_gradients_are_those_of_separate_quantizers():
    model = quantized_llama()
    shared = step(model)
    assert_identical(shared, step(unshare(model)))
    assert len(shared[1]) == len(list(model.parameters()))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = quantized_llama().train()
    wanted = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = Counter()
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.update(["layer"]))
    assert_identical(step(model), wanted)
    assert calls["layer"] == 2  # once forward, once recomputed
    assert all(shared._source is None and shared._values is None for shared in shared_inputs(model))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_held_after_a_forward_pass(context):
    model = quantized_llama()
    with context():
        model(token_ids())
    assert shared_inputs(model)
    assert all(shared._source is None and shared._values is None for shared in shared_inputs(model))


def test_no_grad_values_never_reach_a_training_step():
    model, x = quantized_llama().model.layers[0].mlp, torch.randn(2, 3, 32)
    with torch.no_grad():
        model.gate_proj(x)  # the group is half done when training starts
    model(x).sum().backward()
    assert model.gate_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_cross_attention_reads_two_tensors(cross):
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    out = cross(x, y)
    assert torch.equal(out, unshare(copy.deepcopy(cross))(x, y))
    with torch.no_grad():
        x.mul_(3)
        y.neg_().add_(1)
    assert torch.equal(cross(x, y), unshare(copy.deepcopy(cross))(x, y))
    assert not torch.equal(cross(x, y), out)


def test_cross_attention_holds_nothing_after_a_forward_pass(cross):
    cross(torch.randn(2, 8), torch.randn(2, 8))
    assert cross.q_proj.shared_input._source is None


def test_a_buffer_that_changed_in_place_is_quantized_again(cross):
    """Only q_proj runs while keys and values come from a cache; static buffers keep their identity."""
    buffer, new = torch.randn(2, 8), torch.randn(2, 8)
    with torch.no_grad():
        cross.q_proj(buffer)
        buffer.copy_(new)
        assert torch.equal(cross.q_proj(buffer), unshare(copy.deepcopy(cross)).q_proj(new))


def test_nothing_is_held_after_a_forward_pass_that_failed():
    model = quantized_llama()
    handle = model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids())
    handle.remove()
    model(token_ids())
    assert all(shared._source is None for shared in shared_inputs(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_share_among_themselves(copied):
    model = quantized_llama()
    twin = copied(model)
    q_proj, k_proj = twin.model.layers[0].self_attn.q_proj, twin.model.layers[0].self_attn.k_proj
    assert q_proj.shared_input is k_proj.shared_input is not None
    assert not {id(shared) for shared in shared_inputs(twin)} & {id(shared) for shared in shared_inputs(model)}
    assert_identical(step(twin), step(model))


def test_nothing_is_shared_with_a_gradient_mask():
    clip = TensorSpec(bits=8, granularity="token", options={"ste": "clip"})
    model = quantized_llama(QuantScheme(weight=TensorSpec(bits=4), input=clip))
    assert shared_inputs(model) == []
    assert model.model.layers[0].self_attn.q_proj.input_quantizer is not None


def test_nothing_is_shared_between_different_specs():
    other = Override(names=("k_proj",), input=TensorSpec(bits=4, granularity="token"))
    model = quantized_llama(QuantScheme(input=TensorSpec(bits=8, granularity="token"), overrides=(other,)))
    assert model.model.layers[0].self_attn.q_proj.shared_input is None
    assert model.model.layers[0].mlp.up_proj.shared_input is not None
