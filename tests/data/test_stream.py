"""A stream gives the samples that a store would hold, each once, in order, whoever writes them and however often it is interrupted."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import VOCABULARY
from synthetic import QUIET, Reader, fit, ids, module, ready, samples, teacher

from lightning_qat.data import teachers
from lightning_qat.data.order import StreamOrder, StreamPlan
from lightning_qat.data.stream import GenerationHere, SampleStream, in_order
from lightning_qat.generation import CallableTeacher, Sample


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tokens of samples 0 to 89."""
    return samples(ready(tmp_path_factory.mktemp("stored") / "gen", num_samples=90, val_samples=0))


@pytest.fixture
def forked(monkeypatch):
    """A process that need not import everything first; whether one that must works is the slow test below."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def stream(folder=None, **changes):
    return module(folder or "not-used", mode="stream", **changes)


def shown(reader):
    """Rows in the order in which they were trained on."""
    return [row for _, rows in reader.seen for row in rows]


def children():
    return multiprocessing.active_children()


# ---------------------------------------------------------------- which samples


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("size", "held_back"), [(7, 0), (7, 3), (6, 2)])
def test_no_epoch_repeats_another_and_none_shows_validation_samples(size, held_back, world):
    seen, onwards = [], []
    for rank in range(world):
        plan = StreamPlan(size, held_back, world, rank)
        order, mine = StreamOrder(plan, lambda: None), []
        for epoch in range(4):
            order.set_epoch(epoch)
            mine += list(order)
            assert len(order) == size // world
        assert list(itertools.islice(plan.onwards(mine[0]), len(mine))) == mine
        assert list(itertools.islice(plan.onwards(mine[5]), len(mine) - 5)) == mine[5:]
        seen += mine
        onwards.append(mine)
    assert len(set(seen)) == len(seen) == 4 * (size // world) * world
    assert not set(seen) & set(range(size, size + held_back))
    if world == 1:
        assert seen == [n for n in range(4 * size + held_back) if not size <= n < size + held_back]
    first = [number for step in zip(*onwards, strict=True) for number in step][: size // world * world]
    assert first == list(range(size // world * world))  # ranks take turns


def test_a_stream_is_what_a_store_would_hold(stored, tmp_path):
    reader = fit(stream(tmp_path / "gen"), max_epochs=3)
    assert shown(reader) == stored[:16] + stored[21 : 21 + 32]
    assert [epoch for epoch, _ in reader.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert list(tmp_path.iterdir()) == []  # nothing is stored


def test_validation_samples_are_the_last_of_the_first_epoch(stored):
    data = ready(None, mode="stream", store="not-used")
    assert ids(data.val_dataset) == stored[16:21]
    data.teardown("fit")
    reader = Reader()
    pl.Trainer(accelerator="cpu", **QUIET).validate(reader, datamodule=stream())
    assert reader.validated == stored[16:21]


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 7}, {"buffer": 8}, {"teacher_logits": 3}, {"stream_device": "cpu"}], ids=str
)
def test_samples_do_not_depend_on_how_they_are_asked_for(changes, stored):
    assert shown(fit(stream(**changes), max_epochs=2)) == stored[:16] + stored[21:37]


def test_distributions_come_with_the_samples(tmp_path):
    batches = [ready(tmp_path, teacher_logits=3, mode=mode) for mode in ("store", "stream")]
    whole = {tuple(item["input_ids"].tolist()): item for item in batches[0].train_dataset}
    for batch in batches[1].train_dataloader():
        for row, (tokens, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
            item = whole[tuple(tokens[mask].tolist())]
            assert batch["loss_mask"][row][mask].tolist() == item["loss_mask"].tolist()
            assert torch.equal(batch["teacher"].tail[row][mask][:-1], item["tails"][:-1])


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"limit_train_batches": 3, "accumulate_grad_batches": 2}], ids=str)
def test_a_shortened_epoch_goes_on_with_the_next_one(limits, stored):
    rows = shown(fit(stream(), max_epochs=2, **limits))
    count = limits["limit_train_batches"] * 4
    assert rows == stored[:count] + stored[21 : 21 + count]


@pytest.mark.parametrize("step", [4, 6], ids=["between-epochs", "within-an-epoch"])
@pytest.mark.parametrize("worker", ["inline", "process"])
def test_a_resumed_stream_goes_on_with_the_next_sample(step, worker, forked, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    whole = fit(stream(stream_worker=worker), max_epochs=3, callbacks=[keep]).seen
    resumed = fit(stream(stream_worker=worker), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=3).seen
    assert resumed == whole[step:]


def test_a_stream_can_be_trained_on_again(stored):
    data = stream()
    assert shown(fit(data, max_epochs=1)) == shown(fit(data, max_epochs=1)) == stored[:16]


# ---------------------------------------------------------------- order and buffer


class Shuffled:
    """Finishes samples in an odd order: of `rows` under way, the one with the smallest key."""

    vocab_size, rows = 9, 4

    def __init__(self, key):
        self.key, self.identity, self.under_way, self.most, self.starts = key, {"rows": 4}, set(), 0, 0

    def samples(self, indices):
        self.starts += 1
        indices, running = iter(indices), []
        while True:
            running += itertools.islice(indices, self.rows - len(running))
            if not running:
                return
            self.under_way |= set(running)
            self.most = max(self.most, len(self.under_way))
            running.sort(key=self.key)
            yield Sample(index=running[0], tokens=torch.tensor([running.pop(0)]))


KEYS = {"in-order": lambda n: n, "reversed": lambda n: -n, "one-is-long": lambda n: (n == 1, n), "mixed": lambda n: n * 7919 % 31}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("buffer", [4, 6, 50])
def test_samples_come_in_order_and_no_more_wait_than_the_buffer_holds(key, buffer):
    source, given = Shuffled(key), []
    for sample in in_order(source, iter(range(40)), buffer):
        given.append(sample.index)
        source.under_way -= {sample.index}
    assert given == list(range(40))
    assert source.most <= buffer
    assert source.starts == 2 or buffer < 50  # once for all, and once to find that there are no more


def test_nothing_is_written_ahead_of_what_is_wanted():
    source = Shuffled(KEYS["in-order"])
    for wanted, sample in zip(range(20), in_order(source, itertools.count(), 10), strict=False):
        assert sample.index == wanted
        assert len(source.under_way) <= 10
        source.under_way -= {wanted}


def test_a_source_that_ends_early_is_named():
    class Ends(Shuffled):
        def samples(self, indices):
            return iter(())

    plan = StreamPlan(8, 0)
    with pytest.raises(ValueError, match=r"teacher: its samples ended before sample 0"):
        SampleStream(plan, GenerationHere(Ends(KEYS["in-order"]), plan, 4)).read(0)


# ---------------------------------------------------------------- the teacher


class Module(Reader):
    """Trains while it holds the teacher, and casts it as a precision plugin might."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)

    def on_fit_start(self):
        self.model.bfloat16()


