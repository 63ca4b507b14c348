"""Sums that can be done by hand, limits, and what must grow or shrink."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SIZES, gemma3, gpt2, mixtral, qwen3
from transformers import LlamaConfig, ViTConfig

from lightning_qat.plan import PRECISIONS, STRATEGIES, TEACHERS, Setting, best_plan, estimate, parse_memory, read_shape, recipe, remedies
from lightning_qat.plan.memory import CONTEXT, teacher_bytes

SMALL = {"max_length": 16, "loss_chunk": 8}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """Three blocks; the smallest model of which blocks are extrapolated has four."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(**SIZES | {"num_hidden_layers": 5}, tie_word_embeddings=False).save_pretrained(folder)
    return read_shape(str(folder), "w4a8kv4")


# ---------------------------------------------------------------- counts

LLAMAS = {  # public facts: parameters of the published weights
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", LLAMAS)
def test_parameters_of_llama(name):
    shape = read_shape(name, "w4a8kv4")
    assert shape.parameters == LLAMAS[name]
    assert shape.parameters == shape.root + shape.block * shape.config.num_hidden_layers
    assert 4 < shape.effective_bits < 4.02


def test_a_hub_id_of_a_named_shape_needs_no_network():
    assert read_shape("huggyllama/llama-7b", "w8a8").name == "huggyllama/llama-7b"


@pytest.mark.parametrize("build", [gemma3, gpt2, qwen3], ids=lambda build: build.__name__)
def test_other_architectures(build, tmp_path):
    model = build()
    model.config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path / "config.json"), "w4a8")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert estimate(shape, Setting(**SMALL)).total > 16 * shape.parameters


def test_what_lasts(shape):
    """Weights, gradients and AdamW in fp32: 16 bytes a parameter; sharded over 4, 4 bytes."""
    count = shape.parameters
    alone = estimate(shape, Setting(teacher="none", **SMALL)).parts
    assert alone["student"] + alone["optimizer"] == 12 * count
    assert alone["teacher"] == alone["buckets"] == alone["gathered weights"] == 0
    sharded = estimate(shape, Setting(gpus=4, strategy="fsdp2", **SMALL)).parts
    assert sharded["student"] + sharded["optimizer"] == 3 * count
    assert sharded["teacher"] == 2 * count // 4 + 2 * shape.root
    assert sharded["gathered weights"] >= 4 * shape.root
    ddp = estimate(shape, Setting(gpus=4, strategy="ddp", **SMALL)).parts
    assert ddp["buckets"] == 4 * count


def test_teachers(shape):
    rest = shape.parameters - shape.linear
    expected = {"bfloat16": 2 * shape.parameters, "float32": 4 * shape.parameters, "none": 0}
    expected |= {"int8": shape.linear + 2 * rest, "nf4": int(shape.linear * 0.5625) + 2 * rest}
    assert {kind: teacher_bytes(shape, kind) for kind in expected} == expected


def test_optimizers(shape):
    bytes_of = {name: estimate(shape, Setting(optimizer=name, **SMALL)).parts["optimizer"] for name in ("adamw", "adamw8bit", "sgd")}
    assert bytes_of == {"adamw": 8 * shape.parameters, "adamw8bit": int(2.03125 * shape.parameters), "sgd": 0}


def test_blocks_are_extrapolated_exactly(shape, monkeypatch):
    """Running all blocks gives what follows from two and three."""
    setting = Setting(gradient_checkpointing=False, loss_chunk=None, max_length=16)
    short = estimate(shape, setting).phases
    monkeypatch.setattr("lightning_qat.plan.simulation.DEPTHS", (5, 5))
    assert estimate(shape, setting).phases == short


@pytest.mark.slow
@given(st.sampled_from(sorted(STRATEGIES)), st.sampled_from(sorted(PRECISIONS)), st.sampled_from(sorted(TEACHERS)), st.booleans())
@settings(max_examples=12, deadline=None)
def test_more_never_needs_less(shape, strategy, precision, teacher, checkpointing):
    gpus = 1 if strategy == "single" else 2
    choices = {"strategy": strategy, "precision": precision, "teacher": teacher, "gradient_checkpointing": checkpointing, "loss_chunk": 8}
    small = estimate(shape, Setting(gpus=gpus, max_length=16, **choices))
    assert small.total == sum(small.parts.values()) >= small.phases[small.phase] + CONTEXT
    assert estimate(shape, Setting(gpus=gpus, max_length=32, **choices)).total >= small.total
    if gpus == 2:
        assert estimate(shape, Setting(gpus=4, max_length=16, **choices)).total <= small.total


