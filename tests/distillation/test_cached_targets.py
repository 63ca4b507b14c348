"""Training from the teacher's distributions in the batch, and from rows that hold several samples."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import VOCABULARY, gpt2, llama, opt, qwen3, save_causal_lm, token_ids
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, insert_quantizers
from lightning_qat.distillation.batches import check_packing, read_batch
from lightning_qat.evaluation import pad_batch, score_text
from lightning_qat.generation.targets import top_targets, unpack_targets
from lightning_qat.losses import TopK
from lightning_qat.modules import scheme_of

PACKED = ("llama", "qwen3", "gpt2")
LENGTHS = ((3, 6, 1), (4, 5), (2, 2, 6))  # of the samples in each of three rows of 10 tokens


def samples(seed=0):
    return [[token_ids(1, length, seed=seed + 10 * row + i)[0] for i, length in enumerate(row_)] for row, row_ in enumerate(LENGTHS)]


@torch.no_grad()
def batch_of(teacher, windows, k=8, **changes):
    """A padded batch with what the data would have stored: nothing after a sample's last token."""
    ids, mask = pad_batch(windows)
    logits = teacher(input_ids=ids, attention_mask=mask).logits
    known = TopK(*unpack_and_tail(logits, k))
    trained = mask * torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": trained, "teacher": known, "source": "generated"} | changes


def unpack_and_tail(logits, k):
    words, tails = top_targets(logits, k)
    return *unpack_targets(words, tails, VOCABULARY), tails


@torch.no_grad()
def packed_batch(teacher, rows, k=8):
    """The same samples, several to a row; the second row is one token short."""
    width = max(sum(map(len, row)) for row in rows)
    ids, positions, mask, trained = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(4))
    logits = torch.zeros(len(rows), width, VOCABULARY)
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            where = slice(start, start := start + len(sample))
            ids[r, where], positions[r, where], mask[r, where] = sample, torch.arange(len(sample)), 1
            trained[r, where.start : where.stop - 1] = 1
            logits[r, where] = teacher(input_ids=sample[None]).logits[0]
    known = TopK(*unpack_and_tail(logits, k))
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "loss_mask": trained}
    return batch | {"teacher": known, "source": "generated"}


def flat(rows):
    return [sample for row in rows for sample in row]


def module_of(student=None, **kwargs):
    return DistillationModule(student=llama() if student is None else student, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **kwargs)


def quiet(module):
    module.log = lambda *args, **kwargs: None
    return module


def trainer(scheme="w4a8kv4", steps=2, **kwargs):
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [QuantizationCallback(scheme)]
    return pl.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=callbacks, num_sanity_val_steps=0, **off | kwargs)


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def losses_of(module, batches):
    run = trainer(steps=len(batches))
    run.callbacks.append(recorder := Losses())
    run.fit(module, loader(*batches))
    return recorder.values


# ---------------------------------------------------------------- training


