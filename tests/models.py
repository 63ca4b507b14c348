"""Tiny random models for the tests: hidden size 32, two layers, the same weights on every call."""

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide enough that a flipped code shows in the logits
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _build(model_class, config, **settings):
    torch.manual_seed(1234)
    model = model_class(config(**settings)).eval()
    with torch.no_grad():  # norms that are all ones and biases that are all zero hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def llama(**changes):
    """Grouped-query attention; `tie_word_embeddings=True` ties the head."""
    return _build(LlamaForCausalLM, LlamaConfig, **SIZES | {"tie_word_embeddings": False} | changes)


def tied_llama(**changes):
    return llama(tie_word_embeddings=True, **changes)


def llama3(**changes):
    """RoPE scaling as in Llama 3.1 and 3.2, head tied."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return llama(**{"rope_parameters": rope, "tie_word_embeddings": True} | changes)


def qwen3(**changes):
    """Normalised queries and keys; the head dimension is not hidden / heads."""
    return _build(Qwen3ForCausalLM, Qwen3Config, **SIZES | {"head_dim": 16, "tie_word_embeddings": True} | changes)


def gemma3(**changes):
    """One sliding and one full layer, normalised keys, and most weights in the (tied, scaled) embedding."""
    settings = {"head_dim": 16, "vocab_size": 3000, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return _build(Gemma3ForCausalLM, Gemma3TextConfig, **SIZES | settings | {"query_pre_attn_scalar": 16} | changes)


def gpt2(**changes):
    """transformers' Conv1D layers, q, k and v in one of them."""
    settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return _build(GPT2LMHeadModel, GPT2Config, **settings | ids | changes)


def opt(**changes):
    """Biases everywhere, learned positions."""
    settings = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_key_value_heads", "initializer_range")}
    more = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "dropout": 0.0, "init_std": 0.2}
    return _build(OPTForCausalLM, OPTConfig, **settings | more | changes)


def mixtral(**changes):
    """Mixture of experts, expert weights in 3-d parameters."""
    return _build(MixtralForCausalLM, MixtralConfig, **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes)


def qwen3_moe(**changes):
    settings = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig, **SIZES | settings | changes)


def vit(**changes):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
    image = {"image_size": 16, "patch_size": 4, "num_labels": 5, "hidden_dropout_prob": 0.0}
    return _build(ViTForImageClassification, ViTConfig, **settings | image | changes)


class CNN(nn.Module):
    """3 -> 8, depthwise 8 -> 8, a linear classifier; images [batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.classifier = nn.Linear(8, 4)

    def forward(self, images):
        x = self.depthwise(self.stem(images).relu()).relu()
        return self.classifier(x.mean((-1, -2)))


class CNN1d(nn.Module):
    """The same idea over sequences [batch, 3, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False)
        self.classifier = nn.Linear(8, 4)

    def forward(self, signal):
        x = self.depthwise(self.stem(signal).relu()).relu()
        return self.classifier(x.mean(-1))


def cnn():
    torch.manual_seed(1234)
    return CNN().eval()


def cnn1d():
    torch.manual_seed(1234)
    return CNN1d().eval()


def mlp():
    torch.manual_seed(1234)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


LANGUAGE_MODELS = {
    "llama": llama,
    "llama-tied": tied_llama,
    "llama3": llama3,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "opt": opt,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
}


def character_tokenizer():
    """One token a printable ASCII character, that is one byte; with padding (0) and BOS (1) these are the ids of the models above."""
    vocabulary = {"<pad>": 0, "<s>": 1} | {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


def save_causal_lm(model, folder):
    """The model and its tokenizer where a teacher is expected by path."""
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def token_ids(rows=2, length=10, seed=0):
    """Random ids without the padding id."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(model):
    """Keyword arguments of one forward pass of a transformers model above."""
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": token_ids()}


@torch.no_grad()
def logits_of(model, **changes):
    """Logits of one forward pass of any model above; `changes` are further keyword arguments."""
    if isinstance(model, CNN | CNN1d | nn.Sequential):
        shape = {CNN: (2, 3, 8, 8), CNN1d: (2, 3, 12), nn.Sequential: (2, 16)}[type(model)]
        return model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return model(**inputs_of(model) | changes).logits
