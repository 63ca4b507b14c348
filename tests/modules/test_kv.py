"""Keys and values on their grid, against attention computed by hand; float64, so that no rounding of a product flips a code."""

import sys

import pytest
import torch
from models import gemma3, gpt2, llama, logits_of, mlp, qwen3, qwen3_moe, token_ids
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lightning_qat import KVSpec, QuantScheme, fake_quantize, insert_quantizers

GRANULARITIES = ("token_head", "token")
each_position = pytest.mark.parametrize("position", ["post_rope", "pre_rope"])
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def kv_scheme(position="post_rope", granularity="token_head", bits=4):
    return QuantScheme(kv=KVSpec(bits=bits, position=position, granularity=granularity))


def with_kv(model, scheme=None):
    model = model.double()
    insert_quantizers(model, scheme or kv_scheme())
    return model


def close(got, wanted, atol=1e-9):
    return torch.allclose(got, wanted, atol=atol, rtol=0)


def on_grid(x, spec):
    """x [batch, heads, tokens, head_dim]: one scale per token and head, or per token over its heads laid side by side."""
    if spec.granularity == "token_head":
        return fake_quantize(x, spec.tensor)
    batch, heads, tokens, width = x.shape
    flat = x.permute(0, 2, 1, 3).reshape(batch, tokens, heads * width)
    return fake_quantize(flat, spec.tensor).reshape(batch, tokens, heads, width).permute(0, 2, 1, 3)


def one_layer_llama_by_hand(model, ids, spec):
    """The forward pass of a Llama with one layer, quantization written in where `spec.position` says."""
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    hidden = model.model.embed_tokens(ids)
    x = layer.input_layernorm(hidden)
    heads = lambda y: y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    q, k, v = heads(attention.q_proj(x)), heads(attention.k_proj(x)), heads(attention.v_proj(x))
    if spec.position == "pre_rope":
        k, v = on_grid(k, spec), on_grid(v, spec)
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(ids.shape[1])[None]))
    if spec.position == "post_rope":
        k, v = on_grid(k, spec), on_grid(v, spec)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(-2))
    return model.lm_head(model.model.norm(hidden + layer.mlp(layer.post_attention_layernorm(hidden))))


@each_position
@each_granularity
@torch.no_grad()
def test_llama_against_attention_by_hand(position, granularity):
    scheme = kv_scheme(position, granularity)
    model = llama(num_hidden_layers=1).double()
    expected, float_logits = one_layer_llama_by_hand(model, token_ids(), scheme.kv), logits_of(model)
    got = logits_of(with_kv(model, scheme))
    assert close(got, expected)
    assert (got - float_logits).abs().max() > 1e-2


@each_position
def test_the_four_forms_differ(position):
    """Otherwise the test above could not tell them apart."""
    forms = [logits_of(with_kv(llama(), kv_scheme(position, granularity))) for granularity in GRANULARITIES]
    assert not close(*forms)
    other = kv_scheme("pre_rope" if position == "post_rope" else "post_rope")
    assert not close(forms[0], logits_of(with_kv(llama(), other)))


@pytest.mark.parametrize("build", [qwen3, gemma3, qwen3_moe])
@each_granularity
def test_pre_rope_quantizes_what_k_norm_returns(build, granularity, monkeypatch):
    model, scheme = build(experts_implementation="eager").double(), kv_scheme("pre_rope", granularity)
    attention = model.model.layers[0].self_attn
    home, seen = sys.modules[type(attention).__module__], []
    rope = home.apply_rotary_pos_emb
    monkeypatch.setattr(home, "apply_rotary_pos_emb", lambda q, k, *rest, **more: seen.append((q, k)) or rope(q, k, *rest, **more))
    logits_of(model)
    (q, k), *_ = seen
    seen.clear()
    logits_of(with_kv(model, scheme))
    (got_q, got_k), *_ = seen
    assert torch.equal(got_q, q)
    assert close(got_k, on_grid(k, scheme.kv))
    assert not close(got_k, k)


