"""`lightning-qat export`, `quantize` and `evaluate`: from checkpoints of every kind to folders, with the options of the verb."""

import json
import logging
import sys

import lightning.pytorch as pl
import pytest
import torch
from models import llama, save_causal_lm, token_ids
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, load_quantized
from lightning_qat.cli import commands, main
from lightning_qat.formats import formats
from lightning_qat.formats.exactness.codes import stored_codes
from lightning_qat.formats.folder.hub import UploadError
from lightning_qat.generation import load_causal_lm
from lightning_qat.modules import scheme_of
from lightning_qat.modules.weights import layer_weights

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
FILE = """
import lightning.pytorch as pl
import torch

class Own(pl.LightningModule):
    def __init__(self, width: int, net=None):
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 8))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

class Unsaved(Own):
    def __init__(self, size):
        super().__init__(size)
        self._hparams.clear()

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 16))

Word = "no class"
"""
RUN = """
quantization: {scheme: w4a8}
model: {class_path: my_models.Own, init_args: {width: 20}}
data: {class_path: my_models.Data}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: kept, save_last: true}}]
"""


def trained(module, data, path, scheme):
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=[QuantizationCallback(scheme)], **QUIET)
    trainer.fit(module, DataLoader(data, batch_size=4))
    trainer.save_checkpoint(path)
    return {weight.name: stored_codes(weight) for weight in layer_weights(getattr(module, "student", module))}


