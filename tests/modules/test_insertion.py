"""Insertion and removal: the model stays the user's, nothing is silently skipped, a refusal changes nothing."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from models import CNN, cnn, cnn1d, gpt2, llama, logits_of, mlp, tied_llama, vit
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM

from lightning_qat import (
    KVSpec,
    QuantScheme,
    TensorSpec,
    insert_quantizers,
    named_quantizers,
    quantizers_disabled,
    remove_quantizers,
)
from lightning_qat.modules import QuantLayer, cached_weights, scheme_of
from lightning_qat.scheme import Override

W4, W8 = TensorSpec(bits=4), TensorSpec(bits=8)
KV4 = QuantScheme(kv=KVSpec(bits=4))
PRE_ROPE = QuantScheme(weight=W4, kv=KVSpec(bits=4, position="pre_rope"))
MODELS = {"llama": llama, "llama-tied": tied_llama, "gpt2": gpt2, "vit": vit, "cnn": cnn, "cnn1d": cnn1d, "mlp": mlp}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def scheme_for(model):
    return "w4a8" if isinstance(model, CNN | nn.Sequential) or not hasattr(model, "config") else "w4a8kv4"


def anatomy(model):
    """Everything insertion might leave behind: types, attributes, hooks, configs, buffers and parameters, by name."""
    found = {f"{name}!": id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        found[name] = type(module), id(module), sorted(vars(module)), hooks, id(getattr(module, "config", None))
    return found


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def quant_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


# ---------------------------------------------------------------- the model stays yours


@each_model
def test_names_objects_and_hooks_survive(build):
    model = build()
    keys, parameters, modules = list(model.state_dict()), dict(model.named_parameters()), dict(model.named_modules())
    called = Counter()
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: called.update([name]))
    insert_quantizers(model, scheme_for(model))
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    logits_of(model)
    assert all(called[name] == 1 for name in called)
    assert len(called) == sum(isinstance(module, nn.Linear | nn.Conv2d) for module in modules.values())


@pytest.mark.parametrize("exclude", [("lm_head", "type:Embedding"), ()], ids=["default", "everything"])
def test_tied_weights_stay_tied(exclude):
    model = tied_llama()
    insert_quantizers(model, QuantScheme(weight=W4, exclude=exclude))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.__class__ is nn.Linear) == bool(exclude)
    for twin in (copy.deepcopy(model), pickled(model)):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_quantized_and_independent(build, copied):
    model = build()
    insert_quantizers(model, scheme_for(model))
    wanted, twin = logits_of(model), copied(model)
    assert torch.equal(logits_of(twin), wanted)
    assert scheme_of(twin) == scheme_of(model)
    remove_quantizers(twin)
    assert torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(twin), logits_of(build()))


def test_a_pickled_model_keeps_its_kv_hooks_where_hooks_are_counted_anew(monkeypatch):
    model = llama()
    insert_quantizers(model, PRE_ROPE)
    (first, *_) = model.model.layers[0].self_attn.k_proj._forward_hooks
    data = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", first)  # another process starts at 0 and gets here sooner or later
    twin = pickle.loads(data)
    wanted = logits_of(twin)
    twin.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    assert torch.equal(logits_of(twin), wanted)


@pytest.mark.parametrize("scheme", ["w4a8kv4", KV4, PRE_ROPE, "w16a8"], ids=["w4a8kv4", "kv4", "pre-rope", "a8"])
def test_removal_of_every_part(scheme):
    model = llama()
    before, wanted = anatomy(model), logits_of(model)
    insert_quantizers(model, scheme)
    assert not torch.equal(logits_of(model), wanted)
    remove_quantizers(model)
    assert anatomy(model) == before
    assert torch.equal(logits_of(model), wanted)


@each_model
def test_removal_restores_the_model(build):
    model = build()
    before, wanted = anatomy(model), logits_of(model)
    insert_quantizers(model, scheme_for(model))
    assert not torch.equal(logits_of(model), wanted)
    remove_quantizers(model)
    assert anatomy(model) == before
    assert torch.equal(logits_of(model), wanted)
    assert list(named_quantizers(model)) == []


def test_removal_keeps_weights_as_trained():
    model = mlp()
    insert_quantizers(model, "w4a8")
    with torch.no_grad():
        model[0].weight.add_(1.0)
    remove_quantizers(model)
    assert torch.equal(model[0].weight, mlp()[0].weight + 1.0)


# ---------------------------------------------------------------- calling it again


@each_model
def test_a_second_call_inserts_nothing(build):
    model = build()
    first = insert_quantizers(model, scheme_for(model))
    quantizers, wanted = dict(named_quantizers(model)), logits_of(model)
    second = insert_quantizers(model, scheme_for(model))
    assert first.inserted == len(first.layers) + len(first.attention) > 0
    assert second.inserted == 0
    assert (second.layers, second.attention, second.left_alone) == (first.layers, first.attention, first.left_alone)
    assert all(dict(named_quantizers(model))[name] is quantizer for name, quantizer in quantizers.items())
    assert torch.equal(logits_of(model), wanted)


def test_layers_born_later_are_added():
    model = nn.Sequential(nn.Linear(8, 8))
    insert_quantizers(model, QuantScheme(weight=W4, exclude=("2",)), final=False)  # "2" is not built yet
    model.extend([nn.Linear(8, 8), nn.Linear(8, 8)])
    report = insert_quantizers(model, QuantScheme(weight=W4, exclude=("2",)))
    assert report.inserted == 1
    assert list(quant_layers(model)) == ["0", "1"]


def test_another_scheme_is_refused():
    model = mlp()
    insert_quantizers(model, "w4a8")
    before = anatomy(model)
    with pytest.raises(
        ValueError, match=r"(?s)already quantized with another.*remove_quantizers.*scheme\.weight\.bits: 4 in the model, 8 here"
    ):
        insert_quantizers(model, "w8a8")
    assert anatomy(model) == before


# ---------------------------------------------------------------- patterns and overrides


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("include", {"include": ("*_proj", "qproj")}),
        ("exclude", {"exclude": ("lm_head", "type:Embedding", "qproj")}),
        ("overrides", {"overrides": (Override(names=("qproj",), weight=W8),)}),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(field, fields):
    model = llama()
    before = anatomy(model)
    with pytest.raises(ValueError, match=rf"QuantScheme\.{field}: pattern 'qproj' matches nothing.*q_proj"):
        insert_quantizers(model, QuantScheme(weight=W4, **fields))
    assert anatomy(model) == before


def test_default_excludes_may_match_nothing():
    assert insert_quantizers(mlp(), "w4").inserted == 2


def test_include_and_exclude():
    model = llama()
    insert_quantizers(model, QuantScheme(weight=W4, include=("mlp.*",), exclude=("layers.0.*.down_proj",)))
    names = {name.removeprefix("model.layers.") for name in quant_layers(model)}
    assert names == {"0.mlp.gate_proj", "0.mlp.up_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"}


def test_overrides_reach_single_layers():
    scheme = QuantScheme(
        weight=W4,
        input=TensorSpec(bits=8, granularity="token"),
        kv=KVSpec(bits=4),
        overrides=(
            Override(names=("down_proj",), weight=W8),
            Override(names=("layers.1.mlp.down_proj",), weight=None, input=None),
            Override(names=("layers.0.self_attn",), kv=None),
        ),
    )
    model = llama()
    report = insert_quantizers(model, scheme)
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight_quantizer.spec == W4
    assert layers[0].mlp.down_proj.weight_quantizer.spec == W8
    assert layers[0].mlp.down_proj.input_quantizer.spec == scheme.input
    assert type(layers[1].mlp.down_proj) is nn.Linear
    assert [attention.name for attention in report.attention] == ["model.layers.1.self_attn"]
    assert report.coverage == 1.0  # what the user switched off is no gap
    weight = layers[0].mlp.down_proj.weight
    scale = weight.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(layers[0].mlp.down_proj.quantized_weight(), (weight / scale).round() * scale)


def test_an_override_may_switch_one_layer_on():
    model = mlp()
    insert_quantizers(model, QuantScheme(overrides=(Override(names=("0",), weight=W4),)))
    assert list(quant_layers(model)) == ["0"]


def test_an_override_that_can_quantize_nothing_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), Odd(8, 8))
    with pytest.raises(ValueError, match=r"(?s)no layer can be quantized.*left alone: 1 \(Odd"):
        insert_quantizers(model, QuantScheme(overrides=(Override(names=("1",), weight=W4),)))


class Classifier(nn.Module):
    """A head under a name of its own, which only `get_output_embeddings` gives away."""

    def __init__(self):
        super().__init__()
        self.body, self.to_vocabulary = nn.Linear(8, 8), nn.Linear(8, 50)

    def get_output_embeddings(self):
        return self.to_vocabulary


def test_heads_under_other_names_are_excluded():
    model = Classifier()
    report = insert_quantizers(model, "w4")
    assert list(quant_layers(model)) == ["body"]
    assert [(item.name, item.on_purpose) for item in report.left_alone] == [("to_vocabulary", True)]


# ---------------------------------------------------------------- coverage and refusals


class Odd(nn.Linear):
    """Code of its own, so it must not be swapped."""


def test_low_coverage_is_refused_with_names_and_reasons():
    build = lambda: nn.Sequential(nn.Linear(8, 8), Odd(8, 8), nn.ConvTranspose1d(8, 8, 3), nn.Conv3d(1, 1, 3))  # noqa: E731
    model = build()
    with pytest.raises(ValueError, match=r"coverage: 18\.\d%.*allow_partial") as refused:  # 64 of 64 + 64 + 192 + 27
        insert_quantizers(model, "w4")
    for line in (r"1 (Odd, 64 weights): a subclass of Linear", "2 (ConvTranspose1d, 192 weights): no quantized layer", "3 (Conv3d, 27"):
        assert line in str(refused.value)
    assert quant_layers(model) == {}
    report = insert_quantizers(model, "w4", allow_partial=True)
    assert report.coverage == report.share_of_all == 64 / (64 + 64 + 192 + 27)
    assert list(quant_layers(model)) == ["0"]


def test_coverage_counts_from_ninety_percent():
    assert insert_quantizers(nn.Sequential(nn.Linear(9, 10), Odd(10, 1)), "w4").coverage == 0.9
    with pytest.raises(ValueError, match=r"coverage: 89\.\d%"):
        insert_quantizers(nn.Sequential(nn.Linear(9, 9), Odd(10, 1)), "w4")


def test_multihead_attention_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"left alone: 1 \(MultiheadAttention, 192 weights\).*\n.*1\.out_proj .*without calling the layer"):
        insert_quantizers(model, "w4a8")


def test_a_group_size_that_does_not_divide_is_refused_by_name():
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"2: weight\.group_size: got 16, which does not divide the 24 inputs"):
        insert_quantizers(model, "w4g16")
    assert anatomy(model) == before


GROUPED_INPUT = TensorSpec(bits=8, granularity="group", group_size=5)
REFUSED = {
    "group-size": (llama, "w4g5"),
    "input-group-size": (llama, QuantScheme(weight=W4, input=GROUPED_INPUT)),
    "conv-input-group": (cnn, QuantScheme(weight=W4, input=TensorSpec(bits=8, granularity="group", group_size=3))),
    "weight-per-token": (llama, QuantScheme(weight=TensorSpec(bits=4, granularity="token"))),
    "weight-quantizer": (llama, QuantScheme(weight=TensorSpec(bits=3, quantizer="mean_abs"))),
    "weight-option": (llama, QuantScheme(weight=TensorSpec(bits=4, options={"stee": "clip"}))),
    "pattern": (llama, QuantScheme(weight=W4, include=("nothing",))),
    "coverage": (lambda: nn.Sequential(nn.Linear(8, 8), Odd(8, 8)), "w4a8"),
    "kv-bits": (llama, "w4a8kv1"),
    "kv-quantizer": (llama, QuantScheme(weight=W4, kv=KVSpec(bits=4, quantizer="mean_abs"))),
    "kv-position": (gpt2, PRE_ROPE),
    "kv-without-attention": (mlp, "w4kv4"),
    "nothing-to-quantize": (lambda: nn.Sequential(nn.ReLU()), "w4"),
}


@pytest.mark.parametrize(("build", "scheme"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_model_untouched(build, scheme):
    model = build()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"\w"):
        insert_quantizers(model, scheme)
    assert anatomy(model) == before
    assert scheme_of(model) is None


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("scheme", ["w4", "w4a8kv4", KV4], ids=["w4", "w4a8kv4", "kv4"])
def test_save_pretrained_is_refused_until_quantizers_are_out(scheme, tmp_path):
    model = llama()
    insert_quantizers(model, scheme)
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"export.*remove_quantizers"):
            part.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_quantizers(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path)), logits_of(llama()))


def test_a_save_method_of_the_instance_comes_back(tmp_path):
    model = llama()
    model.save_pretrained = lambda path: f"mine: {path}"
    insert_quantizers(model, "w4")
    remove_quantizers(model)
    assert model.save_pretrained(tmp_path) == f"mine: {tmp_path}"


# ---------------------------------------------------------------- quantizers_disabled and cached_weights

FLOAT_AGAIN = {
    "llama": (llama, "w4a8kv4"),
    "llama-token": (llama, "llm-qat"),
    "gpt2-eager-token": (lambda: gpt2(attn_implementation="eager"), QuantScheme(weight=W4, kv=KVSpec(bits=4, granularity="token"))),
    "vit": (vit, "w4a8kv4"),
    "cnn": (cnn, "w2a8"),
    "cnn-channels-last": (lambda: cnn().to(memory_format=torch.channels_last), "w4a8"),
    "mlp": (mlp, "w1a8"),
}


@pytest.mark.parametrize(("build", "scheme"), FLOAT_AGAIN.values(), ids=FLOAT_AGAIN)
def test_disabled_quantizers_give_the_original_outputs(build, scheme):
    model = build()
    wanted = logits_of(model)
    insert_quantizers(model, scheme)
    quantized = logits_of(model)
    assert not torch.equal(quantized, wanted)
    with quantizers_disabled(model):
        assert torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(model), quantized)


def test_quantizers_are_enabled_again_after_an_error_as_they_were():
    model = mlp()
    insert_quantizers(model, "w4a8")
    model[0].input_quantizer.enabled = False
    model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), quantizers_disabled(model):
        logits_of(model)
    assert {name for name, quantizer in named_quantizers(model) if not quantizer.enabled} == {"0.input_quantizer"}


@each_model
def test_cached_weights_change_nothing_and_are_computed_once(build):
    model = build()
    insert_quantizers(model, QuantScheme(weight=W4, input=TensorSpec(bits=8, granularity="token"), exclude=()), allow_partial=True)
    wanted, calls = logits_of(model), Counter()
    for name, quantizer in named_quantizers(model):
        if name.endswith("weight_quantizer"):
            quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with cached_weights(model):
        for _ in range(3):
            assert torch.equal(logits_of(model), wanted)
    assert set(calls.values()) == {1}
    assert len(calls) == len(quant_layers(model))


def test_cached_weights_are_forgotten_and_never_read_by_training():
    model, x = mlp(), torch.randn(2, 16)
    insert_quantizers(model, "w4a8")
    with cached_weights(model):
        before = logits_of(model)
        with torch.no_grad():
            model[0].weight.neg_()
        model(x).sum().backward()
        assert model[0].weight.grad.abs().sum() > 0
        assert torch.equal(logits_of(model), before)  # the price of a cache, and why it is a block of code
        fresh = model(x)
    assert not torch.equal(logits_of(model), before)
    assert torch.equal(model(x), fresh)


@pytest.mark.parametrize("scheme", ["w4a8", "w16a8"])
def test_cached_weights_do_not_show_in_the_state_dict(scheme):
    model = mlp()
    insert_quantizers(model, scheme)
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with cached_weights(model):
        logits_of(model)
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == parameters


def test_cached_weights_and_disabled_quantizers_nest_both_ways():
    model = mlp()
    wanted = logits_of(model)
    insert_quantizers(model, "w4a8")
    quantized = logits_of(model)
    with cached_weights(model):
        assert torch.equal(logits_of(model), quantized)
        with quantizers_disabled(model):
            assert torch.equal(logits_of(model), wanted)
        assert torch.equal(logits_of(model), quantized)
    with quantizers_disabled(model), cached_weights(model):
        assert torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(model), quantized)


# ---------------------------------------------------------------- torch's fused inference path


def encoder_layer():
    torch.manual_seed(1234)
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=32, dropout=0.0, batch_first=True).eval()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_fused_inference_path_does_not_bypass_quantizers(context):
    layer, x, calls = encoder_layer(), torch.randn(2, 5, 8), Counter()
    with context():
        fused = layer(x)
    before = anatomy(layer)
    insert_quantizers(layer, "w4a8", allow_partial=True)
    for name, quantizer in named_quantizers(layer):
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with context():
        out = layer(x)
    assert calls == dict.fromkeys((name for name, _ in named_quantizers(layer)), 1)
    assert len(calls) == 4
    torch.testing.assert_close(out, layer(x).detach())  # what training sees
    remove_quantizers(layer)
    assert anatomy(layer) == before
    with context():
        assert torch.equal(layer(x), fused)


@torch.no_grad()
def test_an_encoder_with_a_padding_mask_runs_in_eval_mode():
    """torch would turn the padded batch into a nested tensor for its fused path."""
    encoder, x = nn.TransformerEncoder(encoder_layer(), 2).eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    insert_quantizers(encoder, "w4a8", allow_partial=True)
    got = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got[1, :3], encoder(x[1:, :3])[0])
