"""llama.cpp itself, where it is installed: our files in its kernels, against its blocks of eight-bit inputs written out in torch."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizers import ROWS, byte_tokenizer
from models import SIZES, _build, llama, llama3, qwen3
from torch.nn.functional import cross_entropy
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.modules.layer import quant_layers

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

G32 = {"granularity": "group", "group_size": 32}
FIRST = range(10, 34)  # tokens that begin a text; each is a test of its own


def mistral(**changes):
    return _build(MistralForCausalLM, MistralConfig, **SIZES | {"tie_word_embeddings": False} | changes)


def qwen2(**changes):
    return _build(Qwen2ForCausalLM, Qwen2Config, **SIZES | {"tie_word_embeddings": False} | changes)


def half(bits, **fields):
    return TensorSpec(bits=bits, scale_dtype="float16", **fields)


TYPES = {
    "Q8_0": (half(8, **G32), 32),
    "Q4_0": (half(4, **G32), 32),
    "Q5_0": (half(4, symmetric=False, **G32), 32),
    "Q6_K": (half(6), 256),
    "Q4_K": (half(4, symmetric=False), 256),
    "Q3_K": (half(3), 256),
    "Q2_K": (half(2, quantizer="mean_abs"), 256),
    "TQ2_0": (half(2), 256),
    "TQ1_0": (half(1, quantizer="mean_abs"), 256),
}


def in_blocks(x, size):
    """Inputs as llama.cpp takes them: codes with the fp32 scale; in blocks of 32 their values then have the scale rounded to fp16."""
    blocks = x.unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    scale = largest / 127
    return (codes * (scale.half().float() if size == 32 else scale)).flatten(-2)


def served(folder):
    """llama.cpp with keys and values in fp32; its AMX buffers have crashed for batches and stay out of this."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra_buffers():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_extra_buffers
    try:
        settings = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
        return llama_cpp.Llama(str(folder / "model.gguf"), logits_all=True, verbose=False, **settings)
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = defaults


def logits_of(engine, ids):
    engine.reset()
    engine.eval(ids)
    return torch.tensor(np.array(engine.scores[: len(ids)]))


@pytest.fixture(params=TYPES)
def exported(request, tmp_path):
    """(model, engine, block of inputs) of each type of block."""
    spec, size = TYPES[request.param]
    shape = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": ROWS, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = llama(**shape)
    insert_quantizers(model, QuantScheme(weight=spec))
    engine = served(export(model, tmp_path / "out", format="gguf", tokenizer=byte_tokenizer()))
    yield model, engine, size
    engine.close()


def test_logits_are_those_of_our_weights_on_its_inputs(exported):
    """A rounding tie moves a code of a token now and then, so most tokens are equal and the others near."""
    model, engine, size = exported
    hooks = [layer.register_forward_pre_hook(lambda _, args: (in_blocks(args[0], size),)) for _, layer in quant_layers(model)]
    with torch.no_grad():
        emulated = torch.cat([model(torch.tensor([[first]])).logits[0] for first in FIRST])
        for hook in hooks:
            hook.remove()
        weights_only = torch.cat([model(torch.tensor([[first]])).logits[0] for first in FIRST])
    theirs = torch.cat([logits_of(engine, [first]) for first in FIRST])
    apart = (emulated - theirs).abs().amax(-1)
    assert apart.median() < 2e-5
    assert apart.max() < 0.1
    assert apart.median() < 0.01 * (weights_only - theirs).abs().amax(-1).median()


ROPES = {
    "llama3": {"rope_parameters": llama3().config.rope_parameters},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
FAMILIES = {
    **{name: (llama, rope) for name, rope in ROPES.items()},
    "linear-qwen2": (qwen2, ROPES["linear"]),
    "linear-qwen3-head-dim": (qwen3, ROPES["linear"]),
    "biases": (llama, PLAIN | {"attention_bias": True, "mlp_bias": True}),
    "mistral": (mistral, PLAIN | {"sliding_window": None}),
    "mistral-llama3": (mistral, ROPES["llama3"] | {"sliding_window": None}),
    "qwen3-head-dim": (qwen3, PLAIN),
}


@pytest.mark.parametrize(("build", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_long_texts_are_read_as_by_transformers(build, changes, tmp_path):
    """Positions, biases and heads: one small matrix is quantized, so the others are products in floating point on both sides."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": ROWS, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = build(**shape | changes)
    insert_quantizers(model, QuantScheme(weight=half(8, **G32), include=("down_proj",)), allow_partial=True)
    engine = served(export(model, tmp_path / "out", format="gguf", tokenizer=byte_tokenizer()))
    for _, layer in quant_layers(model):
        layer.register_forward_pre_hook(lambda _, args: (in_blocks(args[0], 32),))
    ids = torch.randint(ROWS, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
        if (rope := changes["rope_parameters"])["rope_type"] != "default":
            rotary = model.model.rotary_emb
            rotary.inv_freq, _ = rotary.compute_default_rope_parameters(model.config)
            unscaled = model(ids[None]).logits[0]
            assert (ours - unscaled)[8:].abs().amax(-1).median() > 0.1, rope
    apart = (ours - logits_of(engine, ids.tolist())).abs().amax(-1)
    assert apart.median() < 2e-5
    assert apart.max() < 0.1
    engine.close()


@pytest.mark.slow
def test_the_preset_predicts_the_perplexity_that_is_served(tmp_path):
    """Input codes are those of llama.cpp but for rounding ties, sums are in another order: tokens differ, their mean does not."""
    model, tokenizer = load_causal_lm("tiny-teacher"), load_tokenizer("tiny-teacher")
    insert_quantizers(model, "llama.cpp-w4a8")
    engine = served(export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer))
    text = Path(argparse.__file__).read_text("utf-8")
    assert engine.tokenize(text[:2000].encode(), add_bos=False) == tokenizer.encode(text[:2000])
    rows = torch.tensor(tokenizer.encode(text)[: 32 * 64]).view(32, 64)
    with torch.no_grad():
        ours = model(rows).logits
    theirs = torch.stack([logits_of(engine, row.tolist()) for row in rows])
    perplexity = [cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).exp().item() for logits in (ours, theirs)]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=1e-3)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.98
    engine.close()
