"""Frequencies of tokens against the teacher's: sums over a Markov chain are done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from models import character_tokenizer, llama
from report_stores import Markov, sample, store_of

from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.source import TeacherSource
from lightning_qat.generation.steppers import CallableTeacher
from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.targets import top_targets
from lightning_qat.report import collect
from lightning_qat.report.marginals import compare
from lightning_qat.report.verdict import verdict, warnings

MARKOV = Markov()
TEACHER = CallableTeacher(MARKOV, 12, "markov")


def markov_store(folder, count=40, length=30, targets=None, **identity):
    samples = []
    for index, tokens in enumerate(MARKOV.texts(count, length)):
        logits, kept = MARKOV.logits[tokens[:-1]], {}
        if targets == "full":
            kept = {"targets": logits.half()}
        elif targets is not None:
            kept = dict(zip(("targets", "tails"), top_targets(logits, targets), strict=True))
        samples.append(sample(index, tokens, **kept))
    return store_of(folder, samples, vocab_size=12, **identity)


def sums_by_hand(texts, probabilities, first=1):
    observed, expected = np.zeros(12), np.zeros(12)
    for tokens in texts:
        for i in range(first, len(tokens)):
            observed[tokens[i]] += 1
            expected += probabilities[tokens[i - 1]]
    return observed, expected


def same_as(found, observed, expected, tolerance=1e-5):
    count = observed.sum()
    assert found.positions == count
    assert found.distance == pytest.approx(np.abs(observed - expected).sum() / 2 / count, abs=tolerance)
    nats = sum(o / count * math.log(o / e) for o, e in zip(observed, expected, strict=True) if o)
    assert found.kl == pytest.approx(nats, abs=tolerance)
    listed = {token.token: (token.observed, token.expected) for token in found.top}
    for token, pair in listed.items():
        place = -1 if token is None else token
        assert pair == pytest.approx((observed[place], expected[place]), rel=2e-3, abs=0.05)
    order = [max(pair) for pair in listed.values()]
    assert order == sorted(order, reverse=True)
    assert len(listed) == (np.maximum(observed, expected) >= 0.5).sum()


@pytest.mark.parametrize("targets", [None, "full"])
def test_sums_are_those_by_hand(tmp_path, targets):
    store = markov_store(tmp_path, targets=targets)
    found, _ = compare(store, None if targets else TEACHER)
    same_as(found, *sums_by_hand(MARKOV.texts(40, 30), MARKOV.probabilities), 1e-3 if targets else 1e-5)
    assert (found.source, found.samples) == ("targets" if targets else "teacher", 40)
    assert not found.is_far


def test_what_targets_do_not_name_is_one_more_token(tmp_path):
    found, _ = compare(markov_store(tmp_path, targets=3))
    observed, expected = np.zeros(13), np.zeros(13)
    for tokens in MARKOV.texts(40, 30):
        for last, following in itertools.pairwise(tokens):
            named = np.argsort(-MARKOV.probabilities[last])[:3]
            observed[following if following in named else 12] += 1
            expected[named] += MARKOV.probabilities[last][named]
            expected[12] += 1 - MARKOV.probabilities[last][named].sum()
    same_as(found, observed, expected)
    assert any(token.token is None for token in found.top)
    assert not found.is_far


def test_chance_is_that_of_each_position(tmp_path):
    """Drawing from the average instead would give more: a position whose next token is sure adds no noise."""
    found, _ = compare(markov_store(tmp_path), TEACHER)
    draw, distances, nats = np.random.default_rng(5), [], []
    rows = [last for tokens in MARKOV.texts(40, 30) for last in tokens[:-1]]
    expected = MARKOV.probabilities[rows].mean(0)
    uses = np.bincount(rows, minlength=12)
    for _ in range(400):
        share = sum(draw.multinomial(count, row) for count, row in zip(uses, MARKOV.probabilities, strict=True)) / len(rows)
        distances.append(np.abs(share - expected).sum() / 2)
        nats.append((share * np.log(np.maximum(share, 1e-300) / expected)).sum())
    spread = np.std(distances)
    assert found.distance_by_chance == pytest.approx(np.mean(distances), abs=5 * spread / math.sqrt(20))
    assert found.distance_spread == pytest.approx(spread, rel=0.7)
    assert found.kl_by_chance == pytest.approx(np.mean(nats), abs=5 * np.std(nats) / math.sqrt(20))
    average = [np.abs(draw.multinomial(len(rows), expected) / len(rows) - expected).sum() / 2 for _ in range(400)]
    assert found.distance_by_chance < np.mean(average)


def test_deviations_are_in_standard_deviations(tmp_path):
    store = markov_store(tmp_path)
    found, _ = compare(store, TEACHER)
    observed, expected = sums_by_hand(MARKOV.texts(40, 30), MARKOV.probabilities)
    variance = sum((MARKOV.probabilities[last] * (1 - MARKOV.probabilities[last]) for t in MARKOV.texts(40, 30) for last in t[:-1]), 0)
    deviation = (observed - expected) / np.sqrt(variance + 1)
    assert [token.token for token in found.over] == [i for i in np.argsort(-deviation)[:8] if deviation[i] > 0]
    assert [token.token for token in found.under] == [i for i in np.argsort(deviation)[:8] if deviation[i] < 0]
    assert found.over[0].deviation == pytest.approx(deviation.max(), rel=1e-4)


def test_another_teacher_is_noticed(tmp_path):
    store = markov_store(tmp_path)
    other = CallableTeacher(Markov(seed=1), 12, "other")
    statistics = collect(store, teacher=other)
    assert statistics.agreement.is_far
    assert "differ from the teacher's" in verdict(statistics)
    assert any("by more than chance" in text for text in warnings(statistics))


def test_a_distance_that_the_temperature_makes_is_no_fault(tmp_path):
    statistics = collect(markov_store(tmp_path, temperature=0.5), teacher=CallableTeacher(Markov(seed=1), 12, "other"))
    assert any("temperature 0.5" in text and "meant" in text for text in warnings(statistics))
    assert not any("by more than chance" in text for text in warnings(statistics))


def test_most_probable_tokens_of_the_hybrid_rule_are_left_out(tmp_path):
    found, _ = compare(markov_store(tmp_path, mode="hybrid", greedy_tokens=[3, 5]), TEACHER)
    same_as(found, *sums_by_hand(MARKOV.texts(40, 30), MARKOV.probabilities, first=6))


def test_only_what_the_teacher_wrote_counts(tmp_path):
    texts, draw = list(MARKOV.texts(20, 30)), np.random.default_rng(0)
    roles = [[0, *draw.integers(0, 3, 29).tolist()] for _ in texts]
    pairs = enumerate(zip(texts, roles, strict=True))
    store = store_of(tmp_path, [sample(i, t, chosen=np.count_nonzero(r), roles=r) for i, (t, r) in pairs], vocab_size=12)
    observed, expected = np.zeros(12), np.zeros(12)
    for tokens, who in zip(texts, roles, strict=True):
        for i in range(1, 30):
            if who[i]:
                observed[tokens[i]] += 1
                expected += MARKOV.probabilities[tokens[i - 1]]
    same_as(compare(store, TEACHER)[0], observed, expected)


def test_samples_to_score_are_spread_over_the_store(tmp_path):
    seen = []

    def teacher(ids):
        seen.extend(ids.tolist())
        return MARKOV(ids)

    found, _ = compare(markov_store(tmp_path), CallableTeacher(teacher, 12, "spy"), scored=3)
    texts = list(MARKOV.texts(40, 30))
    assert seen == [texts[0], texts[20], texts[39]]
    assert (found.samples, found.positions) == (3, 87)


def test_a_language_model_is_summed_sample_by_sample(tmp_path):
    model, lengths = llama(), (9, 2, 14, 1, 20)
    texts = [torch.randint(2, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths]
    found, _ = compare(store_of(tmp_path, [sample(i, tokens) for i, tokens in enumerate(texts)]), model)
    expected = torch.zeros(97)
    with torch.no_grad():
        for tokens in texts:
            expected += model(torch.tensor([tokens])).logits[0, :-1].softmax(-1).sum(0)
    assert found.positions == sum(lengths) - len(lengths)
    for token in found.top:
        assert token.expected == pytest.approx(float(expected[token.token]), rel=1e-4)


@pytest.mark.parametrize("mode", ["hybrid", "sample"])
def test_a_teacher_agrees_with_itself(tmp_path, mode):
    """End to end: what the engine wrote, scored by the model, and by the targets that the engine kept."""
    model, tokenizer = llama(), character_tokenizer()
    source = TeacherSource(model, GenerationSettings(max_length=24, mode=mode, logits=97, rows=16), tokenizer)
    store = GenerationStore(tmp_path).open(source.identity, 48)
    with store.writing() as writer:
        writer.append(source.samples(range(48)))
    by_model, by_targets = (collect(store, tokenizer=tokenizer, teacher=teacher) for teacher in (model, None))
    for found in (by_model, by_targets):
        assert found.agreement.positions == 48 * (23 if mode == "sample" else 18)
        assert not found.agreement.is_far
        assert all("hardly more likely than random" in text for text in warnings(found))  # true of random weights
    assert by_model.agreement.distance == pytest.approx(by_targets.agreement.distance, abs=1e-4)
    assert by_model.start.allowed == 95
    assert by_model.start.distinct == len({int(store.view(i)["tokens"][0]) for i in range(48)})
    assert by_targets.start.allowed is None


def test_ids_that_the_tokenizer_does_not_know_are_expected_nowhere(tmp_path):
    model, tokenizer = llama(vocab_size=120), character_tokenizer()
    source = TeacherSource(model, GenerationSettings(max_length=24, mode="sample", rows=16), tokenizer)
    store = GenerationStore(tmp_path).open(source.identity, 32)
    with store.writing() as writer:
        writer.append(source.samples(range(32)))
    assert not collect(store, tokenizer=tokenizer, teacher=model).agreement.is_far
    assert collect(store, teacher=model).agreement.is_far


def test_nothing_to_compare_with(tmp_path):
    store = markov_store(tmp_path / "a")
    assert compare(store) == (None, "no teacher was given and the store holds no targets")
    assert compare(store, TEACHER, scored=0) == (None, "that was not asked for")
    given = store_of(tmp_path / "b", [sample(0, [1, 2, 3], chosen=0)], vocab_size=12)
    assert compare(given, TEACHER) == (None, "no sample holds a token that was drawn")
    first = store_of(tmp_path / "c", [sample(0, [1], chosen=1)], vocab_size=12)
    assert compare(first, TEACHER) == (None, "no sample holds a token that was drawn")


def test_teachers_that_cannot_be_meant(tmp_path):
    store = markov_store(tmp_path)
    with pytest.raises(ValueError, match=r"teacher: got logits of shape \(16, 30, 97\), expected \(16, 30, 12\)"):
        compare(store, llama())
    with pytest.raises(ValueError, match=r"teacher: got a model in training mode.*call teacher\.eval"):
        compare(store, llama(vocab_size=12).train())
    with pytest.raises(ValueError, match="teacher: got a Linear, expected a causal language model"):
        compare(store, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="teacher: its logits are not finite in sample 0; try another dtype"):
        compare(store, CallableTeacher(lambda ids: MARKOV(ids) * math.nan, 12, "broken"))
