"""Exports that go wrong, and modules in unusual states: a folder is whole or not there, and the error names the way out."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from models import character_tokenizer, gpt2, llama, logits_of, mlp, save_causal_lm
from safetensors import SafetensorError
from torch import nn

from lightning_qat import DistillationModule, export, insert_quantizers, load_quantized
from lightning_qat.formats import company, native, staging
from lightning_qat.modules import scheme_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from disks import read_only_copy, small_disk


def quantized(build=mlp, scheme="w4a8"):
    model = build()
    insert_quantizers(model, scheme)
    return model


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_nothing_and_the_old_export(tmp_path):
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        old = export(quantized(), disk / "old")
        with pytest.raises(ValueError, match=r"path: cannot write to .*new.*; nothing was left behind") as raised:
            export(quantized(lambda: nn.Sequential(nn.Linear(512, 512)), "w4"), disk / "new")
        assert "os error 28" in str(raised.value)  # in the words of safetensors
        assert names(disk) == ["old"]
        load_quantized(old, model=mlp())


def test_a_library_that_does_not_tell_that_the_disk_is_full(tmp_path, monkeypatch):
    def write(self, job, folder):
        with pytest.raises(OSError, match="No space"):
            (folder / "ballast").write_bytes(bytes(2**20))
        raise RuntimeError("unexpected pos 64 vs 0")  # as torch's writer says it

    monkeypatch.setattr(native.NativeFormat, "write", write)
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        with pytest.raises(ValueError, match=r"path: cannot write to .*No space left.*nothing was left behind; free space there") as raised:
            export(quantized(), disk / "new")
        assert isinstance(raised.value.__cause__, RuntimeError)
        assert names(disk) == []


@pytest.mark.parametrize("place", ["write", "verify"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left.*nothing was left behind; free space there"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; nothing was left behind"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "os error 27"),
    ],
    ids=["full", "broken", "safetensors"],
)
def test_an_error_of_the_disk_inside_the_library_of_a_target(place, error, message, tmp_path, monkeypatch):
    def fail(self, job, folder):
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(native.NativeFormat, place, fail)
    with pytest.raises(ValueError, match=rf"path: cannot write to .*out.*{message}"):
        export(quantized(), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("reads back differently"), KeyboardInterrupt(), KeyError("mine")], ids=repr)
def test_other_errors_stay_what_they_are(error, tmp_path, monkeypatch):
    def fail(self, job, folder):
        raise error

    monkeypatch.setattr(native.NativeFormat, "verify", fail)
    with pytest.raises(type(error)):
        export(quantized(), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", range(0, 9, 2))
def test_a_disk_that_fails_at_any_sync(place, tmp_path, monkeypatch):
    real, left = os.fsync, iter(range(place))

    def fail(descriptor):
        if next(left, None) is None:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    try:
        export(quantized(), tmp_path / "out")
    except ValueError as error:
        assert "path: cannot write" in str(error)
    assert names(tmp_path) in ([], ["out"])
    for folder in tmp_path.iterdir():
        load_quantized(folder, model=mlp())


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "source").mkdir()
    with (
        read_only_copy(tmp_path / "source", tmp_path / "disk" / "there") as folder,
        pytest.raises(ValueError, match=r"path: cannot write to .*out.*(Read-only|denied)"),
    ):
        export(quantized(), folder / "out")


def test_folders_above_are_made(tmp_path):
    load_quantized(export(quantized(), tmp_path / "not" / "there" / "out"), model=mlp())


def test_places_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    paths = [tmp_path / "file", tmp_path / "file" / "x", tmp_path / "dangling", tmp_path / "full", "", ".", "..", "/", "x\0y", "x" * 300]
    for path in [*paths, tmp_path / "here", "/proc/out", os.devnull]:
        with pytest.raises(ValueError, match="path: "):
            export(quantized(), path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    load_quantized(export(quantized(), tmp_path / "link"), model=mlp())
    assert (tmp_path / "link").is_symlink()
    assert "manifest.json" in names(tmp_path / "disk")


# ---------------------------------------------------------------- processes that die, and two at once


def die_while_verifying(folder):
    native.NativeFormat.verify = lambda self, job, folder: os.kill(os.getpid(), signal.SIGKILL)
    export(quantized(), folder)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_while_verifying, args=(tmp_path / "out",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert re.fullmatch(r"\.out\.\d+\.part", left)
    for name in (".out.12.part.mine", ".outer.12.part", ".out.x.part"):
        (tmp_path / name).mkdir()
    export(quantized(), tmp_path / "other")
    assert left in names(tmp_path)  # it is of another export
    load_quantized(export(quantized(), tmp_path / "out"), model=mlp())
    assert names(tmp_path) == [".out.12.part.mine", ".out.x.part", ".outer.12.part", "other", "out"]


def test_an_export_that_is_still_written_is_left_alone(tmp_path):
    """Another process holds it; here a thread with a descriptor of its own, which a lock tells apart as well."""
    other = tmp_path / ".out.1.part"
    other.mkdir()
    descriptor = staging._lock(other)
    export(quantized(), tmp_path / "out")
    assert names(tmp_path) == [".out.1.part", "out"]
    os.close(descriptor)


def test_the_second_of_two_at_once_is_refused(tmp_path, monkeypatch):
    real = native.NativeFormat.verify

    def verify(self, job, folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text("of the other")
        return real(self, job, folder)

    monkeypatch.setattr(native.NativeFormat, "verify", verify)
    with pytest.raises(ValueError, match=r"path: cannot write to .*nothing was left behind; another process wrote there meanwhile"):
        export(quantized(), tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "of the other"


def test_many_at_once_give_one_whole_export(tmp_path):
    failed = []

    def run():
        try:
            export(quantized(), tmp_path / "out")
        except ValueError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 3
    assert all(error.startswith("path: ") for error in failed)
    assert names(tmp_path) == ["out"]
    load_quantized(tmp_path / "out", model=mlp())


# ---------------------------------------------------------------- tokenizer, chat template, generation config


def test_no_tokenizer_is_told_at_the_line_that_exports(tmp_path):
    with pytest.warns(UserWarning, match="no tokenizer is known") as caught:
        export(quantized(llama, "w4"), tmp_path / "out")
    assert caught[0].filename == __file__


def test_a_hub_id_that_cannot_be_asked_tells_why_there_is_no_tokenizer(tmp_path, monkeypatch):
    def refuse(name):
        raise ValueError(f"tokenizer: none can be read from {name!r}: offline")

    monkeypatch.setattr(company, "load_tokenizer", refuse)
    model = quantized(llama, "w4")
    model.config._name_or_path = "owner/name"
    with pytest.warns(UserWarning, match=r"'owner/name': offline.*pass tokenizer=") as caught:
        export(model, tmp_path / "out")
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="none can be read from 'other'"):
        export(model, tmp_path / "new", tokenizer="other")


def test_everything_that_belongs_to_a_language_model_is_there(tmp_path):
    source = Path(save_causal_lm(llama(), tmp_path / "source"))
    model = type(llama()).from_pretrained(source)
    model.generation_config.update(temperature=0.3, do_sample=False, max_new_tokens=7)  # contradictory, as some published models are
    insert_quantizers(model, "w4")
    given = character_tokenizer()
    given.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    for tokenizer, template in ((None, False), (given, True)):
        folder = export(model, tmp_path / f"out-{template}", tokenizer=tokenizer)
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names(folder))
        assert ("chat_template.jinja" in names(folder)) == template  # what is given wins
        loaded = load_quantized(folder)
        assert (loaded.generation_config.max_new_tokens, loaded.generation_config.temperature) == (7, 0.3)
    read = type(given).from_pretrained(folder)
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    assert read("hi")["input_ids"] == given("hi")["input_ids"]


class Holder(pl.LightningModule):
    """A module of one's own around a transformers model."""

    def __init__(self, model=None, tokenizer=None):
        super().__init__()
        self.model = gpt2() if model is None else model
        self.tokenizer = tokenizer

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


