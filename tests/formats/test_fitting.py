"""Whether a runtime executes what was trained, and what a model computes when it is made to."""

import copy
import json
import re

import pytest
import torch
from models import llama, logits_of

from lightning_qat import KVSpec, QuantScheme, TensorSpec, export, fake_quantize, insert_quantizers
from lightning_qat.formats.exactness.codes import integer_weights
from lightning_qat.formats.exactness.executed import difference, example_for, executing, outputs_of
from lightning_qat.formats.exactness.fitting import fit_model
from lightning_qat.modules.layer import quant_layers
from lightning_qat.runtime import Runtime, rule
from lightning_qat.scheme import Override

HALF = rule(bits=(8,), granularity=("token",), divisor=("half_range",), code_range=("full",), arithmetic=("input",))
RUNTIME = Runtime(weight=(rule(bits=(2, 4, 8), granularity=("channel", "group"), scale_dtype=("bfloat16",)),), input=(HALF,))


def quantized(scheme="w4a8kv4", dtype=torch.float32):
    model = llama().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    insert_quantizers(model, scheme)
    return model


def fit(model, drop=(), inexact=False, scale_dtype=torch.float32, runtime=RUNTIME):
    return fit_model(model, runtime, "mine", scale_dtype, drop, inexact)


# ---------------------------------------------------------------- refusals


def test_every_misfit_is_named_once_with_the_ways_out():
    with pytest.raises(ValueError, match="cannot express") as caught:
        fit(quantized())
    lines = str(caught.value).splitlines()
    assert lines[0] == "format 'mine' cannot express the scheme:"
    assert "input.divisor: got 'qmax', executed is 'half_range'" in lines[1]
    assert "the nearest that fits: code_range='full', divisor='half_range'" in lines[1]
    assert "(model.layers.0.self_attn.q_proj and 13 more)" in lines[1]
    assert lines[2].startswith("  kv: this format executes no quantized kv (model.layers.0.self_attn and 1 more)")
    assert lines[-1].endswith("export with drop=('input', 'kv'), or export with drop=('kv',), inexact=True, which measures the difference")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, [(("input", "kv"), True), (("kv",), True)]),
        ({"drop": ("kv",)}, [(("input", "kv"), True), (("kv",), True)]),  # not ('input',): that would ask for the keys and values again
        ({"drop": ("input",)}, [(("input", "kv"), True)]),
        ({"inexact": True}, [(("kv",), True)]),
        ({"drop": ("input", "kv")}, [(("input", "kv"), True)]),
    ],
)
def test_the_arguments_that_are_told_go_through(given, told):
    with pytest.raises(ValueError, match="ways out") as caught:
        fit(quantized(), scale_dtype=torch.bfloat16, **given)
    line = str(caught.value).splitlines()[-1]
    assert re.findall(r"drop=(\(.*?\)), inexact=(\w+)", line) == [(str(drop), str(inexact)) for drop, inexact in told]
    for drop, inexact in told:
        fit(quantized(), drop, inexact, scale_dtype=torch.bfloat16)


def test_nothing_but_training_helps_a_weight_that_does_not_fit():
    model = quantized(QuantScheme(weight=TensorSpec(bits=3), input=TensorSpec(bits=8, granularity="token")))
    with pytest.raises(ValueError, match=r"ways out: train with the nearest that fits$"):
        fit(model)


def test_conventions_alone_may_be_inexact():
    model = quantized("w4a8")
    with pytest.raises(ValueError, match="inexact=True, which measures the difference"):
        fit(model)
    found = fit(model, inexact=True)
    assert set(found.inputs) == {name for name, _ in quant_layers(model)}
    assert found.notes == ("input: executed with code_range='full', divisor='half_range', arithmetic='input'",)
    assert not found.is_exact


def test_bits_are_never_a_convention():
    model = quantized(QuantScheme(weight=TensorSpec(bits=4), overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=3)),)))
    with pytest.raises(ValueError, match=r"weight.bits: got 3, executed is 2 or 4 or 8.*\(model.layers.0.mlp.down_proj and 1 more\)"):
        fit(model, inexact=True)


def test_codes_of_weights_are_never_a_convention():
    runtime = Runtime(weight=(rule(code_range=("narrow",)),))
    model = quantized(QuantScheme(weight=TensorSpec(bits=4, code_range="full", divisor="half_range")))
    with pytest.raises(ValueError, match=r"weight.code_range: got 'full', executed is 'narrow'"):
        fit(model, inexact=True, runtime=runtime)


