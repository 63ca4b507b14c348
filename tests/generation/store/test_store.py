"""The store gives back what it was given, says what is missing, and refuses what it cannot keep."""

import json
import mmap
import multiprocessing
import os
import pickle
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ARRAYS, IDENTITY, known, same

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.store import store as store_module

KINDS = ("plain", "chat", "top_k", "logits")


def write(store, samples, writer=0):
    with store.writing(writer) as shards:
        shards.append(samples)
    return store


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


@pytest.fixture
def store(tmp_path):
    return GenerationStore(tmp_path / "gen").open(IDENTITY, 10)


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(store, kind):
    samples = [known(index, kind) for index in range(10)]
    write(store, samples)
    again = GenerationStore.existing(store.folder)
    assert all(same(again.read(index), sample) for index, sample in enumerate(samples))
    assert again.identity == IDENTITY
    assert again.requested == 10
    assert again.verify() == []


bits = st.integers(0, 2**32 - 1)


@st.composite
def any_sample(draw, index, vocab_size):
    tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20))
    rows, generator = len(tokens) - 1, np.random.default_rng(draw(bits))
    arrays = {}
    if draw(st.booleans()):
        arrays["roles"] = generator.integers(0, 256, len(tokens), dtype=np.uint8)
    if draw(st.booleans()):
        arrays["tails"] = np.frombuffer(generator.bytes(4 * rows), np.float32)  # NaN and inf too
    width = draw(st.sampled_from([0, 1, 2, 7]))
    kind = draw(st.sampled_from([None, np.int32, np.float16]))
    if kind is not None:
        arrays["targets"] = np.frombuffer(generator.bytes(kind().itemsize * rows * width), kind).reshape(rows, width)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    nll = draw(st.floats(0, 1e6, width=32))
    return Sample(index=index, tokens=torch.tensor(tokens), nll=nll, chosen=draw(st.integers(0, 2**32 - 1)), **tensors)


@st.composite
def any_set(draw):
    vocab_size = draw(st.sampled_from([1, 300, 2**16, 2**16 + 1, 2**31]))
    numbers = draw(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**63)), max_size=8, unique=True))
    return vocab_size, [draw(any_sample(number, vocab_size)) for number in numbers]


@settings(max_examples=30, deadline=None)
@given(any_set(), st.integers(1, 4), st.sampled_from([1, 200, 2**30]))
def test_any_samples_in_any_groups_and_shards_come_back(drawn, group, shard_bytes):
    vocab_size, samples = drawn
    with tempfile.TemporaryDirectory() as folder:
        store = GenerationStore(folder, shard_bytes).open({"vocab_size": vocab_size}, 0)
        for start in range(0, len(samples), group):
            write(store, samples[start : start + group])
        again = GenerationStore.existing(folder)
        assert again.records["index"].tolist() == sorted(sample.index for sample in samples)
        assert all(same(again.read(sample.index), sample) for sample in samples)
        assert again.verify() == again.repair() == []
        there = {sample.index for sample in samples}
        assert again.missing(21) == [number for number in range(21) if number not in there]


def test_the_files_are_as_documented(store):
    sample = replace(known(6, "top_k", length=7), nll=1.5, chosen=4)
    write(store, [known(5, length=3), sample])
    index = (store.folder / "shard-000-00000.index").read_bytes()
    data = (store.folder / "shard-000-00000.data").read_bytes()
    magic, version, vocab_size, digest, crc = struct.unpack("<8sII32s12xI", index[:64])
    assert (magic, version, vocab_size, crc) == (b"LQATGEN\0", 2, 300, zlib.crc32(index[:60]))
    record = struct.unpack("<QQQIIffIIII", index[64 + 56 :])
    number, offset, _, tokens, chosen, nll, _, flags, width, data_crc, record_crc = record
    assert (number, offset, tokens, chosen, nll, flags, width) == (6, 8, 7, 4, 1.5, 1 + 2 + 4, 5)
    salt = int.from_bytes(digest[:4], "little")
    assert record_crc == zlib.crc32(index[64 + 56 : -4], salt)
    assert data_crc == zlib.crc32(data[8:], salt)
    assert data[8:22] == struct.pack("<7H", *sample.tokens.tolist())
    assert data[24:31] == bytes(sample.roles.tolist())
    assert data[32:56] == struct.pack("<6f", *sample.tails.tolist())
    assert data[56:] == struct.pack("<30i", *sample.targets.flatten().tolist())
    assert len(index) == 64 + 2 * 56


