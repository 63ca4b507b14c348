"""Items and batches hold what the distillation module expects."""

import pytest
import torch
from models import VOCABULARY, character_tokenizer
from synthetic import chat_tokenizer, ready, teacher

from lightning_qat.data.collate import Collate
from lightning_qat.data.datasets import as_item
from lightning_qat.generation.sample import ASSISTANT, FORCED, USER, Sample
from lightning_qat.generation.targets import top_targets
from lightning_qat.losses import TopK, kl_divergence


def items(*lists, **changes):
    return [as_item(Sample(index=0, tokens=torch.tensor(tokens)), "generated") | changes for tokens in lists]


def test_a_real_token_0_is_not_taken_for_padding():
    batch = Collate(10)(items([5, 0, 0], [0, 7, 0, 0]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 0, 0, 0], [0, 7, 0, 0]]
    assert batch["source"] == "generated"
    assert "loss_mask" not in batch


def test_sources():
    assert Collate(10)(items([1, 2], source="text"))["source"] == "text"
    assert Collate(10)([*items([1, 2]), *items([3, 4], source="text")])["source"] == "mixed"


def test_padding_in_packed_rows_is_a_sample_of_its_own():
    rows = [{"position_ids": torch.tensor([0, 1, 0, 1, 2])}, {"position_ids": torch.tensor([0, 1])}]
    batch = Collate(10)([item | row for item, row in zip(items([1, 2, 3, 4, 5], [6, 7]), rows, strict=True)])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]


def chat_sample(roles, **changes):
    return Sample(index=0, tokens=torch.arange(len(roles)), roles=torch.tensor(roles, dtype=torch.uint8), **changes)


def test_the_loss_on_the_assistant_is_where_its_token_comes_next():
    roles = [FORCED, USER, USER, FORCED, ASSISTANT, ASSISTANT, FORCED, USER, FORCED, ASSISTANT]
    item = as_item(chat_sample(roles), "generated", "assistant")
    assert item["loss_mask"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 0]
    assert "loss_mask" not in as_item(chat_sample(roles), "generated", "all")
    batch = Collate(10)([item, *items([4, 5, 6], source="text")])
    assert batch["loss_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]  # of text, every token
    silent = as_item(chat_sample([FORCED, USER]), "generated", "assistant")
    with pytest.raises(ValueError, match=r"loss_on: got 'assistant', but it wrote nothing in this batch; raise max_length or batch_size"):
        Collate(10)([silent])


def test_top_k_targets_are_read_back():
    logits = torch.randn(5, VOCABULARY)
    words, tails = top_targets(logits, 4)
    long = as_item(Sample(index=0, tokens=torch.arange(6), targets=words, tails=tails), "generated")
    short = as_item(Sample(index=1, tokens=torch.arange(3), targets=words[:2], tails=tails[:2]), "generated")
    batch = Collate(VOCABULARY)([long, short])
    known, p = batch["teacher"], logits.softmax(-1)
    assert isinstance(known, TopK)
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    for row, length in ((0, 5), (1, 2)):
        assert torch.equal(known.ids[row, :length], p.topk(4).indices[:length])
        assert torch.allclose(known.probabilities[row, :length], p.topk(4).values[:length], atol=1e-4)
        assert torch.allclose(known.tail[row, :length], 1 - p.topk(4).values[:length].sum(-1), atol=1e-4)
        assert known.probabilities[row, length:].count_nonzero() == 0
        assert (known.tail[row, length:] == 1).all()
        assert all(part[row].isfinite().all() for part in known)


def test_full_targets_are_logits_that_losses_can_use():
    logits = torch.randn(3, VOCABULARY).half()
    logits[:, 5:9] = -torch.inf  # ids that the tokenizer does not know
    batch = Collate(VOCABULARY)([as_item(Sample(index=0, tokens=torch.arange(4), targets=logits), "generated")])
    assert batch["teacher"].shape == (1, 4, VOCABULARY)
    assert torch.equal(batch["teacher"][0, :3].softmax(-1), logits.softmax(-1))
    assert kl_divergence(torch.randn(1, 4, VOCABULARY), batch["teacher"], batch["loss_mask"]).isfinite()


@pytest.mark.parametrize("kept", [5, "full"])
def test_batches_hold_what_the_teacher_says_now(kept, tmp_path):
    """Cached targets, read back, are the teacher's own distributions over the next token."""
    model = teacher()
    data = ready(tmp_path, teacher_logits=kept)
    for batch in data.train_dataloader():
        with torch.no_grad():
            p = model(batch["input_ids"]).logits.softmax(-1)
        counted = batch["loss_mask"].bool()
        ends = batch["attention_mask"].sum(-1) - 1
        assert torch.equal(batch["loss_mask"].sum(-1), ends)
        assert not counted[torch.arange(len(ends)), ends].any()
        if kept == "full":
            assert torch.allclose(batch["teacher"].float().softmax(-1)[counted], p[counted], atol=2e-3)
        else:
            ids, probabilities, tail = (part[counted] for part in batch["teacher"])
            assert torch.allclose(probabilities, p[counted].gather(-1, ids), atol=1e-4)
            assert torch.allclose(tail, 1 - probabilities.sum(-1), atol=1e-4)
            assert torch.equal(ids[:, 0], p[counted].argmax(-1))


# ---------------------------------------------------------------- chat and prompts


def test_samples_without_an_answer_are_left_out(tmp_path):
    tokenizer = chat_tokenizer()
    data = ready(tmp_path, generation="chat", tokenizer=tokenizer, loss_on="assistant", max_length=20, num_samples=40)
    everything = ready(tmp_path, generation="chat", tokenizer=tokenizer, max_length=20, num_samples=40)
    store = everything.train_dataset.store
    answered = [i for i in range(40) if ASSISTANT in store.read(i).roles[1:].tolist()]
    assert [*map(int, data.train_dataset.numbers), *map(int, data.val_dataset.numbers)] == answered
    assert 0 < 40 - len(answered) == data.filter_report.dropped["in which the assistant wrote nothing"]
    for batch in data.train_dataloader():
        assert (batch["loss_mask"].sum(-1) > 0).all()
        assert (batch["loss_mask"] <= batch["attention_mask"]).all()
    with pytest.raises(ValueError, match=r"loss_on: got 'assistant', but it wrote nothing in any sample; raise max_length"):
        ready(tmp_path / "b", generation="chat", tokenizer=tokenizer, loss_on="assistant", max_length=3)


def test_prompts_are_continued_and_not_trained_on(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo and\n")
    options = {"generation": "prefix", "prompts": str(tmp_path / "prompts.txt"), "tokenizer": character_tokenizer(), "bos": True}
    data = ready(tmp_path / "gen", loss_on="assistant", **options)
    for number, item in zip(data.train_dataset.numbers, data.train_dataset, strict=True):
        prompt = [1, *(ord(letter) - 30 for letter in ("one", "two and")[int(number) % 2])]
        assert item["input_ids"][: len(prompt)].tolist() == prompt
        assert item["loss_mask"].tolist() == [0] * (len(prompt) - 1) + [1] * (len(item["input_ids"]) - len(prompt)) + [0]
