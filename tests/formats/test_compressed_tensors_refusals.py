"""What compressed-tensors cannot express is refused before anything is written, with the name of the field and the way out."""

import pytest
import torch
from models import cnn, gpt2, llama, mixtral, opt, qwen3, tied_llama, token_ids
from serving import in_half, quantized
from torch import nn

from lightning_qat import KVSpec, QuantScheme, TensorSpec, export, insert_quantizers
from lightning_qat.scheme import Override

W4 = TensorSpec(bits=4)
HALF = {"code_range": "full", "divisor": "half_range"}
A8 = TensorSpec(bits=8, granularity="token", **HALF)
STATIC = TensorSpec(bits=8, granularity="tensor", dynamic=False, code_range="full")
KV4 = KVSpec(bits=4, **HALF)


def float_norms():
    model = in_half(llama)()
    model.model.norm.float()
    return model


REFUSED = {
    "input-divisor": (llama, "w4a8", r"input.divisor: got 'qmax', executed is 'half_range'"),
    "input-code-range": (llama, "w4a8", r"input.code_range: got 'narrow', executed is 'full'"),
    "input-reciprocal": (
        llama,
        QuantScheme(input=TensorSpec(bits=8, granularity="token", round_via="reciprocal", **HALF)),
        "input.round_via",
    ),
    "input-rounded-scale": (
        llama,
        QuantScheme(input=TensorSpec(bits=8, granularity="token", scale_dtype="float16", **HALF)),
        "input.scale_dtype",
    ),
    "input-arithmetic": (in_half(llama), QuantScheme(input=A8), r"input.arithmetic: got 'float32', executed is 'input'"),
    "input-asymmetric": (llama, QuantScheme(input=TensorSpec(bits=8, granularity="token", symmetric=False)), "input.symmetric: got False"),
    "input-percentile": (
        llama,
        QuantScheme(input=TensorSpec(bits=8, granularity="token", range_finder="percentile", **HALF)),
        "input.range_finder",
    ),
    "input-without-range": (llama, QuantScheme(input=STATIC), r"the input of model.layers.0.self_attn.q_proj has no range yet; train"),
    "input-with-two-axes": (
        opt,
        QuantScheme(weight=W4, input=A8),
        r"the input of model.decoder.layers.0.fc1: it has \[2\] axes.*granularity='group'",
    ),
    "weight-float-zero": (
        llama,
        QuantScheme(weight=TensorSpec(bits=4, symmetric=False, zero_point="float")),
        "weight.zero_point: got 'float'",
    ),
    "weight-axis": (llama, QuantScheme(weight=TensorSpec(bits=4, axis=1)), "weight.axis: got 1"),
    "weight-scales": (in_half(llama), "w4", r"weight.scale_dtype: this format stores scales as bfloat16.*and 13 more"),
    "kv-divisor": (llama, "w4kv4", "kv.divisor: got 'qmax'"),
    "kv-token": (
        llama,
        QuantScheme(kv=KVSpec(bits=4, granularity="token", **HALF)),
        "kv.position: got 'post_rope', executed is 'pre_rope'",
    ),
    "kv-behind-norm": (
        qwen3,
        QuantScheme(kv=KVSpec(bits=4, position="pre_rope", **HALF)),
        "keys of Qwen3Attention pass through another layer",
    ),
    "kv-unknown-attention": (gpt2, QuantScheme(kv=KV4), "the library does not know its attention"),
    "kv-unknown-config": (opt, QuantScheme(kv=KV4), "needs a config with num_key_value_heads"),
    "kv-in-one-layer": (
        llama,
        QuantScheme(kv=KV4, overrides=(Override(names=("layers.0.self_attn",), kv=None),)),
        "not the same in every attention module",
    ),
    "tied": (tied_llama, QuantScheme(weight=W4, exclude=()), r"its weight is tied \(model.embed_tokens and lm_head\)"),
    "tied-head": (tied_llama, QuantScheme(weight=W4, exclude=("type:Embedding",)), "lm_head: its weight is tied"),
    "conv1d": (gpt2, "w4", "c_attn: it is a Conv1D"),
    "experts": (mixtral, "w4", r"model.layers.0.mlp.experts: it is a MixtralExperts.*exclude"),
    "float64": (lambda: llama().double(), "w4", "the model is in torch.float64, allowed are float32"),
    "two-dtypes": (
        float_norms,
        QuantScheme(weight=TensorSpec(bits=4, scale_dtype="bfloat16")),
        "model.norm.weight is in torch.float32 and most of the model in torch.bfloat16",
    ),
    "no-transformers-model": (cnn, "w4", "writes models of transformers; CNN is none"),
}


@pytest.mark.parametrize(("build", "scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_library_does_not_execute_is_refused_by_name(build, scheme, message, tmp_path):
    model = quantized(build, scheme)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": TensorSpec(bits=8, granularity="token", symmetric=False)}, "input.symmetric: got False.*the nearest that fits"),
        ({"weight": TensorSpec(bits=4, symmetric=False, zero_point="float")}, "weight.zero_point: got 'float'"),
        ({"kv": KVSpec(bits=4, granularity="token")}, "kv.position: got 'post_rope'"),
    ],
    ids=["input", "weight", "kv"],
)
def test_a_scheme_that_never_fits_is_refused_before_training(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme.parse(QuantScheme(**fields), target="compressed-tensors")


def test_a_quantized_part_without_a_language_model_is_refused(tmp_path):
    model = nn.ModuleDict({"network": llama(), "head": nn.Linear(8, 8)})
    insert_quantizers(model, QuantScheme(weight=W4, exclude=("lm_head", "type:Embedding")))
    with pytest.raises(ValueError, match="ModuleDict is none and holds none"):
        export(model, tmp_path / "out", format="compressed-tensors")


def test_refusing_leaves_the_model_as_it_was(tmp_path):
    model = quantized(opt, QuantScheme(weight=W4, input=A8))
    before = model(token_ids()).logits
    with pytest.raises(ValueError, match="axes"):
        export(model, tmp_path / "out", format="compressed-tensors")
    assert torch.equal(model(token_ids()).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
