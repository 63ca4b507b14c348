"""`lightning-qat plan`: what it shows, what it writes, and what it refuses."""

import json

import pytest
import yaml
from models import llama, save_causal_lm

from lightning_qat.cli import main
from lightning_qat.cli.fit import QATCli, run_trainer_command
from lightning_qat.plan import Setting, read_recipe, recipe

SMALL = ["--max_length", "16", "--loss_chunk", "8"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_causal_lm(llama(), tmp_path_factory.mktemp("plan") / "teacher")


def test_the_yaml_of_a_plan_trains(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = ["--out", "plan.yaml", "--json", "plan.json"]
    assert main(["plan", "--model", teacher, "--gpus", "1", "--memory", "80GB", "--samples", "12", *SMALL, *files]) == 0
    shown = capsys.readouterr().out
    assert "It fits" in shown
    assert "reserve" in shown
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] is True
    assert figures["total"] == sum(figures["parts"].values())
    small = ["--data.init_args.val_samples=4", "--data.init_args.rows=4", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "plan.yaml", *small, "--trainer.enable_progress_bar=false"]) == 0
    assert list(tmp_path.glob("runs/*/last.ckpt"))


def test_a_yaml_is_read_as_a_plan(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_qat.plan.advice.MOST_GPUS", 2)
    path = tmp_path / "fit.yaml"
    path.write_text(recipe(teacher, Setting(max_length=16, loss_chunk=8, optimizer="sgd")))
    assert main(["plan", "--config", str(path), "--memory", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert "single, bf16-mixed, sgd, teacher bfloat16" in shown
    assert "It does not fit" in shown  # the reserve alone is more
    assert "CosineAnnealingLR" in shown  # the YAML itself


SETTINGS = [
    {},
    {"gradient_checkpointing": False, "optimizer": "adamw8bit", "precision": "32-true"},
    {"gpus": 2, "strategy": "ddp", "teacher": "nf4"},
    {"gpus": 2, "strategy": "ddp", "teacher": "offload"},
    {"gpus": 16, "strategy": "fsdp2", "param_dtype": "bfloat16", "loss_chunk": None},
    {"gpus": 2, "strategy": "fsdp2", "teacher": "none"},
    {"gpus": 2, "strategy": "deepspeed_stage_2", "optimizer": "sgd", "teacher": "float32"},
    {"lora_rank": 8},
]


class ParseOnly(QATCli):
    """Reads a YAML against all classes that it names, and builds none."""

    def instantiate_classes(self):
        pass


@pytest.mark.parametrize("choices", SETTINGS, ids=lambda choices: " ".join(map(str, choices.values())) or "default")
def test_every_yaml_names_what_exists_and_reads_back(choices, tmp_path, monkeypatch):
    setting = Setting(**choices)
    path = tmp_path / "plan.yaml"
    path.write_text(recipe("a/b", setting))
    monkeypatch.setattr("lightning_qat.cli.fit.QATCli", ParseOnly)
    run_trainer_command(["fit", "--config", str(path)], run=False)
    name, fields = read_recipe(path.read_text())
    assert name == "a/b"
    assert Setting(**fields) == setting
    assert yaml.safe_load(path.read_text())["trainer"]["num_nodes"] == -(-setting.gpus // 8)


def refused(capsys, *args):
    assert main(["plan", *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lightning-qat plan: error:")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "model: got none"),
        (["--model", "llama-9b"], "did you mean 'llama-"),
        (["--model", "llama-7b", "--gpus", "0"], "gpus: got 0, expected at least 1"),
        (["--model", "llama-7b", "--memory", "80"], "memory: got '80', expected a number with a unit"),
        (["--model", "llama-7b", "--precision", "bf16"], "precision: got 'bf16'"),
        (["--model", "llama-7b", "--strategy", "zero"], "strategy: got 'zero'"),
        (["--model", "llama-7b", "--scheme", "w4a8k4"], "scheme: got 'w4a8k4'"),
        (["--config", "nothing.yaml"], "config: no file at 'nothing.yaml'"),
    ],
)
def test_refused_by_name(args, message, capsys):
    assert message in refused(capsys, *args)


def test_a_yaml_that_is_none(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("trainer: {max_steps: 1}\n")
    assert "config: has no section 'model'" in refused(capsys, "--config", str(path))
    content = yaml.safe_load(recipe("a/b", Setting()))
    content["model"]["init_args"]["optimizer"]["class_path"] = "torch.optim.Adagrad"
    path.write_text(yaml.safe_dump(content))
    assert "the optimizer is 'Adagrad'" in refused(capsys, "--config", str(path))
    content["trainer"]["strategy"] = "horovod"
    content["model"]["init_args"].pop("optimizer")
    path.write_text(yaml.safe_dump(content))
    assert "trainer.strategy is 'horovod'" in refused(capsys, "--config", str(path))


def test_speed_is_measured_only_on_request(teacher, capsys, monkeypatch):
    monkeypatch.setattr("lightning_qat.plan.speed.LIMIT", 0.0)
    assert main(["plan", "--model", teacher, "--gpus", "1", *SMALL]) == 0
    assert "tokens/s" not in capsys.readouterr().out
    assert main(["plan", "--model", teacher, "--gpus", "1", "--measure", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "Estimate from this machine (CPU, 1 thread" in shown
    assert "tokens/s in one process" in shown