def test_training_on_cached_logits_is_training_with_the_teacher():
    """The same bits where whole logits are kept, the same to rounding where all tokens are; k = 8 is another loss."""
    teacher = llama()
    batches = [batch_of(teacher, flat(samples(seed)), k=VOCABULARY) for seed in (0, 100)]
    live = losses_of(DistillationModule(llama(), llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)), batches)
    with torch.no_grad():
        logits = [{**b, "teacher": teacher(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits} for b in batches]
    assert losses_of(module_of(), logits) == live
    assert losses_of(module_of(), batches) == pytest.approx(live, rel=1e-5)
    fewer = losses_of(module_of(), [batch_of(teacher, flat(samples(seed)), k=8) for seed in (0, 100)])
    assert all(a < b for a, b in zip(fewer, live, strict=True))


def test_the_loss_falls_without_a_teacher():
    """Down to what no student gets below: the entropy of the merged distributions."""
    batch = batch_of(llama(), flat(samples()))
    p = torch.cat([batch["teacher"].probabilities, batch["teacher"].tail.unsqueeze(-1)], -1)[batch["loss_mask"].bool()]
    floor = -(p * p.log()).sum(-1).mean().item()
    values = losses_of(module_of(qwen3()), [batch] * 30)
    assert floor < values[-1] < floor + 0.5 * (values[0] - floor)


def test_the_teacher_wins_over_what_the_batch_holds():
    batch = batch_of(llama(), flat(samples()))
    module = quiet(DistillationModule(llama()))
    expected = module.training_step({key: value for key, value in batch.items() if key != "teacher"}, 0)
    assert torch.equal(module.training_step(batch, 0), expected)
    assert torch.equal(module.training_step({**batch, "teacher": "nonsense"}, 0), expected)


def test_the_loss_mask_says_what_is_trained_on():
    batch = batch_of(llama(), [token_ids(1, 10)[0]], k=VOCABULARY)
    few = torch.zeros(1, 10, dtype=torch.long)
    few[0, [2, 5]] = 1
    module = quiet(module_of(qwen3()))
    p = llama()(batch["input_ids"]).logits.softmax(-1)
    terms = -(p * module.student(batch["input_ids"]).logits.log_softmax(-1)).sum(-1)[0]
    assert module.training_step({**batch, "loss_mask": few}, 0).item() == pytest.approx(terms[[2, 5]].mean().item(), rel=1e-5)
    assert read_batch({**batch, "loss_mask": few}).scored.nonzero().tolist() == [[0, 2], [0, 5]]  # of the tokens at 3 and 6
    del batch["loss_mask"]
    assert module.training_step(batch, 0).item() == pytest.approx(terms.mean().item(), rel=1e-5)


def test_mixed_precision():
    run = trainer(precision="bf16-mixed")
    run.fit(module_of(), loader(*[batch_of(llama(), flat(samples()))] * 2))
    assert run.callback_metrics["train/loss"].isfinite()


def test_distributions_move_with_the_batch():
    batch = batch_of(llama(), flat(samples()))
    moved = module_of()._apply_batch_transfer_handler(batch, torch.device("meta"))
    assert isinstance(moved["teacher"], TopK)
    assert {x.device.type for x in moved["teacher"]} == {"meta"}
    assert [x.dtype for x in moved["teacher"]] == [torch.int64, torch.float32, torch.float32]


# ---------------------------------------------------------------- several samples in a row


def models_of(kind):
    teacher, student = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}[kind](), {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}[kind]()
    insert_quantizers(student, "w4a8kv4")
    return teacher, student


@pytest.mark.parametrize("kind", PACKED)
def test_samples_in_a_row_do_not_see_each_other(kind):
    teacher, student = models_of(kind)
    module = module_of(student).eval()
    batch = packed_batch(teacher, samples())
    with torch.no_grad():
        together = module(batch["input_ids"], position_ids=batch["position_ids"])
        for r, row in enumerate(samples()):
            start = 0
            for sample in row:
                alone = module(sample[None], torch.ones(1, len(sample)))[0]
                torch.testing.assert_close(together[r, start : (start := start + len(sample))], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("live", [True, False], ids=["teacher", "cached"])
@pytest.mark.parametrize("kind", PACKED)
def test_packing_changes_neither_loss_nor_gradient(kind, live):
    def run(pack):
        teacher, student = models_of(kind)
        module = quiet(DistillationModule(teacher if live else None, student)).eval()  # no dropout
        batch = packed_batch(teacher, samples()) if pack else batch_of(teacher, flat(samples()))
        loss = module.training_step(batch, 0)
        loss.backward()
        return loss.detach(), [p.grad for p in module.student.parameters()]

    (loss, grads), (other, others) = run(True), run(False)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    for mine, yours in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-5)


def test_scores_of_packed_rows_are_those_of_the_samples():
    teacher, student = models_of("llama")
    packed, padded, scores = packed_batch(teacher, samples()), batch_of(teacher, flat(samples())), {}
    plain = {key: value for key, value in packed.items() if key != "loss_mask"}  # the last token of a sample counts in the loss
    for name, batch in (("packed", packed), ("padded", padded), ("plain", plain)):
        (scores[name],) = trainer().validate(module_of(student), loader(batch), verbose=False)
    assert scores["packed"] == pytest.approx(scores["padded"], rel=1e-5)
    assert scores["plain"]["val/ppl_generated"] == pytest.approx(scores["packed"]["val/ppl_generated"], rel=1e-6)
    long_enough = [sample for sample in flat(samples()) if len(sample) > 1]
    assert scores["packed"]["val/ppl_generated"] == pytest.approx(score_text(student, long_enough).perplexity, rel=1e-5)


