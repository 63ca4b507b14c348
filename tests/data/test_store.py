"""The store: a file that is there is whole, damage is named, other people's samples are refused."""

import json

import pytest
import torch

from lightning_qat.data import GenerationStore

SETTINGS = {"teacher": "abc", "seed": 0, "max_length": 6}
LENGTHS = torch.tensor([6, 1, 4])


def tile_of(number):
    tokens = torch.randint(0, 50_000, (3, 6), generator=torch.Generator().manual_seed(number))
    return tokens.masked_fill(torch.arange(6) >= LENGTHS[:, None], 0)


@pytest.fixture
def store(tmp_path):
    store = GenerationStore(tmp_path / "gen", SETTINGS)
    store.open()
    for number in range(3):
        store.write(number, tile_of(number), LENGTHS)
    return store


def test_what_is_written_is_read(store):
    again = GenerationStore(store.folder, SETTINGS)
    again.open()
    for number in range(3):
        samples = again.read(number)
        assert [len(sample) for sample in samples] == LENGTHS.tolist()
        assert all(sample.dtype == torch.int64 for sample in samples)
        assert torch.equal(torch.nn.utils.rnn.pad_sequence(samples, batch_first=True), tile_of(number))
    assert sorted(file.name for file in store.folder.iterdir()) == ["store.json", *(f"tile-00000{n}.safetensors" for n in range(3))]


def test_the_folder_says_what_it_holds(store):
    assert json.loads((store.folder / "store.json").read_text()) == {"format_version": 1, **SETTINGS}


def test_missing_tiles_are_those_that_are_not_there(store):
    assert store.missing(3) == []
    assert store.missing(5) == [3, 4]
    store.path(1).unlink()
    assert store.missing(3) == [1]
    assert GenerationStore(store.folder.parent / "none", SETTINGS).missing(2) == [0, 1]


def test_a_torn_write_is_not_a_tile(store):
    torn = store.path(1).with_suffix(".4711.part")
    torn.write_bytes(store.path(1).read_bytes()[:40])
    store.path(1).unlink()
    store.open()
    assert store.missing(3) == [1]
    store.write(1, tile_of(1), LENGTHS)
    assert torch.equal(store.read(1)[0], tile_of(1)[0])


@pytest.mark.parametrize("position", [-1, -30, -60], ids=["tail", "tokens", "middle"])
def test_a_flipped_bit_is_found_by_name(store, position):
    content = bytearray(store.path(1).read_bytes())
    content[position] ^= 1
    store.path(1).write_bytes(content)
    with pytest.raises(ValueError, match=r"store: .*tile-000001\.safetensors.*delete it"):
        store.read(1)
    assert len(store.read(0)) == len(store.read(2)) == 3


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_tile_is_found_by_name(store, keep):
    store.path(2).write_bytes(store.path(2).read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"store: cannot read '.*tile-000002\.safetensors'.*generated again"):
        store.read(2)


def test_a_missing_tile_is_named(store):
    with pytest.raises(ValueError, match=r"tile-000007\.safetensors"):
        store.read(7)


@pytest.mark.parametrize("changes", [{"teacher": "xyz"}, {"seed": 1}, {"max_length": 7}], ids=str)
def test_samples_of_other_settings_are_refused(store, changes):
    (field, value), (_, before) = *changes.items(), *((key, SETTINGS[key]) for key in changes)
    before_files = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    with pytest.raises(ValueError, match=rf"{field}: {before!r} there, {value!r} here.*another folder"):
        GenerationStore(store.folder, SETTINGS | changes).open()
    assert {file.name: file.read_bytes() for file in store.folder.iterdir()} == before_files


@pytest.mark.parametrize("content", ["", '{"teacher": ', "[]"], ids=["empty", "torn", "no-object"])
def test_a_damaged_index_is_refused(store, content):
    (store.folder / "store.json").write_text(content)
    with pytest.raises(ValueError, match=r"store: .*store\.json.*damaged"):
        store.open()


def test_a_second_writer_is_refused_until_the_first_is_done(store):
    other = GenerationStore(store.folder, SETTINGS)
    with store.writing():
        with pytest.raises(ValueError, match="another process writes to"), other.writing():
            pass
        assert len(other.read(0)) == 3  # reading is free
    with other.writing():
        pass


def test_the_lock_is_released_after_an_error(store):
    with pytest.raises(RuntimeError, match="killed"), store.writing():
        raise RuntimeError("killed")
    with GenerationStore(store.folder, SETTINGS).writing():
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"store: cannot write to '.*file"):
            GenerationStore(folder, SETTINGS).open()
    assert (tmp_path / "file").read_text() == "mine"
