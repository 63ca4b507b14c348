"""SyntheticDataModule over a store: the same samples however they are batched, resumed or spread over processes."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import VOCABULARY, character_tokenizer, llama, save_causal_lm
from synthetic import TEXT, fit, ids, module, ready, rows_of, samples, teacher

from lightning_qat.data import GenerationStore, teachers
from lightning_qat.generation import CallableTeacher, GenerationSettings, SampleFilters, TeacherSource


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Samples of the default settings."""
    return ready(tmp_path_factory.mktemp("data") / "gen")


@pytest.fixture
def written(monkeypatch):
    """Numbers of the samples that teachers were asked for."""
    numbers, original = [], TeacherSource.samples

    def samples(source, indices, progress=None):
        indices = list(indices)
        numbers.extend(indices)
        return original(source, indices, progress)

    monkeypatch.setattr(TeacherSource, "samples", samples)
    return numbers


# ---------------------------------------------------------------- the same samples


def test_samples_are_those_of_the_engine(shared):
    source = TeacherSource(teacher(), GenerationSettings(max_length=12, rows=8))
    assert samples(shared) == [next(source.samples([i])).tokens.tolist() for i in range(21)]
    assert len({len(sample) for sample in samples(shared)}) > 3


def test_a_sample_does_not_depend_on_how_it_is_batched_or_counted(shared, tmp_path):
    assert samples(ready(tmp_path / "a", batch_size=1)) == samples(shared)
    assert samples(ready(tmp_path / "b", num_samples=40))[:16] == samples(shared)[:16]
    assert samples(ready(tmp_path / "c", seed=1)) != samples(shared)


def test_half_a_store_is_completed_and_a_whole_one_is_not_touched(shared, tmp_path, written):
    store = GenerationStore(tmp_path).open(shared.train_dataset.store.identity, 21)
    with store.writing() as writer:
        writer.append(shared.train_dataset.store.read(i) for i in (0, 3, 20))
    before = [path.read_bytes() for path in sorted(tmp_path.glob("shard-*"))]
    assert samples(ready(tmp_path)) == samples(shared)
    assert written == sorted({*range(21)} - {0, 3, 20})
    after = [path.read_bytes() for path in sorted(tmp_path.glob("shard-*"))]
    assert all(new.startswith(old) for new, old in zip(after, before, strict=True))
    again = ready(tmp_path)
    again.setup("validate")
    assert len(written) == 18
    assert samples(ready(tmp_path, num_samples=30))[:16] == samples(shared)[:16]  # more samples of the same kind
    assert written[18:] == list(range(21, 30))


def test_an_interrupted_run_leaves_a_store_that_goes_on(shared, tmp_path, monkeypatch):
    original = TeacherSource.samples

    def interrupted(source, indices, progress=None):
        for count, sample in enumerate(original(source, indices, progress)):
            if count == 14:
                raise KeyboardInterrupt
            yield sample

    with monkeypatch.context() as patch:
        patch.setattr(TeacherSource, "samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ready(tmp_path)
    assert len(GenerationStore.existing(tmp_path).records) == 8  # one group of rows
    assert samples(ready(tmp_path)) == samples(shared)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_teacher_by_path_and_one_in_memory_write_the_same(dtype, tmp_path):
    data = ready(tmp_path / "gen", teacher=save_causal_lm(teacher(), tmp_path / "teacher"), dtype=dtype)
    other = ready(tmp_path / "gen2", tokenizer=character_tokenizer(), dtype=dtype)
    assert data.train_dataset.store.identity == other.train_dataset.store.identity
    assert data.train_dataset.store.identity["dtype"] == ("float32" if dtype == "auto" else dtype)
    assert samples(data) == samples(other)
    assert data.vocab_size == VOCABULARY


def test_a_callable_teacher(shared, tmp_path):
    model = teacher()
    ends = tuple(range(90, 97))
    same = CallableTeacher(lambda tokens: model(tokens, use_cache=False).logits, VOCABULARY, "mine", ends, bos_token=0)
    data = ready(tmp_path, teacher=same, bos=False)
    assert data.train_dataset.store.identity["teacher"] == "mine"
    assert all(sample[-1] in ends or len(sample) == 12 for sample in samples(data))
    with torch.no_grad():
        for sample in samples(data)[:4]:  # after the start token, the most probable ones
            assert sample[1] == int(model(torch.tensor([sample[:1]])).logits[0, -1].argmax())


def test_any_source_of_samples(shared, tmp_path):
    source = TeacherSource(teacher(), GenerationSettings(max_length=12, rows=8))
    assert samples(ready(tmp_path, teacher=source, max_length=None, rows=None)) == samples(shared)
    with pytest.raises(ValueError, match=r"max_length: got 13, the teacher has 12"):
        ready(tmp_path / "b", teacher=source, max_length=13)
    with pytest.raises(ValueError, match=r"generation: got 'sample', the teacher has 'hybrid'"):
        ready(tmp_path / "c", teacher=source, generation="sample")


def test_rows_are_those_of_the_store(shared, tmp_path):
    assert samples(ready(shared.folder, rows=None)) == samples(shared)
    data = ready(tmp_path, rows=None)
    assert data.train_dataset.store.identity["rows"] == 32  # holds 21
    assert ready(tmp_path, rows=None, num_samples=400).train_dataset.store.identity["rows"] == 32


# ---------------------------------------------------------------- a teacher in memory


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_teacher_in_memory_stays_as_it_was(dtype, tmp_path):
    model = teacher().train()
    model.model.layers[0].eval()
    weights, modes = {name: tensor.clone() for name, tensor in model.state_dict().items()}, [m.training for m in model.modules()]
    attention = model.config._attn_implementation
    ready(tmp_path, teacher=model, dtype=dtype)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, weights[name]) and tensor.dtype == torch.float32 for name, tensor in model.state_dict().items())