def test_a_model_that_mixes_samples_is_refused():
    """OPT masks by the attention mask alone."""
    teacher, student = opt(), opt().train()
    insert_quantizers(student, "w4a8")
    batch = packed_batch(teacher, samples())
    module = quiet(module_of(student))
    with pytest.raises(MisconfigurationException, match=r"rows hold several samples .*OPTForCausalLM with 'sdpa' attention lets a sample"):
        module.training_step(batch, 0)
    assert all(m.training for m in student.modules())
    module.training_step(batch_of(teacher, flat(samples())), 0)
    with pytest.raises(MisconfigurationException, match="rows hold several samples"):
        quiet(DistillationModule(opt(), llama())).training_step(batch, 0)


def test_trying_a_model_leaves_it_as_it_was():
    student = llama().train()
    static = {"bits": 8, "granularity": "tensor", "dynamic": False}  # a pass through it in training would move its ranges
    insert_quantizers(student, {"weight": {"bits": 4}, "input": static})
    student.model.layers[1].eval()
    modes, buffers = [m.training for m in student.modules()], {name: x.clone() for name, x in student.named_buffers()}
    check_packing(student)
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(x, buffers[name]) for name, x in student.named_buffers())
    student(token_ids())
    assert any(not torch.equal(x, buffers[name]) for name, x in student.named_buffers())


# ---------------------------------------------------------------- validation


def test_scores_without_a_teacher():
    teacher, student = llama(), qwen3()
    windows = flat(samples())
    generated, text = batch_of(teacher, windows, k=VOCABULARY), {"source": "text", "input_ids": token_ids(3, 9, seed=70)}
    scores = {}
    for line in trainer("w8a8").validate(module := module_of(student), [loader(generated), loader(text)], verbose=False):
        scores |= line
    module.eval()
    divergence, same, lower = [], [], 0.0
    with torch.no_grad():
        for window in windows:
            p, q = (m(input_ids=window[None]).logits[0, :-1].log_softmax(-1) for m in (teacher, module.student))
            divergence.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    assert scores["val/kl"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-4)
    assert scores["val/top1"] == pytest.approx(torch.cat(same).float().mean().item(), abs=1e-6)
    assert scores["val/ppl_text"] == pytest.approx(score_text(student, list(text["input_ids"])).perplexity, rel=1e-5)
    fewer = batch_of(teacher, windows, k=4)
    for line in trainer("w8a8").validate(module_of(student), loader(fewer), verbose=False):
        lower = line["val/kl"]
    assert 0 < lower < scores["val/kl"]


def test_text_needs_no_teacher():
    (scores,) = trainer().validate(module_of(), loader({"source": "text", "input_ids": token_ids()}), verbose=False)
    assert scores.keys() == {"val/ppl_text"}


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_without_a_teacher(tmp_path):
    folder = save_causal_lm(llama(), tmp_path / "student")
    module, run, batch = module_of(folder), trainer(), batch_of(llama(), flat(samples()))
    run.fit(module, loader(batch, batch))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["teacher"] is None
    assert saved["hyper_parameters"]["student"] == folder
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    assert loaded.teacher is None
    assert scheme_of(loaded.student) == scheme_of(module.student)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask), module.eval()(ids, mask))
    with_teacher = DistillationModule(llama())
    insert_quantizers(with_teacher.student, "w4a8kv4")
    assert with_teacher.state_dict().keys() == module.state_dict().keys() == saved["state_dict"].keys()


# ---------------------------------------------------------------- refusals


def test_without_a_teacher_a_student_is_needed():
    with pytest.raises(ValueError, match=r"student: needed when teacher is None; pass a folder, a hub id or a causal language model"):
        DistillationModule()


@pytest.mark.parametrize("start", ["fit", "validate"])
def test_a_batch_without_distributions(start):
    batch = batch_of(llama(), flat(samples()))
    del batch["teacher"]
    with pytest.raises(MisconfigurationException, match=r"holds no distributions.*set teacher_logits=32 in SyntheticDataModule, or pass"):
        getattr(trainer(), start)(module_of(), loader(batch))


def test_samples_of_another_vocabulary_are_refused():
    data = pl.LightningDataModule()
    data.vocab_size, data.train_dataloader = 50, lambda: loader(batch_of(llama(), flat(samples())))
    with pytest.raises(MisconfigurationException, match=rf"vocabulary of 50, the student has {VOCABULARY}"):
        trainer().fit(module_of(), datamodule=data)
