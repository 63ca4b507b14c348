"""Loading a teacher, and which of its tokens may start a sample."""

from types import SimpleNamespace

import pytest
import torch
from models import character_tokenizer, gpt2, llama, qwen3, save_causal_lm, vit
from torch import nn
from transformers import LlamaConfig

from lightning_qat.generation import fingerprint, load_causal_lm, load_tokenizer, start_tokens

# ---------------------------------------------------------------- start tokens


def teacher_with(size, **ids):
    config = LlamaConfig(vocab_size=size, **{"bos_token_id": None, "eos_token_id": None} | ids)
    return SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(size, 2), config=config, generation_config=None)


def test_special_and_unused_ids_do_not_start_a_sample():
    tokenizer = character_tokenizer()
    assert start_tokens(teacher_with(97), tokenizer) == list(range(2, 97))
    assert start_tokens(teacher_with(128), tokenizer) == list(range(2, 97))  # ids that only pad the matrix
    assert start_tokens(teacher_with(50), tokenizer) == list(range(2, 50))
    assert start_tokens(teacher_with(9, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0), None) == [3, 4, 6, 7, 8]


class HoleyTokenizer:
    """Three tokens whose ids leave some out."""

    all_special_ids = [0]

    def get_vocab(self):
        return {"a": 0, "b": 2, "c": 5}

    def __len__(self):
        return 3


def test_ids_that_the_tokenizer_skips_do_not_start_a_sample():
    assert start_tokens(teacher_with(8), HoleyTokenizer()) == [2, 5]
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert start_tokens(teacher_with(98), tokenizer)[-1] == 97


def test_end_tokens_of_the_generation_config_do_not_start_a_sample():
    model = llama()
    model.generation_config.eos_token_id = [7, 8]  # where Llama 3 keeps its second end token
    assert {7, 8}.isdisjoint(start_tokens(model, None))


def test_an_empty_start_set_is_refused():
    with pytest.raises(ValueError, match=r"none of the 2 token ids is neither special nor unused"):
        start_tokens(teacher_with(2), character_tokenizer())


# ---------------------------------------------------------------- loading


def test_teachers_that_are_none(tmp_path):
    for path in (tmp_path / "nothing", "./nothing/here"):
        with pytest.raises(ValueError, match=r"teacher: no folder at '.*nothing.*tiny-teacher"):
            load_causal_lm(path)
    with pytest.raises(ValueError, match=r"teacher: cannot read a model configuration from"):
        load_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: none can be read from"):
        load_tokenizer(tmp_path)
    vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"is a ViTConfig, which has no causal language model"):
        load_causal_lm(tmp_path / "vit")


@pytest.mark.parametrize("build", [llama, gpt2, qwen3])
def test_a_folder_without_a_tokenizer_is_refused(build, tmp_path):
    """transformers makes up an empty one for some model types."""
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: none can be read from"):
        load_tokenizer(tmp_path)


def test_a_teacher_without_weights_is_refused(tmp_path):
    folder = save_causal_lm(llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="teacher: "):
        load_causal_lm(folder)


def test_a_saved_teacher_is_the_same(tmp_path):
    model = load_causal_lm(save_causal_lm(llama(), tmp_path))
    assert not model.training
    ids = torch.arange(2, 12).unsqueeze(0)
    assert torch.equal(model(ids).logits, llama()(ids).logits)
    assert fingerprint(model) == fingerprint(llama())


def test_the_fingerprint_changes_with_any_weight():
    def changed(edit):
        model = llama()
        with torch.no_grad():
            edit(model.model.layers[1].mlp.up_proj.weight)
        return fingerprint(model)

    found = [
        changed(lambda weight: None),
        changed(lambda weight: weight[3, 4].mul_(1 + 1e-6)),
        changed(lambda weight: weight.neg_()),
        changed(lambda weight: weight[3].copy_(weight[3].flip(0))),  # the same numbers in another order
    ]
    assert len(set(found)) == 4
