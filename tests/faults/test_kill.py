"""The kill harness itself: kills land, jobs get done, failures are not taken for kills."""

import os
import signal
import sys
import time

import pytest
from kill import run_with_kills

COUNT = """
import os, sys, time
path = sys.argv[1]
while (size := os.path.getsize(path)) < 40:
    open(path, "ab").write(b"x")
    time.sleep(0.02)
"""


def count_up(path, end, pause):
    while os.path.getsize(path) < end:
        with open(path, "ab") as file:
            file.write(b"x")
        time.sleep(pause)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "count").touch()
    return tmp_path / "count"


def test_a_function_is_killed_and_gets_done(path):
    seen = []
    killed = run_with_kills(
        count_up, (path, 150, 0.005), kills=5, delay=(0.02, 0.05), after_kill=lambda: seen.append(path.stat().st_size), timeout=30
    )
    assert killed.kills == len(seen) == len(killed.delays) == 5
    assert seen == sorted(seen)
    assert seen[-1] < 150 == path.stat().st_size
    assert all(0.02 <= delay <= 0.05 for delay in killed.delays)
    assert killed.seconds > sum(killed.delays)


def test_a_command_is_killed_and_gets_done(path):
    killed = run_with_kills([sys.executable, "-c", COUNT, str(path)], kills=2, delay=(0.2, 0.4), timeout=30)
    assert killed.kills == 2
    assert path.stat().st_size == 40


def test_a_job_that_ends_by_itself_is_not_started_again(path):
    assert run_with_kills(count_up, (path, 3, 0), kills=5, delay=(20, 20)).kills == 0
    assert path.stat().st_size == 3


def test_a_seed_repeats_the_delays(path):
    runs = []
    for _ in range(2):
        path.write_bytes(b"")
        runs.append(run_with_kills(count_up, (path, 60, 0.01), kills=3, delay=(0.0, 0.03), seed=4).delays)
    assert runs[0] == runs[1]


def fail():
    raise RuntimeError("on purpose")


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("job", [fail, kill_itself, [sys.executable, "-c", "raise SystemExit('on purpose')"]])
def test_a_job_that_fails_is_no_kill(job, capfd):
    with pytest.raises(AssertionError, match="ended by itself with code") as caught:
        run_with_kills(job, kills=5, delay=(20, 20))
    if job is not kill_itself:
        assert "on purpose" in str(caught.value) + capfd.readouterr().err


def test_a_job_that_hangs_is_named_and_ended(path):
    with pytest.raises(AssertionError, match=r"did not end within 1\.0 s"):
        run_with_kills(count_up, (path, 10**9, 0.01), kills=1, delay=(0.0, 0.0), timeout=1.0)
    size = path.stat().st_size
    time.sleep(0.05)
    assert path.stat().st_size == size
