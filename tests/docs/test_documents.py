"""The documents tell the truth: code blocks run, YAML files train, tables are those of the tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architectures import CELLS, SUPPORT

from lightning_qat.cli import main

ROOT = Path(__file__).resolve().parents[2]
PYTHON_BLOCKS = [
    pytest.param(document, code, id=f"{document.name}-{i}")
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL))
]


def architecture_table() -> str:
    refusals = sorted({words for row in SUPPORT.values() for words in row.values() if words not in ("yes", "-")})
    marks = {words: f"no ({i})" for i, words in enumerate(refusals, start=1)}
    rows = [["architecture", *CELLS], ["---"] * (len(CELLS) + 1)]
    rows += [[name, *(marks.get(row[cell], row[cell]) for cell in CELLS)] for name, row in SUPPORT.items()]
    notes = [f"({i}) refused by name: *{words}*" for i, words in enumerate(refusals, start=1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + "\n\n".join(notes) + "\n"


def test_the_architecture_table_is_the_tested_one():
    assert architecture_table() in (ROOT / "docs" / "architectures.md").read_text("utf-8")


@pytest.mark.parametrize(("document", "code"), PYTHON_BLOCKS)
def test_code_block_runs(document, code, tmp_path):
    """Each block runs on its own in an empty folder, as a reader would paste it."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.stem != "llm_qat_7b_8gpu"]  # that one: tests/plan


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_yaml_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.init_args.num_samples=70", "--data.init_args.max_length=16"]
    assert main(["fit", "--config", str(path), *small, "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=2"]) == 0
    checkpoint = f"runs/{path.stem}/last.ckpt"
    assert main(["export", "--checkpoint", checkpoint, "--out", "exported"]) == 0
    assert main(["export", "--checkpoint", checkpoint, "--out", "exported"]) == 2
