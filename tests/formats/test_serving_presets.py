"""Presets for transformers and vLLM: trained by a Trainer that has the callback, exported, read back."""

import json

import pytest
import torch
from models import token_ids
from serving import trained, wide_llama
from transformers import AutoModelForCausalLM

from lightning_qat import QuantScheme, export, load_quantized
from lightning_qat.generation import load_causal_lm

PRESETS = {
    "ct-w4a8": "compressed-tensors",
    "ct-w8a8": "compressed-tensors",
    "vllm-w4a16": "vllm",
    "vllm-w8a8": "vllm",
}


def check(module, target, ids, tmp_path):
    folder = export(module, tmp_path / "out", format=target)
    manifest = json.loads((folder / "manifest.json").read_text())
    found = manifest["verification"]
    assert (found["codes_different"], found["scales_different"], found["max_logit_difference"]) == (0, 0, 0.0)
    assert (manifest["notes"], manifest["difference"]) == ([], None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, load_quantized(folder)(ids).logits)
    if "outputs_compared_on" not in found:
        assert torch.equal(loaded(ids).logits, module.network(ids).logits)


@pytest.mark.parametrize(("preset", "target"), PRESETS.items(), ids=PRESETS)
def test_a_preset_trains_and_is_exported(preset, target, tmp_path):
    assert QuantScheme.parse(preset) == QuantScheme.parse(preset, target=target)
    before = wide_llama()
    module = trained(wide_llama(), preset, steps=3)
    assert not torch.equal(module.network.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    check(module, target, token_ids(), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:export. no tokenizer")
@pytest.mark.parametrize(("preset", "target"), [*PRESETS.items(), ("llm-qat", "compressed-tensors")])
def test_fifty_steps_of_the_teacher(preset, target, tmp_path):
    teacher = load_causal_lm("tiny-teacher")
    ids = torch.randint(teacher.config.vocab_size, (2, 40))
    module = trained(teacher, QuantScheme.parse(preset, target=target), steps=50, vocabulary=teacher.config.vocab_size, length=24)
    check(module, target, ids, tmp_path)
