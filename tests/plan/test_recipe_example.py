"""The YAML for LLaMA 7B on 8 GPUs: it builds without weights, and trains shrunken in two real processes."""

import json
from pathlib import Path

import torch
import yaml
from gloo import run_ranks
from torch.distributed.tensor import DTensor

from lightning_qat.cli.fit import run_trainer_command
from lightning_qat.plan import SHAPES, read_recipe, read_shape

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llm_qat_7b_8gpu.yaml"


def test_it_is_the_papers_recipe():
    content = yaml.safe_load(EXAMPLE.read_text())
    model, data, trainer = content["model"]["init_args"], content["data"]["init_args"], content["trainer"]
    assert trainer["devices"] * data["batch_size"] * data["max_length"] == 16_384
    assert trainer["max_steps"] * trainer["devices"] * data["batch_size"] == 96_000
    assert data["num_samples"] - 64 == 96_000
    assert model["optimizer"]["init_args"]["lr"] == 2e-5
    assert model["lr_scheduler"]["init_args"]["T_max"] == trainer["max_steps"]
    name, fields = read_recipe(EXAMPLE.read_text())
    assert name in SHAPES["llama-7b"].hub_ids
    assert (fields["strategy"], fields["gpus"], fields["precision"], fields["teacher"]) == ("fsdp2", 8, "bf16-mixed", "bfloat16")


def test_it_builds_on_the_meta_device(tmp_path, monkeypatch):
    """Seven billion parameters from a folder that holds nothing but config.json."""
    config = read_shape("llama-7b", "w4a8kv4").config
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    monkeypatch.chdir(tmp_path)
    one = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    cli = run_trainer_command(["fit", "--config", str(EXAMPLE), "--model.init_args.teacher", str(tmp_path), *one], run=False)
    for model, dtype in ((cli.model.student, torch.float32), (cli.model.teacher, torch.bfloat16)):
        assert all(parameter.is_meta and parameter.dtype == dtype for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    assert cli.datamodule.teacher == str(tmp_path)


def shrunken(folder):
    small = {"max_length": 32, "num_samples": 12, "store": f"{folder}/gen", "rows": 4}
    args = [f"--data.init_args.{key}={value}" for key, value in small.items()]
    args += ["--model.init_args.teacher=tiny-teacher", "--data.init_args.val_samples=4"]
    args += ["--trainer.max_steps=2", "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
    args += ["--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    args += ["--trainer.strategy.init_args.data_parallel_size=2", f"--trainer.default_root_dir={folder}"]
    args += ["--trainer.callbacks.dirpath", str(folder)]
    cli = run_trainer_command(["fit", "--config", str(EXAMPLE), *args])
    weights = list(cli.model.student.parameters()) + list(cli.model.teacher.parameters())
    return (
        cli.trainer.global_step,
        all(isinstance(weight, DTensor) for weight in weights),
        float(cli.trainer.callback_metrics["train/loss"]),
    )


def test_it_trains_shrunken_on_two_processes(tmp_path):
    for steps, sharded, loss in run_ranks(shrunken, tmp_path):
        assert steps == 2
        assert sharded
        assert 0 < loss < 20
    assert (tmp_path / "last.ckpt").exists()
