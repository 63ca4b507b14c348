"""SyntheticDataModule: the same samples however they are batched, resumed or spread over processes."""

import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import VOCABULARY, character_tokenizer, llama, save_causal_lm
from torch import nn

import lightning_qat.data.datamodule as datamodule
from lightning_qat import SyntheticDataModule
from lightning_qat.data import GenerationStore

TEXT = "It is a truth universally acknowledged, that a single test in possession of a good oracle must be in want of a bug."


def teacher():
    return llama(eos_token_id=list(range(90, 97)))  # several end tokens: samples of many lengths


def module(folder, **changes):
    settings = {"num_samples": 21, "max_length": 12, "rows": 8, "batch_size": 4, "val_samples": 5, "store": folder}
    return SyntheticDataModule(**{"teacher": teacher()} | settings | changes)


def ready(folder, **changes):
    data = module(folder, **changes)
    data.setup("fit")
    return data


def samples(data):
    return [dataset[i]["input_ids"] for dataset in (data.train_dataset, data.val_dataset) for i in range(len(dataset))]


def same(mine, yours):
    return len(mine) == len(yours) and all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Samples of the default settings."""
    return ready(tmp_path_factory.mktemp("data") / "gen")


# ---------------------------------------------------------------- the same samples


def test_a_sample_does_not_depend_on_how_it_is_batched_or_counted(shared, tmp_path):
    assert same(samples(ready(tmp_path / "a", batch_size=1)), samples(shared))
    assert same(samples(ready(tmp_path / "b", num_samples=40))[:16], samples(shared)[:16])
    assert not same(samples(ready(tmp_path / "c", seed=1)), samples(shared))
    assert len({len(sample) for sample in samples(shared)}) > 3


def test_half_a_store_is_completed_and_a_whole_one_is_not_touched(shared, tmp_path, monkeypatch):
    ready(tmp_path)
    store = GenerationStore(tmp_path, {})
    kept = {tile: store.path(tile).read_bytes() for tile in (0, 2)}
    lost = store.path(1).read_bytes()
    store.path(1).unlink()
    (tmp_path / "tile-000001.99.part").write_bytes(lost[:50])
    generated, original = [], datamodule.generate_rows

    def recorded(model, settings, first, *args):
        generated.append(first)
        return original(model, settings, first, *args)

    monkeypatch.setattr(datamodule, "generate_rows", recorded)
    assert same(samples(ready(tmp_path)), samples(shared))
    assert generated == [8]
    assert store.path(1).read_bytes() == lost
    assert all(store.path(tile).read_bytes() == content for tile, content in kept.items())
    again = ready(tmp_path)
    again.setup("validate")
    assert generated == [8]
    ready(tmp_path, num_samples=30)  # more samples of the same kind
    assert generated == [8, 24]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_by_path_and_one_in_memory_write_the_same(dtype, tmp_path):
    data = ready(tmp_path / "gen", teacher=save_causal_lm(teacher(), tmp_path / "teacher"), dtype=dtype)
    other = ready(tmp_path / "gen2", tokenizer=character_tokenizer(), dtype=dtype)
    assert (tmp_path / "gen" / "store.json").read_text() == (tmp_path / "gen2" / "store.json").read_text()
    assert same(samples(data), samples(other))
    assert data.vocab_size == VOCABULARY


def test_a_teacher_in_memory_stays_as_it_was(tmp_path):
    model = teacher().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready(tmp_path, teacher=model, dtype="bfloat16")
    assert model.training
    assert all(torch.equal(tensor, weights[name]) and tensor.dtype == torch.float32 for name, tensor in model.state_dict().items())


def test_two_processes_share_the_work(shared, tmp_path, monkeypatch):
    """Rank 1 arrives first; while it waits at the barrier, rank 0 does its share."""
    written, original = [], GenerationStore.write
    monkeypatch.setattr(GenerationStore, "write", lambda store, tile, *args: written.append((rank, tile)) or original(store, tile, *args))
    modules = [module(tmp_path), module(tmp_path)]

    def barrier(name):
        nonlocal rank
        if rank == 1:
            rank = 0
            modules[0].setup("fit")
            rank = 1

    for i, data in enumerate(modules):
        data.trainer = SimpleNamespace(
            global_rank=i,
            world_size=2,
            strategy=SimpleNamespace(root_device=torch.device("cpu"), barrier=barrier, broadcast=lambda x: all_three),
        )
    rank, all_three = 1, [0, 1, 2]
    modules[1].setup("fit")
    assert written == [(1, 1), (0, 0), (0, 2)]
    assert same(samples(modules[0]), samples(shared))
    assert same(samples(modules[1]), samples(shared))


# ---------------------------------------------------------------- batches


def test_validation_samples_are_never_trained_on(shared):
    assert (len(shared.train_dataset), len(shared.val_dataset)) == (16, 5)
    train, val = set(shared.train_dataset.indices), set(shared.val_dataset.indices)
    assert train.isdisjoint(val)
    assert train | val == set(range(21))


@pytest.mark.parametrize(("num_samples", "held_back"), [(1, 0), (19, 0), (20, 1), (100, 5), (2000, 64)])
def test_one_in_twenty_is_held_back_by_default(num_samples, held_back, tmp_path):
    assert module(tmp_path, num_samples=num_samples, val_samples=None).val_samples == held_back


def test_batches_are_padded_and_masked(shared):
    seen = []
    for batch in shared.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert batch["source"] == "generated"
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        assert mask.sum(-1).max() == ids.shape[1] <= 12
        assert ids[mask == 0].count_nonzero() == 0
        assert (mask.diff() <= 0).all()  # padding on the right
        seen += [row[:length].tolist() for row, length in zip(ids, mask.sum(-1).tolist(), strict=True)]
    assert sorted(seen) == sorted(sample.tolist() for sample in samples(shared)[:16])
    assert seen != [sample.tolist() for sample in samples(shared)[:16]]  # shuffled


def test_a_real_token_0_is_not_taken_for_padding():
    batch = datamodule.collate([{"input_ids": torch.tensor(ids), "source": "generated"} for ids in ([5, 0, 0], [0, 7, 0, 0])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 0, 0, 0], [0, 7, 0, 0]]


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


# ---------------------------------------------------------------- inside a Trainer


class Reader(pl.LightningModule):
    """Trains nothing and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch["input_ids"].tolist()))
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert batch["source"] == "generated"

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, ckpt_path=None, callbacks=(), **limits):
    reader = Reader()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), num_sanity_val_steps=1, **quiet | limits).fit(
        reader, datamodule=module(folder), ckpt_path=ckpt_path
    )
    return reader.seen