def test_the_tokenizer_of_a_module_of_ones_own(tmp_path):
    module = Holder(tokenizer=character_tokenizer())
    insert_quantizers(module, "w4")
    assert "tokenizer.json" in names(export(module, tmp_path / "out"))
    module.tokenizer = None
    assert "tokenizer.json" not in names(export(module, tmp_path / "none"))
    assert "tokenizer.json" in names(export(module, tmp_path / "given", tokenizer=character_tokenizer()))


# ---------------------------------------------------------------- live modules


def test_a_compiled_module_is_exported_as_the_one_inside(tmp_path):
    model = quantized()
    wanted = logits_of(model)
    folder = export(torch.compile(model, backend="eager"), tmp_path / "out")
    assert torch.equal(logits_of(load_quantized(folder, model=mlp())), wanted)
    model.compile(backend="eager")
    logits_of(model)
    assert torch.equal(logits_of(load_quantized(export(model, tmp_path / "in-place"), model=mlp())), wanted)


def test_of_a_distillation_module_its_student_is_written(tmp_path):
    module = DistillationModule(teacher=llama())
    insert_quantizers(module.student, "w4a8kv4")
    loaded = load_quantized(export(module, tmp_path / "out"))
    assert type(loaded) is type(llama())
    assert torch.equal(logits_of(loaded), logits_of(module.student))


def test_a_lightning_module_around_a_transformers_model(tmp_path):
    module = Holder()
    insert_quantizers(module, "w4a8kv4")
    loaded = load_quantized(export(module.eval(), tmp_path / "out"), model=Holder())
    assert torch.equal(logits_of(loaded.model), logits_of(module.model))
    assert scheme_of(loaded) == scheme_of(module)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_module_under_ddp_is_exported_as_the_one_inside(one_process, tmp_path):
    model = quantized()
    folder = export(nn.parallel.DistributedDataParallel(model), tmp_path / "out")
    assert torch.equal(logits_of(load_quantized(folder, model=mlp())), logits_of(model))


def test_a_sharded_module_is_refused_with_the_way_out(one_process, tmp_path):
    model = quantized()
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"export: '0\.weight' is sharded over processes; .*load_trained\(checkpoint\).*lightning-qat export"
    ):
        export(model, tmp_path / "out")
    assert names(tmp_path) == []
