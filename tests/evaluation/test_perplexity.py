"""Perplexity: every token once, whatever the batches, and by hand where that is possible."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, character_tokenizer, gpt2, llama, token_ids
from torch import nn

from lightning_qat import insert_quantizers
from lightning_qat.evaluation import HELD_OUT, TokenPerplexity, read_documents, score_text, text_windows
from lightning_qat.losses import next_token_nll

TOKENIZER = character_tokenizer()
LENGTHS = (12, 7, 2, 9, 12, 5, 3)
WINDOWS = [token_ids(1, length, seed=i)[0] for i, length in enumerate(LENGTHS)]


@torch.no_grad()
def nats_one_by_one(model):
    """An oracle without batches: log-softmax of each window alone."""
    total = 0.0
    for window in WINDOWS:
        scores = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        total -= scores.gather(-1, window[1:, None]).sum().item()
    return total


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_score_does_not_depend_on_the_batches(build, dtype, tolerance):
    model = build().to(dtype)
    expected = nats_one_by_one(model)
    for batch_size in (1, 3, 16):
        score = score_text(model, WINDOWS, batch_size)
        assert score.tokens == sum(LENGTHS) - len(LENGTHS)
        assert score.nats == pytest.approx(expected, rel=tolerance)
        assert score.perplexity == pytest.approx(math.exp(expected / score.tokens), rel=tolerance * 10)
        assert score.bits_per_byte is None


def test_bits_per_byte_by_hand():
    class Uniform(nn.Module):
        """No token is likelier than another."""

        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 64)})

    score = score_text(Uniform(), [torch.arange(5), torch.arange(9)], text_bytes=36)
    assert score.tokens == 12
    assert score.perplexity == pytest.approx(64)
    assert score.nats == pytest.approx(12 * math.log(64))
    assert score.bits_per_byte == pytest.approx(12 * 6 / 36)


def test_the_model_comes_back_in_its_mode_and_without_a_cache():
    model = llama().train()
    insert_quantizers(model, "w4a8kv4")
    before = score_text(model, WINDOWS)
    assert model.training
    assert score_text(model.eval(), WINDOWS) == before  # scored in eval mode
    assert not model.training
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    assert score_text(model, WINDOWS) != before
    with pytest.raises(IndexError):
        score_text(model.train(), [torch.tensor([1, VOCABULARY])])
    assert model.training


def test_progress_counts_windows():
    steps = []
    score_text(llama(), WINDOWS, 3, progress=steps.append)
    assert steps == [3, 3, 1]


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no window has two tokens"):
        score_text(llama(), [])


# ---------------------------------------------------------------- the metric


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_scored(side):
    logits, ids = torch.randn(2, 8, 11), torch.randint(0, 11, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    where = slice(0, 3) if side == "left" else slice(5, 8)
    real = slice(3, 8) if side == "left" else slice(0, 5)
    mask[1, where] = 0
    padded, alone = TokenPerplexity(), TokenPerplexity()
    padded.update(*next_token_nll(logits, ids, mask))
    alone.update(*next_token_nll(logits[:1], ids[:1]))
    alone.update(*next_token_nll(logits[1:, real], ids[1:, real]))
    assert padded.tokens == alone.tokens == 7 + 4
    torch.testing.assert_close(padded.compute(), alone.compute(), rtol=1e-6, atol=0)


def test_instances_merge_by_tokens():
    logits, ids = torch.randn(6, 9, 11), torch.randint(0, 11, (6, 9))
    whole, first, second = TokenPerplexity(), TokenPerplexity(), TokenPerplexity()
    whole.update(*next_token_nll(logits, ids))
    first.update(*next_token_nll(logits[:1, :3], ids[:1, :3]))  # 2 tokens, as many as decide against a mean of means
    rest = torch.ones(6, 9, dtype=torch.long)
    rest[0, :2] = 0
    second.update(*next_token_nll(logits, ids, rest))
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), whole.compute(), rtol=1e-6, atol=0)
    assert second.tokens == whole.tokens == 48
    first.reset()
    assert first.tokens == 0


# ---------------------------------------------------------------- windows

DOCUMENTS = st.lists(st.text(alphabet=[chr(code) for code in range(32, 127)], max_size=40), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 50))
def test_every_token_is_scored_exactly_once(documents, length):
    windows = text_windows(TOKENIZER, documents, length)
    assert all(2 <= len(window) <= length and window.dtype == torch.int64 for window in windows)
    scored = [token for window in windows for token in window[1:].tolist()]
    assert scored == [ord(character) - 30 for document in documents for character in document]  # BOS is the one not scored
    context = [token for window in windows for token in window[:-1].tolist()]
    assert context == [token for document in documents for token in [1, *(ord(c) - 30 for c in document)][:-1] if document]


def test_without_bos_the_first_token_of_a_document_is_context():
    plain = type("Plain", (), {"bos_token_id": None, "__call__": lambda self, text, **_: {"input_ids": [ord(c) for c in text]}})()
    windows = text_windows(plain, ["abcde", "x", ""], 3)
    assert [window.tolist() for window in windows] == [[97, 98, 99], [99, 100, 101]]


# ---------------------------------------------------------------- documents


def test_documents_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße\n\nzwei", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["Grüße\n\nzwei"]
    lines = [{"text": "one\u2028line"}, {"text": "two", "more": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one\u2028line", "two"]


def test_the_bundled_text_is_there():
    documents = read_documents(HELD_OUT)
    assert sum(map(len, documents)) > 1000
    assert all(document.strip() for document in documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"text: no file at .*missing\.txt.*'held-out'"),
        ("empty.txt", " \n ", "holds no text"),
        ("empty.jsonl", "", "holds no text"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "one JSON object with a 'text' field a line"),
        ("other.jsonl", '{"content": "a"}', "one JSON object with a 'text' field a line"),
        ("list.jsonl", "[1]", "one JSON object with a 'text' field a line"),
        ("number.jsonl", '{"text": 3}', "one JSON object with a 'text' field a line"),
        ("latin.txt", b"caf\xe9", "latin.txt"),
    ],
)
def test_text_that_cannot_be_read_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="text: no file at"):
        read_documents(tmp_path)
