"""The native format: the file holds the trained integers and nothing else, and says so when it cannot."""

import copy
import json

import manifests
import pytest
import torch
from models import cnn, gemma3, gpt2, llama, logits_of, mlp, opt, qwen3, save_causal_lm, tied_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized, named_quantizers
from lightning_qat.modules import scheme_of
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.scheme import Override

ASYMMETRIC = QuantScheme(weight=TensorSpec(bits=3, granularity="group", group_size=16, symmetric=False))
EVERYTHING = QuantScheme(weight=TensorSpec(bits=5), input=TensorSpec(bits=8, granularity="token"), exclude=())
MIXED = QuantScheme(weight=TensorSpec(bits=4), overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8)),))


def bf16_llama():
    """As transformers loads it: weights in bf16, rotary frequencies in fp32."""
    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def rounded_llama():
    """As a `bf16-true` run leaves it: rotary frequencies are rounded too, which no state_dict tells."""
    return llama().bfloat16()


ROTARY = 2 * 16  # inv_freq and original_inv_freq of heads with 32 features

CASES = {
    "w4a8kv4": (llama, "w4a8kv4"),
    "w2a8kv4": (llama, "w2a8kv4"),
    "w1": (llama, "w1"),
    "w3-asymmetric-groups": (llama, ASYMMETRIC),
    "w8-asymmetric": (llama, QuantScheme(weight=TensorSpec(bits=8, symmetric=False))),
    "w7-per-tensor": (llama, QuantScheme(weight=TensorSpec(bits=7, granularity="tensor"))),
    "w4-full-range": (llama, QuantScheme(weight=TensorSpec(bits=4, code_range="full", divisor="half_range"))),
    "llm-qat": (llama, "llm-qat"),
    "bf16-scales": (llama, QuantScheme(weight=TensorSpec(bits=4, granularity="group", group_size=8, scale_dtype="bfloat16"))),
    "fp16-scales": (llama, QuantScheme(weight=TensorSpec(bits=4, scale_dtype="float16"))),
    "mixed": (llama, MIXED),
    "inputs-only": (llama, "w16a8"),
    "tied": (tied_llama, "w4a8kv4"),
    "tied-all-layers": (tied_llama, EVERYTHING),
    "all-layers": (llama, EVERYTHING),
    "bf16-model": (bf16_llama, "w4a8kv4"),
    "bf16-true": (rounded_llama, "w4a8kv4"),
    "gpt2": (gpt2, "w4a8kv4"),
    "opt": (opt, "w4a8"),
    "qwen3": (qwen3, "w4a8kv4"),
    "gemma3": (gemma3, "w4a8kv4"),
}
MODULES = {"cnn": (cnn, "w4a8"), "cnn-w1": (cnn, "w1"), "mlp": (mlp, ASYMMETRIC)}
every_case = pytest.mark.parametrize(("build", "scheme"), (CASES | MODULES).values(), ids=CASES | MODULES)


def quantized(build=llama, scheme="w4a8kv4"):
    model = build()
    insert_quantizers(model, scheme)
    return model


def reload(folder, build=None):
    """A model that is not one of transformers needs an instance; other weights in it must not matter."""
    if build not in (cnn, mlp):
        return load_quantized(folder)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return load_quantized(folder, model=model)


def weight_codes(model):
    """Codes, scales and zero points of every layer, whether its weight is packed or not."""
    found = {}
    for name, layer in quant_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer is not None:
            found[name] = quantizer.codes() if isinstance(quantizer, PackedWeight) else quantizer.codes(layer.to_matrix(layer.weight))
    return found


# ---------------------------------------------------------------- what is written is what was trained


