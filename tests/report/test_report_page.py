"""The page is well-formed, safe whatever a teacher writes, and needs nothing but itself."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from models import character_tokenizer, llama
from report_stores import Markov, sample, store_of

from lightning_qat.generation.steppers import CallableTeacher
from lightning_qat.report import write_generation_report
from lightning_qat.report.histograms import Histogram
from lightning_qat.report.svg import Bar, bar_chart, histogram_chart, log_ticks, ticks
from lightning_qat.report.wording import label, number, percent, printable, size

SVG = "{http://www.w3.org/2000/svg}"
ATTACK = "</script><script>alert('1')</script> & \"quotes\""
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that every element is closed where it was opened, and keeps what there is."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def ids_of(text):
    return [ord(character) - 30 for character in text]


def report(tmp_path, samples=None, shown=6, identity=None, **given):
    samples = [sample(i, [1, *ids_of(f"hello {i} {ATTACK}")]) for i in range(9)] if samples is None else samples
    store = store_of(tmp_path / "a <b> folder", samples, **identity or {})
    found = write_generation_report(store, tmp_path / "report.html", shown=shown, **given)
    page = (tmp_path / "report.html").read_text("utf-8")
    return found, page, Reader(page)


@pytest.mark.parametrize("given", [{}, {"tokenizer": character_tokenizer()}, {"teacher": llama(), "tokenizer": character_tokenizer()}])
def test_page_is_well_formed_and_stands_alone(tmp_path, given):
    found, page, read = report(tmp_path, **given)
    for _, attributes in read.elements:
        assert not {"src", "href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert [attributes for tag, attributes in read.elements if tag == "script"] == [{"type": "application/json", "id": "statistics"}]
    assert set(re.findall(r"https?://[^\"<]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "url(" not in page
    assert page.startswith("<!DOCTYPE html>")
    data = re.search(r'id="statistics">(.*?)</script>', page, re.S)[1]
    assert json.loads(data) == json.loads(json.dumps(found.to_dict()))
    assert {tag for tag, _ in read.elements} >= {"h1", "h2", "svg", "details", "table", "style"}


@pytest.mark.parametrize("given", [{}, {"teacher": llama(), "tokenizer": character_tokenizer()}])
def test_charts_are_xml_with_a_name(tmp_path, given):
    _, page, _ = report(tmp_path, **given)
    charts = [ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", page, re.S)]
    assert len(charts) == 4
    for chart in charts:
        assert chart.get("role") == "img"
        assert len(chart.get("aria-label")) > 20
        bars = [bar for bar in chart.iter(f"{SVG}rect") if bar.get("rx") is None]
        assert bars
        assert all(bar.find(f"{SVG}title").text for bar in bars)
        _, _, width, height = map(float, chart.get("viewBox").split())
        for bar in bars:
            x, y, w, h = (float(bar.get(name)) for name in ("x", "y", "width", "height"))
            assert x >= 0
            assert y >= 0
            assert x + w <= width
            assert y + h <= height


def test_what_a_teacher_writes_is_text(tmp_path):
    found, page, read = report(tmp_path, tokenizer=character_tokenizer(), identity={"model": ATTACK})
    assert read.text.count(ATTACK) == 6
    assert found.identity["model"] == ATTACK
    assert read.text.count(json.dumps(ATTACK)) == 1  # in the table of settings
    assert page.count("<script") == 1
    assert "a <b> folder" in read.text
    assert "<b>" not in page


def test_special_and_given_tokens_are_marked(tmp_path):
    samples = [sample(0, [1, *ids_of("abcdef")], roles=[0, 0, 1, 1, 0, 2, 2], chosen=4)]
    _, page, _ = report(tmp_path, samples, tokenizer=character_tokenizer(), identity={"mode": "chat"})
    spans = re.findall(r'<span class="([^"]*)">([^<]*)</span>', page)
    assert spans == [("given special", "&lt;s&gt;"), ("given", "a"), ("user", "bc"), ("given", "d"), ("assistant", "ef")]
    assert "Who wrote the tokens" in page


def test_samples_shown_are_the_first_the_most_repetitive_and_the_least_likely(tmp_path):
    texts = [np.random.default_rng(i).integers(2, 97, 20).tolist() for i in range(9)]
    texts[6] = [5] * 20
    samples = [sample(i, text, nll=100.0 if i == 7 else 30.0) for i, text in enumerate(texts)]
    _, page, read = report(tmp_path, samples, shown=2)
    assert re.findall(r"<h3>(Sample .*?)</h3>", page) == [
        "Sample 0",
        "Sample 1",
        "Sample 6, the most repetitive one",
        "Sample 7, the least likely one",
    ]
    assert " ".join(map(str, texts[7])) in read.text


def test_one_sample_may_be_both(tmp_path):
    _, page, _ = report(tmp_path, [sample(0, [5] * 20, nll=50.0), sample(1, list(range(20)))], shown=0)
    assert re.findall(r"<h3>(Sample .*?)</h3>", page) == ["Sample 0, the most repetitive one and the least likely one"]


def test_long_samples_are_cut(tmp_path):
    _, page, _ = report(tmp_path, [sample(0, [5] * 5000)])
    assert "904 more tokens" in page


def test_one_token_makes_a_page(tmp_path):
    found, page, _ = report(tmp_path, [sample(0, [5])], tokenizer=character_tokenizer(), identity={"mode": "sample"})
    assert found.tokens == 1
    assert "1 sample, 1 token." in page


def test_frequencies_that_are_off_are_shown(tmp_path):
    texts = [sample(i, tokens) for i, tokens in enumerate(Markov().texts(40, 30))]
    found, _, read = report(tmp_path, texts, teacher=CallableTeacher(Markov(seed=1), 12, "other"), identity={"vocab_size": 12})
    assert found.agreement.is_far
    assert f"{found.agreement.distance:.4f}" in read.text
    assert f"token {found.agreement.over[0].token}" in read.text
    assert "Worth a look" in read.text
    assert "Nothing looks wrong" not in read.text


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    report(tmp_path / "one")
    out = tmp_path / "one" / "report.html"
    before, store = out.read_bytes(), store_of(tmp_path / "two", [sample(0, [1, 2])])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match=r"out: cannot write .*No space left"):
        write_generation_report(store, out)
    assert out.read_bytes() == before
    assert {path.name for path in out.parent.iterdir()} == {"report.html", "a <b> folder"}


def test_the_same_store_gives_the_same_page(tmp_path):
    assert report(tmp_path / "one", teacher=llama())[1] == report(tmp_path / "two", teacher=llama())[1]


def test_mistakes_are_named_before_any_work(tmp_path):
    store = store_of(tmp_path / "store", [])
    with pytest.raises(ValueError, match="shown: got -1, expected 0 or more"):
        write_generation_report(store, tmp_path / "r.html", shown=-1)
    for out in (tmp_path, tmp_path / "nowhere" / "r.html"):
        with pytest.raises(ValueError, match=r"out: got .*, expected a file in a folder that is there"):
            write_generation_report(store, out)


@pytest.mark.parametrize(("low", "high"), [(0, 63), (0, 1), (33, 128), (0, 3), (0, 1e6), (-0.5, 7.5), (5, 5.2)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low <= tick <= high for tick in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (3.2, 19), (1.01, 1.2), (1, 1e300), (7, 7.1)])
def test_ticks_of_a_logarithmic_axis_are_inside(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 12
    assert all(low <= tick <= high for tick in found)


def test_charts_of_extremes():
    for values in ([1], [1, 1_000_000]):
        ElementTree.fromstring(histogram_chart("t", Histogram.of_integers(values), "x"))
    for values in ([1.0], [1.0, 1e300]):
        ElementTree.fromstring(histogram_chart("t", Histogram.of_ratios(values), "x"))
    ElementTree.fromstring(bar_chart("t", [Bar('<&">', [0.0, 0.0])], ["a", "b"], "x"))


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.0001, "< 0.1 %"),
        (0.031, "3.1 %"),
        (0.5, "50 %"),
        (0.9999, "> 99.9 %"),
        (0.995, "99.5 %"),
        (0.97, "97 %"),
    ],
)
def test_shares_read_as_they_are(share, text):
    assert percent(share) == text


def test_numbers_and_sizes():
    assert [number(value) for value in (1234567, 0.12345, 12.34, 2048.7, 0, 7, 1e300)] == [
        "1,234,567",
        "0.123",
        "12.3",
        "2,049",
        "0",
        "7",
        "1e+300",
    ]
    assert [size(value) for value in (5, 1500, 2_000_000, 3.5e12)] == ["5 bytes", "1.5 kB", "2 MB", "3.5 TB"]


def test_labels_show_white_space_and_controls():
    class Words:
        pieces = {0: " the", 1: "\n        ", 2: "\ufffd", 3: "\x1b[0m", 4: "a" * 3 + "word" * 20, 5: "of"}

        def decode(self, ids):
            return self.pieces.get(ids[0], "")

        def convert_ids_to_tokens(self, token):
            return {2: "<0xF0>", 5: "▁of"}.get(token, "x") if token < 6 else None

    names = [label(token, Words()) for token in range(7)]
    assert names == ["␣the", "⏎␣×8", "<0xF0>", "␛[0m", "aaa" + "word" * 5 + "…", "␣of", "token 6 (unknown)"]
    assert label(5) == "token 5"
    assert printable("a\x00\x7f\ud800") == "a␀␡?"
