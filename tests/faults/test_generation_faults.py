"""The same samples, byte for byte: from one process, from two, killed twenty times, and whatever the loader's batch size is."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill import run_with_kills
from models import llama

from lightning_qat import SyntheticDataModule
from lightning_qat.data import GenerationStore

SAMPLES = 2000
ENDS = list(range(90, 97))  # samples of many lengths


def fill(folder, batch_size=8, rows=64):
    torch.set_num_threads(1)
    data = SyntheticDataModule(llama(eos_token_id=ENDS), SAMPLES, 32, batch_size, store=folder, rows=rows, teacher_logits=4)
    data.setup("fit")
    return data


def digest(folder):
    store = GenerationStore.existing(folder)
    assert store.missing(SAMPLES) == []
    assert store.verify() == []
    return store.digest(SAMPLES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("whole") / "gen"
    fill(folder)
    torch.set_num_threads(threads)
    return digest(folder)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_twenty_times(seed, whole, tmp_path):
    """Each life writes at least the rows that were under way; what a killed one leaves behind is read by the next."""
    there = [0]

    def look():
        there.append(len(GenerationStore.existing(tmp_path / "gen").records) if (tmp_path / "gen" / "store.json").exists() else 0)

    killed = run_with_kills(fill, (tmp_path / "gen",), kills=20, delay=(0.2, 0.4), seed=seed, after_kill=look)
    print(f"{killed.kills} kills")
    assert killed.kills >= 10, "the machine is too fast for this test: give it more samples"
    assert there == sorted(there)
    assert digest(tmp_path / "gen") == whole


def shown(folder, batch_size):
    """All training batches as the loader gives them, put in the order of their content."""
    loader = fill(folder, batch_size).train_dataloader()
    rows = [
        ids[: int(mask.sum())].tolist() for batch in loader for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def test_the_loaders_batch_size_changes_nothing(whole, tmp_path):
    small, large = shown(tmp_path / "small", 8), shown(tmp_path / "large", 64)
    assert digest(tmp_path / "small") == digest(tmp_path / "large") == whole
    assert small == large


COMMAND = [sys.executable, "-m", "lightning_qat.cli", "generate", "--teacher", "tiny-teacher", "--max_length", "32", "--rows", "64"]
COMMAND += ["--num_samples", str(SAMPLES), "--teacher_logits", "8", "--show", "0", "--accelerator", "cpu"]


def command(folder, *more):
    return [*COMMAND, "--store", str(folder), *more]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_line_on_the_bundled_teacher(tmp_path, monkeypatch):
    """One process, two processes, twenty kills of the command."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run(command(tmp_path / "one"), check=True, capture_output=True, timeout=300)
    subprocess.run(command(tmp_path / "two", "--devices", "2", "--strategy", "ddp"), check=True, capture_output=True, timeout=300)
    writers = {Path(file).name.split("-")[1] for file in (tmp_path / "two").glob("shard-*.data")}
    assert writers == {"000", "001"}
    killed = run_with_kills(command(tmp_path / "killed"), kills=20, delay=(5.0, 7.0), timeout=300)
    print(f"{killed.kills} kills")
    assert killed.kills >= 2
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == digest(tmp_path / "killed")
