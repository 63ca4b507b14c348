"""The tokenizer of a GGUF file: a byte-level BPE vocabulary with its merges, special tokens and chat template.

Readers know rules that cut text into words by name only (``tokenizer.ggml.pre``). Anything else than byte-level BPE with one of those
rules is refused: it would encode text differently. Every export is read back with transformers, and must encode texts to the same ids.
"""

import json
from typing import Any

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
PRE_TOKENIZERS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
PROBES = (
    "The quick brown fox can't jump over 12345 lazy dogs.",
    "def f(x: int) -> str:\n    return x['a'] + \"b\"  # 3.14\n\n\tpass\r\n",
    "  two  spaces   three, and trailing   ",
    "Grüße, naïve café — “quotes” … 你好，世界 🙂 привет",
    "",
)


def check_tokenizer(tokenizer: Any, rows: int) -> str:
    """The name of the rule that cuts text into words.

    Args:
        tokenizer: A tokenizer of transformers, or None.
        rows: Rows of the model's embedding.

    Raises:
        ValueError: No tokenizer, one that a GGUF file cannot hold, or one with more tokens than the model.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: none is known for this model, and a GGUF file holds it; pass tokenizer= to export")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}; GGUF files are written for tokenizers of the tokenizers library")
    described = json.loads(backend.to_str())
    model, normalizer = described["model"], described["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, {"type": "NFC"}):
        raise ValueError(
            f"tokenizer: got {model['type']} with byte_fallback={model.get('byte_fallback')} and normalizer {normalizer}; GGUF files are "
            "written for byte-level BPE (as of GPT-2, Llama 3, Qwen), SentencePiece vocabularies are not supported"
        )
    if (highest := max(tokenizer.get_vocab().values())) >= rows:
        raise ValueError(f"tokenizer: has a token {highest}, the model's embedding has {rows} rows; pass the model's own tokenizer")
    return _pre_tokenizer(described["pre_tokenizer"])


def _pre_tokenizer(described: dict[str, Any] | None) -> str:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = (described or {}).get("pretokenizers") or [described or {}]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        if len(steps) == 2 and not last.get("use_regex", True) and steps[0].get("behavior") == "Isolated":
            rules = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in reversed(PRE_TOKENIZERS)}
            if (name := rules.get((steps[0].get("pattern") or {}).get("Regex", ""))) is not None:
                return name
    raise ValueError(
        f"tokenizer: cuts text into words by {json.dumps(described)[:200]}, which has no name in GGUF; known are byte-level "
        f"tokenizers with the rules {('gpt-2', *PRE_TOKENIZERS)}"
    )


def write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """The tokenizer's keys; `writer` is a ``gguf.GGUFWriter``. Ids without a token are filled up to `rows` with unused ones."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in described["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(check_tokenizer(tokenizer, rows))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([added.get(index, NORMAL if index in by_id else UNUSED) for index in range(rows)])
    if merges:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    writer.add_add_bos_token(whole != bare and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(whole != bare and whole[-1] == tokenizer.eos_token_id)
    if template := tokenizer.chat_template:
        named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else template
        writer.add_chat_template(named)


def compare_tokenizers(mine: Any, theirs: Any) -> None:
    """Both must encode texts to the same ids, with and without special tokens, and the names of special tokens to one id each.

    Raises:
        RuntimeError: They differ.
    """
    for text in (*PROBES, *mine.all_special_tokens):
        for special in (False, True):
            left, right = (tokenizer.encode(text, add_special_tokens=special) for tokenizer in (mine, theirs))
            if left != right:
                raise RuntimeError(f"export: the tokenizer reads back differently: {text!r} is {left}, read back {right}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if (left := getattr(mine, name)) != (right := getattr(theirs, name)):
            raise RuntimeError(f"export: the tokenizer reads back differently: {name} is {left}, read back {right}")
