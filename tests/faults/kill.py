"""Kill a job at random moments, start it again, and see that it gets done.

    killed = run_with_kills(train, args=(folder,), kills=20, delay=(0.01, 0.2))
    killed = run_with_kills([sys.executable, "-m", "lightning_qat", "generate", ...], kills=5, delay=(1.0, 8.0))

A function runs in a forked child, which costs milliseconds because torch is there already; a command (any sequence of words) starts anew.
Both run in a session of their own, and the kill goes to all of it, as when a machine or a container dies. A forked child must not
use CUDA if its parent did: give a command there.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Killed:
    """How a job went.

    Attributes:
        kills: Kills that landed; fewer than asked for if the job ended by itself before.
        seconds: Time of all runs together.
        delays: After how many seconds each kill landed.
    """

    kills: int = 0
    seconds: float = 0.0
    delays: list[float] = field(default_factory=list)


class _Function:
    def __init__(self, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(job, args))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def _run(job: Callable[..., Any], args: tuple[Any, ...]) -> None:
        os.setsid()
        job(*args)

    def wait(self, seconds: float) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode

    def output(self) -> str:
        return "its traceback is in the captured stderr"


class _Command:
    def __init__(self, job: Sequence[str]) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(job, stdout=self.file, stderr=subprocess.STDOUT, start_new_session=True)
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        self.file.seek(0)
        return self.file.read()[-4000:].decode(errors="replace")


def run_with_kills(
    job: Callable[..., Any] | Sequence[str],
    args: tuple[Any, ...] = (),
    *,
    kills: int,
    delay: tuple[float, float],
    seed: int = 0,
    after_kill: Callable[[], Any] | None = None,
    timeout: float = 120.0,
) -> Killed:
    """Run a job to its end, killing it (SIGKILL) on the way.

    Args:
        job: A function, called as ``job(*args)``, or the words of a command.
        args: For a function.
        kills: After so many kills the job is left alone.
        delay: Shortest and longest time in seconds from a start to the kill; drawn evenly.
        seed: Of the delays.
        after_kill: Called while the job is dead, to look at what it left behind.
        timeout: Seconds that the last run may take.

    Raises:
        AssertionError: The job failed by itself or hangs.
    """
    draw, killed, start = random.Random(seed), Killed(), time.monotonic()
    while True:
        left_alone = killed.kills == kills
        run = _Function(job, args) if callable(job) else _Command(job)
        wait = timeout if left_alone else draw.uniform(*delay)
        code = run.wait(wait)
        if sent := code is None:
            _kill(run)
            assert not left_alone, f"the job did not end within {timeout} s: {run.output()}"
            code = run.wait(timeout)
        if code == 0:
            killed.seconds = time.monotonic() - start
            return killed
        failed = f"the job ended by itself with code {code}: {run.output()}"
        assert sent, failed
        assert code == -signal.SIGKILL, failed
        killed.kills += 1
        killed.delays.append(wait)
        if after_kill is not None:
            after_kill()


def _kill(run: _Function | _Command) -> None:
    try:
        os.killpg(run.pid, signal.SIGKILL)
    except ProcessLookupError:  # not the leader of a session yet, or gone
        os.kill(run.pid, signal.SIGKILL)
