"""What samples start with: the paper's rule number for number, prompts as they were given, and BOS as the tokenizer does."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import character_tokenizer, gpt2, llama
from tokenizers.processors import TemplateProcessing

from lightning_qat.generation import load_tokenizer
from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.sample import ASSISTANT
from lightning_qat.generation.scripts import ALL, Span, StartTokens, build_script, resolve_bos
from lightning_qat.generation.scripts.chat import Chat
from lightning_qat.generation.scripts.prompts import Prompts, read_prompts
from lightning_qat.generation.settings import GenerationSettings


def only(script, index=0):
    (span,) = script.spans(index)
    return span


# ---------------------------------------------------------------- start tokens

M64 = 2**64 - 1


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def draw_by_hand(seed, index, position):
    return (mix(mix(mix(seed) ^ index) ^ position) >> 11) / 2**53


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**40), st.integers(1, 5000), st.integers(0, 9), st.integers(0, 9))
def test_start_and_greedy_tokens_are_drawn_by_seed_and_index(seed, index, size, low, more):
    allowed = list(range(100, 100 + size))
    span = only(StartTokens(allowed, [5, 7], seed, (low, low + more)), index)
    start = allowed[int(draw_by_hand(seed, index, 0) * size)]
    assert span == Span([start], ASSISTANT, low + int(draw_by_hand(seed, index, 1) * (more + 1)), frozenset({5, 7}))


def test_the_numbers_are_those_of_the_tensor_formula():
    allowed, index = list(range(3, 30_003)), torch.arange(1000)
    starts = torch.tensor(allowed)[(uniform(7, index, 0) * len(allowed)).long()]
    greedy = 3 + (uniform(7, index, 1) * 3).long()
    script = StartTokens(allowed, [], 7, (3, 5))
    spans = [only(script, i) for i in range(1000)]
    assert [span.forced for span in spans] == starts.unsqueeze(-1).tolist()
    assert [span.greedy for span in spans] == greedy.tolist()


def test_the_modes_differ_in_how_many_tokens_are_the_most_probable():
    spans = {mode: only(StartTokens([8, 9], [1], 3, (4, 4), mode=mode), 6) for mode in ("hybrid", "greedy", "sample")}
    assert {mode: span.greedy for mode, span in spans.items()} == {"hybrid": 4, "greedy": ALL, "sample": 0}
    assert len({span.forced[0] for span in spans.values()}) == 1


def test_bos_comes_first():
    plain, with_bos = (StartTokens(range(50), [1], 3, (3, 5), bos=bos) for bos in (None, 77))
    for index in range(20):
        assert only(with_bos, index) == only(plain, index)._replace(forced=[77, *only(plain, index).forced])


def test_the_identity_holds_start_tokens_ends_and_bos():
    scripts = [
        StartTokens(*arguments)
        for arguments in (([3], [1], 0, (3, 5)), ([4], [1], 0, (3, 5)), ([3], [2], 0, (3, 5)), ([3], [1], 0, (3, 5), 9))
    ]
    assert len({json.dumps(script.identity) for script in scripts}) == 4
    assert StartTokens([3], [2, 1], 0, (3, 5)).identity == StartTokens((3,), (1, 2), 0, (3, 5)).identity
    assert not any(script.keeps_roles for script in scripts)


# ---------------------------------------------------------------- prompts


def prompts_of(prompts, ends=(1,), bos=None, vocab_size=50, max_length=6):
    return Prompts(prompts, list(ends), bos, vocab_size=vocab_size, max_length=max_length)


def test_prompts_are_continued_in_turn():
    script = prompts_of([[4, 5], [6], [7, 8, 9, 10, 49]], ends=[1, 2])
    assert [only(script, index).forced for index in range(5)] == [[4, 5], [6], [7, 8, 9, 10, 49], [4, 5], [6]]
    assert only(script)[1:] == (ASSISTANT, 0, {1, 2})
    assert script.keeps_roles


def test_bos_is_not_doubled():
    assert [only(prompts_of([[4], [3, 4], [], [4, 3]], bos=3), index).forced for index in range(4)] == [[3, 4], [3, 4], [3], [3, 4, 3]]


def test_the_identity_holds_prompts_and_bos():
    scripts = [prompts_of([[4, 5]]), prompts_of([[4], [5]]), prompts_of([[4, 5]], bos=3), prompts_of([[4, 5]], ends=[2])]
    assert len({json.dumps(script.identity) for script in scripts}) == 4
    assert prompts_of(((4, 5),)).identity == scripts[0].identity


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts: got none, expected at least one"),
        ([[4], []], {}, r"prompts\[1\]: got no tokens, expected at least one"),
        ([[4], [5, 50], [99]], {}, r"prompts\[1\]: got token 50, expected 0 to 49"),
        ([[-1]], {}, r"prompts\[0\]: got token -1"),
        ([[4], [4] * 6, [4] * 9], {}, r"prompts\[1\]: got 6 tokens, expected fewer than max_length=6"),
        ([[4] * 5], {"bos": 3}, r"prompts\[0\]: got 6 tokens with BOS, expected fewer than max_length=6"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(prompts, **changes)


# ---------------------------------------------------------------- prompts from files


def characters(text):
    return [ord(character) - 30 for character in text]


def test_prompts_are_the_lines_of_a_text(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"Once upon\r\n\n  a time\n   \nend")
    wanted = [characters(text) for text in ("Once upon", "  a time", "end")]
    assert read_prompts(tmp_path / "prompts.txt", character_tokenizer()) == wanted


def test_prompts_are_the_lines_of_a_table(tmp_path):
    lines = [{"text": "Once"}, {"prompt": "upon", "id": 7}, {"input_ids": [5, 6]}, {"text": ""}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    wanted = [characters("Once"), characters("upon"), [5, 6], []]
    assert read_prompts(str(tmp_path / "prompts.jsonl"), with_bos(character_tokenizer())) == wanted
    (tmp_path / "prompts.jsonl").write_text('{"input_ids": [5, 6]}')
    assert read_prompts(tmp_path / "prompts.jsonl", None) == [[5, 6]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.csv", b"a", "prompts: no file at '.*prompts.csv' that ends in .txt or .jsonl"),
        ("prompts.txt", b"\xff\xfe", "is not UTF-8"),
        ("prompts.jsonl", b'{"text": "a"}\n{"text"', "prompts: line 2 of '.*' is not JSON"),
        ("prompts.jsonl", b'{"text": "a"}\n\n{"body": "a"}', r"""prompts: line 3 of '.*': got '{"body": "a"}', expected an object with"""),
        ("prompts.jsonl", b'{"text": "a", "prompt": "b"}', "line 1 of"),
        ("prompts.jsonl", b'{"input_ids": [1, 2.5]}', "line 1 of"),
        ("prompts.jsonl", b'{"input_ids": [true]}', "line 1 of"),
        ("prompts.jsonl", b'{"text": 3}', "line 1 of"),
        ("prompts.jsonl", b"[1, 2]", "line 1 of"),
    ],
)
def test_files_without_prompts_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name, character_tokenizer())


def test_text_without_a_tokenizer_and_missing_files_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(ValueError, match="tokenizer: needed for the text in"):
        read_prompts(tmp_path / "prompts.txt", None)
    with pytest.raises(ValueError, match=r"prompts: no file at '.*nothing.txt'"):
        read_prompts(tmp_path / "nothing.txt", character_tokenizer())


# ---------------------------------------------------------------- BOS


def with_bos(tokenizer):
    """As the tokenizers of Llama 3 and Gemma do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def without_bos_token():
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def test_by_default_bos_is_what_the_tokenizer_does():
    assert resolve_bos(character_tokenizer(), llama(), None) is None
    assert resolve_bos(with_bos(character_tokenizer()), llama(), None) == 1
    assert resolve_bos(without_bos_token(), llama(), None) is None
    assert resolve_bos(None, llama(), None) is None


