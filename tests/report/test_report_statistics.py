"""Statistics of stores, counted by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from models import character_tokenizer, llama
from report_stores import sample, store_of

from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.source import TeacherSource
from lightning_qat.report import collect
from lightning_qat.report.histograms import Histogram
from lightning_qat.report.verdict import verdict, warnings


def texts(count=60, seed=0):
    """Some of each kind: repetitive, ended by token 3, cut at 40 tokens, duplicates."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        length = int(draw.integers(2, 40)) if index % 3 else 40
        tokens = draw.integers(4, 30, length).tolist() if index % 4 else (draw.integers(4, 30, 3).tolist() * 40)[:length]
        yield [*tokens[:-1], 3] if length < 40 or index % 6 == 0 else tokens
    yield from [[7, 8, 9]] * 3
    yield from [[*range(4, 9), 3], [*range(5, 11), 3]]  # just short enough to have ended at once, and not so
    yield [*range(4, 20), *range(4, 14)]  # repetitive, but not too much


def test_everything_is_as_counted_by_hand(tmp_path):
    rows = list(texts())
    nats = np.random.default_rng(1).random(len(rows)) * 40
    store = store_of(tmp_path, [sample(i, t, nll=float(nats[i])) for i, t in enumerate(rows)], max_length=40, end_tokens=[3])
    found = collect(store)
    grams = [[tuple(t[i : i + 4]) for i in range(len(t) - 3)] for t in rows]
    repetition = [1 - len(set(g)) / len(g) if g else 0 for g in grams]
    ended = [t[-1] == 3 or len(t) < 40 for t in rows]
    assert (found.samples, found.requested, found.tokens, found.chosen) == (66, 66, sum(map(len, rows)), sum(map(len, rows)) - 66)
    assert found.ended == sum(ended) / 66
    assert found.at_once == sum(e and len(t) <= 6 for e, t in zip(ended, rows, strict=True)) / 66
    assert found.repetition == pytest.approx(sum(repetition) / 66, abs=1e-6)
    assert found.repetitive == sum(r > 0.5 for r in repetition) / 66 > 0
    assert found.duplicates == 66 - len({tuple(t) for t in rows}) == 2
    assert found.perplexity == pytest.approx(math.exp(nats.sum() / found.chosen), rel=1e-6)
    counts = Counter(token for t in rows for token in t[1:])
    assert found.distinct == len(counts)
    assert [count for _, count in found.frequent] == [count for _, count in counts.most_common(30)]
    assert all(counts[token] == count for token, count in found.frequent)
    check_histogram(found.lengths, [len(t) for t in rows])
    check_histogram(found.repetitions, np.float32(repetition))
    check_histogram(found.perplexities, [math.exp(n / (len(t) - 1)) for n, t in zip(nats, rows, strict=True)])
    assert found.start is None
    assert found.roles is None
    assert found.agreement is None
    assert found.not_compared == "no teacher was given and the store holds no targets"


def check_histogram(histogram, values):
    assert sum(histogram.counts) == len(values)
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.edges == sorted(histogram.edges)
    for start, end, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        inside = sum(start < value < end for value in values)
        on_edges = sum(bool(np.isclose(value, start) or np.isclose(value, end)) for value in values)
        assert inside - on_edges <= count <= inside + on_edges


@pytest.mark.parametrize("values", [[5], [1, 2, 3], [1, 2000], list(range(1, 2050, 7)), [0, 0], [2, 33], [2, 34]])
def test_bins_of_whole_numbers_hold_each_value_once(values):
    histogram = Histogram.of_integers(values)
    widths = {b - a for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)}
    assert len(widths) == 1
    assert len(histogram.counts) <= 32
    for start, end, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        assert count == sum(start <= value < end for value in values)


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [1.0, 1e300], [3.2, 9.7, 4.4]])
def test_bins_of_ratios_hold_every_value(values):
    assert sum(Histogram.of_ratios(values).counts) == len(values)


def test_one_token(tmp_path):
    found = collect(store_of(tmp_path, [sample(0, [5]), sample(1, [6])], mode="sample"))
    assert (found.samples, found.tokens, found.chosen, found.distinct, found.frequent) == (2, 2, 0, 0, [])
    assert found.perplexity is None
    assert found.perplexities is None
    assert found.repetition == 0
    assert found.start.distinct == 2
    assert "2 samples, 2 tokens" in verdict(found)


def test_start_tokens_are_the_last_ones_given(tmp_path):
    rows = [[1, 5, 9, 9], [1, 6, 9, 9], [1, 5, 9, 8]]
    assert collect(store_of(tmp_path, [sample(i, t, chosen=2) for i, t in enumerate(rows)], mode="hybrid")).start.distinct == 2