def test_scales_must_be_numbers_of_the_stored_type():
    with pytest.raises(ValueError, match=r"weight.scale_dtype: this format stores scales as bfloat16.*and 13 more"):
        fit(quantized("w4"), scale_dtype=torch.bfloat16)
    assert fit(quantized("w4"), scale_dtype=torch.float32).is_exact
    assert fit(quantized(QuantScheme(weight=TensorSpec(bits=4, scale_dtype="bfloat16"))), scale_dtype=torch.float16).is_exact
    found = fit(quantized("w4"), inexact=True, scale_dtype=torch.bfloat16)
    assert set(found.scale_dtypes.values()) == {torch.bfloat16}
    assert len(found.scale_dtypes) == 14


def test_arithmetic_matters_only_where_inputs_are_half_precision():
    scheme = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="token", divisor="half_range", code_range="full"))
    assert fit(quantized(scheme)).is_exact
    with pytest.raises(ValueError, match=r"input.arithmetic: got 'float32', executed is 'input'"):
        fit(quantized(scheme, torch.bfloat16))


@pytest.mark.parametrize(("drop", "message"), [(("weight",), "drop: got 'weight'"), ("kv", r"expected a list such as \('kv',\)")])
def test_wrong_drops(drop, message):
    with pytest.raises(ValueError, match=message):
        fit(quantized(), drop=drop)


def test_dropping_what_is_not_there_changes_nothing():
    assert fit(quantized("w4"), drop=("kv", "input")).is_exact


# ---------------------------------------------------------------- the model made to compute it


def test_dropped_parts_are_off_and_come_back():
    model, plain = quantized(), quantized("w4")
    before = logits_of(model)
    with executing(model, fit(model, drop=("input", "kv"))):
        assert torch.equal(logits_of(model), logits_of(plain))
    assert torch.equal(logits_of(model), before)
    assert not torch.equal(before, logits_of(plain))


def test_other_conventions_are_computed():
    model = quantized("w4a8")
    other = quantized(
        QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="token", divisor="half_range", code_range="full"))
    )
    before = logits_of(model)
    with executing(model, fit(model, inexact=True)):
        assert torch.equal(logits_of(model), logits_of(other))
    assert torch.equal(logits_of(model), before)


def test_other_kv_conventions_are_computed():
    runtime = Runtime(weight=RUNTIME.weight, kv=(rule(divisor=("half_range",), code_range=("full",)),))
    model = quantized("w4kv4")
    other = quantized(QuantScheme(weight=TensorSpec(bits=4), kv=KVSpec(bits=4, divisor="half_range", code_range="full")))
    with executing(model, fit(model, inexact=True, runtime=runtime)):
        assert torch.equal(logits_of(model), logits_of(other))


def test_a_static_range_is_kept_on_another_grid():
    static = TensorSpec(bits=8, granularity="tensor", dynamic=False)
    runtime = Runtime(weight=RUNTIME.weight, input=(rule(divisor=("half_range",), code_range=("full",)),))
    model = quantized(QuantScheme(weight=TensorSpec(bits=4), input=static))
    for _, layer in quant_layers(model):
        running = layer.input_quantizer.running
        for buffer, value in ((running.low, -2.0), (running.high, 2.0), (running.batches, 1.0)):
            buffer.fill_(value)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, layer.in_features)
    with executing(model, fit(model, inexact=True, runtime=runtime)):
        seen = layer.quantized_input(x)
    step = torch.tensor(2.0) / 127.5
    assert torch.equal(seen, torch.clamp(torch.round(x / step), -128, 127) * step)


def test_rounded_scales_keep_the_codes():
    model = quantized("w4")
    weights = {weight.name: weight for weight in integer_weights(model)}
    with executing(model, fit(model, inexact=True, scale_dtype=torch.bfloat16)):
        for name, layer in quant_layers(model):
            rounded = weights[name].scale.bfloat16().float()
            assert torch.equal(layer.quantized_weight(), weights[name].codes * rounded), name
    assert torch.equal(model.model.layers[0].mlp.up_proj.quantized_weight(), weights["model.layers.0.mlp.up_proj"].dequantize())


