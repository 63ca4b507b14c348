"""Filters drop what they say, count it once, and report it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.generation.filters import FilterReport, SampleFilters, repetition

FIELDS = [("index", "u8"), ("tokens", "u4"), ("repetition", "f4"), ("hash", "u8")]


def records(*rows):
    return np.array([(number, *row) for number, row in enumerate(rows)], dtype=FIELDS)


# ---------------------------------------------------------------- repetition


def repetition_by_hand(tokens):
    seen, repeated, grams = set(), 0, list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    for gram in grams:
        repeated += gram in seen
        seen.add(gram)
    return repeated / len(grams) if len(tokens) >= 5 else 0.0


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([2, 3, 2**31]).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=60)))
def test_repetition_is_counted_as_by_hand(tokens):
    assert repetition(np.array(tokens, dtype=np.int64)) == pytest.approx(repetition_by_hand(tokens), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 20))
def test_repetition_of_what_is_repeated(part, times):
    tokens = part * times
    assert repetition(torch.tensor(tokens)) == pytest.approx(repetition_by_hand(tokens), abs=1e-12)


@pytest.mark.parametrize("length", range(7))
def test_one_token_over_and_over(length):
    assert repetition(torch.full((length,), 7)) == pytest.approx([0, 0, 0, 0, 0, 1 / 2, 2 / 3][length])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint32, np.int64])
def test_repetition_of_any_dtype(dtype):
    tokens = [60_000, 1, 2, 3, 60_001, 1, 2, 3, 60_000, 1, 2, 3]
    assert repetition(np.array(tokens, dtype=dtype)) == pytest.approx(1 / 9)


def test_repetition_tells_large_ids_apart():
    assert repetition(np.array([1, 256, 7, 7, 2, 0, 7, 7])) == 0
    assert repetition(np.array([1, 65_536, 7, 7, 2, 0, 7, 7])) == 0


# ---------------------------------------------------------------- filters


def test_without_filters_all_is_kept():
    report = SampleFilters().apply(records((1, 1.0, 5), (1, 1.0, 5)))
    assert (report.kept.tolist(), report.dropped, str(report)) == ([0, 1], {}, "kept 2 of 2 samples")


def test_bounds_are_kept():
    rows = records((15, 0.0, 1), (16, 0.3, 2), (17, 0.30001, 3))  # 0.3 is another number in float32 than in float64
    report = SampleFilters(min_length=16, max_repetition=0.3).apply(rows)
    assert report.kept.tolist() == [1]
    assert str(report) == "kept 1 of 3 samples: 1 shorter than 16 tokens, 1 repetitive (> 0.30)"


def test_the_first_of_equal_samples_is_kept():
    rows = records((9, 0, 8), (9, 0, 3), (9, 0, 8), (9, 0, 3), (9, 0, 5), (9, 0, 8))
    report = SampleFilters(drop_duplicates=True).apply(rows)
    assert (report.kept.tolist(), report.dropped) == ([0, 1, 4], {"duplicates": 3})


def test_a_dropped_sample_is_no_original_and_counts_once():
    rows = records((3, 0.9, 8), (9, 0.9, 8), (9, 0.1, 8), (9, 0.1, 8))  # all with one hash; tokens would be equal too
    report = SampleFilters(min_length=5, max_repetition=0.5, drop_duplicates=True).apply(rows)
    assert report.kept.tolist() == [2]
    assert report.dropped == {"shorter than 5 tokens": 1, "repetitive (> 0.50)": 1, "duplicate": 1}


def test_numbers_of_samples_are_kept_as_they_are():
    rows = records((9, 0, 1), (1, 0, 2), (9, 0, 3))
    rows["index"] = [5, 2**40, 2**63]
    assert SampleFilters(min_length=2).apply(rows).kept.tolist() == [5, 2**63]


def test_the_report_reads_well():
    dropped = {"shorter than 16 tokens": 41, "repetitive (> 0.50)": 12, "duplicates": 7}
    wanted = "kept 940 of 1,000 samples: 41 shorter than 16 tokens, 12 repetitive (> 0.50), 7 duplicates"
    assert str(FilterReport(np.arange(940), 1000, dropped)) == wanted


ROWS = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 4)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.none() | st.integers(1, 4), st.none() | st.sampled_from([0.0, 0.25, 0.75, 1.0]), st.booleans())
def test_filters_are_what_a_loop_over_samples_does(rows, min_length, max_repetition, drop_duplicates):
    kept, seen, counts = [], set(), [0, 0, 0]
    for number, (length, share, code) in enumerate(rows):
        reasons = (length < (min_length or 0), share > (2 if max_repetition is None else max_repetition), drop_duplicates and code in seen)
        if any(reasons):
            counts[reasons.index(True)] += 1
        else:
            kept.append(number)
            seen.add(code)
    filters = SampleFilters(min_length=min_length, max_repetition=max_repetition, drop_duplicates=drop_duplicates)
    if kept:
        report = filters.apply(records(*rows))
        assert report.kept.tolist() == kept
        assert list(report.dropped.values()) == [count for count in counts if count]
    else:
        with pytest.raises(ValueError, match="filters: kept 0 of"):
            filters.apply(records(*rows))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": 0}, "min_length: got 0, expected at least 1, or None"),
        ({"max_repetition": 1.5}, "max_repetition: got 1.5, expected a share from 0 to 1, or None"),
        ({"max_repetition": -0.1}, "max_repetition: got -0.1"),
        ({"max_repetition": float("nan")}, "max_repetition: got nan"),
    ],
)
def test_filters_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SampleFilters(**changes)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match=r"filters: kept 0 of 2 samples: 2 shorter than 9 tokens; .* loosen min_length"):
        SampleFilters(min_length=9).apply(records((8, 0, 1), (7, 0, 2)))
    with pytest.raises(ValueError, match="filters: kept 0 of 0 samples"):
        SampleFilters().apply(records())
