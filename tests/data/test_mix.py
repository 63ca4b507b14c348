"""Real text among generated samples, in the share that was asked for, with the teacher's targets where samples have them."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import VOCABULARY, character_tokenizer
from synthetic import OTHER_TEXT, TEXT, chat_tokenizer, fit, ids, module, ready, rows_of, samples, teacher

from lightning_qat.data.order import MixedOrder
from lightning_qat.evaluation import text_windows
from lightning_qat.generation import CallableTeacher, GenerationSettings, GenerationStore, TeacherSource
from lightning_qat.generation.targets import top_targets


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def mixed(folder, text, stage="fit", **changes):
    return ready(folder, stage, **{"mode": "mix", "text": text, "tokenizer": character_tokenizer()} | changes)


def windows():
    return [window.tolist() for window in text_windows(character_tokenizer(), [TEXT], 12)]


def split(batches):
    """Rows of generated samples and of text, by what they hold."""
    rows = [row for batch in batches for row in rows_of(batch)]
    return [row for row in rows if row not in windows()], [row for row in rows if row in windows()]


# ---------------------------------------------------------------- order and share


@pytest.mark.parametrize(("others", "shown"), [(10, 4), (10, 10), (3, 8), (1, 5)])
def test_text_goes_round_and_round(others, shown):
    order, seen = MixedOrder(6, others, shown, 0, lambda: None), []
    for epoch in range(5):
        order.set_epoch(epoch)
        places = list(order)
        assert sorted(place for place in places if place < 6) == list(range(6))
        assert len(places) == 6 + shown
        seen += [place - 6 for place in places if place >= 6]
        counts = [seen.count(other) for other in range(others)]
        assert max(counts) - min(counts) <= 1  # everything once before anything twice
    orders = [MixedOrder(6, others, shown, 0, lambda: None, 2, rank) for rank in (0, 1)]
    assert sorted(set(orders[0]) | set(orders[1])) == sorted(set(MixedOrder(6, others, shown, 0, lambda: None)))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with 105 samples."""
    return ready(tmp_path_factory.mktemp("many") / "gen", num_samples=105, tokenizer=character_tokenizer()).folder


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8])
def test_the_share_of_text_is_that_of_tokens(ratio, packing, text, many, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data = mixed(many, text, teacher=None, text_ratio=ratio, num_samples=105, packing=packing)
    tokens = {"generated": 0, "text": 0}
    for index in data.train_dataloader().sampler:
        item = data.train_dataset[index]
        tokens[item["source"]] += len(item["input_ids"])
    assert tokens["text"] / sum(tokens.values()) == pytest.approx(ratio, abs=0.02)
    said = [message for message in caplog.messages if message.startswith("text: ")]
    shown = data.train_dataloader().sampler.shown
    count = len(data.train_dataset) - data.train_dataloader().sampler.size
    assert len(said) == (shown > count)
    assert all(f"each is shown {shown / count:.1f} times per epoch" in message for message in said)


def test_all_samples_and_windows_are_shown(text, tmp_path):
    data = mixed(tmp_path / "gen", text, text_ratio=0.5)
    generated, shown = split(data.train_dataloader())
    plain = ready(tmp_path / "gen", tokenizer=character_tokenizer())
    assert sorted(generated) == sorted(samples(plain)[:16])
    assert ids(data.val_dataset) == ids(plain.val_dataset)
    assert {tuple(row) for row in shown} <= {tuple(row) for row in windows()}
    assert {batch["source"] for batch in data.train_dataloader()} <= {"mixed", "generated", "text"}
    assert not list((tmp_path / "gen").glob("text"))  # targets were not asked for


def test_text_brings_every_token_of_a_chat_to_the_loss(text, tmp_path):
    data = mixed(
        tmp_path, text, generation="chat", loss_on="assistant", tokenizer=chat_tokenizer(), max_length=24, text_ratio=0.5, batch_size=40
    )
    (batch,) = data.train_dataloader()
    assert batch["source"] == "mixed"
    for tokens, mask, counts in zip(batch["input_ids"], batch["attention_mask"], batch["loss_mask"], strict=True):
        whole = chat_tokenizer().decode(tokens[mask.bool()]).replace("<s>", "") in TEXT
        assert (counts.sum() == mask.sum()) == whole


@pytest.mark.parametrize("changes", [{}, {"teacher_logits": 3}, {"packing": True}], ids=str)
def test_a_mixed_run_is_resumed_within_an_epoch(changes, text, tmp_path):
    settings = {"mode": "mix", "text": text, "tokenizer": character_tokenizer(), "text_ratio": 0.4, **changes}
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    whole = fit(module(tmp_path / "gen", **settings), max_epochs=3, callbacks=[keep]).seen
    assert {epoch for epoch, _ in whole[8:]} == {1, 2}
    assert fit(module(tmp_path / "gen", **settings), ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3).seen == whole[8:]


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("kept", [4, "full"])
def test_targets_of_text_are_what_the_teacher_says(kept, text, tmp_path):
    data, model = mixed(tmp_path / "gen", text, teacher_logits=kept, text_ratio=0.7), teacher()
    store = GenerationStore.existing(tmp_path / "gen" / "text")
    assert [store.read(i).tokens.tolist() for i in range(len(windows()))] == windows()
    for number, window in enumerate(windows()):
        with torch.no_grad():
            p = model(torch.tensor([window])).logits[0, :-1].softmax(-1)
        item = data.train_dataset[16 + number]
        assert item["source"] == "text"
        assert item["loss_mask"].tolist() == [1] * (len(window) - 1) + [0]
        if kept == "full":
            assert torch.allclose(item["targets"][:-1].float().softmax(-1), p, atol=2e-3)
        else:
            assert torch.equal(item["targets"][:-1, 0] & 127, p.argmax(-1).int())  # ids of 97 tokens take 7 bits
            assert torch.allclose(item["tails"][:-1], 1 - p.topk(4).values.sum(-1), atol=1e-5)
    for batch in data.train_dataloader():
        assert "teacher" in batch


def test_targets_do_not_depend_on_who_computes_which(text, tmp_path, monkeypatch):
    """Two thirds of the windows are lost and computed again, beside others."""
    data = mixed(tmp_path / "gen", text, teacher_logits=4)
    store = GenerationStore.existing(tmp_path / "gen" / "text")
    part = GenerationStore(tmp_path / "part" / "text").open(store.identity, len(windows()))
    with part.writing() as writer:
        writer.append(store.read(i) for i in range(0, len(windows()), 3))
    mixed(tmp_path / "part", text, teacher_logits=4)
    assert GenerationStore.existing(tmp_path / "part" / "text").digest(len(windows())) == store.digest(len(windows()))
    monkeypatch.setattr("lightning_qat.data.text.LOGITS_AT_ONCE", 1)  # one window at a time: other rounding at most
    mixed(tmp_path / "small", text, teacher_logits=4)
    small = GenerationStore.existing(tmp_path / "small" / "text")
    for i in range(len(windows())):
        assert torch.allclose(small.read(i).tails, store.read(i).tails, atol=1e-5)
    assert data.vocab_size == VOCABULARY


def test_a_callable_teacher_scores_text(text, tmp_path):
    model = teacher()

    def function(tokens):
        assert tokens.shape == (8, 12)
        return model(tokens, use_cache=False).logits

    same = CallableTeacher(function, VOCABULARY, "mine", tuple(range(90, 97)))
    mixed(tmp_path / "gen", text, teacher=same, teacher_logits=4)
    mixed(tmp_path / "other", text, teacher_logits=4)
    stores = [GenerationStore.existing(tmp_path / name / "text") for name in ("gen", "other")]
    for i in range(len(windows())):
        one, other = (store.read(i) for store in stores)
        assert torch.allclose(one.tails, other.tails, atol=1e-5)


def test_tokens_that_are_never_drawn_get_no_mass_in_text_either(text, tmp_path):
    tokenizer = character_tokenizer()
    model = teacher(vocab_size=120)  # 97 of which the tokenizer knows
    mixed(tmp_path / "gen", text, teacher=model, teacher_logits=4)
    store = GenerationStore.existing(tmp_path / "gen" / "text")
    for i, window in enumerate(text_windows(tokenizer, [TEXT], 12)):
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        words, tails = top_targets(torch.cat([logits[:, :97], torch.full_like(logits[:, 97:], -torch.inf)], -1), 4)
        assert torch.equal(store.read(i).targets & 127, words & 127)
        assert torch.allclose(store.read(i).tails, tails, atol=1e-5)


def test_without_a_teacher_text_has_its_targets_too(text, tmp_path):
    whole = mixed(tmp_path / "gen", text, teacher_logits=4)
    alone = mixed(tmp_path / "gen", text, teacher=None, rows=None, max_length=None, num_samples=None)
    for mine, yours in zip(alone.train_dataloader(), whole.train_dataloader(), strict=True):
        assert torch.equal(mine["input_ids"], yours["input_ids"])
        assert all(torch.equal(a, b) for a, b in zip(mine["teacher"], yours["teacher"], strict=True))


# ---------------------------------------------------------------- refusals


def test_texts_with_a_document_in_common(tmp_path):
    for name, documents in {"a": [TEXT, OTHER_TEXT], "b": [OTHER_TEXT]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    with pytest.raises(ValueError, match=r"text: .*have 1 of 2 documents in common, for example 'Call me Ishmael.*train on other text"):
        mixed(tmp_path / "gen", str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl"))
    assert not (tmp_path / "gen").exists()


def test_too_little_text(tmp_path):
    (tmp_path / "text.txt").write_text("x")
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"text: .* holds no document of two tokens or more"):
        mixed(tmp_path / "gen", str(tmp_path / "text.txt"), tokenizer=tokenizer)


def test_targets_that_are_missing_or_of_other_text(text, tmp_path):
    ready(tmp_path / "gen", tokenizer=character_tokenizer(), teacher_logits=4)
    alone = {"teacher": None, "rows": None}
    with pytest.raises(
        ValueError, match=r"text: .* holds the teacher's targets for its samples, but none for .*text.txt'; name the teacher"
    ):
        mixed(tmp_path / "gen", text, **alone)
    mixed(tmp_path / "gen", text, teacher_logits=4)
    (tmp_path / "other.txt").write_text(OTHER_TEXT)
    with pytest.raises(ValueError, match=r"text: .* holds targets, but not those of all of .*other.txt'"):
        mixed(tmp_path / "gen", str(tmp_path / "other.txt"), **alone)
    with pytest.raises(ValueError, match=r"store: .*text' holds samples of other settings \(windows: "):
        mixed(tmp_path / "gen", str(tmp_path / "other.txt"), teacher_logits=4)


def test_targets_need_a_teacher_in_this_process(text, tmp_path):
    class Elsewhere:
        vocab_size = VOCABULARY

        def __init__(self):
            self.inside = TeacherSource(teacher(), GenerationSettings(max_length=12, rows=8, logits=4))
            self.identity = self.inside.identity

        def samples(self, indices):
            return self.inside.samples(indices)

    with pytest.raises(ValueError, match=r"teacher_logits: got 4 with real text, .* not a Elsewhere; use engine='transformers', or"):
        mixed(tmp_path / "gen", text, teacher=Elsewhere())
    assert not (tmp_path / "gen").exists()
