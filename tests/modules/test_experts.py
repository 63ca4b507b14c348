"""Experts in 3-d parameters against transformers' own eager forward and a reference loop written out here."""

import ast
import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from models import logits_of, mixtral, qwen3_moe, token_ids
from torch import nn
from torch.nn import functional
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lightning_qat import (
    QuantScheme,
    TensorSpec,
    export,
    fake_quantize,
    insert_quantizers,
    load_quantized,
    quantizers_disabled,
    remove_quantizers,
)
from lightning_qat.callbacks.reach import ReachProbe
from lightning_qat.modules import cached_weights, experts
from lightning_qat.modules.experts import HOMES, expert_coverage
from lightning_qat.modules.packed import PackedWeight

W4 = TensorSpec(bits=4)
W4_GROUPS = TensorSpec(bits=4, granularity="group", group_size=8, symmetric=False)
A8 = TensorSpec(bits=8, granularity="token")
BUILDERS = {"mixtral": mixtral, "qwen3-moe": qwen3_moe}
NAMES = ("gate_up_proj", "down_proj")
every_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
every_weight = pytest.mark.parametrize("weight", [W4, W4_GROUPS], ids=["channel", "group"])


def experts_of(model):
    return model.model.layers[0].mlp.experts


def float_experts(build=mixtral, **changes):
    return experts_of(build(experts_implementation="eager", **changes))


def quantized_experts(build=mixtral, weight=W4, input=None, **changes):
    """One experts module on its own, quantized."""
    parent = nn.ModuleDict({"experts": float_experts(build, **changes)})
    insert_quantizers(parent, QuantScheme(weight=weight, input=input))
    return parent["experts"]


