"""Disks that misbehave, for tests: full ones, read-only ones, and calls that are watched or fail."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes in memory at `folder`; skips the test where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def read_only_copy(source, target):
    """A copy of a folder that the present user may not write; root, whom modes do not stop, gets a disk that is mounted so."""
    with contextlib.ExitStack() as disk:
        if not os.geteuid():
            disk.enter_context(small_disk(target.parent, 2**20))
        shutil.copytree(source, target)
        if not os.geteuid():
            subprocess.run(["mount", "-o", "remount,ro", str(target.parent)], check=True)
        else:
            modes = {path: path.stat().st_mode for path in [target, *target.iterdir()]}
            disk.callback(lambda: [path.chmod(mode) for path, mode in modes.items()])
            for path, mode in modes.items():
                path.chmod(mode & 0o555)
        yield target


class Fuse:
    """Counts the calls that write (`os.pwrite`, `os.fsync`, `os.replace`) and lets the one at `place` go wrong.

    A write that goes wrong is done by half before. Afterwards everything works again.
    """

    def __init__(self, monkeypatch, place, wrong):
        self.left, self.wrong = place, wrong
        self.real = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace")}
        for name in self.real:
            monkeypatch.setattr(os, name, lambda *args, name=name: self.call(name, *args))

    def call(self, name, *args):
        self.left -= 1
        if self.left == -1:
            if name == "pwrite":
                file, content, offset = args
                self.real[name](file, content[: len(content) // 2], offset)
            self.wrong()
        return self.real[name](*args)

    @property
    def burnt(self):
        return self.left < 0


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Recorder:
    """Keeps what is written and synced, so that a test can say what a power cut would have left.

    Attributes:
        events: ``("write", path, offset, content)``, ``("sync", path)``, ``("create", path, content)``, in their order.
    """

    def __init__(self, monkeypatch):
        self.events = []
        pwrite, fsync, replace, touch = os.pwrite, os.fsync, os.replace, Path.touch

        def record_write(file, content, offset):
            self.events.append(("write", _path(file), offset, bytes(content)))
            return pwrite(file, content, offset)

        def record_sync(file):
            self.events.append(("sync", _path(file)))
            return fsync(file)

        def record_rename(source, target):
            assert ("sync", str(source)) in self.events, "renamed before it was on disk"
            with open(source, "rb") as file:
                self.events.append(("create", str(target), file.read()))
            return replace(source, target)

        def record_touch(path):
            if not path.exists():
                self.events.append(("create", str(path), b""))
            return touch(path)

        monkeypatch.setattr(os, "pwrite", record_write)
        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "replace", record_rename)
        monkeypatch.setattr(Path, "touch", record_touch)

    def after_power_cut(self, place, kept):
        """Contents of the files when the power fails before event `place`.

        Args:
            place: Number of events that happened.
            kept: A function of (path, content) that says what of a write is on disk that was not synced; None for nothing.

        Returns:
            A dict of paths and contents; a file is lost unless its folder was synced after it got its name.
        """
        files = {}
        for number, event in enumerate(self.events[:place]):
            later = self.events[number + 1 : place]
            if event[0] == "create" and ("sync", os.path.dirname(event[1])) in later:
                files[event[1]] = bytearray(event[2])
            if event[0] == "write" and event[1] in files:
                _, path, offset, content = event
                content = content if ("sync", path) in later else kept(path, content)
                if content is not None:
                    file = files[path]
                    file.extend(bytes(max(0, offset + len(content) - len(file))))
                    file[offset : offset + len(content)] = content
        return {path: bytes(content) for path, content in files.items()}


def _path(file):
    return os.readlink(f"/proc/self/fd/{file}")
