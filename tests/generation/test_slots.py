"""A model in slots gives its own logits, wherever its rows are and whatever the other rows do."""

import pytest
import torch
from models import gemma3, gpt2, llama, llama3, mixtral, opt, qwen3
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, MambaConfig, MambaForCausalLM

from lightning_qat.generation import CallableTeacher
from lightning_qat.generation.slots import BLOCK
from lightning_qat.generation.steppers import CallableStepper, ModelStepper

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3, "sliding_window": 5}


def gemma2():
    """Bounded scores, every other layer with a window."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=2.0, attn_implementation="eager")).eval()


def gpt_oss():
    """A learned score per head that only takes probability away."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    return model


def long(build):
    return lambda: build(max_position_embeddings=256)


MODELS = {"llama": long(llama), "llama3": long(llama3), "qwen3": long(qwen3), "gemma3": long(gemma3), "opt": opt, "mixtral": long(mixtral)}
MODELS |= {"gpt2": lambda: gpt2(n_positions=256), "gemma2": gemma2, "gpt_oss": gpt_oss}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@each_model
@torch.no_grad()
def test_rows_at_different_positions(build):
    """Three rows begin at different steps, one of them twice; the oracle is the model without a cache."""
    model = build()
    length = min(model.config.max_position_embeddings, 2 * BLOCK + 6)
    ids = torch.randint(2, 90, (4, length), generator=torch.Generator().manual_seed(0))
    wanted, stepper = model(ids, use_cache=False).logits, ModelStepper(model, 3, length)
    sequence, position = torch.tensor([0, 1, 2]), torch.tensor([0, -3, -length // 2])
    compared = 0
    for _ in range(length + length // 4):
        position[(position == length // 2) & (sequence == 1)] = 0
        sequence[(position == 0) & (sequence == 1) & (compared > length)] = 3
        at = position.clamp(0, length - 1)
        logits = stepper.step(ids[sequence, at], at, int(at.max()) + 1)
        live = (position >= 0) & (position < length)
        assert torch.allclose(logits[live], wanted[sequence, at][live], atol=2e-4, rtol=1e-3)
        compared += int(live.sum())
        position += 1
    assert compared > 2 * length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_row_is_bitwise_the_same_beside_any_others(dtype):
    """Blocks that only other rows need change nothing."""
    model = llama(max_position_embeddings=1024).to(getattr(torch, dtype))
    ids = torch.randint(2, 90, (100,), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(2, 90, (100, 8), generator=torch.Generator().manual_seed(1))
    alone, crowded = ModelStepper(model, 8, 1000), ModelStepper(model, 8, 1000)
    others = torch.tensor([0, 900, 3, 500, 64, 63, 127, 10])
    for i in range(100):
        tokens = noise[i].clone()
        tokens[5] = ids[i]
        positions = others + i
        positions[5] = i
        first = torch.zeros(8, dtype=torch.int64)
        first[2] = ids[i]
        wanted = alone.step(first, torch.tensor([0, 0, i, 0, 0, 0, 0, 0]), i + 1)[2]
        assert torch.equal(crowded.step(tokens, positions, 1000)[5], wanted), i


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = gemma3()
    before = model.config._attn_implementation
    ids = torch.arange(2, 12)[None]
    wanted = model(ids).logits
    stepper = ModelStepper(model, 2, 8)
    stepper.step(torch.tensor([3, 4]), torch.tensor([0, 0]), 1)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, wanted)


@torch.no_grad()
def test_a_compiled_model_gives_the_same_logits():
    model = llama()
    plain, compiled = ModelStepper(model, 4, 8), ModelStepper(model, 4, 8, compiled=True)
    for i in range(3):
        at = torch.full((4,), i)
        assert torch.allclose(plain.step(at + 5, at, i + 1), compiled.step(at + 5, at, i + 1), atol=1e-5)


def test_a_model_that_attends_in_ways_of_its_own_is_refused():
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match=r"teacher: MambaForCausalLM .*pass a CallableTeacher"):
        ModelStepper(MambaForCausalLM(config).eval(), 2, 8)
    model = llama()
    model.model.layers[0].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states.flip(1), None)
    with pytest.raises(ValueError, match="gives other logits in slots than by itself"):
        ModelStepper(model, 2, 8)
    model = llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="has layers of type linear_attention"):
        ModelStepper(model, 2, 8)


@pytest.mark.parametrize(("build", "positions"), [(llama, 64), (gpt2, 64), (opt, 32)])
@torch.no_grad()
def test_a_sample_longer_than_the_teachers_positions_is_refused(build, positions):
    ModelStepper(build(), 2, positions)
    with pytest.raises(ValueError, match=rf"max_length: got {positions + 1}, the teacher has {positions} positions"):
        ModelStepper(build(), 2, positions + 1)


@torch.no_grad()
def test_a_function_as_the_teacher():
    model = llama()
    stepper = CallableStepper(CallableTeacher(lambda ids: model(ids).logits, 97, "mine"), 3, 10)
    ids = torch.randint(2, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits
    for i in range(10):
        at = torch.full((3,), i)
        assert torch.allclose(stepper.step(ids[:, i], at, i + 1), wanted[:, i], atol=1e-4)
    with pytest.raises(ValueError, match=r"mine returned logits of shape \(3, 97\), expected \(3, 10, 97\)"):
        CallableStepper(CallableTeacher(lambda ids: torch.zeros(3, 97), 97, "mine"), 3, 10).step(ids[:, 0], ids[:, 0] * 0, 1)
    with pytest.raises(ValueError, match="function: got a int"):
        CallableTeacher(3, 97, "mine")
    with pytest.raises(ValueError, match=r"end_tokens: got \(97,\)"):
        CallableTeacher(lambda ids: ids, 97, "mine", end_tokens=(97,))