def test_large_vocabularies_take_32_bits(tmp_path):
    store = GenerationStore(tmp_path).open({"vocab_size": 2**16 + 1}, 1)
    write(store, [Sample(index=0, tokens=torch.tensor([2**16, 0, 1]))])
    assert store.view(0)["tokens"].dtype == np.uint32
    assert store.read(0).tokens.tolist() == [2**16, 0, 1]


def repeated_share(tokens):
    seen, repeated = [], 0
    for end in range(4, len(tokens) + 1):
        repeated += tokens[end - 4 : end] in seen
        seen.append(tokens[end - 4 : end])
    return repeated / len(seen) if seen else 0.0


@pytest.mark.parametrize("tokens", [[1], [1] * 4, [1] * 5, [1, 2] * 9, list(range(20)), [*range(6), *range(6)]], ids=len)
def test_records_say_what_a_filter_needs(store, tokens):
    write(store, [Sample(index=3, tokens=torch.tensor(tokens), nll=2.5, chosen=1)])
    (record,) = store.records
    assert record["repetition"] == np.float32(repeated_share(tokens))
    assert (record["index"], record["tokens"], record["nll"], record["chosen"]) == (3, len(tokens), 2.5, 1)


def test_equal_samples_have_equal_hashes(store):
    tokens = torch.tensor([5, 6, 7])
    write(store, [Sample(index=0, tokens=tokens), Sample(index=1, tokens=tokens.flip(0)), Sample(index=2, tokens=tokens)])
    first, other, second = store.records["hash"].tolist()
    assert first == second != other


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_the_mapped_file_itself(store, kind):
    write(store, [known(0, kind, length=9), known(1, kind, length=6)])
    sample, views = known(1, kind, length=6), store.view(1)
    assert list(views) == [name for name in ARRAYS if getattr(sample, name) is not None]
    roots = set()
    for name, view in views.items():
        assert view.tolist() == getattr(sample, name).tolist()
        assert view.flags.aligned
        assert not view.flags.writeable
        assert np.shares_memory(view, store.view(1)[name])  # a copy would be another one each time
        while isinstance(view, np.ndarray):
            view = view.base
        roots.add(view)
    assert len(roots) == 1
    assert isinstance(roots.pop(), mmap.mmap)


# ---------------------------------------------------------------- what is there and what is not


def test_missing_samples_are_those_that_are_not_there(store):
    write(store, [known(index) for index in (7, 2, 4)])
    assert store.records["index"].tolist() == [2, 4, 7]
    assert store.missing(8) == [0, 1, 3, 5, 6]
    assert store.missing(0) == []
    for index in (3, -1, 8, 2**70):
        with pytest.raises(ValueError, match=rf"sample {index} is not in .*lightning-qat generate --resume --store .*gen"):
            store.read(index)


def test_more_samples_may_be_asked_for_later(store):
    write(store, [known(0)])
    assert GenerationStore(store.folder).open(IDENTITY, 50).requested == 50
    assert GenerationStore(store.folder).open(IDENTITY, 3).requested == 50
    assert GenerationStore.existing(store.folder).requested == 50
    assert same(GenerationStore.existing(store.folder).read(0), known(0))


def test_a_number_that_is_there_twice_counts_once_and_the_last_one_wins(store):
    old, new = known(4, length=5), known(4, "top_k", length=9)
    write(store, [old, known(5)])
    write(GenerationStore(store.folder, shard_bytes=1).open(IDENTITY, 10), [new])  # into the next shard
    store.refresh()
    assert store.records["index"].tolist() == [4, 5]
    assert same(store.read(4), new)
    assert store.verify() == []
    write(store, [known(6), old])
    assert same(store.read(4), old)


def test_the_same_sample_in_shards_of_two_writers_is_one_sample(store):
    samples = [known(index, "top_k") for index in range(4)]
    write(store, samples, writer=0)
    alone = store.digest(4)
    write(store, samples, writer=1)
    assert len(list(store.folder.glob("*.data"))) == 2
    assert store.records["index"].tolist() == [0, 1, 2, 3]
    assert store.digest(4) == alone