def test_every_epoch_shows_every_sample_in_another_order(shared, tmp_path):
    seen = fit(tmp_path, max_epochs=2)
    epochs = [[ids for epoch, ids in seen if epoch == wanted] for wanted in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 4
    assert epochs[0] != epochs[1]
    assert epochs[0] == [batch["input_ids"].tolist() for batch in shared.train_dataloader()]


@pytest.mark.parametrize("step", [4, 6], ids=["between-epochs", "within-an-epoch"])
def test_a_resumed_run_sees_what_the_whole_run_would_have_seen(step, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=step, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path / "gen", max_epochs=3, callbacks=[keep])
    resumed = fit(tmp_path / "gen", ckpt_path=tmp_path / "kept" / f"step={step}.ckpt", max_epochs=3)
    assert resumed == whole[step:]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, r"num_samples: got 0"),
        ({"num_samples": 5}, r"num_samples: got 5 with val_samples=5; at least one must be left for training"),
        ({"val_samples": -1}, r"num_samples: got 21 with val_samples=-1"),
        ({"max_length": 1}, r"max_length: got 1, expected at least 2"),
        ({"rows": 0}, r"rows: got 0"),
        ({"greedy_tokens": (5, 3)}, r"greedy_tokens: got \(5, 3\)"),
        ({"dtype": "float8"}, r"dtype: got 'float8', expected 'float32'"),
        ({"batch_size": 0}, r"batch_size: got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_at_once(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "gen", **changes)
    assert list(tmp_path.iterdir()) == []


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
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' here"),
        ({"teacher": llama(initializer_range=0.1)}, "teacher: "),
        ({"teacher": llama(eos_token_id=5)}, "there"),
        ({"tokenizer": tokenizer_with_another_special_token()}, "start_tokens"),
    ],
    ids=["seed", "max_length", "rows", "greedy_tokens", "dtype", "teacher", "end-tokens", "start-tokens"],
)
def test_a_store_of_other_samples_is_refused(changes, message, shared):
    with pytest.raises(ValueError, match=rf"store: .*holds samples of other settings.*{message}"):
        ready(shared.folder, **changes)


def test_text_needs_a_tokenizer_and_a_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"tokenizer: needed with `validation`"):
        ready(tmp_path / "gen", validation=str(tmp_path / "text.txt"))
    with pytest.raises(ValueError, match=r"text: no file at 'nothing\.txt'"):
        ready(tmp_path / "gen", validation="nothing.txt", tokenizer=character_tokenizer())
    assert not (tmp_path / "gen").exists()


def test_a_teacher_too_short_for_the_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_length: got 65, the teacher has 64 positions"):
        ready(tmp_path, max_length=65)
