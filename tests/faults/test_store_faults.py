"""The store under kills, power cuts, damage and full disks: what it gives is right, what is lost is named and can be had again."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
from disks import Fuse, Recorder, die, no_space, read_only_copy, small_disk
from kill import run_with_kills
from samples import IDENTITY, known, same

from lightning_qat.generation.store import GenerationStore

FORK = multiprocessing.get_context("fork")
HEADER, RECORD = 64, 56  # bytes in an index
KINDS = ("plain", "top_k", "logits", "chat")
WAY_OUT = "lightning-qat generate --resume --store"


def sample(index):
    return known(index, KINDS[index % 4])


def complete(folder, count, group=2, shard_bytes=2**30, acknowledge=lambda numbers: None, pause=0.0, writer=0, writers=1):
    """What a run does: append what is missing, in groups; `acknowledge` hears of each group that is safe."""
    store = GenerationStore(folder, shard_bytes).open(IDENTITY, count)
    with store.writing(writer) as shards:
        missing = [index for index in store.missing(count) if index % writers == writer]
        for start in range(0, len(missing), group):
            numbers = missing[start : start + group]
            shards.append(slowly(numbers, pause))
            acknowledge(numbers)
    return store


def slowly(numbers, pause):
    for index in numbers:
        yield sample(index)
        time.sleep(pause)


def acknowledging(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return lambda numbers: os.write(file, "".join(f"{index}\n" for index in numbers).encode())


def acknowledged(path):
    return set(map(int, path.read_text().split())) if path.exists() else set()


def check(folder):
    """The numbers that are there; each of them holds the right bits and nothing is damaged."""
    store = GenerationStore.existing(folder)
    numbers = store.records["index"].tolist()
    assert all(same(store.read(index), sample(index)) for index in numbers)
    assert store.verify() == []
    return set(numbers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Digests of sets of samples that were written without trouble, by size."""
    folder = tmp_path_factory.mktemp("whole")
    return {count: complete(folder / str(count), count, group=count).digest(count) for count in (6, 10, 12, 48, 400)}


# ---------------------------------------------------------------- killed


def paths(folder, number=0, writer=0):
    return [folder / f"shard-{writer:03d}-{number:05d}.{kind}" for kind in ("index", "data")]


def torn_states(before, after):
    """All that a cut can leave of a group: its data is written first, and on disk before the first byte of its records is."""
    junk = random.Random(0).randbytes(5 * RECORD + 3)  # nothing of ours, as after a power cut; more than what is written next
    yield before[0] + junk, before[1] + junk
    for end in range(len(before[1]), len(after[1]) + 1):
        yield before[0], after[1][:end]
    for end in range(len(before[0]), len(after[0])):
        yield after[0][:end], after[1]
        yield after[0][:end].ljust(len(after[0]), b"\0"), after[1]  # a power cut may leave a file long and empty


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_torn_tail_is_ignored_and_cut_off(quick_path, step):
    """At every byte; going on from there is tried at every `step`th."""
    folder = quick_path / "gen"
    states = []
    for count in (4, 6):
        complete(folder, count)
        states.append([path.read_bytes() for path in paths(folder)])
    before, after = states
    assert len(after[1]) > len(before[1]) > 0
    for number, state in enumerate(torn_states(before, after)):
        for path, content in zip(paths(folder), state, strict=True):
            path.write_bytes(content)
        whole = [n for n in range(6) if state[0][HEADER + RECORD * n :][:RECORD] == after[0][HEADER + RECORD * n :][:RECORD]]
        store = GenerationStore.existing(folder)
        assert store.records["index"].tolist() == whole
        assert all(same(store.read(index), sample(index)) for index in whole)
        if number % step == 0:
            complete(folder, 6)
            assert [path.read_bytes() for path in paths(folder)] == after


def dying(folder, acks, place):
    Fuse(pytest.MonkeyPatch(), place, die)
    complete(folder, 6, shard_bytes=300, acknowledge=acknowledging(acks))


