"""`lightning-qat fit --ckpt_path last`, killed and started again, ends as a run that nothing disturbs."""

import subprocess
import sys
import time

import pytest
import torch
import yaml
from kill import run_with_kills
from models import llama, save_causal_lm
from resuming import tensors

KEEP = {"save_last": True, "save_top_k": 0, "every_n_train_steps": 5, "save_on_train_epoch_end": False}


def command(folder, teacher):
    """The words of a command, for a file like those of the examples."""
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}}
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 150}}
    data = {"num_samples": 256, "max_length": 12, "rows": 32, "batch_size": 4, "val_samples": 8, "store": str(folder / "generations")}
    keep = {"class_path": "lightning_qat.callbacks.AtomicModelCheckpoint", "init_args": {"dirpath": str(folder / "kept"), **KEEP}}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    model = {"teacher": teacher, "optimizer": adam, "lr_scheduler": cosine}
    config = {
        "seed_everything": 0,
        "quantization": {"scheme": "w4a8kv4"},
        "model": {"class_path": "DistillationModule", "init_args": model},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
        "trainer": {"max_steps": 150, "val_check_interval": 20, "default_root_dir": str(folder), "callbacks": [keep], **quiet},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "lightning_qat.cli", "fit", "--config", str(file), "--ckpt_path", "last"]


def end_of(folder):
    checkpoint = torch.load(folder / "kept" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 150
    kinds = ("state_dict", "optimizer_states", "lr_schedulers", "random_states")
    return tensors({kind: checkpoint[kind] for kind in kinds})


@pytest.mark.slow
def test_a_command_killed_again_and_again(tmp_path, quick_path):
    teacher = save_causal_lm(llama(attention_dropout=0.2), tmp_path / "teacher")
    whole, kills = tmp_path / "whole", quick_path / "kills"
    whole.mkdir()
    kills.mkdir()

    start = time.monotonic()
    run = subprocess.Popen(command(whole, teacher), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = None
    while run.poll() is None:
        if first is None and (whole / "kept" / "last.ckpt").exists():
            first = time.monotonic() - start
        time.sleep(0.02)
    assert run.returncode == 0
    seconds = time.monotonic() - start

    landed = []

    def note():
        path = kills / "kept" / "last.ckpt"
        landed.append(torch.load(path, weights_only=True)["global_step"] if path.exists() else 0)

    delay = (first, first + (seconds - first) / 2)  # some while it generates, most while it trains
    killed = run_with_kills(command(kills, teacher), kills=4, delay=delay, after_kill=note)
    assert killed.kills > 0
    assert landed == sorted(landed)  # what was reached is not lost
    one, other = end_of(whole), end_of(kills)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
