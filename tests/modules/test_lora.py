"""LoRA under quantizers: W + scaling * B A is what is quantized, trained and merged; what cannot be is refused by name."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from models import gpt2, llama, mlp, opt, tied_llama, token_ids
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from lightning_qat import (
    QuantScheme,
    TensorSpec,
    export,
    fake_quantize,
    insert_quantizers,
    load_quantized,
    merge_lora,
    named_quantizers,
    quantize_tensor,
    quantizers_disabled,
    remove_quantizers,
)
from lightning_qat.modules import QuantLayer, cached_weights, use_int8_forward
from lightning_qat.modules.lora import adapted_layers
from lightning_qat.modules.weights import layer_weights, set_weight_dtypes
from lightning_qat.numerics.low_rank import add_low_rank
from lightning_qat.scheme import Override

IDS = token_ids()
W4, A8 = TensorSpec(bits=4), TensorSpec(bits=8, granularity="token")


def adapt(model, rank=4, targets="all-linear", seed=0, name="default", **settings):
    """Adapters that do something: B is drawn too."""
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **settings), model, adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "lora_embedding" in key:
                parameter.normal_(std=0.05)
    return model


def adapted_mlp(**settings):
    return adapt(mlp(), targets=["0", "2"], **settings)


def train(model, steps=2, **batch):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(**{"input_ids": IDS, "labels": IDS} | batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def codes_of(model):
    return {weight.name: weight.codes() for weight in layer_weights(model)}


def different(ones, others):
    assert ones.keys() == others.keys()
    return sum(int((one.codes != others[name].codes).sum()) + int((one.scale != others[name].scale).sum()) for name, one in ones.items())


def values_seen(model):
    """What each weight quantizer gave in the latest forward pass, by layer."""
    seen = {}
    for name, quantizer in named_quantizers(model):
        if name.endswith(".weight_quantizer"):
            layer = name.removesuffix(".weight_quantizer")
            quantizer.register_forward_hook(lambda _, args, values, layer=layer: seen.update({layer: (args[0].dtype, values.detach())}))
    return seen


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("build", [lambda: adapt(llama().train()), lambda: adapt(opt().train())], ids=["llama", "biases"])
def test_the_sum_is_quantized_and_trained(build):
    model = build()
    name, layer = next(adapted_layers(model))
    a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    x = torch.randn(2, 5, weight.shape[1])
    wanted = functional.linear(fake_quantize(x, A8), fake_quantize(weight + (b @ a) * 3.0, W4), layer.base_layer.bias)
    towards = torch.randn_like(wanted)
    grads = torch.autograd.grad((wanted * towards).sum(), (a, b))
    insert_quantizers(model, QuantScheme(weight=W4, input=A8))
    found = model.get_submodule(name)(x)
    (found * towards).sum().backward()
    assert torch.equal(found, wanted)
    assert weight.grad is None
    assert all(torch.allclose(mine.grad, theirs, rtol=1e-6, atol=1e-6) for mine, theirs in zip((a, b), grads, strict=True))


SCHEMES = {
    "w4a8kv4": "w4a8kv4",
    "w2": "w2",
    "groups": "w4g16",
    "asymmetric": QuantScheme(weight=TensorSpec(bits=3, symmetric=False)),
    "static": QuantScheme(weight=TensorSpec(bits=4, granularity="tensor")),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("seed", "rank"), [(0, 1), (1, 4), (2, 16)])
def test_merged_codes_are_the_trained_ones_and_pefts(seed, rank, scheme):
    model = adapt(llama().train(), rank=rank, seed=seed)
    insert_quantizers(model, SCHEMES[scheme])
    train(model)
    seen, wanted = values_seen(model), model(input_ids=IDS).logits
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = codes_of(model)
    plain = copy.deepcopy(model)
    remove_quantizers(plain)
    merged = merge_lora(model)
    assert merged is model
    codes = codes_of(model)
    assert different(trained, codes) == 0
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    for name, layer in adapted_layers(plain):
        layer.merge()
        spec = model.get_submodule(name).weight_quantizer.spec
        assert torch.equal(quantize_tensor(layer.base_layer.weight, spec).codes, codes[name].codes)
        assert torch.equal(seen[name][1], codes[name].dequantize())


def test_a_product_is_exact_whatever_torch_is_set_to():
    weight, a, b = torch.randn(24, 32), torch.randn(8, 32), torch.randn(24, 8)
    wanted = weight + (b @ a) * 0.5
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = add_low_rank(weight, a, b, 0.5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, wanted)


def test_operator_follows_torchs_rules():
    parts = [torch.randn(6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)]
    assert add_low_rank(*parts, 2.0).dtype == torch.float64
    parts = [part.requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(lambda w, a, b: add_low_rank(w, a, b, 2.0), parts)
    torch.library.opcheck(add_low_rank, (*[part.detach().float() for part in parts], 2.0))


def test_under_autocast_quantizers_see_the_fp32_sum():
    model = adapt(llama().train())
    insert_quantizers(model, "w4a8")
    seen = values_seen(model)
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
        model(input_ids=IDS)
    trained = codes_of(model)
    for name, (dtype, values) in seen.items():
        assert (dtype, values.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(values, trained[name].dequantize().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):  # merging inside it must not matter either
        merge_lora(model)
    assert different(trained, codes_of(model)) == 0


def test_a_base_in_bf16_is_summed_and_merged_in_fp32():
    model = llama(dtype="bfloat16").train().bfloat16()
    adapt(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    insert_quantizers(model, "w4a8")
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    train(model)
    layer, trained = model.model.layers[0].mlp.up_proj, codes_of(model)
    wanted = layer.base_layer.weight.float() + (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * 3.0
    merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, wanted)
    assert different(trained, codes_of(model)) == 0
    assert torch.isfinite(model.float()(input_ids=IDS).logits).all()


def test_parts_that_a_strategy_rounds_are_rounded_before_the_sum():
    model = adapted_mlp()
    insert_quantizers(model, "w4a8")
    set_weight_dtypes(model, {"0": "bfloat16"})
    layer = model[0]
    w, a, b = (p.bfloat16().float() for p in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    wanted, own = quantize_tensor(w + (b @ a) * 3.0, W4), quantize_tensor(layer.base_layer.weight.detach(), W4)
    assert torch.equal(codes_of(model)["0"].codes, wanted.codes)
    assert not torch.equal(own.codes, wanted.codes)
    merge_lora(model)
    assert torch.equal(codes_of(model)["0"].codes, wanted.codes)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = adapt(llama().train())
        insert_quantizers(model, "w4a8kv4")
        if recompute:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {name for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_two_active_adapters_are_summed_in_turn():
    model = adapt(mlp(), targets=["0"])
    adapt(model, targets=["0"], name="second", seed=1)
    model[0].set_adapter(["default", "second"])
    insert_quantizers(model, QuantScheme(weight=W4), allow_partial=True)
    weight = model[0].base_layer.weight.detach().clone()
    for name in ("default", "second"):
        weight += (model[0].lora_B[name].weight @ model[0].lora_A[name].weight).detach() * 3.0
    assert torch.equal(codes_of(model)["0"].codes, quantize_tensor(weight, W4).codes)
    assert torch.equal(merge_lora(model)[0].weight, weight)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_codes():
    model = adapted_mlp()
    insert_quantizers(model, "w4a8")
    x, seen = torch.randn(4, 16), codes_of(model)
    wanted = model(x)
    found = torch.compile(model, fullgraph=True)(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert different(seen, codes_of(model)) == 0


# ---------------------------------------------------------------- as a layer among the others


def test_names_counts_and_patterns_are_those_of_the_plain_model():
    scheme = QuantScheme(weight=W4, input=A8, exclude=("lm_head", "type:Embedding", "*.down_proj"), overrides=(
        Override(names=("*.q_proj",), weight=TensorSpec(bits=8)),
    ))  # fmt: skip
    plain, model = llama(), adapt(llama())
    there, here = insert_quantizers(plain, scheme), insert_quantizers(model, scheme)
    assert here == there
    assert insert_quantizers(model, scheme).inserted == 0
    assert scheme.effective_bits(model) == scheme.effective_bits(plain)
    assert [(w.name, w.shape) for w in layer_weights(model)] == [(w.name, w.shape) for w in layer_weights(plain)]
    assert model.model.layers[0].self_attn.q_proj.weight_quantizer.spec.bits == 8
    assert not any(isinstance(part, QuantLayer) for _, layer in adapted_layers(model) for part in list(layer.modules())[1:])


def test_siblings_quantize_their_input_once():
    model = adapt(llama(), targets=["q_proj", "v_proj"])  # k_proj is a plain layer
    insert_quantizers(model, "w4a8")
    calls = Counter()
    for name, quantizer in named_quantizers(model):
        if name.startswith("model.layers.0.self_attn.") and name.endswith("_proj.input_quantizer") and "o_proj" not in name:
            quantizer.register_forward_hook(lambda *_: calls.update(["input"]))
    model(input_ids=IDS)
    assert calls["input"] == 1


def test_kept_weights_are_dropped_by_a_step_and_give_the_same_gradients():
    model, x = adapted_mlp().train(), torch.randn(4, 16)
    insert_quantizers(model, "w4a8")
    calls = Counter()
    for name, quantizer in named_quantizers(model):
        if name.endswith("weight_quantizer"):
            quantizer.register_forward_hook(lambda *_: calls.update(["weight"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def gradients():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    wanted = gradients()
    calls.clear()
    with cached_weights(model, training=True):
        for _ in range(3):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), wanted, strict=True))
        assert calls["weight"] == 2
        optimizer.step()
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_removal_gives_pefts_layers_back_bit_for_bit():
    model = adapt(llama())
    wanted, names = model(input_ids=IDS).logits, list(model.state_dict())
    insert_quantizers(model, "w4a8kv4")
    assert not torch.equal(model(input_ids=IDS).logits, wanted)
    with quantizers_disabled(model):
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)
    remove_quantizers(model)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert list(model.state_dict()) == names


def test_copies_and_pickles_compute_the_same():
    model = adapted_mlp()
    insert_quantizers(model, "w4a8")
    x = torch.randn(3, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(model[0])


def test_integer_products_are_refused_by_name():
    model = adapted_mlp()
    insert_quantizers(model, "w8a8")
    assert use_int8_forward(model) == {"0": "not a Linear layer", "2": "not a Linear layer"}
    assert use_int8_forward(merge_lora(model)) == {}


# ---------------------------------------------------------------- merging and exporting


def test_a_merged_model_is_a_plain_quantized_one(tmp_path):
    model = adapt(llama().train())
    insert_quantizers(model, QuantScheme(weight=W4, input=A8, exclude=("lm_head", "type:Embedding", "1.mlp.down_proj")))
    train(model)
    model.eval()
    wanted = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has an adapter.*merge_lora\(model\) first"):
        export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    merge_lora(model)
    assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-5)  # the excluded layer summed outputs, and sums weights now
    assert list(model.state_dict()) == list(llama().state_dict())
    assert not hasattr(model, "peft_config")
    wanted = model(input_ids=IDS).logits
    assert torch.equal(load_quantized(export(model, tmp_path / "out"))(input_ids=IDS).logits, wanted)
    remove_quantizers(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert insert_quantizers(adapt(model), "w4a8").coverage == 1.0  # the next adapter starts from here


def test_siblings_share_their_input_after_merging_too():
    model = adapt(llama())
    insert_quantizers(model, "w4a8")
    attention = merge_lora(model).model.layers[0].self_attn
    assert attention.q_proj.shared_input is attention.k_proj.shared_input is attention.v_proj.shared_input is not None


def test_merging_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="Sequential holds no LoRA adapter"):
        merge_lora(mlp())
    model = adapted_mlp()
    model[2].enable_adapters(False)
    with pytest.raises(ValueError, match="adapters of 2 are switched off"):
        merge_lora(model)


def test_pefts_own_merge_is_refused_while_quantizers_are_in():
    model = adapted_mlp()
    insert_quantizers(model, "w4a8")
    with pytest.raises(ValueError, match=r"merge: this layer holds quantizers; call lightning_qat\.merge_lora"):
        model[0].merge()


def test_a_model_that_peft_wrapped_is_merged_inside():
    wrapped = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    model = wrapped.get_base_model()
    insert_quantizers(model, "w4a8")
    trained, wanted = codes_of(model), wrapped(input_ids=IDS).logits
    assert different(codes_of(merge_lora(model)), trained) == 0
    assert torch.equal(model(input_ids=IDS).logits, wanted)


# ---------------------------------------------------------------- refusals


def merged():
    model = adapted_mlp()
    model[0].merge()
    return model


def on_top_of_quantizers():
    model = mlp()
    insert_quantizers(model, "w4a8")
    return adapt(model, targets=["0"])


def with_ia3():
    return inject_adapter_in_model(IA3Config(target_modules=["0"], feedforward_modules=[]), mlp())


REFUSED = {
    "dropout": (lambda: adapted_mlp(lora_dropout=0.1), r"^0: lora_dropout: got 0\.1, allowed is 0"),
    "dora": (lambda: adapted_mlp(use_dora=True), "^0: its adapter is a DoraLinearVariant, allowed is plain LoRA"),
    "bias": (lambda: adapted_mlp(lora_bias=True), "^0: lora_bias: got True"),
    "merged": (merged, "^0: its adapter is merged already; call unmerge first"),
    "conv1d": (lambda: adapt(gpt2(), targets=["c_attn"], fan_in_fan_out=True), "has an adapter on a Conv1D, allowed is nn.Linear"),
    "embedding": (lambda: adapt(llama(), targets=["embed_tokens"]), r"adapters of type peft\.tuners\.lora\.layer\.Embedding cannot"),
    "ia3": (with_ia3, r"^0: adapters of type peft\.tuners\.ia3"),
    "saved-modules": (lambda: adapt(llama(), targets=["q_proj"], modules_to_save=["lm_head"]), "^lm_head: adapters of type peft"),
    "tied": (lambda: adapt(tied_llama(), targets=["lm_head"]), r"^lm_head: has an adapter, but shares its weight with model\.embed_tokens"),
    "order": (on_top_of_quantizers, "^0: its adapter was put on top of quantizers.*add adapters first, then quantizers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_part_of_the_weight_is_refused_by_name(case):
    build, message = REFUSED[case]
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        insert_quantizers(model, "w4a8")
    with pytest.raises(ValueError, match=message):
        merge_lora(model)
    assert [type(module) for module in model.modules()] == before


def test_the_wrong_order_is_refused_by_export_too_and_can_be_put_right(tmp_path):
    model = on_top_of_quantizers()
    with pytest.raises(ValueError, match="on top of quantizers"):
        export(model, tmp_path / "out")
    remove_quantizers(model)
    assert insert_quantizers(model, "w4a8").coverage == 1.0
