"""Training that is killed again and again ends with the same weights; and every checkpoint that is there is whole."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from kill import run_with_kills
from resuming import Student, differences, distillation, end_of, learned_and_static, synthetic, train, world

from lightning_qat.callbacks import AtomicModelCheckpoint, checkpoint

FORK = multiprocessing.get_context("fork")


class Mine:
    """Kills the whole session once, when something is about to happen for the n-th time.

    Args:
        folder: Where it is noted that the mine has gone off.
        place: What shall be about to happen; None for a mine that never goes off.
        count: The n.
    """

    def __init__(self, folder, place=None, count=1):
        self.note, self.place, self.left = folder / "exploded", place, count
        if self.note.exists():
            self.place = None

    def pass_by(self, place):
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                self.note.touch()
                os.killpg(0, signal.SIGKILL)

    def under(self, owner, name):
        """Calls of a function pass by first."""
        original = getattr(owner, name)

        def watched(*args, **options):
            folder = name == "save" and isinstance(args[1], Path)  # its last file, after those of the tensors
            self.pass_by("meta" if folder else name)
            return original(*args, **options)

        setattr(owner, name, watched)


def run(folder, store, kind, student, options):
    """Train to the end from wherever the last checkpoint is."""
    mine = Mine(folder, *options)
    for owner, name in ((torch, "save"), (checkpoint, "flush"), (checkpoint, "replace"), (checkpoint, "_delete"), (checkpoint, "_sync")):
        mine.under(owner, name)

    def on_batch(step, name):
        def watched(*args):
            mine.pass_by(name)
            return step(*args)

        return watched

    keep = AtomicModelCheckpoint(folder / "kept", every_n_train_steps=3, save_last=True)
    module = student()
    for name in ("training_step", "validation_step"):
        setattr(module, name, on_batch(getattr(module, name), name))
    with learned_and_static() as scheme:
        scheme = scheme if isinstance(module, Student) else "w4a8kv4"
        data = synthetic(store, batch_size=2 if kind == "single" else 1)
        trainer = train(kind, data, scheme, module=module, callbacks=[keep], ckpt_path="last", max_epochs=2)
    torch.save(end_of(trainer), folder / f"end-{trainer.global_rank}.pt")


def job(folder, store, kind="single", student=Student, options=()):
    """As many processes as the strategy wants, all of one session."""
    run_ranks(run, folder, store, kind, student, options, world=world(kind))


def killed(folder, *args):
    """Whether the job died of its mine."""

    def session():
        os.setsid()
        job(folder, *args)

    process = FORK.Process(target=session)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_checkpoints(folder):
    """Whatever has the name of a checkpoint can be read; hidden names hold what was under way."""
    for path in (folder / "kept").glob("*.ckpt"):
        assert not path.name.startswith("."), path
        if path.is_dir():
            assert (path / ".metadata").exists(), path
            assert torch.load(path / "meta.pt", weights_only=True)["global_step"] > 0
        else:
            assert torch.load(path, weights_only=True)["global_step"] > 0


def ends(folder, kind):
    found = [torch.load(folder / f"end-{rank}.pt", weights_only=False) for rank in range(world(kind))]
    assert list((folder / "kept").glob(".*")) == []
    return found


def compare(whole, folder, kind):
    for one, other in zip(whole, ends(folder, kind), strict=True):
        assert differences(one, other) == []


WHOLE = {}


@pytest.fixture
def whole(store, tmp_path_factory):
    """The ends of a run that nothing disturbs, made once for each kind."""

    def of(kind, student=Student):
        if (kind, student) not in WHOLE:
            folder = tmp_path_factory.mktemp("whole")
            job(folder, store, kind, student)
            WHOLE[kind, student] = ends(folder, kind)
        return WHOLE[kind, student]

    return of


# Second and later counts: something is there already that must not get lost.
MOMENTS = [("training_step", 8), ("validation_step", 2), ("save", 4), pytest.param(("flush", 4), marks=pytest.mark.slow)]
FOLDERS = [("meta", 3), pytest.param(("_delete", 5), marks=pytest.mark.slow)]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment[0])
def test_one_process_killed_at_the_worst_moments(moment, whole, store, quick_path):
    assert killed(quick_path, store, "single", Student, moment)
    check_checkpoints(quick_path)
    assert not killed(quick_path, store, "single", Student, moment)
    compare(whole("single"), quick_path, "single")


@pytest.mark.parametrize("moment", FOLDERS)
def test_two_processes_killed_at_the_worst_moments(moment, whole, store, quick_path):
    kind = "fsdp2"
    assert killed(quick_path, store, kind, Student, moment)
    check_checkpoints(quick_path)
    assert not killed(quick_path, store, kind, Student, moment)
    compare(whole(kind), quick_path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp2"])
def test_distillation_killed_at_random_moments(kind, whole, store, quick_path):
    args = (quick_path, store, kind, distillation)
    run_with_kills(job, args, kills=1, delay=(0.3, 1.0), after_kill=lambda: check_checkpoints(quick_path))
    compare(whole(kind, distillation), quick_path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp2"])
def test_training_killed_at_many_random_moments(kind, whole, store, quick_path):
    undisturbed, start = whole(kind), time.monotonic()
    (quick_path / "timed").mkdir()
    job(quick_path / "timed", store, kind)
    seconds, folder = time.monotonic() - start, quick_path / "killed"
    folder.mkdir()
    delay = (0.1 * seconds, 0.6 * seconds)  # of the time of a run, for on a fast machine none would land otherwise
    landed = run_with_kills(job, (folder, store, kind), kills=25, delay=delay, after_kill=lambda: check_checkpoints(folder))
    assert landed.kills > 0
    compare(undisturbed, folder, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [(name, count) for name in ("save", "meta", "flush", "replace", "_delete", "_sync") for count in range(1, 12, 2)]
)
def test_folders_killed_at_every_moment(moment, whole, store, quick_path):
    killed(quick_path, store, "fsdp2", Student, moment)
    check_checkpoints(quick_path)
    assert not killed(quick_path, store, "fsdp2", Student, moment)
    compare(whole("fsdp2"), quick_path, "fsdp2")


def test_checkpoints_are_looked_at(quick_path):
    """The check itself would notice."""
    (quick_path / "kept" / "last.ckpt").mkdir(parents=True)
    with pytest.raises(AssertionError, match=r"last\.ckpt"):
        check_checkpoints(Path(quick_path))