def test_a_kill_at_any_step_costs_at_most_the_group_in_flight(quick_path, whole):
    """Every call that writes is the last one once, half of it done."""
    for place in range(1000):
        folder, acks = quick_path / str(place), quick_path / f"{place}.acks"
        process = FORK.Process(target=dying, args=(folder, acks, place))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        if (folder / "store.json").exists():
            safe = acknowledged(acks)
            assert safe <= check(folder) <= safe | {len(safe), len(safe) + 1}
        complete(folder, 6, shard_bytes=300)
        assert check(folder) == set(range(6))
        assert GenerationStore.existing(folder).digest(6) == whole[6]
        assert not list(folder.glob("shard-*.part"))
    assert place > 20
    assert len(list(folder.glob("*.data"))) > 1


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_kills_at_random_moments(tmp_path, whole, seed):
    folder, acks = tmp_path / "gen", tmp_path / "acks"
    before = set()

    def look():
        nonlocal before
        if not (folder / "store.json").exists():
            return
        there, safe = check(folder), acknowledged(acks)
        assert before | safe <= there  # nothing that was safe is lost
        assert len(there - before - safe) <= 4  # and at most one group was in flight
        before = there

    def job():
        complete(folder, 400, group=4, shard_bytes=20_000, acknowledge=acknowledging(acks), pause=0.001)

    killed = run_with_kills(job, kills=25, delay=(0.0, 0.03), seed=seed, after_kill=look)
    assert killed.kills >= 20
    assert check(folder) == set(range(400))
    assert GenerationStore.existing(folder).digest(400) == whole[400]


@pytest.mark.slow
def test_kills_of_a_run_of_several_writers(tmp_path, whole):
    def run():
        others = [FORK.Process(target=part, args=(writer,)) for writer in (1, 2)]
        for process in others:
            process.start()
        part(0)
        for process in others:
            process.join()
            assert process.exitcode == 0

    def part(writer):
        complete(tmp_path, 400, group=4, shard_bytes=20_000, pause=0.001, writer=writer, writers=3)

    killed = run_with_kills(run, kills=30, delay=(0.0, 0.05), after_kill=lambda: (tmp_path / "store.json").exists() and check(tmp_path))
    assert killed.kills >= 10
    assert check(tmp_path) == set(range(400))
    assert GenerationStore.existing(tmp_path).digest(400) == whole[400]


# ---------------------------------------------------------------- power cuts