def test_dropout_is_off_while_a_teacher_in_training_writes(shared, tmp_path):
    model = teacher(attention_dropout=0.5).train()
    assert samples(ready(tmp_path, teacher=model)) == samples(ready(tmp_path.with_name("b"), teacher=teacher(attention_dropout=0.5)))


@pytest.mark.parametrize(("dtype", "copies"), [("auto", 0), ("float32", 0), ("bfloat16", 1)])
def test_a_teacher_in_memory_that_fits_is_not_copied(dtype, copies, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(teachers, "copy", SimpleNamespace(deepcopy=lambda thing: made.append(thing) or copy.deepcopy(thing)))
    ready(tmp_path, dtype=dtype)
    assert len(made) == copies


def test_the_teacher_is_freed_after_setup(tmp_path, monkeypatch):
    loaded, original = [], teachers.load_causal_lm

    def load(*args):
        model = original(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teachers, "load_causal_lm", load)
    gc.disable()  # setup itself collects what only cycles hold
    try:
        data = ready(tmp_path / "gen", teacher=save_causal_lm(teacher(), tmp_path / "teacher"))
    finally:
        gc.enable()
    assert [reference() for reference in loaded] == [None]
    assert len(data.train_dataset) == 16


# ---------------------------------------------------------------- batches


def test_validation_samples_are_never_trained_on(shared):
    train, val = (set(map(int, dataset.numbers)) for dataset in (shared.train_dataset, shared.val_dataset))
    assert (train, val) == ({*range(16)}, {*range(16, 21)})


@pytest.mark.parametrize(("num_samples", "held_back"), [(1, 0), (19, 0), (20, 1), (100, 5), (2000, 64)])
def test_one_in_twenty_is_held_back_by_default(num_samples, held_back, tmp_path):
    assert module(tmp_path, num_samples=num_samples, val_samples=None).val_samples == held_back


def test_batches_are_padded_and_masked(shared):
    seen = []
    for batch in shared.train_dataloader():
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        assert set(batch) == {"input_ids", "attention_mask", "source"}
        assert batch["source"] == "generated"
        assert tokens.dtype == mask.dtype == torch.int64
        assert mask.sum(-1).max() == tokens.shape[1] <= 12
        assert tokens[mask == 0].count_nonzero() == 0
        assert (mask.diff() <= 0).all()  # padding on the right
        seen += rows_of(batch)
    assert sorted(seen) == sorted(samples(shared)[:16])
    assert seen != samples(shared)[:16]  # shuffled


def test_real_text_beside(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"validation": str(tmp_path / "text.txt"), "tokenizer": character_tokenizer()}
    data = ready(tmp_path / "gen", **options)
    generated, text = data.val_dataloader()
    assert [batch["source"] for batch in generated] == ["generated"] * 2
    assert {batch["source"] for batch in text} == {"text"}
    scored = sum(int(batch["attention_mask"].sum()) - len(batch["input_ids"]) for batch in text)
    assert scored == len(TEXT)  # every character once, after BOS
    assert len(ready(tmp_path / "gen3", val_samples=0, **options).val_dataloader()) == 1
    assert ready(tmp_path / "gen4", val_samples=0).val_dataloader() == []


def test_datasets_pickle(shared):
    twin = pickle.loads(pickle.dumps(shared.train_dataset))
    assert torch.equal(twin[3]["input_ids"], shared.train_dataset[3]["input_ids"])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(shared, tmp_path):
    data = ready(tmp_path, num_workers=1)
    for mine, yours in zip(data.train_dataloader(), shared.train_dataloader(), strict=True):
        assert torch.equal(mine["input_ids"], yours["input_ids"])


# ---------------------------------------------------------------- filters


def test_filters_leave_samples_out_of_training_and_validation(shared, tmp_path, caplog):
    everything = samples(shared)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data = ready(shared.folder, filters=SampleFilters(min_length=6, drop_duplicates=True))
    kept = [sample for i, sample in enumerate(everything) if len(sample) >= 6 and sample not in everything[:i]]
    assert samples(data) == kept
    assert ids(data.val_dataset) == kept[-5:]
    assert len(kept) < 21
    assert data.filter_report.total == 21
    assert sum(data.filter_report.dropped.values()) == 21 - len(kept)
    assert caplog.messages.count(f"filters: {data.filter_report}") == 1
    with pytest.raises(ValueError, match=r"filters: kept 5 of 21 samples.*none of which is left for training with val_samples=5"):
        ready(shared.folder, filters=_longest(everything, 5))


def _longest(everything, count):
    """Filters that keep just so many, whatever the lengths are."""
    lengths = sorted((len(sample) for sample in everything), reverse=True)
    assert lengths[count - 1] > 0

    class Longest(SampleFilters):
        def apply(self, records):
            keep = records[sorted(records["tokens"].argsort(stable=True)[-count:])]
            report = SampleFilters().apply(records)
            return type(report)(keep["index"], len(records), {"short": len(records) - count})

    return Longest()


def test_filters_look_at_the_first_num_samples_only(shared):
    data = ready(shared.folder, num_samples=10, val_samples=2, filters=SampleFilters(min_length=6))
    assert samples(data) == [sample for sample in samples(shared)[:10] if len(sample) >= 6]
    assert data.filter_report.total == 10


# ---------------------------------------------------------------- inside a Trainer


def test_every_epoch_shows_every_sample_in_another_order(shared):
    seen = fit(module(shared.folder), max_epochs=2).seen
    epochs = [[rows for epoch, rows in seen if epoch == wanted] for wanted in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 4
    assert epochs[0] != epochs[1]
    assert epochs[0] == [rows_of(batch) for batch in shared.train_dataloader()]
    assert sorted(row for rows in epochs[1] for row in rows) == sorted(samples(shared)[:16])


@pytest.mark.parametrize("step", [4, 6], ids=["between-epochs", "within-an-epoch"])
def test_a_resumed_run_sees_what_the_whole_run_would_have_seen(step, shared, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=step, save_top_k=-1, filename="{step}")
    whole = fit(module(shared.folder), max_epochs=3, callbacks=[keep]).seen
    resumed = fit(module(shared.folder), ckpt_path=tmp_path / "kept" / f"step={step}.ckpt", max_epochs=3).seen
    assert resumed == whole[step:]


# ---------------------------------------------------------------- refusals


def tokenizer_with_another_special_token():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "a"})
    return tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"max_length": 13}, "max_length: 12 there, 13 here"),
        ({"rows": 16}, "rows: 8 there, 16 here"),
        ({"greedy_tokens": (3, 4)}, r"greedy_tokens: \[3, 5\] there, \[3, 4\] here"),
        ({"generation": "sample"}, "generation: 'hybrid' there, 'sample' here"),
        ({"teacher_logits": 3}, "teacher_logits: None there, 3 here"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' here"),
        ({"teacher": llama(initializer_range=0.1)}, "teacher: "),
        ({"teacher": llama(eos_token_id=5)}, "there"),
        ({"tokenizer": tokenizer_with_another_special_token()}, "start_tokens"),
    ],
    ids=["seed", "max_length", "rows", "greedy_tokens", "generation", "logits", "dtype", "teacher", "end-tokens", "start-tokens"],
)
def test_a_store_of_other_samples_is_refused(changes, message, shared):
    with pytest.raises(ValueError, match=rf"store: .*holds samples of other settings.*{message}"):
        ready(shared.folder, **changes)