def test_the_digest_depends_on_the_samples_only(tmp_path):
    samples = [known(index, KINDS[index % 4]) for index in range(12)]
    one, other = (GenerationStore(tmp_path / name, size).open(IDENTITY, 12) for name, size in (("one", 2**30), ("other", 150)))
    write(one, samples)
    for sample in reversed(samples):
        write(other, [sample], writer=sample.index % 3)
    assert one.digest(12) == other.digest(12)
    for field in ("tokens", "roles", "tails", "targets"):
        index = next(number for number in range(12) if getattr(samples[number], field) is not None and len(samples[number].tokens) > 1)
        before = getattr(samples[index], field)
        changed = before.clone()
        changed.view(-1)[0] = int(changed.view(-1)[0] == 0)
        write(other, [replace(samples[index], **{field: changed})], writer=9)
        assert one.digest(12) != other.digest(12), field
        write(other, [samples[index]], writer=9)
        assert one.digest(12) == other.digest(12)
    with pytest.raises(ValueError, match="sample 12 is not in"):
        one.digest(13)


# ---------------------------------------------------------------- shards


def test_full_shards_are_followed_by_new_ones(tmp_path):
    store = GenerationStore(tmp_path, shard_bytes=100).open(IDENTITY, 30)
    samples = [known(index, length=10) for index in range(9)]  # 24 bytes each
    write(store, samples[:7])
    write(store, [known(9, length=200), *samples[7:]])
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.data"))]
    assert sizes == [96, 72, 400, 48]
    assert all(same(store.read(sample.index), sample) for sample in samples)


def test_the_next_run_goes_on_in_the_last_shard(store):
    for index in range(4):
        write(GenerationStore(store.folder).open(IDENTITY, 10), [known(index)])
    assert [path.name for path in store.folder.glob("*.data")] == ["shard-000-00000.data"]


def test_writing_nothing_leaves_no_shard(store):
    with store.writing() as writer:
        writer.append([])
    assert list(files(store.folder)) == ["store.json"]


def test_few_data_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    store = GenerationStore(tmp_path, shard_bytes=1).open(IDENTITY, 6)
    write(store, [known(index) for index in range(6)])
    kept = store.view(0)["tokens"]
    for index in (0, 1, 2, 3, 4, 5, 0, 5, 1):
        assert same(store.read(index), known(index))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert len(mapped) <= 3  # two, and the one that `kept` holds
    assert kept.tolist() == known(0).tokens.tolist()


def test_a_pickled_store_reads_the_same_and_carries_no_data(tmp_path):
    store = GenerationStore(tmp_path).open(IDENTITY, 3)
    write(store, [known(index, length=100_000) for index in range(3)])
    store.view(0)
    content = pickle.dumps(store)
    assert len(content) < 10_000
    assert all(same(pickle.loads(content).read(index), known(index, length=100_000)) for index in range(3))


def test_worker_processes_read(store):
    write(store, [known(index) for index in range(6)])
    loader = torch.utils.data.DataLoader(Numbered(store), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [tokens.tolist() for tokens in loader] == [known(index).tokens.tolist() for index in range(6)]


class Numbered(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store.records)

    def __getitem__(self, index):
        return self.store.read(index).tokens


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1, "teacher": "xyz"}, ["seed: 0 there, 1 here", "teacher: 'abc' there, 'xyz' here"]),
        ({"script": {"mode": "chat", "bos": None}}, ["script.mode: 'hybrid' there, 'chat' here"]),
        ({"script": {"mode": "hybrid"}}, ["script.bos: None there, nothing here"]),
        ({"extra": None}, ["extra: nothing there, None here"]),
        ({"seed": 0.0}, ["seed: 0 there, 0.0 here"]),
        ({"greedy_tokens": (3, 6)}, [r"greedy_tokens: \[3, 5\] there, \[3, 6\] here"]),
        ({"vocab_size": 301}, ["vocab_size: 300 there, 301 here"]),
    ],
    ids=str,
)
def test_samples_of_other_settings_are_refused(store, changes, told):
    write(store, [known(0)])
    before = files(store.folder)
    with pytest.raises(ValueError, match=r"holds samples of other settings \(.*another folder") as caught:
        GenerationStore(store.folder).open(IDENTITY | changes, 99)
    for text in told:
        caught.match(text)
    assert str(caught.value).count(" there, ") == len(told)
    assert files(store.folder) == before


