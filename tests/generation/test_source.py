"""A teacher in this process as a source of samples: what identifies them, and what is refused."""

import pytest
from models import character_tokenizer, gemma3, gpt2, llama, opt, qwen3

from lightning_qat.generation import CallableTeacher, GenerationSettings, TeacherSource
from lightning_qat.generation.store import GenerationStore

SETTINGS = {"max_length": 12, "rows": 4}


def source(teacher=None, tokenizer=None, prompts=None, bos=None, **changes):
    return TeacherSource(teacher or llama(), GenerationSettings(**SETTINGS | changes), tokenizer, prompts, bos)


def tokens_of(source, count=6):
    return {sample.index: sample.tokens.tolist() for sample in source.samples(range(count))}


@pytest.mark.parametrize("build", [llama, gpt2, opt, qwen3, gemma3])
@pytest.mark.parametrize("mode", ["hybrid", "greedy", "sample"])
def test_every_kind_of_model_writes_in_every_mode(build, mode):
    samples = tokens_of(source(build(), mode=mode))
    assert sorted(samples) == list(range(6))
    assert {len(tokens) for tokens in samples.values()} == {12}


def test_prompts_are_continued():
    samples = list(source(mode="prefix", prompts=[[5, 6, 7], [8, 9]], logits=3).samples(range(5)))
    for sample in samples:
        prompt = [[5, 6, 7], [8, 9]][sample.index % 2]
        assert sample.tokens[: len(prompt)].tolist() == prompt
        assert sample.roles.tolist() == [0] * len(prompt) + [2] * (12 - len(prompt))
        assert sample.targets.shape == (11, 3)
        assert sample.chosen == 12 - len(prompt)


def test_a_function_writes_what_its_model_writes():
    model = llama().double()
    teacher = CallableTeacher(lambda ids: model(ids).logits, 97, "a llama")
    options = {"mode": "prefix", "prompts": [[5], [6, 7]]}
    assert tokens_of(source(teacher, **options)) == tokens_of(source(model, **options))


def test_bos_stands_in_front_when_asked_for():
    samples = tokens_of(source(bos=True))
    assert {tokens[0] for tokens in samples.values()} == {1}
    without = tokens_of(source(bos=False))
    assert [tokens[1] for tokens in samples.values()] == [tokens[0] for tokens in without.values()]


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": llama(initializer_range=0.1)},
        {"teacher": llama(eos_token_id=5)},
        {"teacher": llama().bfloat16()},
        {"tokenizer": character_tokenizer()},
        {"bos": True},
        {"seed": 1},
        {"max_length": 13},
        {"rows": 8},
        {"mode": "sample"},
        {"greedy_tokens": (3, 4)},
        {"temperature": 0.9},
        {"top_k": 5},
        {"top_p": 0.9},
        {"logits": 4},
        {"mode": "prefix", "prompts": [[5]]},
    ],
    ids=lambda change: "+".join(change),
)
def test_everything_that_samples_depend_on_is_in_the_identity(change, tmp_path):
    plain = source().identity
    other = source(**change).identity
    assert plain == source().identity
    assert plain != other
    GenerationStore(tmp_path).open(plain, 4)
    with pytest.raises(ValueError, match=r"holds samples of other settings"):
        GenerationStore(tmp_path).open(other, 4)


def test_prompts_are_in_the_identity():
    first, second = (source(mode="prefix", prompts=[[5], [token]]).identity for token in (6, 7))
    assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 65}, "max_length: got 65, the teacher has 64 positions"),
        ({"logits": 98}, "logits: got 98, the teacher has 97 tokens"),
        ({"mode": "prefix"}, "prompts: got none"),
        ({"mode": "chat"}, "tokenizer|chat template"),
        ({"prompts": [[5]]}, "prompts: got some with mode='hybrid'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_teacher_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        source(**change)


def test_an_empty_start_set_is_refused():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokenizer.get_vocab())})
    with pytest.raises(ValueError, match="start tokens: none"):
        source(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="start tokens: none of the 2 ids"):
        source(CallableTeacher(lambda ids: ids, 2, "all ends", end_tokens=(0, 1)))
