"""Checkpoints are read as data: what is pickled, damaged or something else is refused by name, and no code in it runs."""

import pickle
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from models import mlp
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback
from lightning_qat.trained import is_checkpoint, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


class Sharded(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"note": "a word"})
        self.net = mlp().double()

    def configure_model(self):
        self.after_build()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def write(path):
    plan = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=plan, max_steps=1, callbacks=[QuantizationCallback("w8")], **quiet)
    module = Sharded()
    trainer.fit(module, DataLoader(torch.ones(2, 16, dtype=torch.float64)))
    trainer.save_checkpoint(path)
    return {name: tensor.full_tensor() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "last.ckpt"
    return path, run_ranks(write, path)[0]


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "last.ckpt"))


def test_everything_in_a_folder_comes_back(written):
    path, weights = written
    saved = read_checkpoint(path)
    assert saved["state_dict"].keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) and tensor.dtype == torch.float64 for name, tensor in saved["state_dict"].items())
    assert saved["hyper_parameters"] == {"note": "a word"}
    assert saved["callbacks"]["QuantizationCallback"]["scheme"]["weight"]["bits"] == 8
    assert saved["global_step"] == 1
    assert not [key for key in saved if key.startswith("optimizer")]


class Boom:
    """Leaves a trace when it is unpickled."""

    ran = False

    def __reduce__(self):
        return exec, ("from test_reading import Boom; Boom.ran = True",)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_code_in_a_folder_is_named_and_not_run(name, folder):
    (folder / name).write_bytes(pickle.dumps(Boom())) if name == ".metadata" else torch.save(Boom(), folder / name)
    with pytest.raises(ValueError, match=r"\.metadata names builtins.exec" if name == ".metadata" else "pickled object of exec"):
        read_checkpoint(folder)
    assert not Boom.ran


def test_an_index_of_something_else_is_refused(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"planner_data": {}}))
    with pytest.raises(ValueError, match=r"\.metadata holds a dict"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_folder_is_refused(damage, name, folder):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"checkpoint: .*(is not a checkpoint|holds no)"):
        read_checkpoint(folder)


def test_a_folder_of_checkpoints_tells_one_of_them(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.metadata.*load_quantized\)$"):
        read_checkpoint(tmp_path)
    (tmp_path / "epoch=0.ckpt").touch()
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"in it is 'last\.ckpt'$"):
        read_checkpoint(tmp_path)


class Pickled:
    pass


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match="no file at"):
        read_checkpoint(path)
    for content in (b"", b"not a checkpoint at all", pickle.dumps(b"x" * 100)[:50]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint, or a damaged one: it is no whole archive"):
            read_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="it holds no 'state_dict'"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "hyper_parameters": {"settings": Pickled()}}, path)
    with pytest.raises(ValueError, match=r"pickled object of test_reading.Pickled.*add_safe_globals\(\[Pickled\]\)"):
        read_checkpoint(path)
    torch.save({"state_dict": {"a": torch.ones(500)}}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="or a damaged one: it is no whole archive"):
        read_checkpoint(path)


def test_what_looks_like_a_checkpoint(folder, tmp_path):
    assert is_checkpoint("anything.ckpt")
    assert is_checkpoint(folder)
    assert is_checkpoint(folder.rename(tmp_path / "step-3"))
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint("tiny-teacher")
