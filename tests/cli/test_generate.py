"""`lightning-qat generate` and `report`: a tool of their own, without a training run."""

import json

import lightning.pytorch  # noqa: F401  its log handler keeps the stderr of its import, which must not be one that capsys closes
import pytest
from models import llama, save_causal_lm

from lightning_qat.cli import commands, main
from lightning_qat.data import GenerationStore


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_causal_lm(llama(), tmp_path_factory.mktemp("generate") / "teacher"))


SMALL = ["--num_samples", "20", "--max_length", "12", "--rows", "8", "--accelerator", "cpu"]


def generate(*args):
    return main(["generate", *args])


@pytest.fixture
def store(teacher, tmp_path):
    assert generate("--teacher", teacher, "--store", str(tmp_path / "gen"), "--teacher_logits", "4", *SMALL) == 0
    return tmp_path / "gen"


def test_a_store_is_written_and_shown(store, capsys, teacher):
    assert generate("--teacher", teacher, "--store", str(store), "--teacher_logits", "4", "--show", "1", *SMALL) == 0
    shown = capsys.readouterr().out
    assert "20 samples, 240 tokens" in shown
    assert "sample 0" in shown
    assert "sample 1" not in shown
    written = GenerationStore.existing(store)
    assert written.missing(20) == []
    assert written.read(3).targets.shape == (11, 4)


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "true"]], ids=["switch", "value"])
def test_resume_writes_again_what_is_damaged_with_the_same_settings(resume, store, capsys):
    before = GenerationStore.existing(store).digest(20)
    data = next(store.glob("*.data"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises(ValueError, match="lightning-qat generate --resume --store"):
        GenerationStore.existing(store).digest(20)
    capsys.readouterr()
    assert generate("--store", str(store), *resume) == 0
    assert GenerationStore.existing(store).digest(20) == before
    assert "sample" in capsys.readouterr().out


def test_a_store_can_grow(store, teacher):
    before = GenerationStore.existing(store).digest(20)
    more = ["--num_samples", "30", *SMALL[2:]]
    assert generate("--teacher", teacher, "--store", str(store), "--teacher_logits", "4", *more) == 0
    assert GenerationStore.existing(store).missing(30) == []
    assert GenerationStore.existing(store).digest(20) == before
    assert generate("--store", str(store), "--resume") == 0
    assert GenerationStore.existing(store).requested == 30


def test_text_and_report(store, teacher, tmp_path):
    text, page = tmp_path / "text.jsonl", tmp_path / "page.html"
    assert generate("--store", str(store), "--resume", "--jsonl", str(text), "--report", str(page)) == 0
    lines = [json.loads(line) for line in text.read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(20))
    assert all(isinstance(line["text"], str) and len(line["input_ids"]) == 12 for line in lines)
    assert page.read_text("utf-8").startswith("<!")
    for more in ([], ["--teacher", teacher, "--shown", "1"]):
        assert main(["report", "--store", str(store), "--out", str(page), *more]) == 0


SHORT = ["--max_length", "12"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--store", "gen"], "teacher: got none"),
        (["--store", "gen", "--resume"], "store: store.json is missing in 'gen'"),
        (["--store", "gen", "--teacher", "./nothing"], "teacher: no folder at './nothing'"),
        (["--store", "gen", "--teacher", "TEACHER", "--max_length", "65"], "max_length: got 65, the teacher has 64 positions"),
        (["--store", "gen", "--teacher", "TEACHER", "--teacher_logits", "98", *SHORT], "teacher_logits: got 98, the teacher has 97 tokens"),
        (["--store", "gen", "--teacher", "TEACHER", "--generation", "prefix", *SHORT], "prompts: got no prompts"),
        (["--store", "gen", "--teacher", "TEACHER", "--generation", "hybird", *SHORT], "generation: got 'hybird'"),
        (["--store", "gen", "--teacher", "TEACHER", "--num_sampels", "3", *SHORT], "num_sampels"),
        (["--store", "/proc/gen", "--teacher", "TEACHER", *SHORT], "/proc/gen"),
    ],
    ids=lambda value: " ".join(value[2:6]) if isinstance(value, list) else "",
)
def test_mistakes(args, message, teacher, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert generate(*[teacher if arg == "TEACHER" else arg for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_another_teacher_is_refused(store, tmp_path, capsys):
    other = str(save_causal_lm(llama(initializer_range=0.1), tmp_path / "other"))
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    assert generate("--teacher", other, "--store", str(store), "--teacher_logits", "4", *SMALL) == 2
    assert "holds samples of other settings (teacher: " in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "given"),
    [
        ([], []),
        (["--resume"], ["--resume", "true"]),
        (["--resume", "--store", "gen"], ["--resume", "true", "--store", "gen"]),
        (["--resume", "false", "--compile"], ["--resume", "false", "--compile", "true"]),
        (["--store", "--resume"], ["--store", "--resume", "true"]),
    ],
    ids=["nothing", "last", "first", "two", "as-a-value"],
)
def test_a_switch_needs_no_value(args, given):
    assert commands._with_switches(commands.generate, args) == given
