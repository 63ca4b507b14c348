"""Training from a store alone: no teacher is named, none is loaded."""

import lightning.pytorch as pl
import pytest
import torch
from models import VOCABULARY, character_tokenizer, llama
from synthetic import QUIET, TEXT, chat_tokenizer, fit, module, ready, rows_of, samples

from lightning_qat import DistillationModule, QuantizationCallback
from lightning_qat.data import teachers
from lightning_qat.generation import SampleFilters


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("data") / "gen", teacher_logits=8, tokenizer=character_tokenizer(), seed=3)


@pytest.fixture(autouse=True)
def _no_teacher(monkeypatch):
    def refuse(*args):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(teachers.Recipe, "build", refuse)


def alone(shared, **changes):
    given = {"teacher": None, "num_samples": None, "max_length": None, "rows": None, "val_samples": None}
    return module(shared.folder, **given | changes)


def test_everything_is_taken_from_the_store(shared):
    data = alone(shared)
    data.setup("fit")
    assert samples(data) == samples(shared)
    assert (data.num_samples, data.max_length, data.val_samples, data.vocab_size) == (21, 12, 1, VOCABULARY)
    for batch in data.train_dataloader():
        assert batch["teacher"].ids.shape[-1] == 8


def test_nothing_in_the_folder_is_changed(shared):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shared.folder.iterdir()}
    alone(shared).setup("fit")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shared.folder.iterdir()} == before


def test_fewer_samples_may_be_asked_for(shared):
    data = alone(shared, num_samples=10, val_samples=2)
    data.setup("fit")
    assert samples(data) == samples(shared)[:10]
    with pytest.raises(
        ValueError, match=r"num_samples: got 22, .* holds 21 samples and lacks sample 21; ask for fewer, or name the teacher"
    ):
        alone(shared, num_samples=22).setup("fit")


def test_the_seed_is_that_of_the_training_order_only(shared):
    with_seed = [fit(alone(shared, seed=seed), max_epochs=1).seen for seed in (0, 3)]
    assert with_seed[0] != with_seed[1]
    assert sorted(row for _, rows in with_seed[0] for row in rows) == sorted(row for _, rows in with_seed[1] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 13}, r"max_length: got 13, the samples in the store have 12"),
        ({"rows": 16}, r"rows: got 16, the samples in the store have 8"),
        ({"generation": "chat"}, r"generation: got 'chat', the samples in the store have 'hybrid'"),
        ({"teacher_logits": 9}, r"teacher_logits: got 9, the samples in the store have 8"),
        ({"temperature": 0.5}, r"temperature: got 0.5, the samples in the store have 1.0"),
        ({"greedy_tokens": (1, 2)}, r"greedy_tokens: got \[1, 2\], the samples in the store have \[3, 5\]"),
        ({"loss_on": "assistant"}, r"loss_on: got 'assistant', the samples in the store have generation='hybrid'"),
        ({"validation": "held-out"}, r"tokenizer: needed with `validation`"),
        ({"tokenizer": chat_tokenizer()}, r"tokenizer: is not the one of the samples in"),
        ({"val_samples": 21}, r"num_samples: got 21 with val_samples=21"),
        ({"filters": SampleFilters(min_length=13)}, r"filters: kept 0 of 21 samples"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_agree_with_the_store_is_refused(changes, message, shared):
    with pytest.raises(ValueError, match=message):
        alone(shared, **changes).setup("fit")


def test_what_agrees_may_be_given(shared):
    data = alone(shared, max_length=12, rows=8, teacher_logits=8, greedy_tokens=(3, 5), tokenizer=character_tokenizer())
    data.setup("fit")
    assert samples(data) == samples(shared)


def test_real_text_beside(shared, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = alone(shared, validation=str(tmp_path / "text.txt"), tokenizer=character_tokenizer())
    data.setup("validate")
    rows = [row for batch in data.val_dataloader()[1] for row in rows_of(batch)]
    assert "".join(character_tokenizer().decode(row[1:]) for row in rows) == TEXT


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": None}], ids=str)
def test_a_student_learns_from_the_store_alone(changes, shared, tmp_path):
    module = DistillationModule(student=llama(attn_implementation="sdpa"), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    options = QUIET | {"max_steps": 12, "num_sanity_val_steps": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[QuantizationCallback("w4a8kv4")], **options)
    data = alone(shared, val_samples=5, **changes)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 12
    assert trainer.callback_metrics["val/kl"] > 0