def test_different_start_tokens_by_chance(tmp_path):
    model, tokenizer = llama(), character_tokenizer()
    identity = TeacherSource(model, GenerationSettings(max_length=4, rows=2), tokenizer).identity
    found = collect(store_of(tmp_path, [sample(i, [40 + i % 9, 5]) for i in range(60)], **identity), tokenizer=tokenizer, teacher=model)
    draws = np.random.default_rng(0).integers(0, 95, (2000, 60))
    by_chance = np.mean([len(set(row)) for row in draws.tolist()])
    assert (found.start.distinct, found.start.allowed) == (9, 95)
    assert found.start.by_chance == pytest.approx(by_chance, abs=0.5)


def test_tokens_by_role(tmp_path):
    roles = [[0, 0, 1, 1, 1, 0, 2, 2], [0, 1, 0, 2]]
    store = store_of(tmp_path, [sample(i, list(range(len(r))), chosen=5, roles=r) for i, r in enumerate(roles)], mode="chat")
    found = collect(store)
    assert found.roles == {"given": 5, "user": 4, "assistant": 3}
    assert found.distinct == len({1, 2, 3, 4, 6, 7})
    assert found.start is None


def test_what_samples_take_on_disk(tmp_path):
    def kept(length):
        return {"targets": torch.zeros(length - 1, 5, dtype=torch.int32), "tails": torch.ones(length - 1)}

    samples = [sample(i, [1] * length, roles=[0] * length, **kept(length)) for i, length in enumerate((7, 3))]
    storage = collect(store_of(tmp_path / "top", samples), scored=0).storage
    assert storage.arrays == {"tokens": 20, "roles": 10, "tails": 32, "targets": 160}
    assert storage.total == sum(path.stat().st_size for path in (tmp_path / "top").iterdir() if path.suffix != ".lock")
    assert (storage.targets, storage.entry_bytes) == ("the 5 most probable tokens", 4)
    full = [sample(0, [1, 2], targets=torch.zeros(1, 97, dtype=torch.float16))]
    storage = collect(store_of(tmp_path / "full", full)).storage
    assert (storage.targets, storage.entry_bytes) == ("logits of the whole vocabulary", 2)
    storage = collect(store_of(tmp_path / "none", [sample(0, [1, 2])])).storage
    assert (storage.targets, storage.entry_bytes, storage.arrays) == (None, 0, {"tokens": 4})


def distinct_texts(count, length=30):
    return [np.random.default_rng(i).integers(4, 90, length).tolist() for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "fields", "text"),
    [
        ([[*t[: 3 + i % 2], 3] for i, t in enumerate(distinct_texts(20))], {}, "100 % of the samples end after 5 tokens or fewer"),
        ([*distinct_texts(50), distinct_texts(1)[0]], {}, "2.0 % of the samples are exact duplicates"),
        ([*distinct_texts(17), [5] * 30, [6] * 30], {}, "11 % of the samples repeat themselves"),
        (distinct_texts(20), {"requested": 50}, "20 of the 50 samples asked for are there"),
    ],
)
def test_what_looks_wrong_is_said(tmp_path, rows, fields, text):
    store = store_of(tmp_path, [sample(i, t) for i, t in enumerate(rows)], max_length=30, end_tokens=[3], **fields)
    (said,) = warnings(collect(store))
    assert said.startswith(text)


def test_nothing_wrong_is_said_of_good_samples(tmp_path):
    store = store_of(tmp_path, [sample(i, t) for i, t in enumerate(distinct_texts(20))], max_length=30)
    found = collect(store)
    assert warnings(found) == []
    assert verdict(found).startswith("20 samples, 600 tokens. 100 % reach the maximum length of 30 tokens, 0 % end by themselves.")


def test_an_untrained_teacher_is_named(tmp_path):
    store = store_of(tmp_path, [sample(i, t, nll=29 * math.log(90)) for i, t in enumerate(distinct_texts(20))], max_length=30)
    assert any("trained language model" in text for text in warnings(collect(store)))


def test_what_does_not_fit_together_is_said(tmp_path):
    identity = {"engine": "transformers", "teacher": "abc", "tokenizer": "def", "dtype": "bfloat16"}
    found = collect(store_of(tmp_path, [sample(0, [1, 2, 3])], **identity), tokenizer=character_tokenizer(), teacher=llama())
    assert "tokenizer given here is not the one" in found.remarks[0]
    assert "teacher given here is not the one" in found.remarks[1]
    assert "float32 here, bfloat16 there" in found.remarks[1]
    assert set(found.remarks) <= set(warnings(found))


def test_damage_is_said(tmp_path):
    store = store_of(tmp_path, [sample(i, [1, 2, 3]) for i in range(3)])
    index = next(tmp_path.glob("*.index"))
    content = bytearray(index.read_bytes())
    content[-10] ^= 1
    index.write_bytes(content)
    store.refresh()
    found = collect(store)
    assert found.samples == 2
    assert any("damaged records" in text for text in warnings(found))


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"store: got no samples in .*, expected at least one; `lightning-qat generate`"):
        collect(store_of(tmp_path, []))


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scored: got -1, expected 0 or more"):
        collect(store_of(tmp_path, [sample(0, [1, 2])]), scored=-1)
