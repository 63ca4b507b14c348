"""Tokenizers in GGUF files: texts become the same ids again, or the tokenizer is refused."""

import pytest
from byte_tokenizers import ROWS, byte_tokenizer
from models import character_tokenizer, llama
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lightning_qat import export, insert_quantizers
from lightning_qat.formats.gguf.tokenizer import compare_tokenizers

gguf = pytest.importorskip("gguf")

TEXTS = ("def f(x):\n    return x + 1.5", "Grüße 12345 we'll see…\r\n\n", "<|user|> hi <think>", " a  b ")


def quantized(rows=ROWS):
    model = llama(hidden_size=64, intermediate_size=64, vocab_size=rows, num_hidden_layers=1)
    insert_quantizers(model, "gguf-q4_0")
    return model


def with_split(name):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


def chatty():
    """Tokens of its own, a beginning for every text, a template."""
    tokenizer = with_split("llama-bpe")
    tokenizer.add_tokens([AddedToken("<|user|>", special=True), AddedToken("<think>", normalized=False)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    return tokenizer


CASES = {
    "gpt-2": (byte_tokenizer, "gpt-2", ROWS),
    "llama": (lambda: with_split("llama-bpe"), "llama-bpe", ROWS),
    "qwen": (lambda: with_split("qwen2"), "qwen2", ROWS),
    "tekken": (lambda: with_split("tekken"), "tekken", ROWS),
    "gpt-4o": (lambda: with_split("gpt-4o"), "gpt-4o", ROWS),
    "more-rows": (chatty, "llama-bpe", 300),
}


@pytest.mark.parametrize(("build", "name", "rows"), CASES.values(), ids=CASES)
def test_texts_become_the_same_ids(build, name, rows, tmp_path):
    tokenizer = build()
    folder = export(quantized(rows), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text)
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(folder / "model.gguf").fields.items() if "tokenizer" in key}
    assert fields["tokenizer.ggml.pre"] == name
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == rows
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 0)
    assert read.chat_template == tokenizer.chat_template


def test_special_tokens_and_those_of_a_user_have_their_types(tmp_path):
    folder = export(quantized(300), tmp_path / "out", format="gguf", tokenizer=chatty())
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    types = dict(zip(fields["tokenizer.ggml.tokens"].contents(), map(int, fields["tokenizer.ggml.token_type"].contents()), strict=True))
    assert [types[token] for token in ("<s>", "<|user|>", "<think>", "ab", "[PAD290]")] == [3, 3, 4, 1, 5]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def lowercase():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_other_split():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("build", "rows", "message"),
    [
        (lambda: None, ROWS, "tokenizer: none is known for this model.*pass tokenizer= to export"),
        (lowercase, ROWS, "normalizer.*Lowercase.*SentencePiece vocabularies are not supported"),
        (with_other_split, ROWS, "cuts text into words by.*Whitespace.*no name in GGUF"),
        (character_tokenizer, ROWS, "cuts text into words by.*no name in GGUF"),
        (byte_tokenizer, 96, "tokenizer: has a token 261, the model's embedding has 96 rows"),
        (object, ROWS, "tokenizer: got <object.*expected a tokenizer of transformers"),
    ],
    ids=["none", "normalizer", "split", "characters", "too-large", "not-a-tokenizer"],
)
@pytest.mark.filterwarnings("ignore:export. no tokenizer:UserWarning")
def test_tokenizers_the_file_cannot_hold_are_refused(build, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(quantized(rows), tmp_path / "out", format="gguf", tokenizer=build())
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_reads_back_otherwise_is_an_error():
    mine, theirs = byte_tokenizer(), lowercase()
    compare_tokenizers(mine, byte_tokenizer())
    with pytest.raises(RuntimeError, match="the tokenizer reads back differently"):
        compare_tokenizers(mine, theirs)
    theirs = byte_tokenizer()
    theirs.pad_token = theirs.eos_token
    with pytest.raises(RuntimeError, match="pad_token_id is 0, read back 2"):
        compare_tokenizers(mine, theirs)