def test_bos_of_the_bundled_teacher():
    tokenizer = load_tokenizer("tiny-teacher")
    assert tokenizer.bos_token_id is not None
    assert resolve_bos(tokenizer, None, None) is None


def test_bos_as_it_is_asked_for():
    assert resolve_bos(with_bos(character_tokenizer()), llama(), False) is None
    assert resolve_bos(character_tokenizer(), llama(bos_token_id=9), True) == 1
    assert resolve_bos(without_bos_token(), llama(bos_token_id=9), True) == 9
    assert resolve_bos(None, gpt2(bos_token_id=9), True) == 9
    with pytest.raises(ValueError, match="bos: got True, but neither"):
        resolve_bos(without_bos_token(), llama(bos_token_id=None), True)


# ---------------------------------------------------------------- the script of a mode


def build(mode="hybrid", max_length=20, **changes):
    arguments = {"allowed": [5, 6], "ends": [2], "bos": None, "vocab_size": 97}
    return build_script(GenerationSettings(max_length=max_length, mode=mode, seed=4, turns=2), **arguments | changes)


@pytest.mark.parametrize("mode", ["hybrid", "greedy", "sample"])
def test_scripts_that_begin_with_a_start_token(mode):
    script, wanted = build(mode, bos=1), StartTokens([5, 6], [2], 4, (3, 5), 1, mode)
    assert [only(script, index) for index in range(9)] == [only(wanted, index) for index in range(9)]
    assert script.identity == wanted.identity


def test_scripts_of_prompts_and_chats():
    assert only(build("prefix", prompts=[[4], [5]], bos=1), 1) == Span([1, 5], ASSISTANT, 0, frozenset({2}))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '<s>' }}{% endfor %}"
    script = build("chat", tokenizer=tokenizer, system="Hm", bos=1)
    assert isinstance(script, Chat)
    assert [tokenizer.decode(span.forced) for span in script.spans(0)] == ["system: Hm<s>user: ", "", "user: ", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[4]]}, "prompts: got some with mode='hybrid', which has no use for it; leave it out, or use mode='prefix'"),
        ({"mode": "chat", "prompts": [[4]]}, "prompts: got some with mode='chat'"),
        ({"mode": "prefix", "prompts": [[4]], "system": "Hm"}, "system: got some with mode='prefix', .* use mode='chat'"),
        ({"mode": "prefix"}, "prompts: got none with mode='prefix', expected prompts to continue; without any use mode='hybrid'"),
        ({"mode": "prefix", "prompts": [[97]]}, r"prompts\[0\]: got token 97"),
        ({"mode": "prefix", "prompts": [[4] * 20]}, r"prompts\[0\]: got 20 tokens"),
        ({"mode": "chat"}, "tokenizer: needed with mode='chat'"),
        (
            {"mode": "chat", "tokenizer": SimpleNamespace(chat_template=None)},
            "has no chat template; use a chat-tuned teacher, or mode='hybrid'",
        ),
        ({"max_length": 2, "bos": 1}, "max_length: got 2, expected at least 3"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
