"""GGUF files of whole models: what transformers reads is what was trained, or nothing is written."""

import json

import lightning.pytorch as pl
import pytest
import torch
from byte_tokenizers import ROWS, byte_tokenizer
from models import _build, gemma3, gpt2, llama, mixtral, qwen3
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lightning_qat import KVSpec, QuantizationCallback, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats.gguf import format as room
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.scheme import Override

gguf = pytest.importorskip("gguf")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": ROWS}
WIDE = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def small_llama(**changes):
    return llama(**SHAPE | changes)


def wide_llama():
    return llama(**WIDE)


def tied_llama():
    return small_llama(tie_word_embeddings=True)


def half_llama(dtype=torch.bfloat16):
    model = small_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def small_qwen2():
    settings = SHAPE | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return _build(Qwen2ForCausalLM, Qwen2Config, **settings | {"max_position_embeddings": 64, "tie_word_embeddings": True})


def small_qwen3():
    return qwen3(**SHAPE | {"head_dim": 128})


def half(bits, **fields):
    return TensorSpec(bits=bits, scale_dtype="float16", **fields)


G32 = {"granularity": "group", "group_size": 32}
A8 = TensorSpec(bits=8, scale_dtype="float16", scale_rounding="after", round_via="reciprocal", **G32)
A8_K = TensorSpec(bits=8, granularity="group", group_size=256)
MIXED = QuantScheme(
    weight=half(4, **G32),
    overrides=(Override(names=("down_proj",), weight=half(8, **G32)), Override(names=("q_proj",), weight=None)),
)
EXACT = {
    "q4_0": (small_llama, "gguf-q4_0", {"Q4_0"}),
    "q8_0": (small_llama, "gguf-q8_0", {"Q8_0"}),
    "w4a8": (small_llama, "llama.cpp-w4a8", {"Q4_0"}),
    "w4-zero": (small_llama, QuantScheme(weight=half(4, symmetric=False, **G32)), {"Q5_0"}),
    "w4-shift": (small_llama, QuantScheme(weight=half(4, symmetric=False, zero_point="float", **G32)), {"Q4_1"}),
    "w4-per-tensor": (small_llama, QuantScheme(weight=half(4, granularity="tensor")), {"Q4_0"}),
    "mixed": (small_llama, MIXED, {"Q4_0", "Q8_0"}),
    "w1": (wide_llama, QuantScheme(weight=half(1, quantizer="mean_abs")), {"TQ1_0"}),
    "w2": (wide_llama, QuantScheme.parse("w2", target="gguf"), {"Q2_K"}),
    "w2-ternary-a8": (wide_llama, QuantScheme(weight=half(2), input=A8_K), {"TQ2_0"}),
    "w3": (wide_llama, QuantScheme.parse("w3", target="gguf"), {"Q3_K"}),
    "w4-zero-per-channel": (wide_llama, QuantScheme(weight=half(4, symmetric=False)), {"Q4_K"}),
    "w6": (wide_llama, QuantScheme.parse("w6", target="gguf"), {"Q6_K"}),
    "tied": (tied_llama, "gguf-q4_0", {"Q4_0"}),
    "tied-all-layers": (tied_llama, QuantScheme(weight=half(4, **G32), exclude=()), {"Q4_0"}),
    "tied-head-only": (tied_llama, QuantScheme(weight=half(4, **G32), exclude=("type:Embedding",)), {"Q4_0"}),
    "all-layers": (small_llama, QuantScheme(weight=half(8, **G32), exclude=()), {"Q8_0"}),
    "bf16-model": (half_llama, "gguf-q4_0", {"Q4_0"}),
    "fp16-model": (lambda: half_llama(torch.float16), "gguf-q8_0", {"Q8_0"}),
    "qwen2": (small_qwen2, "gguf-q4_0", {"Q4_0"}),
    "qwen3": (small_qwen3, "gguf-q4_0", {"Q4_0"}),
}


def quantized(build=small_llama, scheme="gguf-q4_0"):
    model = build()
    insert_quantizers(model, scheme, allow_partial=True)
    return model


