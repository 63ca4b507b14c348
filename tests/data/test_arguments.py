"""Arguments that cannot work are refused at once, by name and with the way out."""

import pytest
from models import VOCABULARY, llama
from synthetic import TEXT, module, ready

from lightning_qat import SyntheticDataModule
from lightning_qat.generation import CallableTeacher, SampleFilters

CALLABLE = CallableTeacher(lambda tokens: None, VOCABULARY, "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, r"num_samples: got 0"),
        ({"num_samples": 5}, r"num_samples: got 5 with val_samples=5; at least one must be left for training"),
        ({"val_samples": -1}, r"num_samples: got 21 with val_samples=-1"),
        ({"num_samples": None}, r"num_samples: got None, expected a number; only with teacher=None"),
        ({"max_length": None}, r"max_length: got None, expected a number"),
        ({"max_length": 1}, r"max_length: got 1, expected at least 2"),
        ({"rows": 0}, r"rows: got 0"),
        ({"greedy_tokens": (5, 3)}, r"greedy_tokens: got \(5, 3\)"),
        ({"dtype": "float8"}, r"dtype: got 'float8', expected one of"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"mode": "streem"}, r"mode: got 'streem', expected one of .*did you mean 'stream'\?"),
        ({"generation": "hybird"}, r"generation: got 'hybird', .*did you mean 'hybrid'\?"),
        ({"temperature": 0}, r"temperature: got 0, expected more than 0; for the most probable token use generation='greedy'"),
        ({"teacher_logits": 0}, r"teacher_logits: got 0"),
        ({"engine": "vlm"}, r"engine: got 'vlm', expected 'transformers', 'vllm' or the address of a server"),
        ({"engine": "vllm"}, r"teacher: got a LlamaForCausalLM with engine='vllm', expected the name of a model"),
        ({"engine": "http://localhost:1", "teacher": CALLABLE}, r"teacher: got a CallableTeacher with engine='http"),
        ({"prompts": "prompts.txt"}, r"prompts: got 'prompts.txt' with generation='hybrid'; they belong to generation='prefix'"),
        ({"generation": "prefix"}, r"prompts: got no prompts with generation='prefix'"),
        ({"system": "Be brief."}, r"system: got 'Be brief.' with generation='hybrid'; .*generation='chat'"),
        ({"loss_on": "assistant"}, r"loss_on: got 'assistant' with generation='hybrid', which has none"),
        ({"loss_on": "user"}, r"loss_on: got 'user', expected one of"),
        ({"mode": "mix"}, r"text: got no text with mode='mix'"),
        ({"text": "text.txt"}, r"text: got 'text.txt' with mode='store'; .*belongs to mode='mix'"),
        ({"mode": "mix", "text": "a.txt", "text_ratio": 0}, r"text_ratio: got 0, expected more than 0 .* use mode='store'"),
        ({"mode": "mix", "text": "a.txt", "text_ratio": 1.0}, r"text_ratio: got 1.0, expected more than 0 and less than 1"),
        ({"mode": "mix", "text": "held-out", "validation": "held-out"}, r"text: got 'held-out', which is the `validation` text too"),
        ({"mode": "stream", "filters": SampleFilters()}, r"filters: got some with mode='stream'.*use mode='store'"),
        ({"mode": "stream", "packing": True}, r"packing: got True with mode='stream'.*use mode='store'"),
        ({"mode": "stream", "num_workers": 2}, r"num_workers: got 2 with mode='stream'; .*stream_worker='process'"),
        ({"mode": "stream", "teacher": None}, r"mode: got 'stream' with teacher=None"),
        ({"mode": "stream", "stream_worker": "thread"}, r"stream_worker: got 'thread', expected one of \['inline', 'process'\]"),
        ({"buffer": 0}, r"buffer: got 0, expected at least 1"),
        ({"teacher": None}, r"teacher: got None, but '.*gen' holds no samples"),
    ],
    ids=lambda value: ", ".join(f"{k}={v}"[:25] for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "gen", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": 5}, "teacher: got a int, expected a causal language model"),
        ({"teacher_logits": VOCABULARY + 1}, f"teacher_logits: got {VOCABULARY + 1}, the teacher has {VOCABULARY} tokens"),
        ({"bos": True, "teacher": llama(bos_token_id=None)}, "bos: got True, but neither"),
        ({"generation": "chat"}, "tokenizer: needed with generation='chat'"),
        ({"generation": "prefix", "prompts": "nothing.txt"}, "prompts: no file at 'nothing.txt'"),
        ({"mode": "stream", "buffer": 7}, "buffer: got 7, expected at least rows=8"),
        ({"engine": "http://localhost:1"}, "url: "),
        ({"teacher": "./nothing"}, "no folder at './nothing'"),
    ],
    ids=["teacher", "logits", "bos", "chat", "prompts", "buffer", "server", "folder"],
)
def test_what_only_the_teacher_can_tell_is_refused_before_anything_is_written(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat.generation.served.transport.FIRST_PAUSE", 0.0)
    with pytest.raises(ValueError, match=message):
        ready(tmp_path / "gen", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_same_text_under_two_names(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    with pytest.raises(ValueError, match=r"text: got .*, which is the `validation` text too"):
        module(tmp_path, mode="mix", text=str(tmp_path / "a.txt"), validation=str(tmp_path / "." / "a.txt"))


def test_everything_has_a_default():
    with pytest.raises(ValueError, match=r"teacher: got None, but 'generations' holds no samples"):
        SyntheticDataModule()
