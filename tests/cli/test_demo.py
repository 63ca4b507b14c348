"""The demo from end to end, on a few steps and a short text."""

import json
import math

import pytest

from lightning_qat.cli import main
from lightning_qat.evaluation import HELD_OUT, read_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    text.write_text(read_documents(HELD_OUT)[0][:6000], encoding="utf-8")
    small = ["--trainer.max_steps=10", "--data.init_args.num_samples=130", "--data.init_args.max_length=32", "--trainer.precision=32-true"]
    assert main(["demo", "--out", str(folder / "out"), "--text", str(text), "--fit_args", json.dumps(small)]) == 0
    return folder / "out"


def test_results_hold_what_was_promised(folder):
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert set(results) == {"seed", "teacher", "runs", "generated_tokens", "seconds", "versions"}
    assert set(results["teacher"]) == {"name", "parameters", "bits_per_byte"}
    assert set(results["seconds"]) == {"generate", "train", "evaluate", "total"}
    assert [run["scheme"] for run in results["runs"]] == ["w4a8kv4", "w2a8kv4"]
    assert results["generated_tokens"] == 130 * 32


@pytest.mark.parametrize("row", [0, 1], ids=["w4a8kv4", "w2a8kv4"])
def test_training_helps_and_the_file_is_the_model(folder, row):
    run = json.loads((folder / "results.json").read_text("utf-8"))["runs"][row]
    perplexity = run["perplexity"]
    assert math.isclose(perplexity["reloaded"], perplexity["llm_qat"], rel_tol=1e-4)
    assert perplexity["full_precision"] < perplexity["round_to_nearest"]
    gap = perplexity["round_to_nearest"] - perplexity["full_precision"]
    assert math.isclose(run["recovered"], (perplexity["round_to_nearest"] - perplexity["llm_qat"]) / gap)
    assert run["recovered"] > 0
    assert run["training_tokens"] == 10 * 8 * 32


def test_pictures_and_the_yaml_lie_beside_the_results(folder):
    for name in ("perplexity.png", "loss-w4a8kv4.png", "loss-w2a8kv4.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert str(folder) in (folder / "llm_qat.yaml").read_text("utf-8")


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "out: cannot write to" in capsys.readouterr().err
