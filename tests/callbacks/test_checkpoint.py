"""AtomicModelCheckpoint: at every instant the old or the new one is there, whole; and everything of ModelCheckpoint still works."""

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import mlp
from torch.utils.data import DataLoader

from lightning_qat.callbacks import AtomicModelCheckpoint, checkpoint
from lightning_qat.callbacks.checkpoint import beside, clear_leftovers, exchange, link, put_back, remove, replace


def write(path, content, folder):
    if folder:
        path.mkdir()
        (path / "shard").write_text(content)
    else:
        path.write_text(content)
    return path


def read(path):
    return (path / "shard").read_text() if path.is_dir() else path.read_text()


class PowerCut(BaseException):
    pass


def cut_before(monkeypatch, count):
    """The `count`-th change of the file system does not happen, nor anything after it; returns how many are left."""
    left = [count]

    def guard(owner, name):
        original = getattr(owner, name)

        def watched(*args, **options):
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "symlink_to"),
        (shutil, "rmtree"),
        (checkpoint, "exchange"),
    ):
        guard(owner, name)
    return left


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("new_is_folder", [True, False])
@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
def test_there_is_always_the_old_or_the_new_one(old, new_is_folder, can_exchange, tmp_path, monkeypatch):
    for count in range(10):
        folder = tmp_path / str(count)
        folder.mkdir()
        path = folder / "last.ckpt"
        if old != "nothing":
            write(path, "old", old == "folder")
        part = write(beside(path, ".part"), "new", new_is_folder)
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr(checkpoint, "exchange", lambda one, other: False)
            left = cut_before(patch, count)
            try:
                replace(part, path)
            except PowerCut:
                left = None
        put_back(folder)
        put_back(folder)  # by all ranks
        assert old == "nothing" or os.path.lexists(path)
        assert not os.path.lexists(path) or read(path) in ("old", "new")
        clear_leftovers(folder)
        assert [item.name for item in folder.iterdir()] in (["last.ckpt"], [] if old == "nothing" else ["last.ckpt"])
        if left:
            assert read(path) == "new"
            return
    raise AssertionError("it never came to an end")


def test_two_names_are_exchanged_in_one_step(tmp_path):
    one, other = write(tmp_path / "a", "1", True), write(tmp_path / "b", "2", False)
    if not exchange(one, other):
        pytest.skip("not on this file system")
    assert read(one) == "2"
    assert read(other) == "1"
    assert not exchange(one, tmp_path / "missing")


@pytest.mark.parametrize("folder", [True, False])
def test_a_deleted_checkpoint_loses_its_name_first(folder, tmp_path, monkeypatch):
    path = write(tmp_path / "a.ckpt", "1", folder)
    with monkeypatch.context() as patch:
        cut_before(patch, 2)
        with pytest.raises(PowerCut):
            remove(path)
    assert not path.exists()
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove(path)  # nothing there


def test_a_link_is_changed_in_one_step(tmp_path):
    first, second, last = (tmp_path / name for name in ("1.ckpt", "2.ckpt", "last.ckpt"))
    write(first, "1", True)
    write(second, "2", True)
    write(last, "0", True)
    for target in (first, second):
        link(target, last)
        assert last.is_symlink()
        assert last.resolve() == target
    assert sorted(item.name for item in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "last.ckpt"]


# ---------------------------------------------------------------- inside a Trainer


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp().train()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("falling", 10.0 - self.global_step)
        self.log("rising", float(self.global_step))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(*callbacks, steps=4, ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=list(callbacks), **quiet | options)
    trainer.fit(Module(), DataLoader(torch.randn(32, 16), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def names(folder):
    return sorted(item.name for item in folder.iterdir())


def test_the_best_are_kept_and_the_last(tmp_path):
    keep = AtomicModelCheckpoint(tmp_path, "{step}", monitor="falling", save_top_k=2, every_n_train_steps=1, save_last=True)
    fit(keep)
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert keep.best_model_path.endswith("step=4.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    rising = AtomicModelCheckpoint(tmp_path / "more", "{step}", monitor="rising", every_n_train_steps=1)
    fit(rising)
    assert names(tmp_path / "more") == ["step=1.ckpt"]


def test_the_last_one_is_overwritten_after_a_resume(tmp_path):
    for steps in (2, 4):
        trainer = fit(AtomicModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0), steps=steps, ckpt_path="last")
        assert trainer.global_step == steps
        assert names(tmp_path) == ["last.ckpt"]


class Links(Callback):
    """At no time may a link point nowhere."""

    def __init__(self, folder):
        self.folder, self.looked = folder, 0

    def look(self, *args, **options):
        for item in self.folder.iterdir():
            if not item.name.startswith("."):
                self.looked += 1
                assert item.exists(), item


def test_a_link_to_the_last_one_never_dangles(tmp_path, monkeypatch):
    links = Links(tmp_path)
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _call=original, **options: (links.look(), _call(*args, **options), links.look())[1])
    fit(AtomicModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_last="link"))
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=4.ckpt"
    fit(AtomicModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_last="link"), steps=6, ckpt_path="last")
    assert links.looked > 20


def test_leftovers_are_removed_at_the_start_of_training(tmp_path):
    write(tmp_path / ".step=1.ckpt.part", "half", True)
    write(tmp_path / ".last.ckpt.part", "half", False)
    write(tmp_path / "mine.txt", "kept", False)
    fit(AtomicModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}"))
    assert names(tmp_path) == ["mine.txt", "step=4.ckpt"]


def test_a_half_done_exchange_is_finished_before_the_last_one_is_looked_for(tmp_path):
    fit(AtomicModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0), steps=2)
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    trainer = fit(AtomicModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0), steps=4, ckpt_path="last")
    assert trainer.ckpt_path == str(tmp_path / "last.ckpt")
    assert names(tmp_path) == ["last.ckpt"]


def test_weights_only_and_an_exception(tmp_path):
    fit(AtomicModelCheckpoint(tmp_path, "weights", every_n_train_steps=4, save_weights_only=True))
    assert "optimizer_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)

    class Stops(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(Stops(), AtomicModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_on_exception=True))
    assert names(tmp_path) == ["step=3.ckpt", "weights.ckpt"]


def test_what_cannot_be_renamed_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="AsyncCheckpointIO writes while training goes on"):
        fit(AtomicModelCheckpoint(tmp_path), plugins=[AsyncCheckpointIO()])
    with pytest.raises(MisconfigurationException, match=r"dirpath: got 'memory://somewhere', expected a local folder"):
        fit(AtomicModelCheckpoint("memory://somewhere"))


def test_yaml_names_it():
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    path = "lightning_qat.callbacks.AtomicModelCheckpoint"
    config = parser.parse_object({"callback": {"class_path": path, "init_args": {"dirpath": "runs", "save_last": "link"}}})
    assert isinstance(parser.instantiate_classes(config).callback, AtomicModelCheckpoint)