KEPT = {
    "nothing": lambda path, content: None,
    "everything": lambda path, content: content,
    "half": lambda path, content: content[: len(content) // 2],
    "zeros": lambda path, content: bytes(len(content)),
    "records": lambda path, content: content if path.endswith(".index") else None,
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_power_cut_costs_at_most_the_group_in_flight(quick_path, monkeypatch, kept):
    """What was not synced is lost, in whichever way; what was acknowledged is there."""
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        complete(quick_path / "gen", 10, shard_bytes=300, acknowledge=lambda numbers: recorder.events.append(("safe", numbers)))
    assert len(recorder.events) > 30
    for place in range(len(recorder.events) + 1):
        left = recorder.after_power_cut(place, KEPT[kept])
        safe = {index for event in recorder.events[:place] if event[0] == "safe" for index in event[1]}
        if str(quick_path / "gen" / "store.json") not in left:
            assert not safe
            continue
        shutil.rmtree(quick_path / "cut", ignore_errors=True)
        (quick_path / "cut").mkdir()
        for path, content in left.items():
            (quick_path / "cut" / Path(path).name).write_bytes(content)
        store = GenerationStore.existing(quick_path / "cut")
        there = set(store.records["index"].tolist())
        assert safe <= there <= safe | {len(safe), len(safe) + 1}
        assert all(same(store.read(index), sample(index)) for index in there)
        if place % 4 == 0:
            complete(quick_path / "cut", 10)
            assert check(quick_path / "cut") == set(range(10))


# ---------------------------------------------------------------- damage


@pytest.fixture
def small(quick_path):
    """Twelve samples in shards of two writers."""
    folder = quick_path / "gen"
    for writer in (0, 1):
        complete(folder, 12, shard_bytes=500, writer=writer, writers=2)
    assert len(list(folder.glob("*.data"))) > 2
    return folder


def flips(folder, step=1):
    """The store with one bit flipped, at every `step`th byte of each shard; yields what was flipped."""
    draw = random.Random(0)
    for path in sorted(folder.glob("shard-*")):
        content = path.read_bytes()
        for place in range(0, len(content), step):
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            yield path, place
        path.write_bytes(content)


def readable(store):
    """The numbers that can be read; whatever is read is right."""
    numbers = set()
    for index in range(12):
        try:
            found = store.read(index)
        except ValueError as error:
            told = re.search(rf"sample {index} .*{WAY_OUT} {re.escape(str(store.folder))}", str(error))
        else:
            told = same(found, sample(index))
            numbers.add(index)
        assert told
    return numbers


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_wherever_it_is(small, step):
    for path, place in flips(small, step):
        store = GenerationStore.existing(small)
        found = readable(store)
        header = path.suffix == ".index" and place < HEADER
        assert len(found) < 12 if header else len(found) == 11  # it costs one sample, and those behind it stay
        named = store.verify()
        assert len(named) == 1
        assert path.name in named[0]
        lost = set(range(12)) - found
        if path.suffix == ".data":
            assert re.search(rf"sample {lost.pop()} is damaged", named[0])
        else:
            assert set(store.missing(12)) == lost


def test_a_flipped_bit_in_the_description_is_found(small):
    path = small / "store.json"
    content = path.read_bytes()
    draw = random.Random(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"store\.json|format version"):
            GenerationStore.existing(small)
    path.write_bytes(content)


def test_repair_drops_what_is_damaged_and_nothing_else(small, whole):
    before = {path.name: path.read_bytes() for path in small.glob("shard-*")}
    for path, place in flips(small, step=83):
        store = GenerationStore.existing(small)
        assert store.repair()
        lost = store.missing(12)
        assert len(lost) == (0 if path.suffix == ".index" and place < HEADER else 1)
        assert store.verify() == store.repair() == []
        assert readable(store) == set(range(12)) - set(lost)
        complete(small, 12)
        assert check(small) == set(range(12))
        assert GenerationStore.existing(small).digest(12) == whole[12]
        for name in {file.name for file in small.glob("shard-*")} - before.keys():
            (small / name).unlink()
        for name, content in before.items():
            (small / name).write_bytes(content)


def test_a_run_goes_on_behind_a_damaged_record(quick_path, whole):
    complete(quick_path, 6)
    index = quick_path / "shard-000-00000.index"
    content = bytearray(index.read_bytes())
    content[HEADER + 2 * RECORD + 5] ^= 4
    index.write_bytes(content)
    assert GenerationStore.existing(quick_path).missing(6) == [2]
    complete(quick_path, 6)
    assert index.read_bytes()[: len(content)] == content
    assert len(index.read_bytes()) == HEADER + 7 * RECORD
    assert GenerationStore.existing(quick_path).digest(6) == whole[6]


@pytest.mark.parametrize("kind", ["index", "data"])
def test_a_missing_file_is_named_and_its_samples_are_written_again(small, whole, kind):
    index, data = paths(small)
    gone, left = (index, data) if kind == "index" else (data, index)
    held = set(GenerationStore.existing(small).records["index"].tolist())
    gone.unlink()
    store = GenerationStore.existing(small)
    lost = held - set(store.records["index"].tolist())
    assert 0 < len(lost) < 12
    assert store.missing(12) == sorted(lost)
    assert len(store.verify()) == 1
    assert f"{gone.name} is missing" in store.verify()[0]
    with pytest.raises(ValueError, match=rf"sample {min(lost)} is not in .*{gone.name} is missing.*{WAY_OUT}"):
        store.read(min(lost))
    content = left.read_bytes()
    complete(small, 12)
    assert GenerationStore.existing(small).digest(12) == whole[12]
    assert GenerationStore.existing(small).repair() == [f"{left.name}: holds no intact sample, set aside as {left.name}.1.damaged"]
    assert (small / f"{left.name}.1.damaged").read_bytes() == content
    assert check(small) == set(range(12))


def test_a_missing_file_of_the_shard_in_work_is_left_as_it_is(tmp_path):
    for missing in ("index", "data"):
        folder = tmp_path / missing
        complete(folder, 4)
        (folder / f"shard-000-00000.{missing}").unlink()
        before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
        complete(folder, 4)
        after = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
        assert before.items() <= after.items()
        assert after.keys() - before.keys() == {"shard-000-00001.index", "shard-000-00001.data"}


@pytest.mark.parametrize("keep", [0, 1, 60, -1])
def test_a_data_file_that_was_cut_off_is_named(tmp_path, whole, keep):
    complete(tmp_path, 6)
    data = tmp_path / "shard-000-00000.data"
    data.write_bytes(data.read_bytes()[:keep])
    store = GenerationStore.existing(tmp_path)
    lost = store.missing(6)
    some = ", ".join(map(str, lost[:5]))
    assert lost
    assert store.verify()[0].startswith(f"{data.name} is shorter than its index says, with it these samples: {some}")
    complete(tmp_path, 6)
    assert GenerationStore.existing(tmp_path).digest(6) == whole[6]
    GenerationStore.existing(tmp_path).repair()
    assert check(tmp_path) == set(range(6))


def cut_off_below(folder):
    store = GenerationStore.existing(folder)
    store.read(5)
    with open(folder / "shard-000-00000.data", "r+b") as file:
        file.truncate(0)
    with pytest.raises(ValueError, match=r"sample 5 .* is cut off"):
        store.read(5)
    (folder / "shard-000-00000.data").unlink()
    with pytest.raises(ValueError, match=r"sample 5 .* is missing"):
        store.read(5)


def test_a_reader_outlives_the_file_it_has_mapped(tmp_path):
    complete(tmp_path, 6)
    process = FORK.Process(target=cut_off_below, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0  # reading the pages that are gone would be a SIGBUS


def test_shards_of_other_settings_are_foreign(tmp_path):
    other = GenerationStore(tmp_path / "other").open({**IDENTITY, "seed": 1}, 6)
    with other.writing() as writer:
        writer.append([sample(index) for index in range(6)])
    folder = tmp_path / "gen"
    complete(folder, 2)
    for source, target in zip(paths(tmp_path / "other"), paths(folder, 1), strict=True):
        shutil.copy(source, target)
    store = GenerationStore.existing(folder)
    assert store.missing(6) == [2, 3, 4, 5]
    assert len(store.verify()) == 1
    assert re.search(r"shard-000-00001\.index cannot be used: it is foreign", store.verify()[0])
    complete(folder, 3)
    assert [path.exists() for path in paths(folder, 2)] == [True, True]
    assert len(store.repair()) == 2
    assert {path.name for path in folder.glob("*.damaged")} == {f"shard-000-00001.{kind}.1.damaged" for kind in ("index", "data")}
    assert check(folder) == {0, 1, 2}


def test_foreign_samples_are_not_taken_in_where_the_header_is_damaged(tmp_path):
    complete(tmp_path, 6)
    header = GenerationStore(tmp_path / "other").open({**IDENTITY, "seed": 1}, 6)
    (tmp_path / "store.json").write_bytes((tmp_path / "other" / "store.json").read_bytes())
    index = paths(tmp_path)[0]
    index.write_bytes(b"\0" * 20 + index.read_bytes()[20:])
    store = GenerationStore.existing(tmp_path)
    assert store.identity == header.identity
    assert len(store.repair()) == 2
    assert store.missing(6) == list(range(6))


def test_a_lost_description_is_written_anew_by_its_own_settings_only(small, whole):
    path = small / "store.json"
    content = path.read_bytes()
    for broken in (None, b"", b"[]", b'{"format_version": 2}', content[:-20], content.replace(b'"seed": 0', b'"seed": 1'), b"\xff" * 9):
        path.unlink(missing_ok=True)
        if broken is not None:
            path.write_bytes(broken)
        before = {file.name: file.read_bytes() for file in small.iterdir()}
        with pytest.raises(ValueError, match=r"store\.json.* (missing|damaged).*generate with the settings that these samples"):
            GenerationStore.existing(small)
        with pytest.raises(ValueError, match=r"store\.json.* (missing|damaged).*shard-000-00000\.index holds samples of other settings"):
            GenerationStore(small).open({**IDENTITY, "seed": 1}, 12)
        assert {file.name: file.read_bytes() for file in small.iterdir()} == before
        store = GenerationStore(small).open(IDENTITY, 12)
        assert path.read_bytes() == content
        assert store.digest(12) == whole[12]


def test_a_description_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "store.json").write_text("not ours")
    with pytest.raises(ValueError, match=r"store\.json.* is damaged .*another folder"):
        GenerationStore(tmp_path).open(IDENTITY, 1)
    assert (tmp_path / "store.json").read_text() == "not ours"


# ---------------------------------------------------------------- full and read-only disks


GO_ON = r"no space is left for .*; (\d+) samples are safe; free space there and give the same command again"


def safe_samples(error, folder):
    """What an error of a full disk promises; it is what is there."""
    safe = int(re.search(GO_ON, str(error))[1])
    assert check(folder) == set(range(safe))
    return safe


def test_a_disk_that_is_full_at_any_step_costs_nothing_that_was_safe(quick_path, monkeypatch, whole):
    """Every call that writes fails once, half of it done; then there is space and the same writer goes on."""
    for place in range(1000):
        store = GenerationStore(quick_path / str(place), shard_bytes=300).open(IDENTITY, 10)
        with store.writing() as writer, monkeypatch.context() as patch:
            fuse = Fuse(patch, place, no_space)
            for start in range(0, 10, 2):
                try:
                    writer.append(map(sample, (start, start + 1)))
                except ValueError as error:
                    safe = safe_samples(error, store.folder)
                    assert safe in (start, start + 1)  # one where it was the first of the group that filled a shard
                    writer.append(map(sample, range(safe, start + 2)))
        assert store.digest(10) == whole[10]
        assert check(store.folder) == set(range(10))
        assert not list(store.folder.glob("*.part"))
        if not fuse.burnt:
            break
    assert place > 25


def test_a_disk_that_takes_a_few_bytes_at_a_time(quick_path, monkeypatch, whole):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: real(file, content[:11], offset))
    complete(quick_path, 6)
    assert check(quick_path) == set(range(6))
    assert GenerationStore.existing(quick_path).digest(6) == whole[6]


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    def broken():
        raise OSError(5, "Input/output error")

    store = GenerationStore(tmp_path).open(IDENTITY, 1)
    with store.writing() as writer, monkeypatch.context() as patch:
        Fuse(patch, 3, broken)
        with pytest.raises(ValueError, match=r"store: cannot write to .*Input/output error"):
            writer.append([sample(0)])


def limited(folder, told):
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    try:
        complete(folder, 48)
    except ValueError as error:
        told.send(str(error))


def test_files_that_may_not_grow(tmp_path, whole):
    told, tell = FORK.Pipe(duplex=False)
    process = FORK.Process(target=limited, args=(tmp_path, tell))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert 0 < safe_samples(told.recv(), tmp_path) < 48
    complete(tmp_path, 48)
    assert GenerationStore.existing(tmp_path).digest(48) == whole[48]


def test_a_full_disk_and_space_again(tmp_path, whole):
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        folder, ballast = disk / "gen", disk / "ballast"
        store = GenerationStore(folder).open(IDENTITY, 400)
        ballast.write_bytes(bytes(200 * 1024))
        with pytest.raises(ValueError, match=GO_ON) as caught:
            complete(folder, 400, group=5)
        assert 0 < safe_samples(caught.value, folder) < 400
        with pytest.raises(ValueError, match=GO_ON):
            complete(folder, 400, group=5)
        ballast.unlink()
        with pytest.raises(ValueError, match="no space is left"):
            complete(folder, 10_000, group=5)
        store.refresh()
        assert store.digest(400) == whole[400]


def test_a_folder_that_may_not_be_written_is_read(tmp_path, whole):
    complete(tmp_path / "gen", 6)
    with read_only_copy(tmp_path / "gen", tmp_path / "disk" / "gen") as folder:
        assert check(folder) == set(range(6))
        store = GenerationStore(folder).open(IDENTITY, 6)
        assert store.digest(6) == whole[6]
        for attempt in (lambda: GenerationStore(folder).open(IDENTITY, 7), lambda: complete(folder, 6), store.repair):
            with pytest.raises(ValueError, match=r"store: cannot write to '.*gen'.*make it writable or choose another folder"):
                attempt()


# ---------------------------------------------------------------- readers beside a writer


def test_readers_beside_a_writer_see_whole_samples_only(tmp_path, whole):
    GenerationStore(tmp_path).open(IDENTITY, 400)
    process = FORK.Process(target=complete, args=(tmp_path, 400, 4, 20_000))
    process.start()
    store, sizes = GenerationStore.existing(tmp_path), set()
    while process.is_alive() or len(store.records) < 400:
        store.refresh()
        assert store.damage == []
        sizes.add(len(store.records))
        for index in store.records["index"][-3:].tolist():
            assert same(store.read(index), sample(index))
    process.join()
    assert process.exitcode == 0
    assert len(sizes) > 3
    assert store.digest(400) == whole[400]