def test_the_order_of_settings_and_tuples_are_of_no_interest(store):
    write(store, [known(0)])
    reordered = {key: IDENTITY[key] for key in reversed(IDENTITY)} | {"greedy_tokens": (3, 5)}
    assert GenerationStore(store.folder).open(reordered, 1).missing(1) == []


@pytest.mark.parametrize("size", [None, 0, "300", 2**33])
def test_an_identity_says_how_many_tokens_there_are(tmp_path, size):
    with pytest.raises(ValueError, match="identity: got vocab_size"):
        GenerationStore(tmp_path / "gen").open({**IDENTITY, "vocab_size": size}, 1)
    assert not (tmp_path / "gen").exists()


def test_a_store_of_the_old_format_is_refused(tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"format_version": 1, "seed": 0}))
    for attempt in (lambda: GenerationStore.existing(tmp_path), lambda: GenerationStore(tmp_path).open(IDENTITY, 1)):
        with pytest.raises(ValueError, match="has format version 1, expected 2; choose another folder"):
            attempt()


def test_a_folder_without_a_store_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"store: store\.json is missing in .*none.*lightning-qat generate"):
        GenerationStore.existing(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"store: cannot write to '.*file.*another folder"):
            GenerationStore(folder).open(IDENTITY, 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_has_to_be_opened(tmp_path):
    with pytest.raises(RuntimeError, match=r"call open\(\) first"), GenerationStore(tmp_path).writing():
        pass


# ---------------------------------------------------------------- samples that cannot be kept


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": torch.tensor([1, 300])}, "all of them from 0 to 299"),
        ({"tokens": torch.tensor([1, -1])}, "all of them from 0 to 299"),
        ({"tokens": torch.tensor([], dtype=torch.int64)}, "one token or more"),
        ({"tokens": torch.tensor([[1, 2]])}, "one token or more in a row"),
        ({"tokens": torch.tensor([1, 2], dtype=torch.int32)}, "tokens are int32, expected int64"),
        ({"roles": torch.zeros(2)}, "roles are float32, expected uint8"),
        ({"tails": torch.zeros(1, dtype=torch.bfloat16)}, "tails are bfloat16, expected float32"),
        ({"roles": torch.zeros(3, dtype=torch.uint8)}, r"roles have shape \(3,\), expected \(2,\)"),
        ({"tails": torch.zeros(2)}, r"tails have shape \(2,\), expected \(1,\)"),
        ({"targets": torch.zeros(2, 4, dtype=torch.int32)}, r"targets have shape \(2, 4\), expected \(1, 4\)"),
        ({"targets": torch.zeros(1, 4)}, "targets are float32, expected int32 or float16"),
        ({"index": -1}, "no negative numbers"),
        ({"chosen": -1}, "no negative numbers"),
    ],
    ids=str,
)
def test_samples_that_are_none_are_refused_and_cost_their_group_only(store, changes, told):
    wrong = replace(Sample(index=2, tokens=torch.tensor([1, 2])), **changes)
    with store.writing() as writer:
        writer.append([known(0)])
        with pytest.raises(ValueError, match=told):
            writer.append([known(1), wrong])
        writer.append([known(3)])
    assert store.records["index"].tolist() == [0, 3]
    assert same(store.read(3), known(3))
    assert store.verify() == []


def test_an_error_of_the_source_costs_its_group_only(store):
    def source():
        yield known(1)
        raise ConnectionError("the server is gone")

    write(store, [known(0)])
    with pytest.raises(ConnectionError, match="the server is gone"):
        write(store, source())
    assert store.missing(2) == [1]
    write(store, [known(1)])
    assert same(store.read(1), known(1))


# ---------------------------------------------------------------- writers and readers


def test_a_group_is_seen_when_it_is_whole(store):
    reader = GenerationStore.existing(store.folder)

    def source():
        for index in (5, 6):
            yield known(index)
            reader.refresh()
            seen.append(reader.records["index"].tolist())

    seen = []
    with store.writing() as writer:
        writer.append([known(4)])
        writer.append(source())
        reader.refresh()
        assert seen == [[4], [4]]
        assert reader.records["index"].tolist() == [4, 5, 6]
        assert all(same(reader.read(index), known(index)) for index in (4, 5, 6))
        assert reader.damage == []


