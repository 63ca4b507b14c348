"""What works for which architecture: one table, every cell a test of the feature or of its refusal by name."""

import tempfile
from pathlib import Path

import pytest
import torch
from models import LANGUAGE_MODELS, logits_of, token_ids, vit

from lightning_qat import (
    DistillationModule,
    KVSpec,
    QuantScheme,
    TensorSpec,
    export,
    insert_quantizers,
    load_quantized,
    named_quantizers,
    remove_quantizers,
)
from lightning_qat.generation import GenerationSettings, TeacherSource
from lightning_qat.modules import QuantLayer
from lightning_qat.modules.weights import layer_weights

BUILDERS = LANGUAGE_MODELS | {"vit": vit}
CELLS = ("insert", "kv post_rope", "kv pre_rope", "forward", "generate", "synthesize", "distil", "save", "remove")

YES = "yes"
NOT_APPLICABLE = "-"
NO_SPLIT = "kv.position: 'pre_rope' needs separate k_proj and v_proj, GPT2Attention has no k_proj and no v_proj"

# Architecture -> cell -> "yes", "-" where it has no meaning, or the words of the refusal.
SUPPORT = {name: dict.fromkeys(CELLS, YES) for name in BUILDERS}
SUPPORT["gpt2"]["kv pre_rope"] = NO_SPLIT
SUPPORT["vit"] |= dict.fromkeys(("generate", "synthesize", "distil"), NOT_APPLICABLE)

POST_ROPE = QuantScheme(kv=KVSpec(bits=4))
PRE_ROPE = QuantScheme(kv=KVSpec(bits=4, position="pre_rope", granularity="token"))


def quantized(architecture, scheme="w4a8kv4"):
    model = BUILDERS[architecture]()
    insert_quantizers(model, scheme)
    return model


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def linear_layers(model):
    """Names that must be quantized: all linear layers and experts, but not the embeddings, the head and the router."""
    kinds = ("Linear", "Conv1D", "Conv2d", "MixtralExperts", "Qwen3MoeExperts")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds and name != "lm_head"}


def check_insert(architecture):
    model = BUILDERS[architecture]()
    expected = linear_layers(model)
    report = insert_quantizers(model, "w4a8")
    assert set(layers_of(model)) == {layer.name for layer in report.layers} == expected
    assert report.coverage >= 0.9
    assert all(weight.quantizer.spec.bits == 4 and weight.layer.input_quantizer.spec.bits == 8 for weight in layer_weights(model))


def check_kv(architecture, scheme):
    model = BUILDERS[architecture]()
    wanted = logits_of(model)
    report = insert_quantizers(model, scheme)
    assert len(report.attention) == 2
    got = logits_of(model)
    assert got.isfinite().all()
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.9


def check_forward(architecture):
    wanted, model = logits_of(BUILDERS[architecture]()), quantized(architecture)
    called = {name: 0 for name, _ in named_quantizers(model)}
    for name, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda *_, name=name: called.update({name: called[name] + 1}))
    got = logits_of(model)
    assert got.isfinite().all()
    assert 1e-2 < (got - wanted).norm() / wanted.norm() < 0.9
    # siblings after the first take the values of the first; every other quantizer was reached
    shared = ("k_proj.input_quantizer", "v_proj.input_quantizer", "up_proj.input_quantizer")
    assert {name.endswith(shared) for name, count in called.items() if count == 0} <= {True}


def check_generate(architecture):
    ids = token_ids(length=5)
    out = quantized(architecture).generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)
    assert torch.equal(out[:, :5], ids)


def check_synthesize(architecture):
    """The teacher writes samples: what they are is tested with the engine."""
    samples = list(TeacherSource(BUILDERS[architecture](), GenerationSettings(max_length=8, rows=3)).samples(range(4)))
    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3]
    assert all(2 <= len(sample.tokens) <= 8 for sample in samples)


def check_distil(architecture):
    """A distillation step reaches every quantized weight and none of the teacher's."""
    teacher = BUILDERS[architecture]()
    module = DistillationModule(teacher)
    module.log = lambda *args, **kwargs: None
    insert_quantizers(module.student, "w4a8kv4")
    model, ids = module.student, token_ids()
    module.training_step({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0).backward()
    assert all(p.grad is None for p in teacher.parameters())
    gradients = {weight.key: model.get_parameter(weight.key).grad for weight in layer_weights(model)}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0] == []
    assert len(layers_of(model)) >= 8


def check_save(architecture):
    model = quantized(architecture, "w4a8kv4").eval()
    wanted = logits_of(model)
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(logits_of(load_quantized(export(model, Path(folder) / "export"))), wanted)


def check_remove(architecture):
    model = BUILDERS[architecture]()
    wanted, types = logits_of(model), [type(module) for module in model.modules()]
    insert_quantizers(model, "w4a8kv4")
    remove_quantizers(model)
    assert torch.equal(logits_of(model), wanted)
    assert [type(module) for module in model.modules()] == types


CHECKS = {
    "insert": check_insert,
    "kv post_rope": lambda architecture: check_kv(architecture, POST_ROPE),
    "kv pre_rope": lambda architecture: check_kv(architecture, PRE_ROPE),
    "forward": check_forward,
    "generate": check_generate,
    "synthesize": check_synthesize,
    "distil": check_distil,
    "save": check_save,
    "remove": check_remove,
}
TABLE = [
    pytest.param(architecture, cell, SUPPORT[architecture][cell], id=f"{architecture}-{cell.replace(' ', '-')}")
    for architecture in BUILDERS
    for cell in CELLS
    if SUPPORT[architecture][cell] != NOT_APPLICABLE
]


@pytest.mark.parametrize(("architecture", "cell", "support"), TABLE)
def test_cell(architecture, cell, support):
    if support == YES:
        CHECKS[cell](architecture)
        return
    with pytest.raises(ValueError, match=r"[a-z]") as refused:
        CHECKS[cell](architecture)
    assert support in str(refused.value)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_only_the_router_of_a_mixture_of_experts_is_left_alone(architecture):
    """It has a class of its own, and its product decides where tokens go."""
    report = insert_quantizers(BUILDERS[architecture](), "w4a8")
    gaps = [item.name for item in report.left_alone if not item.on_purpose]
    assert gaps == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_embeddings_are_excluded_by_default(architecture):
    """Subclasses too: Gemma's scaled embedding is most of the model, OPT's learned positions have code of their own."""
    report = insert_quantizers(BUILDERS[architecture](), QuantScheme(weight=TensorSpec(bits=4)), allow_partial=True)
    embeddings = {item.name: item.on_purpose for item in report.left_alone if "Embedding" in item.type}
    assert embeddings
    assert all(embeddings.values()), embeddings
