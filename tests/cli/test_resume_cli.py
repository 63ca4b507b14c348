"""`--ckpt_path` on the command line: the checkpoint gives weights, the configuration gives settings."""

import pytest
import torch
from models import llama, save_causal_lm

from lightning_qat.cli.fit import run_trainer_command


@pytest.fixture
def config(tmp_path):
    save_causal_lm(llama(), tmp_path / "teacher")
    text = f"""
quantization: {{scheme: w4a8kv4}}
model: {{class_path: DistillationModule, init_args: {{teacher: {tmp_path}/teacher}}}}
data:
  class_path: SyntheticDataModule
  init_args: {{num_samples: 20, max_length: 8, batch_size: 4, val_samples: 4, store: {tmp_path}/gen}}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - {{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{dirpath: {tmp_path}, save_last: true, save_top_k: 0}}}}
"""
    (tmp_path / "run.yaml").write_text(text)
    return str(tmp_path / "run.yaml")


def test_a_distillation_is_resumed_and_validated_from_its_checkpoint(config, tmp_path):
    run_trainer_command(["fit", "--config", config])
    path = str(tmp_path / "last.ckpt")
    resumed = run_trainer_command(["fit", "--config", config, "--trainer.max_steps", "3", "--ckpt_path", path])
    assert resumed.trainer.global_step == 3
    run_trainer_command(["validate", "--config", config, "--ckpt_path", path])
    assert torch.load(path, weights_only=True)["global_step"] == 3