@pytest.mark.parametrize("writer", [0, 3])
def test_a_second_writer_is_refused_until_the_first_is_done(store, writer):
    other = GenerationStore.existing(store.folder)
    with store.writing(writer) as shards:
        with pytest.raises(ValueError, match=r"another process writes to .*gen.*; wait until it ends or"), other.writing(writer):
            pass
        shards.append([known(0)])
        other.refresh()
        assert same(other.read(0), known(0))  # reading is free
        with pytest.raises(ValueError, match="another process writes to"):
            other.repair()
    write(other, [known(1)], writer)
    assert other.missing(2) == []


def test_the_writers_of_a_run_do_not_meet(store):
    others = [GenerationStore.existing(store.folder) for _ in range(2)]
    with store.writing(0) as zero, others[0].writing(1) as one, others[1].writing(2) as two:
        for index in range(0, 9, 3):
            for writer, number in ((zero, index), (one, index + 1), (two, index + 2)):
                writer.append([known(number)])
    assert store.missing(9) == []
    assert all(same(store.read(index), known(index)) for index in range(9))


def test_a_writer_knows_what_was_written_before_it(store):
    other = GenerationStore.existing(store.folder)
    write(store, [known(0)])
    assert other.missing(2) == [0, 1]
    with other.writing():
        assert other.missing(2) == [1]


def hold(folder, ready, release):
    with GenerationStore.existing(folder).writing():
        ready.set()
        release.wait(30)


def test_a_writer_of_another_process_is_respected(store):
    fork = multiprocessing.get_context("fork")
    ready, release = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(store.folder, ready, release))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(ValueError, match=r"another process writes to .*store\.lock"), store.writing():
            pass
        write(store, [known(1)], writer=1)  # of the same run
        process.kill()
        process.join()
        write(store, [known(0)])  # a lock dies with its process
    finally:
        process.kill()
        process.join()
    assert store.missing(2) == []


def test_the_lock_is_released_after_an_error(store):
    with pytest.raises(RuntimeError, match="stop"), store.writing():
        raise RuntimeError("stop")
    write(store, [known(0)])


# ---------------------------------------------------------------- views for other programs


class Letters:
    def decode(self, ids):
        return "".join(chr(0x100 + token) for token in ids)


@pytest.mark.parametrize("tokenizer", [None, Letters()], ids=["ids", "text"])
def test_lines_of_json(store, tmp_path, tokenizer):
    write(store, [known(index) for index in (3, 1)])
    path = tmp_path / "samples.jsonl"
    path.write_text("old")
    store.to_jsonl(path, tokenizer)
    for line, index in zip(path.read_text("utf-8").splitlines(), (1, 3), strict=True):
        ids = known(index).tokens.tolist()
        text = {} if tokenizer is None else {"text": tokenizer.decode(ids)}
        assert list(json.loads(line).items()) == list({"index": index, **text, "input_ids": ids}.items())


def test_a_file_of_lines_is_whole_or_not_there(store, tmp_path):
    write(store, [known(index) for index in range(3)])
    data = store.folder / "shard-000-00000.data"
    data.write_bytes(data.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match=r"sample 2 .*damaged"):
        store.to_jsonl(tmp_path / "samples.jsonl")
    with pytest.raises(ValueError, match="path: cannot write"):
        store.to_jsonl(data / "samples.jsonl")
    assert os.listdir(tmp_path) == ["gen"]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    package.disable_progress_bars()
    return package


@pytest.mark.parametrize("tokenizer", [None, Letters()], ids=["ids", "text"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_data_set_of_hugging_face(store, datasets, tokenizer, count):
    write(store, [known(index) for index in range(count)])
    rows = list(store.to_dataset(tokenizer))
    expected = [{"index": index, "input_ids": known(index).tokens.tolist()} for index in range(count)]
    if tokenizer is not None:
        expected = [{**row, "text": tokenizer.decode(row["input_ids"])} for row in expected]
    assert rows == expected


def test_a_data_set_of_damaged_samples_is_refused(store, datasets):
    write(store, [known(index) for index in range(3)])
    data = store.folder / "shard-000-00000.data"
    data.write_bytes(data.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match=r"sample 2 .*damaged.*generate --resume"):
        store.to_dataset()


def test_the_package_that_is_missing_is_named(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-qat\[datasets\]'"):
        store.to_dataset()