def logits_of(model):
    ids = torch.randint(ROWS, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------- what is written is what was trained


@pytest.mark.parametrize(("build", "scheme", "types"), EXACT.values(), ids=EXACT)
def test_codes_scales_and_logits_are_bitwise_the_same(build, scheme, types, tokenizer, tmp_path):
    model = quantized(build, scheme)
    folder = export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    manifest = manifest_of(folder)
    assert set(manifest["types"].values()) == types
    verified = manifest["verification"]
    assert (verified["codes_different"], verified["scales_different"], verified["max_logit_difference"]) == (0, 0, 0.0)
    assert manifest["difference"] is None
    for module in model.modules():  # transformers computes with float inputs
        if getattr(module, "input_quantizer", None) is not None:
            module.input_quantizer.enabled = False
    loaded = load_quantized(folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert logits_of(loaded).dtype == logits_of(model).dtype


def test_the_file_alone_is_enough(tokenizer, tmp_path):
    folder = export(quantized(), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "manifest.json", "model.gguf"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits_of(loaded), logits_of(quantized()))
    with pytest.raises(ValueError, match="model: a GGUF file builds its own model"):
        load_quantized(folder, model=small_llama())


def test_stored_bits_and_metadata(tokenizer, tmp_path):
    folder = export(quantized(scheme=MIXED), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    manifest, reader = manifest_of(folder), gguf.GGUFReader(folder / "model.gguf")
    assert manifest["stored_bits"] == manifest["effective_bits"]  # groups of 32 with fp16 scales: nothing is stored twice
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "general."))}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.context_length"] == 64
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert (kinds["blk.1.ffn_down.weight"], kinds["blk.1.ffn_up.weight"]) == ("Q8_0", "Q4_0")


