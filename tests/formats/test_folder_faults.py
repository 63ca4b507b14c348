"""Exports that go wrong: a folder is whole or not there, and the error names the way out."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
from folders import names, quantized
from models import mlp
from safetensors import SafetensorError
from torch import nn

from lightning_qat import export, load_quantized
from lightning_qat.formats.folder import staging
from lightning_qat.formats.native import format as native

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from disks import read_only_copy, small_disk

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
    def fail(self, job, folder, *entries):
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(native.NativeFormat, place, fail)
    with pytest.raises(ValueError, match=rf"path: cannot write to .*out.*{message}"):
        export(quantized(), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("reads back differently"), KeyboardInterrupt(), KeyError("mine")], ids=repr)
def test_other_errors_stay_what_they_are(error, tmp_path, monkeypatch):
    def fail(self, job, folder, *entries):
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
    with contextlib.suppress(ValueError):
        export(quantized(), tmp_path / "out")
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
    native.NativeFormat.verify = lambda self, job, folder, entries: os.kill(os.getpid(), signal.SIGKILL)
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

    def verify(self, job, folder, entries):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text("of the other")
        return real(self, job, folder, entries)

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