def routing(tokens=6, experts=(0, 2, 3), seed=0):
    """Hidden states, two experts a token out of those named, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.tensor(experts)[torch.randperm(len(experts), generator=generator)[:2]] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, 2, generator=generator)


def with_values(module, weight):
    """The float module with its whole weights replaced by their values on the grid."""
    module = copy.deepcopy(module)
    for name in NAMES:
        parameter = getattr(module, name)
        parameter.data = fake_quantize(parameter.data, weight)
    return module


def reference(module, hidden, index, weights, weight, input):
    """Token by token: both weights and both inputs on their grids."""
    out = torch.zeros_like(hidden)
    for token, (chosen, shares) in enumerate(zip(index, weights, strict=True)):
        for expert, share in sorted(zip(chosen.tolist(), shares, strict=True)):
            x = fake_quantize(hidden[token : token + 1], input)
            gate, up = functional.linear(x, fake_quantize(module.gate_up_proj[expert], weight)).chunk(2, -1)
            y = fake_quantize(module.act_fn(gate) * up, input)
            out[token] += functional.linear(y, fake_quantize(module.down_proj[expert], weight))[0] * share
    return out


# ---------------------------------------------------------------- numbers


@every_model
@every_weight
def test_weights_alone_are_the_eager_forward_with_whole_weights_on_the_grid(build, weight):
    module, arguments = quantized_experts(build, weight), routing()
    assert torch.equal(module(*arguments), with_values(float_experts(build), weight)(*arguments))


@every_weight
def test_inputs_of_both_products_are_quantized(weight):
    module, arguments = quantized_experts(weight=weight, input=A8), routing()
    wanted = reference(float_experts(), *arguments, weight, A8)
    torch.testing.assert_close(module(*arguments), wanted, rtol=1e-5, atol=1e-5)
    plain = with_values(float_experts(), weight)(*arguments)
    assert not torch.allclose(wanted, plain, rtol=1e-3, atol=1e-3)


def test_hidden_states_are_quantized_once_and_routed_tokens_once():
    module, rows = quantized_experts(input=A8), []
    module.input_quantizer.register_forward_hook(lambda _, args, __: rows.append(("hidden", len(args[0]))))
    module.down_input_quantizer.register_forward_hook(lambda _, args, __: rows.append(("routed", len(args[0]))))
    module(*routing(tokens=6))
    assert [count for kind, count in rows if kind == "hidden"] == [6]
    assert sum(count for kind, count in rows if kind == "routed") == 6 * 2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_configured_implementation_does_not_matter(implementation):
    model = mixtral(experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    wanted = mixtral(experts_implementation="eager")
    for part in (model, wanted):
        insert_quantizers(part, "w4a8")
    assert torch.equal(logits_of(model), logits_of(wanted))


def test_autocast_decides_the_dtype_of_the_products():
    module, arguments = quantized_experts(), routing()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = module(*arguments), with_values(float_experts(), W4)(*arguments)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    seen = []
    for name in NAMES:
        getattr(module, f"{name}_quantizer").register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(*arguments)
    assert set(seen) == {torch.bfloat16}


def test_places_of_other_ranks_are_skipped():
    """Expert parallelism marks tokens of experts elsewhere with `num_experts`."""
    module, (hidden, index, weights) = quantized_experts(), routing(experts=(0, 2))
    index[0] = module.num_experts
    assert torch.equal(module(hidden, index, weights), with_values(float_experts(), W4)(hidden, index, weights))
    assert expert_coverage(nn.ModuleDict({"experts": module})) == {"experts": (2, 4)}


# ---------------------------------------------------------------- routed experts only


def test_only_experts_with_tokens_are_quantized():
    module, shapes = quantized_experts(), []
    for name in NAMES:
        getattr(module, f"{name}_quantizer").register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    module(*routing(experts=(1, 3)))
    assert sorted(shapes) == sorted([(96, 32), (32, 48)] * 2)
    module(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert len(shapes) == 4


@every_weight
def test_gradients_pass_straight_through_and_unrouted_experts_get_zero(weight):
    module, plain = quantized_experts(weight=weight), with_values(float_experts(), weight)
    gradients = []
    for part in (module, plain):
        hidden, index, weights = routing(experts=(0, 3))
        hidden.requires_grad_()
        part(hidden, index, weights).square().sum().backward()
        gradients.append((hidden.grad, part.gate_up_proj.grad, part.down_proj.grad))
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*gradients, strict=True))
    assert not module.gate_up_proj.grad[[1, 2]].any()
    assert module.gate_up_proj.grad[[0, 3]].abs().sum((1, 2)).gt(0).all()


def test_a_call_without_tokens_leaves_no_gradient():
    module, hidden = quantized_experts(), torch.zeros(0, 32, requires_grad=True)
    out = module(hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == (0, 32)
    assert module.gate_up_proj.grad is None


def test_coverage_counts_experts_that_were_ever_routed():
    module = quantized_experts()
    parent = nn.ModuleDict({"experts": module})
    assert expert_coverage(parent) == {"experts": (0, 4)}
    module(*routing(experts=(0, 1)))
    assert expert_coverage(parent) == {"experts": (2, 4)}
    with torch.inference_mode():
        module(*routing(experts=(1, 2)))
    module(*routing(experts=(1, 0)))
    assert module.routed.tolist() == [True, True, True, False]
    assert not any("routed" in name for name in parent.state_dict())


def test_the_probe_sees_experts():
    model = mixtral()
    insert_quantizers(model, "w4a8")
    probe = ReachProbe(model)
    logits_of(model)
    assert probe.missed() == []


def test_each_expert_is_quantized_once_where_values_are_kept():
    module, calls, arguments = quantized_experts(), [], routing(experts=(1, 3))
    wanted = module(*arguments)
    module.down_proj_quantizer.register_forward_hook(lambda *_: calls.append(1))
    with cached_weights(module), torch.no_grad():
        assert all(torch.equal(module(*arguments), wanted) for _ in range(3))
        assert len(calls) == 2
        module.down_proj.data.mul_(2)
        module.train(not module.training)  # drops what was kept
        assert torch.equal(module(*arguments), with_values(module, W4)(*arguments))
    assert module.kept_weight is None


# ---------------------------------------------------------------- insertion and removal


@every_model
def test_the_report_counts_both_weights(build):
    model = build()
    elements = sum(p.numel() for p in experts_of(model).parameters())
    for inserted in (True, False):
        report = insert_quantizers(model, "w4a8")
        layer = next(layer for layer in report.layers if layer.name == "model.layers.0.mlp.experts")
        assert (layer.elements, bool(report.inserted)) == (elements, inserted)
        assert report.coverage > 0.95
    assert model.model.layers[0].mlp.experts.gate_up_proj_quantizer.spec == W4
    rows, inputs = (96 + 32, 48) if build is mixtral else (32 + 32, 16)
    only = QuantScheme(weight=W4, include=("experts",))
    remove_quantizers(model)
    insert_quantizers(model, only)
    assert only.effective_bits(model) == 4 + 32 * 4 * rows / elements
    assert inputs * 32 * 3 * 4 == elements


@every_model
def test_names_stay_and_removal_is_bit_for_bit(build):
    model = build()
    wanted, types, names, before = logits_of(model), [type(m) for m in model.modules()], list(model.state_dict()), vars(experts_of(model))
    before = set(before)
    insert_quantizers(model, "w4a8")
    assert list(model.state_dict()) == names
    assert not torch.equal(logits_of(model), wanted)
    with quantizers_disabled(model):
        torch.testing.assert_close(logits_of(model), wanted)  # the loop sums in another order than grouped_mm
    remove_quantizers(model)
    assert torch.equal(logits_of(model), wanted)
    assert [type(m) for m in model.modules()] == types
    assert set(vars(experts_of(model))) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(duplicate):
    model = qwen3_moe()
    insert_quantizers(model, "w4a8")
    wanted = logits_of(model)
    again = duplicate(model)
    assert torch.equal(logits_of(again), wanted)
    assert type(experts_of(again)) is type(experts_of(model)) is experts.QuantQwen3MoeExperts
    remove_quantizers(again)
    assert torch.equal(logits_of(again), logits_of(qwen3_moe()))


def test_classes_are_made_when_first_asked_for():
    """As pickle asks for them in a process that has built no model yet."""
    assert experts.QuantOlmoeExperts.float_type.__name__ == "OlmoeExperts"
    assert experts.QuantOlmoeExperts is experts.QuantOlmoeExperts
    with pytest.raises(AttributeError, match="QuantNoExperts"):
        _ = experts.QuantNoExperts
    with pytest.raises(AttributeError, match="OlmoeExperts"):
        _ = experts.OlmoeExperts


class OwnExperts(MixtralExperts):
    """Code of its own, so it must not be swapped."""


def test_what_is_not_the_common_loop_is_refused_by_name():
    own = nn.ModuleDict({"experts": OwnExperts(mixtral().config)})
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "layer_types": ["full_attention"]}
    gpt_oss = GptOssForCausalLM(GptOssConfig(**settings | heads))
    for model, kind in ((own, "OwnExperts"), (gpt_oss, "GptOssExperts")):
        with pytest.raises(ValueError, match=rf"experts \({kind}, .*weights\): experts with biases, transposed weights or a forward pass"):
            insert_quantizers(model, "w4a8")


REFUSED = {
    "group": (QuantScheme(weight=TensorSpec(bits=4, granularity="group", group_size=32)), r"weight\.group_size: got 32, .* the 48 inputs"),
    "input group": (
        QuantScheme(input=TensorSpec(bits=8, granularity="group", group_size=32)),
        r"input\.group_size: got 32, .* 48 inputs",
    ),
    "tensor": (QuantScheme(weight=TensorSpec(bits=4, granularity="tensor")), r"weight\.granularity: got 'tensor', experts take 'channel'"),
    "axis": (QuantScheme(weight=TensorSpec(bits=4, axis=1)), r"weight\.axis: got 1, experts take"),
    "input tensor": (
        QuantScheme(input=TensorSpec(bits=8, granularity="tensor")),
        r"input\.granularity: got 'tensor', MixtralExperts takes",
    ),
}


@pytest.mark.parametrize(("scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_specs_that_experts_cannot_have_are_refused_before_anything_changes(scheme, message):
    parent = nn.ModuleDict({"experts": float_experts()})
    with pytest.raises(ValueError, match=f"experts: {message}"):
        insert_quantizers(parent, scheme)
    assert type(parent["experts"]) is MixtralExperts


def test_a_weight_or_an_input_alone():
    arguments = routing()
    module = quantized_experts(weight=None, input=A8)
    assert module.gate_up_proj_quantizer is module.down_proj_quantizer is None
    off = TensorSpec(bits=None)
    torch.testing.assert_close(module(*arguments), reference(float_experts(), *arguments, off, A8), rtol=1e-5, atol=1e-5)


def loop_of(node):
    """The body of the forward pass of a class."""
    (forward,) = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward")
    return ast.unparse(ast.Module(body=forward.body, type_ignores=[]))


def test_every_supported_class_has_the_same_loop():
    """Two spellings: the gate written out, or in a method of its own."""
    loops = set()
    for name, home in HOMES.items():
        spec = importlib.util.find_spec(home.rpartition(".")[0])
        file = Path(spec.submodule_search_locations[0]) / f"{home.rpartition('.')[2]}.py"
        (node,) = (n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.ClassDef) and n.name == name)
        assert [ast.unparse(decorator) for decorator in node.decorator_list] == ["use_experts_implementation"], name
        loops.add(loop_of(node))
    assert len(loops) == 2
    assert sum("self._apply_gate" in loop for loop in loops) == 1


# ---------------------------------------------------------------- export


SCHEMES = {"w4a8kv4": "w4a8kv4", "groups": QuantScheme(weight=W4_GROUPS, input=A8), "w1": "w1", "w2": "w2", "inputs": QuantScheme(input=A8)}


@every_model
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_and_logits_are_bitwise_the_same_after_reloading(build, scheme, tmp_path):
    model = build()
    scheme = QuantScheme.parse(scheme)
    insert_quantizers(model, scheme)
    loaded = load_quantized(export(model, tmp_path / "out"))
    assert torch.equal(logits_of(loaded), logits_of(model))
    mine, theirs = experts_of(loaded), experts_of(model)
    if scheme.weight is None:
        return
    assert scheme.effective_bits(loaded) == scheme.effective_bits(model)
    for name in NAMES:
        packed = getattr(mine, f"{name}_quantizer")
        assert isinstance(packed, PackedWeight)
        assert getattr(mine, name).numel() == 0
        wanted = getattr(theirs, f"{name}_quantizer").codes(getattr(theirs, name).flatten(0, 1))
        assert torch.equal(packed.codes().codes, wanted.codes)
        assert torch.equal(packed.codes().scale, wanted.scale)
    with cached_weights(loaded):
        assert torch.equal(logits_of(loaded), logits_of(model))
    again = load_quantized(export(loaded, tmp_path / "again"))
    assert torch.equal(logits_of(again, input_ids=token_ids(seed=1)), logits_of(model, input_ids=token_ids(seed=1)))
    with pytest.raises(ValueError, match="holds packed codes"):
        remove_quantizers(loaded)


def test_reloaded_experts_follow_the_dtype_of_the_model(tmp_path):
    model = mixtral().bfloat16()
    insert_quantizers(model, "w4a8")
    loaded = load_quantized(export(model, tmp_path / "out"))
    assert logits_of(loaded).dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded), logits_of(model))
