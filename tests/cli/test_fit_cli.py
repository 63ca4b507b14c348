"""`lightning-qat fit`: files in layers, options on top, a configuration that runs again, and modules and data of the user's own."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from learned import LearnedGain
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import llama, mlp, save_causal_lm
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, SyntheticDataModule, TensorSpec
from lightning_qat.cli import main
from lightning_qat.cli.fit import run_trainer_command
from lightning_qat.quantizers import quantizers

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
GROUPED = {"weight": {"bits": 4, "granularity": "group", "group_size": 16}, "input": {"bits": 8, "granularity": "token"}}


class Own(pl.LightningModule):
    """A user's module in a user's file."""

    def __init__(self, width: int = 16, optimizer=None):
        super().__init__()
        self.net, self.width = mlp(), width

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OwnData(pl.LightningDataModule):
    """A user's data, which needs a tokenizer and no teacher."""

    def __init__(self, batch_size: int = 4, tokenizer: str | None = None):
        super().__init__()
        self.batch_size, self.tokenizer = batch_size, tokenizer

    def train_dataloader(self):
        return DataLoader(INPUTS, batch_size=self.batch_size)

    def val_dataloader(self):
        return self.train_dataloader()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_causal_lm(llama(), tmp_path_factory.mktemp("fit") / "teacher")


def distillation(teacher, folder):
    data = {"num_samples": 16, "max_length": 8, "rows": 8, "batch_size": 4, "val_samples": 4, "store": str(folder / "gen")}
    return {
        "quantization": {"scheme": "w4a8kv4"},
        "model": {"class_path": "DistillationModule", "init_args": {"teacher": teacher}},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder), **QUIET},
    }


def own(folder, **trainer):
    return {
        "quantization": {"scheme": "w4a8"},
        "model": {"class_path": f"{__name__}.Own"},
        "data": {"class_path": f"{__name__}.OwnData"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder), **QUIET, **trainer},
    }


def written(config, folder, name="run.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return str(path)


def fit(*args):
    return run_trainer_command(["fit", *args])


def built(*args):
    """Model, data and trainer, and nothing run."""
    return run_trainer_command(["fit", *args], run=False)


def scheme_in(cli):
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, QuantizationCallback)]
    return callback.scheme


# ---------------------------------------------------------------- files and options


def test_classes_are_chosen_by_name_and_the_teacher_is_named_once(teacher, tmp_path):
    cli = built("--config", written(distillation(teacher, tmp_path), tmp_path))
    assert isinstance(cli.model, DistillationModule)
    assert isinstance(cli.datamodule, SyntheticDataModule)
    assert cli.datamodule.teacher == teacher
    other = built("--config", written(distillation(teacher, tmp_path), tmp_path), "--data.init_args.teacher", "tiny-teacher")
    assert other.datamodule.teacher == "tiny-teacher"


def test_data_of_the_users_own_gets_the_tokenizer_of_the_model(teacher, tmp_path):
    config = distillation(teacher, tmp_path) | {"data": {"class_path": f"{__name__}.OwnData"}}
    assert built("--config", written(config, tmp_path)).datamodule.tokenizer == teacher
    assert built("--config", written(config, tmp_path), "--data.init_args.tokenizer", "mine").datamodule.tokenizer == "mine"


def test_a_later_file_wins_over_an_earlier_one_and_the_command_line_over_both(tmp_path):
    base = own(tmp_path) | {"quantization": {"scheme": GROUPED}}
    over = {"quantization": {"scheme": {"weight": {"bits": 3}}}, "trainer": {"max_epochs": 7}}
    files = ["--config", written(base, tmp_path), "--config", written(over, tmp_path, "over.yaml")]
    cli = built(*files)
    assert cli.trainer.max_epochs == 7
    assert cli.trainer.accelerator.__class__.__name__ == "CPUAccelerator"  # of the first file
    assert scheme_in(cli).weight == TensorSpec(bits=3, granularity="group", group_size=16)
    assert scheme_in(cli).input == TensorSpec(bits=8, granularity="token")
    again = built(*files, "--quantization.scheme.weight.bits", "2", "--quantization.scheme.weight.group_size=8")
    assert scheme_in(again).weight == TensorSpec(bits=2, granularity="group", group_size=8)
    assert scheme_in(built(*files, "--quantization.scheme", "w8a8")) == QuantScheme.parse("w8a8")


def printed(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        fit(*args, "--print_config")
    assert done.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["w4a8", GROUPED], ids=["string", "nested"])
