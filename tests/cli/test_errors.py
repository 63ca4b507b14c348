"""A mistake on the command line is one readable message and exit status 2; what is right runs."""

import lightning.pytorch  # noqa: F401  its log handler keeps the stderr of its import, which must not be one that capsys closes
import pytest
import torch
import yaml
from models import llama, save_causal_lm

from lightning_qat import QuantScheme
from lightning_qat.cli import main
from lightning_qat.evaluation import HELD_OUT
from lightning_qat.generation import TINY_TEACHER


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_causal_lm(llama(), tmp_path_factory.mktemp("cli") / "teacher")


@pytest.fixture
def config(teacher, tmp_path):
    """A run of two steps, as a dictionary to change."""
    data = {"num_samples": 16, "max_length": 8, "rows": 8, "batch_size": 4, "val_samples": 4, "store": str(tmp_path / "gen")}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return {
        "quantization": {"scheme": "w4a8kv4"},
        "model": {"class_path": "DistillationModule", "init_args": {"teacher": teacher}},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path), **quiet},
    }


def fit(config, folder, *more):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(path), *more])


def refused(capsys, code):
    """The message; every refusal comes here."""
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("lightning-qat")
    assert "Traceback" not in error
    assert len(error.splitlines()) < 12, error
    return error


# ---------------------------------------------------------------- commands and options


def test_an_unknown_command(capsys):
    message = refused(capsys, main(["fitt"]))
    assert "'fitt'" in message
    assert "did you mean 'fit'?" in message


