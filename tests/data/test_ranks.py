"""Several processes, in earnest: each writes its own share, and together they write and show what one would have."""

import json
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import character_tokenizer
from synthetic import QUIET, TEXT, Reader, fit, module, ready, samples, teacher
from torch import distributed

from lightning_qat import SyntheticDataModule
from lightning_qat.data import GenerationModule, GenerationStore
from lightning_qat.data.filling import TokenBar
from lightning_qat.data.ranks import Ranks


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("data") / "gen")


def trainer(world=2, **options):
    """Forked: its processes need not import everything first."""
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False} | QUIET | options
    strategy = "ddp_fork" if world > 1 else "auto"
    return pl.Trainer(accelerator="cpu", devices=world, strategy=strategy, **options)


def predict(data, world=2, **options):
    return trainer(world, **options).predict(GenerationModule(), datamodule=data, return_predictions=world == 1)


def writers(folder):
    """How many samples each writer has written."""
    counts = {}
    for shard in GenerationStore.existing(folder)._shards:
        counts[shard.writer] = counts.get(shard.writer, 0) + len(shard.load().records)
    return counts


class Diary(Reader):
    """Writes what it was shown to a file per rank."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (self.folder / f"rank-{self.global_rank}.json").write_text(json.dumps([row for _, rows in self.seen for row in rows]))


def diaries(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(("count", "world"), [(0, 2), (1, 2), (7, 3), (9, 3), (10, 4)])
def test_shares_are_neighbours_and_about_equal(count, world):
    shares = []
    for rank in range(world):
        ranks = Ranks()
        ranks.rank, ranks.world = rank, world
        shares.append(list(ranks.share(range(count))))
    assert [number for share in shares for number in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


# ---------------------------------------------------------------- fit


def test_two_processes_generate_and_train_like_one(shared, tmp_path):
    trainer().fit(Diary(tmp_path), datamodule=module(tmp_path / "gen", batch_size=2))
    assert writers(tmp_path / "gen") == {0: 11, 1: 10}
    store = GenerationStore.existing(tmp_path / "gen")
    assert store.digest(21) == shared.train_dataset.store.digest(21)
    first, second = diaries(tmp_path)
    assert len(first) == len(second) == 8
    assert sorted(first + second) == sorted(samples(shared)[:16])
    together = [row for pair in zip(first, second, strict=True) for row in pair]
    assert together == [row for _, rows in fit(module(shared.folder), max_epochs=1).seen for row in rows]


def test_two_processes_take_turns_in_a_stream(shared, tmp_path):
    everything = samples(ready(tmp_path / "gen", num_samples=42, val_samples=0))
    data = module("not-used", mode="stream", batch_size=2)
    trainer(max_epochs=2).fit(Diary(tmp_path), datamodule=data)
    first, second = diaries(tmp_path)
    assert first == everything[:16:2] + everything[21:37:2]
    assert second == everything[1:16:2] + everything[22:37:2]


def test_a_resumed_run_of_two_processes(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    for mode in ("store", "stream"):
        settings = {"mode": mode, "batch_size": 2}
        trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(
            Diary(tmp_path), datamodule=module(tmp_path / "gen", **settings)
        )
        whole = diaries(tmp_path)
        resumed = trainer(max_epochs=2)
        resumed.fit(Diary(tmp_path), datamodule=module(tmp_path / "gen", **settings), ckpt_path=tmp_path / "step=3.ckpt")
        assert diaries(tmp_path) == [rows[6:] for rows in whole]


def test_fewer_samples_than_processes_are_refused(tmp_path):
    for mode in ("store", "stream"):
        with pytest.raises(Exception, match=r"num_samples: got 1 .*samples for 2 processes, expected at least one each"):
            trainer().fit(Reader(), datamodule=module(tmp_path / "gen", num_samples=1, val_samples=0, mode=mode))
    assert not (tmp_path / "gen").exists()


class Noting(SyntheticDataModule):
    """Keeps the error of each rank, and leaves the others time to do so."""

    def setup(self, stage=None):
        try:
            super().setup(stage)
        except ValueError as error:
            (self.folder.parent / f"error-{self.trainer.global_rank}.txt").write_text(str(error))
            time.sleep(1)
            raise


def test_an_error_of_rank_0_is_everybodys(shared, tmp_path):
    store = GenerationStore(tmp_path / "gen").open(shared.train_dataset.store.identity, 21)
    data = Noting(teacher(), 21, 12, rows=8, store=tmp_path / "gen")
    with store.writing(), pytest.raises(Exception, match="store: another process writes to"):
        trainer().fit(Reader(), datamodule=data)
    notes = [(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert notes[0] == notes[1]
    assert "it holds store.lock" in notes[1]


def test_rank_0_opens_the_store_first(tmp_path, monkeypatch):
    original = GenerationStore.open

    def open_late(store, *args):
        if distributed.get_rank() == 0:
            time.sleep(0.5)
        else:
            assert (store.folder / "store.json").exists()
        return original(store, *args)

    monkeypatch.setattr(GenerationStore, "open", open_late)
    predict(module(tmp_path))


class LateRank1(Callback):
    """The other one is not through with Trainer.predict before this one is."""

    def on_predict_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        time.sleep(0.5 * trainer.global_rank)

    def teardown(self, trainer, module, stage):
        assert GenerationStore.existing(trainer.datamodule.folder).missing(21) == []


def test_ranks_leave_predict_together(tmp_path):
    predict(module(tmp_path), callbacks=[LateRank1()])


# ---------------------------------------------------------------- predict


def test_predict_fills_the_store(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat.data.predict.ROUNDS", 1)
    data = module(tmp_path)
    assert predict(data, world=1) == [8, 8, 5]
    assert GenerationStore.existing(tmp_path).digest(21) == shared.train_dataset.store.digest(21)
    assert predict(data, world=1) in (None, [])
    data.setup("fit")  # the same data module can be trained on
    assert samples(data) == samples(shared)


def test_two_processes_predict_what_one_would(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat.data.predict.ROUNDS", 1)
    predict(module(tmp_path))
    assert writers(tmp_path) == {0: 11, 1: 10}
    assert GenerationStore.existing(tmp_path).digest(21) == shared.train_dataset.store.digest(21)
    predict(module(tmp_path, num_samples=22))  # one more: the other rank has nothing to do
    assert writers(tmp_path) == {0: 12, 1: 10}
    predict(module(tmp_path, num_samples=22))


def test_predict_writes_the_targets_of_text_too(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"mode": "mix", "text": str(tmp_path / "text.txt"), "tokenizer": character_tokenizer(), "teacher_logits": 4}
    predict(module(tmp_path / "gen", **settings), world=1)
    alone = ready(tmp_path / "gen", **settings | {"teacher": None})
    whole = ready(tmp_path / "other", **settings)
    digests = [GenerationStore.existing(tmp_path / name / "text").digest(11) for name in ("gen", "other")]
    assert digests[0] == digests[1]
    assert samples(alone) == samples(whole)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_of_the_trainer_does_not_change_samples(precision, shared, tmp_path):
    predict(module(tmp_path, teacher_logits=3), world=1, precision=precision)
    ready(tmp_path.with_name("plain"), teacher_logits=3)
    digests = [GenerationStore.existing(folder).digest(21) for folder in (tmp_path, tmp_path.with_name("plain"))]
    assert digests[0] == digests[1]


class Stops(Callback):
    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        raise RuntimeError("power cut")


def test_an_interrupted_prediction_goes_on(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat.data.predict.ROUNDS", 1)
    with pytest.raises(RuntimeError, match="power cut"):
        predict(module(tmp_path), world=1, callbacks=[Stops()])
    assert len(GenerationStore.existing(tmp_path).records) == 8
    assert predict(module(tmp_path), world=1) == [8, 5]  # and nobody holds a lock
    assert GenerationStore.existing(tmp_path).digest(21) == shared.train_dataset.store.digest(21)


def test_something_can_be_kept_beside_the_store(tmp_path):
    data = module(tmp_path)
    data.prepare_store = lambda: (tmp_path / "beside").write_text(str(len(GenerationStore.existing(tmp_path).records)))
    predict(data)
    assert (tmp_path / "beside").read_text() == "0"


def test_predict_needs_a_store_and_a_teacher(shared, tmp_path):
    for changes in ({"mode": "stream"}, {"teacher": None, "store": shared.folder}):
        with pytest.raises(ValueError, match=r"Trainer.predict: fills a store, which needs a teacher and mode='store' or 'mix'"):
            predict(module(tmp_path, **changes), world=1)


def test_predict_needs_this_data_module():
    with pytest.raises(ValueError, match=r"datamodule: got none that generates"):
        GenerationModule.predict_step(SimpleNamespace(trainer=SimpleNamespace(datamodule=None)), (0, [1]), 0)


def test_progress_counts_tokens():
    with TokenBar("x", 3, 10) as bar:
        bar.wrote(9)
        bar.finished(10, counted=True)
        bar.finished(4, counted=False)
        bar.wrote(5)
        bar.finished(6, counted=True)
        task = bar.bar.tasks[0]
    assert (task.completed, task.total, task.fields["tokens"]) == (27, 27, 17)
    assert task.fields["speed"] > 0