def test_a_teacher_that_is_part_of_the_trained_module_is_copied(stored):
    reader = Module(teacher())
    data = stream(teacher=reader.model)
    pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **QUIET).fit(reader, datamodule=data)
    assert shown(reader) == stored[:16]


def test_a_teacher_in_memory_is_left_as_it_was_between_samples(stored):
    model = teacher().train()
    data = ready("not-used", mode="stream", teacher=model)
    assert [data.train_dataset[i]["input_ids"].tolist() for i in range(3)] == stored[:3]
    assert all(part.training for part in model.modules())
    assert model.config._attn_implementation == teacher().config._attn_implementation


def test_precision_does_not_change_samples(stored):
    assert shown(fit(stream(), max_epochs=1, precision="bf16-mixed")) == stored[:16]


def test_the_teacher_is_freed_after_the_run(monkeypatch):
    loaded, original = [], teachers.copy.deepcopy
    data = stream(dtype="bfloat16")

    class Copy:
        @staticmethod
        def deepcopy(thing):
            model = original(thing)
            loaded.append(weakref.ref(model))
            return model

    monkeypatch.setattr(teachers, "copy", Copy)
    fit(data, max_epochs=1)
    gc.collect()
    assert [reference() for reference in loaded] == [None]


# ---------------------------------------------------------------- another process