@each_granularity
@torch.no_grad()
def test_pre_rope_quantizes_what_v_proj_returns(granularity):
    scheme = kv_scheme("pre_rope", granularity)
    attention = with_kv(qwen3(), scheme).model.layers[0].self_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    plain = functional.linear(x, attention.v_proj.weight).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    assert close(attention.v_proj(x), on_grid(plain, scheme.kv).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("build", [llama, qwen3, gemma3, gpt2])
@each_granularity
def test_eager_and_sdpa_agree(build, granularity):
    logits = {}
    for name in ("eager", "sdpa"):
        logits[name] = logits_of(with_kv(build(attn_implementation=name), kv_scheme("post_rope", granularity)))
    assert close(logits["eager"], logits["sdpa"], atol=1e-5)  # eager attention takes its softmax in fp32
    assert not close(logits["sdpa"], logits_of(build().double()))


def test_the_implementation_can_be_changed_afterwards():
    model = with_kv(llama())
    wanted = logits_of(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(token_ids(), output_attentions=True)
    assert close(out.logits, wanted, atol=1e-5)
    assert out.attentions[0].shape == (2, 4, 10, 10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [llama, gemma3, qwen3])
@each_position
@torch.no_grad()
def test_padding_changes_nothing_for_real_tokens(build, position, side):
    model = with_kv(build(), kv_scheme(position))
    row = token_ids(rows=1, length=7, seed=3)
    alone = model(row).logits
    padding, real = torch.zeros(1, 3, dtype=row.dtype), slice(3, None) if side == "left" else slice(7)
    ids = torch.cat([padding, row] if side == "left" else [row, padding], dim=1)
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = torch.cat([ids, token_ids(rows=1, length=10)])  # beside a row without padding
    full = torch.ones_like(mask), torch.arange(10)[None]
    padded = model(batch, attention_mask=torch.cat([mask, full[0]]), position_ids=torch.cat([positions, full[1]])).logits
    assert close(padded[:1, real], alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", [llama, gemma3])
@each_position
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_sequence(build, position, cache):
    model, ids = with_kv(build(), kv_scheme(position)), token_ids()
    expected = model(ids, use_cache=False).logits
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    prefill = model(ids[:, :8], past_key_values=past, use_cache=True).logits
    steps = [model(ids[:, t : t + 1], past_key_values=past, use_cache=True).logits for t in (8, 9)]
    assert close(torch.cat([prefill, *steps], dim=1), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_position
def test_generate_runs(position, cache):
    ids = token_ids(length=5)
    out = with_kv(llama(), kv_scheme(position)).generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    assert out.shape == (2, 9)
    assert torch.equal(out[:, :5], ids)


@each_position
def test_a_teacher_with_the_same_config_is_left_alone(position):
    config = llama().config
    teacher, student = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before, implementation = logits_of(teacher), config._attn_implementation
    insert_quantizers(student, QuantScheme(kv=KVSpec(bits=4, position=position)))
    assert torch.equal(logits_of(teacher), before)
    assert config._attn_implementation == implementation
    assert student.config is config


@each_position
@each_granularity
def test_gradients_pass_as_if_nothing_were_quantized(position, granularity):
    """With 8 bits the identity estimator gives almost the float gradient, for keys and values too."""
    gradients = []
    for scheme in (None, kv_scheme(position, granularity, bits=8)):
        model = llama().double() if scheme is None else with_kv(llama(), scheme)
        model(token_ids()).logits.logsumexp(-1).sum().backward()
        attention = model.model.layers[0].self_attn
        gradients.append(torch.cat([attention.k_proj.weight.grad, attention.v_proj.weight.grad]))
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()
    assert not torch.equal(*gradients)


def test_pre_rope_of_gpt2_is_refused_by_name():
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn: kv\.position: 'pre_rope'.*k_proj.*'post_rope'"):
        insert_quantizers(gpt2(), kv_scheme("pre_rope"))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"QuantScheme\.kv: no attention module"):
        insert_quantizers(mlp(), "w4kv4")


@pytest.mark.parametrize("head_dim", [8, 16])
@torch.no_grad()
def test_pre_rope_follows_the_head_dimension(head_dim):
    """Heads wider than hidden / heads: one scale per head of what the projection really returns."""
    attention = with_kv(llama(head_dim=head_dim), kv_scheme("pre_rope")).model.layers[0].self_attn
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    plain = functional.linear(x, attention.k_proj.weight)
    assert close(attention.k_proj(x), fake_quantize(plain.unflatten(-1, (2, -1)), kv_scheme().kv.tensor).flatten(-2))