@every_case
def test_codes_scales_and_logits_are_bitwise_the_same(build, scheme, tmp_path):
    model = quantized(build, scheme)
    loaded = reload(export(model, tmp_path / "out"), build)
    before, after = weight_codes(model), weight_codes(loaded)
    assert before.keys() == after.keys()
    for name, mine in before.items():
        assert torch.equal(after[name].codes, mine.codes), name
        assert torch.equal(after[name].scale, mine.scale), name
        assert (mine.zero_point is None) == (after[name].zero_point is None)
        assert mine.zero_point is None or torch.equal(after[name].zero_point.to(mine.zero_point.dtype), mine.zero_point), name
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert logits_of(loaded).dtype == logits_of(model).dtype
    assert scheme_of(loaded) == scheme_of(model)
    assert type(loaded).__name__ == type(model).__name__
    assert not any(module.training for module in loaded.modules())


@every_case
def test_exporting_a_loaded_model_writes_the_same_tensors(build, scheme, tmp_path):
    first = export(quantized(build, scheme), tmp_path / "first")
    second = export(reload(first, build), tmp_path / "second")
    mine, yours = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert mine.keys() == yours.keys()
    assert all(torch.equal(tensor, yours[name]) and tensor.dtype == yours[name].dtype for name, tensor in mine.items())
    left, right = (json.loads((folder / "manifest.json").read_text()) for folder in (first, second))
    assert left == right


def test_no_float_weight_of_a_quantized_layer_is_written(tmp_path):
    model = quantized()
    tensors = load_file(export(model, tmp_path / "out") / "model.safetensors")
    for name, layer in quant_layers(model):
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.packed"].dtype == torch.uint8
        assert tensors[f"{name}.packed"].shape == (layer.out_features, layer.in_features // 2)
    assert {name for name in tensors if name.endswith(".weight")} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{kind}_layernorm.weight" for i in (0, 1) for kind in ("input", "post_attention")),
    }


@pytest.mark.parametrize("build", [llama, tied_llama])
def test_tied_weights_are_written_once_and_tied_again(build, tmp_path):
    model = quantized(build)
    folder = export(model, tmp_path / "out")
    tensors, loaded = load_file(folder / "model.safetensors"), load_quantized(folder)
    tied = build is tied_llama
    assert ("lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors) != tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_trained_weights_are_what_is_exported(tmp_path):
    model = quantized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(3):
        model(token_ids(seed=seed)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits_of(model), logits_of(quantized()))
    assert torch.equal(logits_of(load_quantized(export(model, tmp_path / "out"))), logits_of(model))


def test_exporting_changes_nothing_in_the_model(tmp_path):
    model = quantized()
    before, wanted, names = copy.deepcopy(model.state_dict()), logits_of(model), [name for name, _ in named_quantizers(model)]
    export(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), wanted)
    assert [name for name, _ in named_quantizers(model)] == names


# ---------------------------------------------------------------- size

WIDE = {"hidden_size": 128, "intermediate_size": 256}
LINEARS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)  # q, o; k, v; gate, up, down
ROWS = 2 * (128 + 128 + 64 + 64 + 256 + 256 + 128)
REST = 97 * 128 * 2 + 5 * 128  # embedding and head; five norms
SIZES = {
    "w4a8kv4": ("w4a8kv4", LINEARS * 4 + ROWS * 32),
    "w1": ("w1", LINEARS * 1 + ROWS * 32),
    "w3": ("w3", LINEARS * 3 + ROWS * 32),
    "w4g32-asymmetric-bf16": (
        QuantScheme(weight=TensorSpec(bits=4, granularity="group", group_size=32, symmetric=False, scale_dtype="bfloat16")),
        LINEARS * 4 + LINEARS // 32 * (16 + 4),
    ),
}


