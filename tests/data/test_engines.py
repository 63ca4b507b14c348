"""A teacher that a server or vLLM runs: found by name, asked through its engine."""

import sys
from pathlib import Path

import pytest
from models import VOCABULARY, save_causal_lm
from synthetic import chat_tokenizer, fit, ids, module, ready, samples, teacher

sys.path.append(str(Path(__file__).parent.parent / "generation" / "served"))
from completion_server import CompletionServer, fake_vllm

ENDS = set(range(90, 97))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_causal_lm(teacher(), tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def server():
    with CompletionServer(teacher()) as server:
        yield server


def check(data):
    """Samples end where the teacher's configuration says; returns what they depend on."""
    assert data.vocab_size == VOCABULARY
    for sample in samples(data):
        assert len(sample) == 12 or sample[-1] in ENDS
        assert not ENDS & set(sample[1:-1])
    return data.train_dataset.store.identity


@pytest.mark.parametrize("in_memory", [False, True], ids=["by-name", "in-memory"])
def test_a_server_fills_the_store(in_memory, folder, server, tmp_path):
    data = ready(tmp_path, teacher=teacher() if in_memory else folder, engine=server.url, teacher_logits=4)
    identity = check(data)
    assert (identity["engine"], identity["model"]) == ("served", "teacher")
    own = ready(tmp_path.with_name(tmp_path.name + "-own"), teacher=folder)
    # The start token and at least 3 most probable ones are the same from any engine.
    assert [sample[:4] for sample in samples(data)] == [sample[:4] for sample in samples(own)]
    for batch in data.train_dataloader():
        assert batch["teacher"].ids.shape[-1] == 4
    assert samples(ready(tmp_path, teacher=None, teacher_logits=4)) == samples(data)


def test_a_server_streams(folder, server):
    settings = {"teacher": folder, "mode": "stream", "generation": "greedy"}
    reader = fit(module("not-used", engine=server.url, buffer=16, **settings), max_epochs=2, limit_train_batches=2)
    own = ready("not-used", num_samples=30, val_samples=29, **settings)
    stored = [own.train_dataset[0]["input_ids"].tolist(), *ids(own.val_dataset)]
    assert [row for _, rows in reader.seen for row in rows] == stored[:8] + stored[21:29]


def test_vllm_in_this_process(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(teacher()))
    data = ready(tmp_path, teacher=folder, engine="vllm", rows=None)
    assert check(data)["engine"] == "vllm"
    assert samples(ready(tmp_path, teacher=folder, engine="vllm", rows=None)) == samples(data)


def test_what_a_server_cannot_do_is_refused_by_its_name_here(folder, server, tmp_path):
    with pytest.raises(ValueError, match=r"teacher_logits: got 'full', expected a number of tokens or None"):
        ready(tmp_path / "gen", teacher=folder, engine=server.url, teacher_logits="full")
    with pytest.raises(ValueError, match=r"generation: got 'chat', but the tokenizer has no chat template; .* generation='hybrid'"):
        ready(tmp_path / "gen", teacher=folder, engine=server.url, generation="chat")
    with pytest.raises(ValueError, match=r"teacher: cannot read a model configuration from|teacher: no folder at"):
        ready(tmp_path / "gen", teacher=str(tmp_path), engine=server.url, tokenizer=chat_tokenizer())
    assert not (tmp_path / "gen").exists()