def test_rotary_tables_are_those_that_a_loading_runtime_computes():
    model, whole = quantized("w4").bfloat16(), quantized("w4", torch.bfloat16)
    assert not torch.equal(logits_of(model), logits_of(whole))
    with executing(model, fit(model)):
        assert torch.equal(logits_of(model), logits_of(whole))
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_rounded_rotary_tables_are_a_difference_that_is_measured(tmp_path):
    scheme = QuantScheme(weight=TensorSpec(bits=4, scale_dtype="bfloat16"))
    manifests = []
    for name, model in (("rounded", quantized(scheme).bfloat16()), ("kept", quantized(scheme, torch.bfloat16))):
        folder = export(model, tmp_path / name, format="compressed-tensors")
        manifests.append(json.loads((folder / "manifest.json").read_text()))
    assert manifests[0]["notes"] == ["buffers: model.rotary_emb.inv_freq is computed anew, not rounded as in the trained model"]
    assert manifests[0]["difference"]["max_abs"] > 0
    assert (manifests[1]["notes"], manifests[1]["difference"]) == ([], None)


def test_what_was_swapped_comes_back_after_an_error():
    model = quantized()
    before = copy.deepcopy(model.state_dict()), logits_of(model)
    with pytest.raises(KeyError), executing(model, fit(model, drop=("input", "kv"))):
        raise KeyError
    assert torch.equal(logits_of(model), before[1])
    assert model.state_dict().keys() == before[0].keys()


# ---------------------------------------------------------------- integers of every grid


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(bits=4),
        TensorSpec(bits=8, granularity="tensor"),
        TensorSpec(bits=3, granularity="group", group_size=16),
        TensorSpec(bits=4, symmetric=False),
        TensorSpec(bits=8, symmetric=False, granularity="group", group_size=8),
        TensorSpec(bits=3, symmetric=False, zero_point="float"),
        TensorSpec(bits=8, symmetric=False, zero_point="float", granularity="tensor"),
        TensorSpec(bits=4, code_range="full", divisor="half_range", scale_dtype="float16"),
        TensorSpec(bits=5, code_range="unsigned"),
        TensorSpec(bits=1, quantizer="mean_abs"),
        TensorSpec(bits=2, quantizer="mean_abs", granularity="group", group_size=16),
    ],
    ids=str,
)
def test_integer_weights_stand_for_the_trained_values(spec):
    model = quantized(QuantScheme(weight=spec))
    layers = dict(quant_layers(model))
    for weight in integer_weights(model):
        expected = fake_quantize(layers[weight.name].weight.detach(), spec)
        assert torch.equal(weight.dequantize(), expected), weight.name
        low, high = (0, 2**weight.bits - 1) if weight.has_float_zero else (-(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1)
        assert weight.codes.min() >= low
        assert weight.codes.max() <= high
        assert weight.scale.shape == (weight.codes.shape[0], weight.codes.shape[1] // weight.group_size)


def test_scales_along_columns_are_refused():
    model = quantized(QuantScheme(weight=TensorSpec(bits=4, axis=1)))
    with pytest.raises(ValueError, match=r"weight.axis: got 1, only the native format"):
        list(integer_weights(model))


# ---------------------------------------------------------------- examples and differences


def test_examples_are_found_or_named():
    model = quantized()
    found = example_for(model, None)
    assert found["input_ids"].shape == (2, 48)
    assert int(found["input_ids"].max()) < model.config.vocab_size
    assert torch.equal(found["input_ids"], example_for(model, None)["input_ids"])
    assert example_for(torch.nn.Linear(2, 3), None) is None
    x = torch.randn(4, 2)
    for given in (x, (x,), [x], {"input": x}):
        assert example_for(torch.nn.Linear(2, 3), given)["input"] is x
    assert outputs_of(torch.nn.Linear(2, 3), {"input": x}).shape == (4, 3)


def test_outputs_are_taken_in_eval_mode_and_the_mode_comes_back():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    model[1].eval()
    x = torch.ones(3, 2)
    assert torch.equal(outputs_of(model, {"input": x}), model[1](x))
    assert [module.training for module in model] == [True, False]


def test_a_difference_is_measured():
    trained = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert difference(trained, trained) == {"max_abs": 0.0, "kl": 0.0, "top1_agreement": 1.0}
    executed = torch.tensor([[2.0, 1.0], [3.0, 0.0]])
    p, q = trained[0].double().softmax(-1), executed[0].double().softmax(-1)
    expected = (p * (p / q).log()).sum().item() / 2
    measured = difference(trained, executed)
    assert (measured["max_abs"], measured["top1_agreement"]) == (1.0, 0.5)
    assert measured["kl"] == pytest.approx(expected)


def test_ids_stay_in_the_positions_of_a_model():
    model = llama()
    model.config.max_position_embeddings = 7
    assert example_for(model, None)["input_ids"].shape == (2, 7)
