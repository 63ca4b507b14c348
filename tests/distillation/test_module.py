"""DistillationModule: what is trained, what is saved, what is measured, and what is refused."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import VOCABULARY, character_tokenizer, gpt2, llama, mlp, save_causal_lm, token_ids
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, SyntheticDataModule, insert_quantizers, named_quantizers
from lightning_qat.data.collate import Collate
from lightning_qat.evaluation import score_text
from lightning_qat.losses import SoftCrossEntropy
from lightning_qat.modules import scheme_of

LENGTHS = (12, 7, 12, 3, 9, 12, 5, 12)

collate = Collate(VOCABULARY)


def samples(source="generated", seed=0):
    return [{"input_ids": token_ids(1, length, seed=seed + i)[0], "source": source} for i, length in enumerate(LENGTHS)]


def loader(source="generated", seed=0, batch_size=4):
    return DataLoader(samples(source, seed), batch_size=batch_size, collate_fn=collate)


def trainer(scheme="w4a8kv4", steps=2, **kwargs):
    callbacks = [] if scheme is None else [QuantizationCallback(scheme)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=callbacks, num_sanity_val_steps=0, **quiet | kwargs)


def module_of(teacher=None, **kwargs):
    return DistillationModule(llama() if teacher is None else teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **kwargs)


def checkpoint_of(run, folder):
    path = folder / "last.ckpt"
    run.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return save_causal_lm(llama(), tmp_path_factory.mktemp("teacher"))


BATCH = collate(samples(seed=50))
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]


# ---------------------------------------------------------------- teacher and student


def test_the_teacher_is_frozen_and_never_saved(tmp_path):
    module, plain = module_of(), llama()
    run = trainer()
    run.fit(module, loader())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert not any(m.training for m in module.teacher.modules())
    assert list(named_quantizers(module.teacher)) == []
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in module.teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(module.teacher_logits(IDS, MASK), plain(IDS, attention_mask=MASK).logits)
    saved = torch.load(checkpoint_of(run, tmp_path), weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in module.state_dict()} == {key.split(".")[0] for key in saved} == {"student"}
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.student.parameters()}


def test_the_teacher_stays_in_eval_mode():
    module = module_of()
    assert module.train().student.training
    assert not any(m.training for m in module.teacher.modules())
    assert not module.eval().student.training


def test_the_student_is_a_copy_of_its_own():
    module = module_of()
    for (name, mine), (other, yours) in zip(module.student.named_parameters(), module.teacher.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, yours)
        assert mine.data_ptr() != yours.data_ptr()
        assert mine.requires_grad
    assert module.student.config is not module.teacher.config
    assert all(m.training for m in module.student.modules())


def test_a_low_precision_teacher_has_a_student_in_fp32(teacher_folder):
    module = DistillationModule(teacher_folder, teacher_dtype="bfloat16")
    assert next(module.teacher.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in module.student.parameters())
    assert torch.equal(module.student.lm_head.weight, llama().lm_head.weight)  # not the teacher's rounded ones


def test_a_student_of_another_kind_may_share_the_vocabulary():
    module = module_of(student=gpt2())
    trainer("w4a8").fit(module, loader())
    assert type(module.student).__name__ == "GPT2LMHeadModel"
    assert scheme_of(module.student) is not None


# ---------------------------------------------------------------- training


def test_the_loss_falls():
    module = module_of()
    with torch.no_grad():
        floor = functional.softmax(module.teacher_logits(IDS, MASK)[MASK.bool()], -1)
        floor = -(floor * floor.log()).sum(-1).mean()  # the teacher's entropy: no student gets below
    insert_quantizers(module.student, "w4a8kv4")
    run, batches = trainer(steps=30), DataLoader(samples(seed=50), batch_size=8, collate_fn=collate)
    before = SoftCrossEntropy()(module(IDS, MASK), module.teacher_logits(IDS, MASK), MASK).item()
    run.fit(module, batches)
    after = SoftCrossEntropy()(module(IDS, MASK), module.teacher_logits(IDS, MASK), MASK).item()
    assert floor.item() < after < before
    assert after - floor.item() < 0.7 * (before - floor.item())
    assert run.callback_metrics["train/loss"].item() < before


def test_the_logged_loss_is_the_papers(teacher_folder):
    class Recorder(pl.Callback):
        losses = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"].item())

    module, other = module_of(teacher_folder), module_of(teacher_folder)
    insert_quantizers(other.student, "w4a8kv4")
    batch = next(iter(loader()))
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    targets = functional.softmax(other.teacher_logits(ids, keep.long()), -1)[keep]
    expected = functional.cross_entropy(other(ids, keep.long())[keep], targets)
    run = trainer(steps=1)
    run.callbacks.append(Recorder())
    run.fit(module, loader())
    assert Recorder.losses == [pytest.approx(expected.item(), rel=1e-6)]


def test_the_scheduler_is_stepped_with_the_optimizer():
    module = module_of(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    run = trainer(steps=3)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 / 4)


def test_gradient_checkpointing_changes_nothing_but_memory():
    def gradients(**kwargs):
        module = module_of(**kwargs)
        insert_quantizers(module.student, "w4a8kv4")
        loss = module.training_step(BATCH, 0)
        loss.backward()
        return loss.detach(), [p.grad for p in module.student.parameters()]

    loss, grads = gradients()
    other, others = gradients(gradient_checkpointing=True)
    assert module_of(gradient_checkpointing=True).student.is_gradient_checkpointing
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    for mine, yours in zip(others, grads, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("batch_size", [3, 8])
def test_validation_metrics_are_those_of_the_whole_set(batch_size):
    module = module_of()
    loaders = [loader(batch_size=batch_size), loader("text", seed=20, batch_size=batch_size)]
    scores = {}
    for line in trainer().validate(module, loaders, verbose=False):
        scores |= line
    assert scores.keys() == {"val/kl", "val/top1", "val/ppl_generated", "val/ppl_text"}
    windows = {source: [sample["input_ids"] for sample in samples(source, seed)] for source, seed in (("generated", 0), ("text", 20))}
    assert scores["val/ppl_text"] == pytest.approx(score_text(module.student, windows["text"]).perplexity, rel=1e-6)
    assert scores["val/ppl_generated"] == pytest.approx(score_text(module.student, windows["generated"]).perplexity, rel=1e-6)
    module.eval()
    divergence, same = [], []
    with torch.no_grad():
        for window in windows["generated"]:
            p, q = module.teacher_logits(window[None])[0].log_softmax(-1), module(window[None])[0].log_softmax(-1)
            divergence.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    assert scores["val/kl"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-4)
    assert scores["val/top1"] == pytest.approx(torch.cat(same).float().mean().item(), abs=1e-6)


def test_text_alone_is_enough():
    (scores,) = trainer().validate(module_of(), loader("text"), verbose=False)
    assert scores.keys() == {"val/ppl_text"}


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("scheme", ["w4a8kv4", "llm-qat", "w2a8"])
def test_load_from_checkpoint_gives_the_same_logits(scheme, teacher_folder, tmp_path):
    module = module_of(teacher_folder)
    run = trainer(scheme)
    run.fit(module, loader())
    path = checkpoint_of(run, tmp_path)
    for given in ({}, {"teacher": llama()}):
        loaded = DistillationModule.load_from_checkpoint(path, weights_only=True, **given).eval()
        assert scheme_of(loaded.student) == scheme_of(module.student)
        with torch.no_grad():
            assert torch.equal(loaded(IDS, MASK), module.eval()(IDS, MASK))
            assert torch.equal(loaded.teacher_logits(IDS, MASK), module.teacher_logits(IDS, MASK))


def test_the_checkpoint_holds_plain_settings(teacher_folder, tmp_path):
    run = trainer()
    run.fit(module_of(teacher_folder), loader())
    saved = torch.load(checkpoint_of(run, tmp_path), weights_only=True)
    assert saved["hyper_parameters"]["teacher"] == teacher_folder
    assert "optimizer" not in saved["hyper_parameters"]


def test_strict_loading_reports_what_is_missing_or_unknown():
    module = module_of()
    state = module.state_dict()
    module.load_state_dict(state)
    lost = {key: value for key, value in state.items() if key != "student.model.norm.weight"}
    with pytest.raises(RuntimeError, match=r"missing keys \['student\.model\.norm\.weight'\]"):
        module.load_state_dict(lost)
    with pytest.raises(RuntimeError, match=r"unexpected keys \['student\.extra'\]"):
        module.load_state_dict(state | {"student.extra": torch.ones(1)})
    assert "student.model.norm.weight" in module.load_state_dict(lost, strict=False).missing_keys


def test_resuming_goes_on_where_the_run_stopped(teacher_folder, tmp_path):
    schedule = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))}
    whole, first, resumed = (trainer(steps=-1, max_epochs=epochs) for epochs in (2, 1, 2))
    whole.fit(module_of(teacher_folder, **schedule), loader())  # two batches are one epoch
    first.fit(module_of(teacher_folder, **schedule), loader())
    resumed.fit(module_of(teacher_folder, **schedule), loader(), ckpt_path=checkpoint_of(first, tmp_path))
    assert resumed.global_step == 4
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 / 5)
    state = whole.lightning_module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.lightning_module.state_dict().items())


# ---------------------------------------------------------------- refusals


def test_vocabularies_have_to_agree():
    with pytest.raises(ValueError, match=rf"student: its vocabulary has 50 tokens, the teacher's {VOCABULARY}"):
        module_of(student=llama(vocab_size=50))


def test_a_student_without_quantizers_is_not_trained():
    with pytest.raises(MisconfigurationException, match=r"holds no quantizers; add QuantizationCallback"):
        trainer(scheme=None).fit(module_of(), loader())


def test_what_cannot_be_trained_is_refused_before_data_is_generated(tmp_path):
    teacher = llama()
    data = SyntheticDataModule(teacher, num_samples=20, max_length=8, store=tmp_path / "gen")
    with pytest.raises(MisconfigurationException, match="holds no quantizers"):
        trainer(scheme=None).fit(module_of(teacher), datamodule=data)
    assert not (tmp_path / "gen").exists()


def test_an_adopted_student_keeps_its_scheme():
    module = module_of()
    insert_quantizers(module.student, "w4a8")
    quantizers = dict(named_quantizers(module.student))
    trainer("w4a8").fit(module, loader())
    assert dict(named_quantizers(module.student)) == quantizers
    with pytest.raises((ValueError, MisconfigurationException), match="already quantized"):
        trainer("w8a8").fit(module, loader())


def test_samples_of_another_vocabulary_are_refused(tmp_path):
    data = SyntheticDataModule(llama(vocab_size=50), num_samples=8, max_length=4, rows=8, store=tmp_path)
    with pytest.raises(MisconfigurationException, match=rf"vocabulary of 50, the teacher has {VOCABULARY}"):
        trainer().fit(module_of(), datamodule=data)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_cannot_be_loaded_is_refused(role, tmp_path):
    arguments = {"teacher": llama(), role: str(tmp_path / "nothing")}
    with pytest.raises(ValueError, match=r"no folder at .*nothing.*config\.json"):
        DistillationModule(**arguments)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match=r"teacher.*causal language model"):
        DistillationModule(mlp())


def test_an_unknown_dtype_is_refused(teacher_folder):
    with pytest.raises(ValueError, match=r"dtype: got 'float31'"):
        DistillationModule(teacher_folder, teacher_dtype="float31")


def test_the_whole_of_llm_qat_from_a_folder(teacher_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 4)
    data = SyntheticDataModule(
        teacher_folder, num_samples=24, max_length=16, batch_size=8, rows=8, val_samples=8, store=tmp_path / "gen", validation=str(text)
    )
    run = trainer(steps=2)
    run.fit(module_of(teacher_folder), datamodule=data)
    assert run.global_step == 2
    assert {"val/kl", "val/top1", "val/ppl_generated", "val/ppl_text"} <= run.callback_metrics.keys()
    assert Path(tmp_path / "gen" / "store.json").is_file()
    assert len(character_tokenizer()) == data.vocab_size


def test_training_goes_on_after_validating_on_its_own():
    made, data = DistillationModule(teacher=llama()), [loader(), loader("text")]
    run = trainer("w4a8", val_check_interval=1)
    alone = run.validate(made, data, verbose=False)
    run.fit(made, loader(), data)
    again = run.validate(made, data, verbose=False)
    assert alone[0].keys() == again[0].keys()
    assert alone[0]["val/kl"] != again[0]["val/kl"]