def test_a_damaged_store_is_refused(shared, tmp_path):
    ready(tmp_path)
    index = next(tmp_path.glob("*.index"))
    content = bytearray(index.read_bytes())
    content[70] ^= 1
    index.write_bytes(content)
    with pytest.raises(ValueError, match=r"store: shard-000-00000.index holds damaged records .*generate --resume --store"):
        ready(tmp_path)


def test_a_store_that_somebody_writes_to_is_refused(shared, tmp_path):
    store = GenerationStore(tmp_path).open(shared.train_dataset.store.identity, 21)
    with store.writing(), pytest.raises(ValueError, match="store: another process writes to"):
        ready(tmp_path)
    with shared.train_dataset.store.writing():  # a whole one is only read
        ready(shared.folder)


def test_text_needs_a_tokenizer_and_a_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"tokenizer: needed with `validation`"):
        ready(tmp_path / "gen", validation=str(tmp_path / "text.txt"))
    with pytest.raises(ValueError, match=r"text: no file at 'nothing\.txt'"):
        ready(tmp_path / "gen", validation="nothing.txt", tokenizer=character_tokenizer())
    assert not (tmp_path / "gen").exists()


def test_a_teacher_too_short_for_the_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_length: got 65, the teacher has 64 positions"):
        ready(tmp_path / "gen", max_length=65)
    assert not (tmp_path / "gen").exists()