# ---------------------------------------------------------------- advice


def test_the_ladder_gives_up_as_little_as_possible(shape):
    def chosen(memory, **fixed):
        plan = best_plan(shape, memory, {"gpus": 2, "max_length": 64, "loss_chunk": 8, **fixed})
        return plan.setting.strategy, plan.setting.gradient_checkpointing, plan.setting.teacher, plan.fits

    assert chosen(10**12) == ("ddp", False, "bfloat16", True)
    assert chosen(10**6)[3] is False


def test_the_references_recipe_does_not_fit_40_gb_and_the_way_out_does():
    """A bf16 teacher on each GPU, all logits, no checkpointing: users report out of memory on 8 x 40 GB."""
    shape = read_shape("llama-7b", "w4a8kv4")
    reference = {"gpus": 8, "strategy": "fsdp", "precision": "bf16-true", "teacher": "replicated", "gradient_checkpointing": False}
    plan = best_plan(shape, parse_memory("40GB"), {**reference, "loss_chunk": None, "attention": "eager"})
    assert not plan.fits
    advice = remedies(shape, plan, reference)
    assert advice[0].startswith("on the same GPUs: fsdp2, bf16-mixed")
    assert any("LoRA" in line for line in advice)
    assert any("stored probabilities" in line for line in advice)


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("0.5 TB", 5 * 10**11), (" 512MiB ", 2**29), ("40MB", 4 * 10**7)]
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["80", "80gb", "GB", "-80GB", "0GB", "80 G B", "1e2GB", ""])
def test_memory_without_a_unit(text):
    with pytest.raises(ValueError, match=r"memory: got .*'80GB' or '80GiB'"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"strategy": "ddpp"}, "strategy: got 'ddpp'.*did you mean 'ddp'"),
        ({"precision": "bf16"}, "precision: got 'bf16'.*'bf16-mixed'"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'.*'adamw'"),
        ({"teacher": "fp4"}, "teacher: got 'fp4'.*'nf4'"),
        ({"gpus": 0}, "gpus: got 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"loss_chunk": 0}, "loss_chunk"),
        ({"param_dtype": "bf16"}, "param_dtype: got 'bf16', expected 'bfloat16'"),
        ({"gpus": 2}, "strategy: 'single' is for one GPU"),
        ({"scheme": "w4a8k4"}, "scheme: got 'w4a8k4'"),
    ],
)
def test_settings_that_cannot_be(choices, message):
    with pytest.raises(ValueError, match=message):
        Setting(**choices)


def test_models_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"model: got 'llama-8b'.*'llama-13b'.*did you mean 'llama-"):
        read_shape("llama-8b", "w4a8kv4")
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model: .*ViTConfig, which has no causal language model"):
        read_shape(str(tmp_path), "w4a8kv4")
    with pytest.raises(ValueError, match=r"model: .*no folder at './nothing/here'"):
        read_shape("./nothing/here", "w4a8kv4")


def test_experts_are_refused_by_name(tmp_path):
    """Which tokens an expert gets depends on values."""
    mixtral().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: a mixtral cannot be run without values"):
        estimate(read_shape(str(tmp_path), "w4a8kv4"), Setting(**SMALL))


def test_a_teacher_that_no_yaml_can_ask_for():
    with pytest.raises(ValueError, match="teacher: 'replicated' is for estimates"):
        recipe("a", Setting(gpus=2, strategy="fsdp", teacher="replicated"))


def test_simulation_leaves_nothing_behind(shape):
    """Neither the kernels nor the default mode of torch."""
    from lightning_qat.losses import base
    from lightning_qat.numerics.backends import compiled

    before, table = compiled.run, dict(base.ROW_ELEMENTS)
    estimate(shape, Setting(max_length=17))
    assert compiled.run is before
    assert dict(base.ROW_ELEMENTS) == table
    assert type(torch.ones(1)) is torch.Tensor
    assert json.dumps(shape.config.to_dict(), default=str)