@pytest.mark.parametrize(("scheme", "bits"), SIZES.values(), ids=SIZES)
def test_the_file_is_as_large_as_its_counted_bits(scheme, bits, tmp_path):
    model = quantized(lambda: llama(**WIDE), scheme)
    folder = export(model, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counted_bits"] == bits + (REST + ROTARY) * 32
    assert manifest["effective_bits"] == pytest.approx(bits / LINEARS, rel=1e-12)
    content = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert manifest["counted_bits"] / 8 <= len(content) - header <= 1.02 * manifest["counted_bits"] / 8


# ---------------------------------------------------------------- a model one can go on with


def test_a_loaded_model_generates_as_the_exported_one(tmp_path):
    folder = save_causal_lm(llama(), tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(folder)
    insert_quantizers(model, "w4a8kv4")
    loaded = load_quantized(export(model, tmp_path / "out"))
    ids = token_ids(2, 4)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_loaded_model_holds_no_float_weights(tmp_path):
    loaded = load_quantized(export(quantized(), tmp_path / "out"))
    for _, layer in quant_layers(loaded):
        assert layer.weight.numel() == 0
        assert not layer.weight.requires_grad
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


# ---------------------------------------------------------------- refusals of export


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"format: got 'nativ'.*did you mean 'native'\?"):
        export(quantized(mlp, "w4"), tmp_path / "out", format="nativ")


def test_a_model_without_quantizers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no quantizers"):
        export(llama(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"drop": ("kv",)}, {"inexact": True}], ids=str)
def test_what_the_format_does_not_need_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match=r"drop.*inexact"):
        export(quantized(mlp, "w4"), tmp_path / "out", **options)


def test_only_an_empty_folder_is_written_to(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    export(quantized(mlp, "w4"), taken)
    before = {file.name: file.read_bytes() for file in taken.iterdir()}
    with pytest.raises(ValueError, match=r"path: .*taken.*not an empty folder"):
        export(quantized(mlp, "w8"), taken)
    assert {file.name: file.read_bytes() for file in taken.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"path: .*file"):
            export(quantized(mlp, "w4"), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken"]


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    model = quantized(mlp, "w4")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        export(model, tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*.*")) == []
    assert not (tmp_path / "deep" / "out").exists()


# ---------------------------------------------------------------- refusals of load_quantized


@pytest.fixture
def folder(tmp_path):
    return export(quantized(), tmp_path / "out")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: file.unlink()], ids=["truncated", "bit-flip", "missing"])
def test_a_damaged_file_is_named(name, damage, folder):
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"path: .*{name}.*(missing|damaged)"):
        load_quantized(folder)


def test_a_folder_without_a_manifest_is_no_export(folder, tmp_path):
    (folder / "manifest.json").unlink()
    for path in (folder, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"no manifest\.json in .*lightning_qat\.export"):
            load_quantized(path)


def test_a_truncated_manifest_is_refused(folder):
    truncate(folder / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json.*damaged"):
        load_quantized(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"'lightning_qat' version 2; this library reads 'lightning_qat' version 1"),
        ({"format": "another"}, r"'another' version 1; this library reads"),
        ({"model": {"library": "transformers", "class": "LlamaForCausalLLM"}}, r"names the class 'LlamaForCausalLLM'.*transformers"),
    ],
    ids=["newer", "other-format", "unknown-class"],
)
def test_what_this_version_cannot_read_is_refused(changes, message, folder):
    manifests.edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def test_tensors_that_do_not_belong_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    for name, changed in {
        "extra": tensors | {"extra.weight": torch.ones(2)},
        "model.norm.weight": {key: value for key, value in tensors.items() if key != "model.norm.weight"},
    }.items():
        save_file(changed, folder / "model.safetensors")
        manifests.edit(folder, sha256={})
        with pytest.raises(ValueError, match=rf"model: missing in the export.*{name}"):
            load_quantized(folder)


def test_a_module_of_ones_own_needs_an_instance_that_fits(tmp_path):
    folder = export(quantized(mlp, "w4a8"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"model: this is a Sequential of your own; pass model="):
        load_quantized(folder)
    with pytest.raises(ValueError, match=r"model: 2 has shape \(9, 32\) in the given model and \(8, 32\)"):
        load_quantized(folder, model=nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 9)))
    with pytest.raises(ValueError, match=r"quantized layer '2', the given Sequential does not"):
        load_quantized(folder, model=nn.Sequential(nn.Linear(16, 32), nn.ReLU()))
    with pytest.raises(ValueError, match=r"model: .*2\.bias"):
        load_quantized(folder, model=nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)))