def test_a_process_writes_the_same(stored, forked):
    assert shown(fit(stream(stream_worker="process", buffer=8), max_epochs=3)) == stored[:16] + stored[21:53]
    assert children() == []


def test_a_process_starts_anew_where_it_is_told_to(stored, forked):
    reader = fit(stream(stream_worker="process"), max_epochs=3, limit_train_batches=1)
    assert shown(reader) == stored[:4] + stored[21:25] + stored[37:41]
    assert children() == []


class Fails(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise OSError("the disk is full")


def test_the_process_ends_when_training_fails(forked):
    with pytest.raises(OSError, match="the disk is full"):
        fit(stream(stream_worker="process"), max_epochs=1, callbacks=[Fails()])
    assert children() == []


def test_the_process_ends_with_its_data_module(forked):
    data = ready("not-used", mode="stream", stream_worker="process")
    assert len(children()) == 1
    del data
    gc.collect()
    assert children() == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher_logits": VOCABULARY + 1}, ValueError, f"teacher_logits: got {VOCABULARY + 1}"),
        ({"buffer": 7}, ValueError, "buffer: got 7, expected at least rows=8"),
        ({"teacher": CallableTeacher(len, VOCABULARY, "x")}, RuntimeError, r"the process that generates failed:\n.*Traceback(.|\n)*int"),
    ],
    ids=["setting", "buffer", "bug"],
)
def test_errors_of_the_process_are_raised_here(changes, error, message, forked):
    with pytest.raises(error, match=message):
        fit(stream(stream_worker="process", **changes), max_epochs=1)
    assert children() == []


def test_a_teacher_that_breaks_down_later_is_raised_too(forked):
    broken = teacher()
    with torch.no_grad():
        broken.model.embed_tokens.weight[90:] = torch.nan  # end tokens are fed only in rows that go on
        broken.generation_config.eos_token_id = [5]
    data = stream(teacher=broken, stream_worker="process", val_samples=0, greedy_tokens=(0, 0), num_samples=64, rows=8)
    with pytest.raises(ValueError, match=r"generation: the teacher's logits are not finite at position"):
        fit(data, max_epochs=4)
    assert children() == []


def test_a_killed_process_is_noticed(forked):
    data = ready("not-used", mode="stream", stream_worker="process", num_samples=4000, val_samples=0, buffer=8)
    data.train_dataset[0]
    os.kill(children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the process that generates has ended with exit code -9"):
        list(map(data.train_dataset.__getitem__, range(1, 4000)))


def test_a_teacher_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match=r"stream_worker: got 'process', but the teacher cannot be sent .*; name it, or use 'inline'"):
        ready("not-used", mode="stream", stream_worker="process", teacher=CallableTeacher(lambda x: x, VOCABULARY, "x"))
    assert children() == []


KILLED = """
import sys, os, time
sys.path[:0] = {paths!r}
from synthetic import module
if __name__ == "__main__":
    data = module("not-used", mode="stream", stream_worker="process", num_samples=4000)
    data.setup("fit")
    import multiprocessing
    print(data.train_dataset[0]["input_ids"].tolist(), multiprocessing.active_children()[0].pid, sep="|", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_real_process_writes_the_same_and_ends_with_a_killed_trainer(stored, tmp_path):
    tests = Path(__file__).parent
    (tmp_path / "run.py").write_text(KILLED.format(paths=[str(tests.parent), str(tests)]))
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True)
    tokens, child = run.stdout.readline().split("|")
    assert tokens == str(stored[0])
    os.kill(int(child), 0)  # it lives
    run.kill()
    run.wait()
    for _ in range(100):
        if not Path(f"/proc/{int(child)}").exists() or "\nState:\tZ" in Path(f"/proc/{int(child)}/status").read_text():
            return
        time.sleep(0.2)
    pytest.fail("the process that generates outlives its trainer")