def test_a_printed_configuration_prints_itself_and_runs(scheme, tmp_path, capsys):
    config = own(tmp_path) | {"quantization": {"scheme": scheme}}
    first = printed(capsys, "--config", written(config, tmp_path), "--trainer.max_epochs", "2")
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(capsys, "--config", str(tmp_path / "printed.yaml")) == first
    cli = fit("--config", str(tmp_path / "printed.yaml"))
    assert cli.trainer.global_step == 4
    assert scheme_in(cli) == QuantScheme.parse(scheme)


def test_the_saved_configuration_reproduces_the_run(teacher, tmp_path):
    config = distillation(teacher, tmp_path)
    config["trainer"] |= {"logger": True, "enable_checkpointing": False}
    first = fit("--config", written(config, tmp_path), "--trainer.max_steps", "3", "--quantization.scheme", "w3a8")
    (saved,) = tmp_path.rglob("config.yaml")
    second = fit("--config", str(saved))
    assert second.trainer.global_step == 3
    assert scheme_in(second) == QuantScheme.parse("w3a8")
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())


# ---------------------------------------------------------------- a user's own module and callbacks


def test_a_module_of_the_users_own_with_callbacks_from_the_yaml(tmp_path):
    package = "lightning.pytorch.callbacks"
    callbacks = [
        {"class_path": f"{package}.EarlyStopping", "init_args": {"monitor": "loss"}},
        {"class_path": f"{package}.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), "save_last": True}},
    ]
    cli = fit("--config", written(own(tmp_path, callbacks=callbacks, enable_checkpointing=True), tmp_path))
    assert {EarlyStopping, ModelCheckpoint, QuantizationCallback} <= {type(callback) for callback in cli.trainer.callbacks}
    assert type(cli.model.net[0]).__name__ == "QuantLinear"
    path = str(tmp_path / "kept" / "last.ckpt")
    resumed = run_trainer_command(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_epochs", "2", "--ckpt_path", path])
    assert resumed.trainer.global_step == 4


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        (["--model.init_args.widht", "3"], ["widht"]),
        (["--data.class_path", "nowhere.Data"], ["nowhere"]),
        (["--quantization.scheme.weight.bits", "9"], ["got 9"]),
        (["--quantization.scheme", "w4b8"], ["w4b8"]),
        (["--ckpt_path", "nothing.ckpt"], ["nothing.ckpt"]),
    ],
    ids=["argument", "class", "bits", "scheme", "checkpoint"],
)
def test_a_mistake_is_one_short_message(option, parts, tmp_path, capsys):
    assert main(["fit", "--config", written(own(tmp_path), tmp_path), *option]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert "Traceback" not in message


# ---------------------------------------------------------------- the trap of a plain LightningCLI


class WithoutOptimizer(Own):
    """The command line is to build the optimizer."""

    configure_optimizers = pl.LightningModule.configure_optimizers


@pytest.fixture
def learned():
    quantizers.add("gained-for-a-test", LearnedGain)
    yield {"weight": {"bits": 4, "quantizer": "gained-for-a-test"}}
    del quantizers._entries["gained-for-a-test"]


def test_an_optimizer_that_a_plain_cli_built_too_early_is_stopped_with_the_fix(learned, tmp_path):
    callback = {"class_path": "lightning_qat.QuantizationCallback", "init_args": {"scheme": learned}}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "callbacks": [callback], "default_root_dir": str(tmp_path), **QUIET}
    args = ["lightning", "fit", "--config", written({"trainer": trainer}, tmp_path), "--optimizer", "torch.optim.AdamW"]
    with (
        mock.patch.object(sys, "argv", args),
        pytest.raises(MisconfigurationException, match=r"'net\.0\.weight_quantizer.*auto_configure_optimizers=False.*OptimizerCallable"),
    ):
        LightningCLI(WithoutOptimizer, OwnData)


def test_our_cli_builds_the_optimizer_after_the_quantizers(learned, tmp_path):
    config = own(tmp_path) | {"quantization": {"scheme": learned}}
    cli = fit("--config", written(config, tmp_path))
    assert cli.model.net[0].weight_quantizer.gain.item() != 1.0
    with pytest.raises(ValueError, match="optimizer"):
        fit("--config", written(config, tmp_path), "--optimizer", "torch.optim.AdamW")


@pytest.mark.slow
def test_the_command_starts_the_other_processes_itself(teacher, tmp_path):
    config = distillation(teacher, tmp_path)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    command = [sys.executable, "-m", "lightning_qat.cli", "fit", "--config", written(config, tmp_path)]
    script = [str(Path(sys.executable).with_name("lightning-qat")), *command[3:]]
    for args in (command, script) if Path(script[0]).exists() else (command,):
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert "Starting with 2 processes" in done.stderr