def test_a_tied_embedding_is_stored_once_where_it_is_one(tokenizer, tmp_path):
    for case, head in {"tied": False, "tied-all-layers": False, "tied-head-only": True}.items():
        folder = export(quantized(*EXACT[case][:2]), tmp_path / case, format="gguf", tokenizer=tokenizer)
        names = {tensor.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
        assert ("output.weight" in names) == head


def test_a_native_export_becomes_the_same_file(tokenizer, tmp_path):
    model = quantized()
    native = load_quantized(export(model, tmp_path / "native", tokenizer=tokenizer))
    files = [export(each, tmp_path / name, format="gguf", tokenizer=tokenizer) for name, each in {"a": model, "b": native}.items()]
    assert (files[0] / "model.gguf").read_bytes() == (files[1] / "model.gguf").read_bytes()


class Language(pl.LightningModule):
    """A module of somebody's own, which knows nothing of quantization."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def training_step(self, ids, _):
        logits = self.inner(ids).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(model, preset, steps, vocabulary, folder):
    ids = torch.randint(3, vocabulary, (2 * steps, 24), generator=torch.Generator().manual_seed(0))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[QuantizationCallback(preset)], default_root_dir=folder, **quiet)
    module = Language(model.train())
    trainer.fit(module, DataLoader(ids, batch_size=2))
    return module


PRESETS = ("gguf-q4_0", "gguf-q8_0", "llama.cpp-w4a8")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_callback_trained_is_written_as_the_model_in_the_module(preset, tokenizer, tmp_path):
    module = fit(small_llama(), preset, 3, ROWS, tmp_path)
    folder = export(module, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert manifest_of(folder)["verification"]["max_logit_difference"] == 0.0
    assert isinstance(load_quantized(folder), LlamaForCausalLM)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_the_bundled_teacher_and_is_exported(preset, tmp_path):
    module, tokenizer = fit(load_causal_lm("tiny-teacher"), preset, 50, 2048, tmp_path), load_tokenizer("tiny-teacher")
    folder = export(module, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert manifest_of(folder)["verification"]["max_logit_difference"] == 0.0
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert read.encode("def f(x):\n    return 1") == tokenizer.encode("def f(x):\n    return 1")


# ---------------------------------------------------------------- parts that are dropped, conventions that change


def test_dropped_parts_and_rounded_scales_are_measured(tokenizer, tmp_path):
    scheme = QuantScheme(weight=TensorSpec(bits=4, **G32), input=A8, kv=KVSpec(bits=4))
    with pytest.raises(ValueError, match=r"executes no quantized kv[\s\S]*weight.scale_dtype.*float16[\s\S]*drop=\('kv',\)"):
        export(quantized(scheme=scheme), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    folder = export(quantized(scheme=scheme), tmp_path / "out", format="gguf", tokenizer=tokenizer, drop=("kv",), inexact=True)
    manifest = manifest_of(folder)
    assert manifest["dropped"] == ["kv"]
    assert any("scales rounded to float16" in note for note in manifest["notes"])
    assert manifest["difference"]["max_abs"] > 0
    assert manifest["verification"]["max_logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("build", "scheme", "message"),
    [
        (small_llama, QuantScheme(weight=half(4, **G32), input=TensorSpec(bits=8, granularity="token")), r"input.granularity: got 'token'"),
        (small_llama, QuantScheme(input=A8), r"q_proj: has quantized inputs and a floating-point weight.*drop=\('input',\)"),
        (
            wide_llama,
            QuantScheme(weight=half(3), input=A8),
            r"got 32, llama.cpp quantizes inputs of Q3_K weights in groups of 256",
        ),
        (small_llama, QuantScheme(weight=EXACT["w4-shift"][1].weight, input=A8), r"sums of the inputs of Q4_1 weights.*drop=\('input',\)"),
        (
            small_llama,
            QuantScheme(weight=half(4, granularity="group", group_size=16)),
            r"group_size: got 16.*nearest.*group_size=32",
        ),
        (small_llama, QuantScheme(weight=half(8, symmetric=False)), r"weight.symmetric: got False"),
        (lambda: small_llama(intermediate_size=48), QuantScheme(weight=half(4)), r"down_proj: has 48 inputs.*exclude=\('down_proj',\)"),
    ],
    ids=["token-inputs", "inputs-only", "inputs-of-k", "inputs-of-q4_1", "g16", "w8-zero", "width"],
)
def test_schemes_that_do_not_fit_are_refused(build, scheme, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(quantized(build, scheme), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gpt2(vocab_size=ROWS), r"model: got a GPT2LMHeadModel \('gpt2'\).*llama, mistral, qwen2, qwen3"),
        (gemma3, r"'gemma3_text'"),
        (mixtral, r"'mixtral'"),
        (lambda: qwen3(**SHAPE, attention_bias=True), r"config.attention_bias: got True.*no place"),
        (lambda: small_llama(hidden_act="gelu"), r"config.hidden_act: got 'gelu'"),
        (lambda: small_llama().model, r"model: got a LlamaModel"),
        (lambda: small_llama().double(), r"torch.float64, a GGUF file holds"),
    ],
    ids=["gpt2", "gemma3", "mixtral", "bias", "activation", "no-head", "float64"],
)
def test_models_the_file_cannot_describe_are_refused(build, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(quantized(build, QuantScheme(weight=half(4))), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- damage behind the writer's back


@pytest.mark.parametrize(
    ("name", "byte"), [("blk.0.attn_q.weight", 5), ("blk.0.attn_q.weight", 0), ("token_embd.weight", 1), ("output_norm.weight", 2)]
)
def test_a_flipped_bit_is_found_before_the_folder_gets_its_name(name, byte, tokenizer, tmp_path, monkeypatch):
    write = room.GgufFormat.write

    def damaged(self, job, folder):
        entries = write(self, job, folder)
        file = folder / "model.gguf"
        tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
        content = bytearray(file.read_bytes())
        content[tensor.data_offset + byte] ^= 1
        file.write_bytes(content)
        return entries

    monkeypatch.setattr(room.GgufFormat, "write", damaged)
    with pytest.raises(RuntimeError, match=r"reads? back"):
        export(quantized(), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
