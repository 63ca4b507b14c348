"""Every sample is in exactly one row, positions restart, and rows are full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from models import llama
from synthetic import fit, module, ready, rows_of, samples

from lightning_qat.data.packing import pack

CAPACITY = 20


@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_rows_hold_every_sample_once_and_fit(lengths):
    rows = pack(lengths, CAPACITY)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 < load <= CAPACITY for load in loads)
    assert pack(lengths, CAPACITY) == rows
    assert len(rows) < 2 or sum(sorted(loads)[:2]) > CAPACITY  # no two rows could be one


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([20, 20], [[0], [1]]),
        ([5, 15, 5, 15], [[1, 2], [3, 0]]),
        ([10, 9, 8, 1, 12], [[4, 2], [0, 1, 3]]),  # 12 + 8, 10 + 9 + 1
        ([11, 6, 6, 6], [[0, 1], [2, 3]]),
    ],
)
def test_by_hand(lengths, rows):
    assert pack(lengths, CAPACITY) == rows


def test_many_samples_are_packed_quickly_and_tightly():
    lengths = torch.randint(1, 2048, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.99


def packed(folder, **changes):
    return ready(folder, packing=True, max_length=20, **changes)


def test_batches_hold_every_sample_once(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data = packed(tmp_path)
    plain = samples(ready(tmp_path, max_length=20))
    found, tokens, rows = [], 0, 0
    for batch in data.train_dataloader():
        assert batch.keys() == {"input_ids", "attention_mask", "position_ids", "source"}
        for ids, mask, positions in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["position_ids"].tolist(), strict=True
        ):
            assert len(ids) <= 20
            rows, tokens = rows + 1, tokens + sum(mask)
            for token, real, position in zip(ids, mask, positions, strict=True):  # the oracle: cut where positions restart
                if position == 0:
                    found.append(([], real))
                assert real == found[-1][1]
                assert position == len(found[-1][0])
                found[-1][0].append(token)
    assert sorted(sample for sample, real in found if real) == sorted(plain[:16])
    assert all(not any(sample) for sample, real in found if not real)
    assert rows == len(data.train_dataset) < 16
    assert caplog.messages == [f"packing: 16 samples in {rows} rows of 20 tokens, {tokens / rows / 20:.1%} full"]
    assert [item["input_ids"].tolist() for item in data.val_dataset] == plain[16:]  # not packed


def test_targets_and_masks_stay_with_their_samples(tmp_path):
    data, plain = packed(tmp_path, teacher_logits=3), ready(tmp_path, teacher_logits=3, max_length=20)
    for row, item in zip(data.train_dataset.rows, data.train_dataset, strict=True):
        parts = [plain.train_dataset[place] for place in row]
        for name in ("input_ids", "loss_mask", "targets", "tails"):
            assert torch.equal(item[name], torch.cat([part[name] for part in parts]))
    for batch in data.train_dataloader():
        last = torch.cat([batch["position_ids"][:, 1:] == 0, torch.ones(len(batch["input_ids"]), 1).bool()], 1)
        assert torch.equal(batch["loss_mask"], batch["attention_mask"] * ~last)  # none after the last token of each sample
        assert (batch["teacher"].tail[batch["loss_mask"] == 0] == 1).all()


def test_a_packed_run_is_resumed_within_an_epoch(tmp_path):
    settings = {"packing": True, "max_length": 20, "batch_size": 2}
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    whole = fit(module(tmp_path / "gen", **settings), max_epochs=3, callbacks=[keep]).seen
    assert fit(module(tmp_path / "gen", **settings), ckpt_path=tmp_path / "step=6.ckpt", max_epochs=3).seen == whole[6:]


def test_no_sample_sees_its_neighbours(tmp_path):
    """What the batch contract is for: restarting positions alone give the logits of samples by themselves."""
    model = llama(attn_implementation="sdpa")
    for batch in packed(tmp_path).train_dataloader():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for row, tokens in enumerate(rows_of(batch)):
                starts = [i for i, position in enumerate(batch["position_ids"][row][: len(tokens)].tolist()) if position == 0]
                for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                    alone = model(torch.tensor([tokens[start:end]])).logits[0]
                    assert torch.allclose(logits[row, start:end], alone, atol=1e-4)