def same(folder, codes, model=None):
    loaded = {weight.name: stored_codes(weight) for weight in layer_weights(load_quantized(folder, model=model))}
    assert loaded.keys() == codes.keys()
    return all(
        torch.equal(loaded[name].codes, there.codes) and torch.equal(loaded[name].scale, there.scale) for name, there in codes.items()
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """(checkpoint, teacher, codes) of a distillation."""
    folder = tmp_path_factory.mktemp("distilled")
    teacher = save_causal_lm(llama(), folder / "teacher")
    module = DistillationModule(teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    codes = trained(module, [{"input_ids": row} for row in token_ids(8, 8)], folder / "last.ckpt", "w4a8kv4")
    return folder / "last.ckpt", teacher, codes


def refused(capsys, *command):
    assert main([str(part) for part in command]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_a_checkpoint_becomes_an_export_that_is_evaluated(distilled, tmp_path, capsys):
    checkpoint, _, codes = distilled
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert same(tmp_path / "out", codes)
    (tmp_path / "text.txt").write_text("def answer(): return 42\n" * 8)
    for model in (checkpoint, tmp_path / "out"):
        options = ["--text", str(tmp_path / "text.txt"), "--context", "16", "--out", str(tmp_path / f"{model.name}.json")]
        assert main(["evaluate", "--model", str(model), *options]) == 0, capsys.readouterr().err
    figures = [json.loads((tmp_path / f"{name}.json").read_text())["perplexity"] for name in ("last.ckpt", "out")]
    assert figures[0] == figures[1]


def test_options_reach_the_verb(distilled, tmp_path, capsys):
    checkpoint, teacher, _ = distilled
    command = ("export", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert "drop=('input', 'kv'), inexact=True" in refused(capsys, *command, "--drop", "input, kv", "--inexact")
    assert "nothing" in refused(capsys, *command, "--format", "nothing")
    assert "not/a/name" in refused(capsys, *command, "--push_to_hub", "not/a/name")
    assert "tokenizer" in refused(capsys, *command, "--tokenizer", tmp_path)
    assert not (tmp_path / "out").exists()
    assert main([str(part) for part in (*command, "--tokenizer", teacher)]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with a user's file, a checkpoint of its class, and its codes."""
    (tmp_path / "my_models.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_models

    codes = trained(my_models.Own(width=24), torch.randn(8, 16), tmp_path / "last.ckpt", "w4a8")
    trained(my_models.Unsaved(24), torch.randn(8, 16), tmp_path / "unsaved.ckpt", "w4a8")
    yield my_models, codes
    del sys.modules["my_models"]


def test_a_class_of_the_users_own_is_found_from_the_working_directory(own, tmp_path, capsys):
    my_models, codes = own
    assert main(["export", "--checkpoint", "last.ckpt", "--out", "out", "--module", "my_models.Own"]) == 0, capsys.readouterr().err
    assert same(tmp_path / "out", codes, my_models.Own(width=24))


def test_a_run_of_the_command_line_is_exported(own, tmp_path, capsys):
    my_models, _ = own
    (tmp_path / "run.yaml").write_text(RUN)
    assert "nowhere" in refused(capsys, "fit", "--config", "run.yaml", "--quantization.target", "nowhere")
    assert main(["fit", "--config", "run.yaml", "--quantization.target", "compressed-tensors"]) == 0, capsys.readouterr().err
    assert main(["export", "--checkpoint", "kept/last.ckpt", "--out", "out", "--module", "my_models.Own"]) == 0, capsys.readouterr().err
    loaded = load_quantized(tmp_path / "out", model=my_models.Own(width=20))
    assert [tuple(weight.shape) for weight in layer_weights(loaded)] == [(20, 16), (8, 20)]
    assert scheme_of(loaded) == QuantScheme.parse("w4a8", target="compressed-tensors")


@pytest.mark.parametrize(
    ("checkpoint", "options", "parts"),
    [
        ("last.ckpt", [], ["--module package.module.MyModule"]),
        ("last.ckpt", ["--module", "Own"], ["got 'Own', expected package.module.Class"]),
        ("last.ckpt", ["--module", "no_models.Own"], ["cannot import 'no_models.Own'", "No module named 'no_models'"]),
        ("last.ckpt", ["--module", "my_models.Nothing"], ["cannot import 'my_models.Nothing'"]),
        ("last.ckpt", ["--module", "my_models.Word"], ["expected the class of a LightningModule"]),
        ("unsaved.ckpt", ["--module", "my_models.Unsaved"], ["a Unsaved cannot be built", "'size'"]),
    ],
)
def test_mistakes_are_one_message(checkpoint, options, parts, own, tmp_path, capsys):
    message = refused(capsys, "export", "--checkpoint", checkpoint, "--out", "out", *options)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_quantize_takes_a_target_and_a_format(distilled, tmp_path, capsys):
    _, teacher, _ = distilled
    command = ("quantize", "--model", teacher, "--scheme", "w4a8", "--out", tmp_path / "out")
    assert "nowhere" in refused(capsys, *command, "--target", "nowhere")
    assert "nothing" in refused(capsys, *command, "--format", "nothing")
    assert main([str(part) for part in (*command, "--target", "compressed-tensors")]) == 0, capsys.readouterr().err
    scheme = json.loads((tmp_path / "out" / "manifest.json").read_text())["scheme"]
    assert scheme["input"]["divisor"] == "half_range"


def test_the_tokenizer_of_a_gguf_file_is_found_in_it(tmp_path, capsys):
    pytest.importorskip("gguf")
    load_causal_lm("tiny-teacher").save_pretrained(tmp_path / "model")  # no tokenizer beside it
    (tmp_path / "text.txt").write_text("def answer(): return 42\n" * 2)
    command = ("quantize", "--model", tmp_path / "model", "--scheme", "gguf-q8_0", "--format", "gguf", "--out", tmp_path / "out")
    assert "tokenizer" in refused(capsys, *command)
    assert main([str(part) for part in (*command, "--tokenizer", "tiny-teacher")]) == 0, capsys.readouterr().err
    command = ("evaluate", "--model", tmp_path / "out", "--text", tmp_path / "text.txt", "--context", "16")
    assert main([str(part) for part in command]) == 0, capsys.readouterr().err


def test_what_scores_text_only_does_not_continue_it(distilled, tmp_path, capsys, monkeypatch):
    _, teacher, _ = distilled
    monkeypatch.setattr(commands, "load_causal_lm", lambda name: torch.nn.Linear(2, 2))
    assert "prompt: " in refused(capsys, "evaluate", "--model", teacher, "--prompt", "def f(")


@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_a_model_that_is_not_there_is_no_teacher(command, tmp_path, capsys):
    options = [] if command == "evaluate" else ["--scheme", "w4", "--out", tmp_path / "out"]
    assert "error: model: no folder at" in refused(capsys, command, "--model", tmp_path / "nothing", *options)


def test_a_failed_upload_is_one_message(distilled, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise UploadError("push_to_hub: the export is complete")

    monkeypatch.setattr(sys.modules["lightning_qat.cli.export"], "export_model", fail)
    assert "the export is complete" in refused(capsys, "export", "--checkpoint", distilled[0], "--out", tmp_path / "out")


def test_what_torchao_says_when_it_is_imported_is_left_out(caplog):
    assert main(["--help"]) == 0
    logging.getLogger("torchao").warning("Failed to load a.so: no such file")
    logging.getLogger("torch.utils._pytree").warning("<enum 'A'> is an Enum subclass and is now natively supported")
    logging.getLogger("torchao").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_help_names_every_format(command):
    text = commands.COMMANDS[command].__doc__ or ""
    assert [name for name in formats.names() if name not in text] == []