@pytest.mark.parametrize("args", [[], ["--help"]], ids=["nothing", "help"])
def test_help_names_every_command(args, capsys):
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown for command in ("fit", "generate", "quantize", "evaluate", "export"))


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["generate", "--teacher", TINY_TEACHER, "--store", "x", "--num_smaples", "3"], ["num_smaples"]),
        (["quantize", "--model", TINY_TEACHER, "--shceme", "w4", "--out", "x"], ["shceme"]),
        (["quantize", "--model", TINY_TEACHER, "--scheme", "w4"], ["out"]),
        (["evaluate", "--model", TINY_TEACHER, "--context", "many"], ["context", "many"]),
    ],
    ids=["generate", "quantize", "missing", "type"],
)
def test_a_misspelt_missing_or_mistyped_option(args, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, main(args))
    assert all(part in message for part in parts), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--store", "gen", "--teacher", "{here}/nothing"], "teacher: no folder at"),
        (["quantize", "--scheme", "w4", "--out", "out", "--model", "{here}/nothing"], "no folder at"),
        (["evaluate", "--model", "{here}/nothing"], "no folder at"),
        (["evaluate", "--model", "{teacher}", "--text", "{here}/nothing.txt"], "text: no file at"),
        (["evaluate", "--model", "{here}/nothing.ckpt"], "checkpoint: no file at"),
        (["export", "--checkpoint", "{here}/nothing.ckpt", "--out", "out"], "checkpoint: no file at"),
        (["generate", "--store", "gen", "--teacher", "{teacher}", "--num_samples", "0"], "num_samples: got 0"),
        (["generate", "--store", "gen", "--teacher", "{teacher}", "--max_length", "65"], "the teacher has 64 positions"),
        (["generate", "--store", "gen", "--teacher", "{teacher}", "--dtype", "float8"], "dtype: got 'float8'"),
        (["quantize", "--scheme", "w4b8", "--out", "out", "--model", "{teacher}"], "scheme: got 'w4b8'"),
        (["quantize", "--scheme", "w9", "--out", "out", "--model", "{teacher}"], "bits: got 9, allowed are 1 to 8"),
        (["quantize", "--scheme", "w4g5", "--out", "out", "--model", "{teacher}"], "group_size: got 5, which does not divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_wrong_path_or_setting(command, message, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = refused(capsys, main([part.format(here=tmp_path, teacher=teacher) for part in command]))
    assert message in shown
    assert not (tmp_path / "out").exists()


def test_an_existing_output_folder(teacher, tmp_path, capsys):
    command = ["quantize", "--model", teacher, "--scheme", "w4a8", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert "not an empty folder" in refused(capsys, main(command))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# ---------------------------------------------------------------- YAML


def put(config, path, value):
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("quantisation", {"scheme": "w4"}, ["quantisation"]),
        ("quantization.sheme", "w4", ["sheme"]),
        ("trainer.max_step", 3, ["max_step"]),
        ("model.init_args.teachr", "x", ["teachr", "did you mean 'teacher'?"]),
        ("data.init_args.num_sample", 3, ["num_sample", "did you mean 'num_samples'?"]),
        ("model.class_path", "DistilationModule", ["DistilationModule"]),
        ("quantization.scheme", "w4b8", ["w4b8", "w<bits>"]),
        ("quantization.scheme", "w9a8", ["got 9", "1 to 8"]),
        ("quantization.scheme", {"weight": {"bits": 9}}, ["got 9", "1 to 8"]),
        ("quantization.scheme", {"weight": {"bits": 4, "group_sise": 8}}, ["group_sise"]),
        ("quantization.scheme", {"wieght": {"bits": 4}}, ["wieght"]),
        ("quantization.scheme", {"weight": {"bits": 4, "granularity": "grup"}}, ["grup", "group"]),
        ("data.init_args.num_samples", "many", ["num_samples", "many"]),
        ("data.init_args.num_samples", 3, ["num_samples: got 3 with val_samples=4"]),
        ("model.init_args.teacher", "./nothing/here", ["no folder at", "nothing/here"]),
        ("data.init_args.validation", "./nothing.txt", ["text: no file at", "nothing.txt"]),
        ("model.init_args.loss", "lightning_qat.losses.SoftCrosEntropy", ["did you mean 'SoftCrossEntropy'?"]),
        ("model.init_args.loss", "SoftCrosEntropy", ["no class has the short name 'SoftCrosEntropy'", "did you mean 'SoftCrossEntropy'?"]),
        ("model.init_args.lora", {"rank": 0}, ["LoraSettings.rank: got 0"]),
        ("model.init_args.param_dtype", "bfloat16", ["param_dtype: got 'bfloat16'", "ModelParallelStrategy"]),
        ("trainer.callbacks", [{"class_path": "lightning_qat.callbacks.DelaydStart"}], ["did you mean 'DelayedStart'?"]),
        ("trainer.callbacks", [{"class_path": "lightning_qat.callbacks.DelayedStart"}], ["DelayedStart: nothing is delayed"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_a_mistake_in_the_yaml(path, value, parts, config, tmp_path, capsys):
    put(config, path, value)
    message = refused(capsys, fit(config, tmp_path))
    assert all(part in message for part in parts), message
    assert "Subclass types" not in message
    assert "Union subtypes" not in message
    assert not (tmp_path / "gen").exists(), "data was generated first"


@pytest.mark.parametrize("command", [["export", "--out", "out", "--checkpoint"], ["evaluate", "--model"]], ids=["export", "evaluate"])
def test_a_folder_that_is_no_checkpoint_is_refused(command, tmp_path, capsys):
    (tmp_path / "last.ckpt").mkdir()
    message = refused(capsys, main([*command, str(tmp_path / "last.ckpt")]))
    assert "holds no .metadata and meta.pt" in message


def test_a_yaml_that_is_not_there(tmp_path, capsys):
    assert "nothing.yaml" in refused(capsys, main(["fit", "--config", str(tmp_path / "nothing.yaml")]))


def test_a_command_line_value_wins_over_the_yaml(config, tmp_path, capsys):
    assert "w4b8" in refused(capsys, fit(config, tmp_path, "--quantization.scheme", "w4b8"))


SCHEMES = {
    "string": ("w4a8kv4", "w4a8kv4"),
    "preset": ("llm-qat", "llm-qat"),
    "dataclass": (
        {
            "weight": {"bits": 4, "granularity": "group", "group_size": 16},
            "input": {"bits": 8, "granularity": "token"},
            "kv": {"bits": 4, "position": "pre_rope"},
            "overrides": [{"names": ["down_proj"], "weight": {"bits": 8}}],
        },
    )
    * 2,
}


@pytest.mark.parametrize(("written", "meant"), SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_in_the_yaml_is_trained(written, meant, config, tmp_path, capsys):
    put(config, "quantization.scheme", written)
    put(config, "trainer.enable_checkpointing", True)
    assert fit(config, tmp_path) == 0, capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2
    assert QuantScheme.parse(saved["quantization_scheme"]) == QuantScheme.parse(meant)
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    assert main(["evaluate", "--model", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--context", "16"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_bundled_names_are_what_the_help_says():
    assert (TINY_TEACHER, HELD_OUT) == ("tiny-teacher", "held-out")
