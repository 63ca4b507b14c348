"""Samples are what section 3.1 of LLM-QAT says, and each is a function of (teacher, settings, seed, index) alone."""

import itertools
import math
import random

import pytest
import torch
from models import gemma3, gpt2, llama, opt, qwen3
from torch.nn import functional

from lightning_qat.generation import GenerationSettings
from lightning_qat.generation.engine import generate
from lightning_qat.generation.randomness import uniform
from lightning_qat.generation.sample import ASSISTANT, FORCED, USER
from lightning_qat.generation.scripts import ALL, Span, StartTokens
from lightning_qat.generation.steppers import ModelStepper
from lightning_qat.generation.targets import unpack_targets

MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt, "qwen3": qwen3, "gemma3": gemma3}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


class Markov:
    """A stepper whose next token depends on the last one only: row i of `table` holds the logits after token i."""

    def __init__(self, table, rows=8):
        self.table, self.rows, self.device = table, rows, torch.device("cpu")

    def step(self, tokens, positions, longest):
        assert int(positions.max()) + 1 == longest
        return self.table[tokens]


def random_table(size=8, spread=1.0):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(3)) * spread


def write(teacher, indices=range(8), allowed=None, ends=(), never=(), script=None, **changes):
    """Samples by number; `teacher` is a table of logits or a model."""
    settings = GenerationSettings(**{"max_length": 12, "rows": 8} | changes)
    if isinstance(teacher, torch.Tensor):
        size, stepper = len(teacher), Markov(teacher, settings.rows)
    else:
        size, stepper = teacher.get_input_embeddings().weight.shape[0], ModelStepper(teacher, settings.rows, settings.max_length)
    allowed = list(range(2, min(90, size))) if allowed is None else allowed
    script = script or StartTokens(allowed, ends, settings.seed, settings.greedy_tokens, mode=settings.mode)
    return {sample.index: sample for sample in generate(stepper, script, settings, size, indices, never)}


def stack(samples):
    return torch.stack([samples[index].tokens for index in sorted(samples)])


def same(first, second):
    """Bitwise, all of a sample."""
    return all(
        a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)
        for field in ("index", "tokens", "roles", "targets", "tails", "nll", "chosen")
        for a, b in [(getattr(first, field), getattr(second, field))]
    )


# ---------------------------------------------------------------- a function of seed and index


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_model
def test_a_sample_does_not_depend_on_what_is_written_beside_it(build, dtype):
    """Rows end at different times, over more than one block of positions where the model has them; targets too, bit for bit."""
    model = build().to(getattr(torch, dtype))
    ends = list(range(5, model.get_input_embeddings().weight.shape[0], 48))
    options = {"max_length": min(100, model.config.max_position_embeddings), "logits": 4}
    whole = write(model, range(60), ends=ends, **options)
    assert len({len(sample.tokens) for sample in whole.values()}) > 10
    order = random.Random(0).sample(range(60), 45)
    parts = [write(model, order[:20], ends=ends, **options), write(model, order[20:], ends=ends, **options)]
    for part in parts:
        for index, sample in part.items():
            assert same(sample, whole[index]), index


def test_samples_are_given_out_as_they_finish_and_numbers_are_asked_for_one_at_a_time():
    asked = []
    stepper, settings = Markov(random_table()), GenerationSettings(max_length=30, rows=8)
    endless = (asked.append(i) or i for i in itertools.count())
    samples = generate(stepper, StartTokens([1, 2, 3], [5], 0, (0, 0)), settings, 8, endless)
    first = [next(samples) for _ in range(20)]
    assert len(asked) <= 20 + 2 * 8
    whole = write(random_table(), range(40), [1, 2, 3], [5], max_length=30, greedy_tokens=(0, 0))
    assert all(same(sample, whole[sample.index]) for sample in first)
    assert [sample.index for sample in first] != sorted(sample.index for sample in first)


def test_another_seed_gives_other_samples():
    table = random_table(96)
    assert torch.equal(stack(write(table, seed=1)), stack(write(table, seed=1)))
    assert (stack(write(table, seed=1)) != stack(write(table, seed=2))).float().mean() > 0.5


def test_what_is_given_out_can_be_trained_on():
    """Neither views of the engine's rows nor tensors of inference mode."""
    samples = write(random_table(), range(40), logits=2)
    assert not any(sample.tokens.is_inference() for sample in samples.values())
    assert same(samples[0], write(random_table(), [0], logits=2)[0])
    assert samples[0].tokens.untyped_storage().nbytes() == samples[0].tokens.nbytes


# ---------------------------------------------------------------- the rule of the paper


def chi_square(observed, probabilities):
    expected = observed.sum(-1, keepdim=True) * probabilities
    return ((observed - expected) ** 2 / expected)[expected > 0].sum().item()


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({}, lambda table: table.softmax(-1)),
        ({"temperature": 1.7}, lambda table: (table / 1.7).softmax(-1)),
        ({"top_k": 3}, lambda table: table.masked_fill(table < table.topk(3).values[:, -1:], -torch.inf).softmax(-1)),
    ],
    ids=["softmax", "temperature", "top-k"],
)
def test_continuations_follow_the_teachers_distribution(options, law):
    table = random_table()
    samples = stack(write(table, range(4096), list(range(8)), rows=512, max_length=4, mode="sample", **options))
    pairs = torch.cat([samples[:, i : i + 2] for i in range(3)])
    observed = torch.zeros(8, 8).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)
    expected = law(table)
    assert observed[expected == 0].sum() == 0
    freedom = int((expected > 0).sum()) - 8
    bound = freedom + 5 * math.sqrt(2 * freedom)
    assert chi_square(observed, expected) < bound
    bent = law(table / 1.4)  # the test would notice
    assert chi_square(observed, bent) > bound
    starts = torch.bincount(samples[:, 0], minlength=8).float()
    assert chi_square(starts, torch.full((8,), 1 / 8)) < 7 + 5 * math.sqrt(14)


@pytest.mark.parametrize(("low", "high"), [(3, 5), (0, 0), (2, 2)])
def test_the_greedy_prefix_is_drawn_from_its_range(low, high):
    table = torch.zeros(96, 96)
    table[torch.arange(96), torch.randperm(96)] = 0.5  # the most probable token has a chance of 1.7 %
    tokens = stack(write(table, range(3000), rows=600, max_length=9, greedy_tokens=(low, high)))
    best = table.argmax(-1)[tokens[:, :-1]] == tokens[:, 1:]
    run = best.long().cumprod(-1).sum(-1)  # most probable tokens in a row; a sampled one may follow by chance
    assert int(run.min()) == low
    assert (run > high).float().mean() < 0.04
    for length in range(low, high):
        assert (run > length).float().mean().item() == pytest.approx((high - length) / (high - low + 1), abs=0.04)


@each_model
def test_greedy_samples_are_what_generate_gives(build):
    model = build()
    tokens = stack(write(model, mode="greedy"))
    wanted = model.generate(tokens[:, :1], attention_mask=torch.ones(8, 1).long(), max_new_tokens=11, do_sample=False)
    assert torch.equal(tokens, wanted)


@each_model
@torch.no_grad()
def test_sampled_tokens_are_drawn_from_the_uncached_models_softmax(build):
    model = build().double()
    samples = write(model, mode="sample", seed=7)
    tokens = stack(samples)
    probabilities = model(tokens).logits.softmax(-1)
    for position in range(1, 12):
        cumulative = probabilities[:, position - 1].cumsum(-1)
        draw = uniform(7, torch.arange(8), position + 2)
        assert torch.equal(tokens[:, position], (cumulative <= draw[:, None]).sum(-1)), position
    chosen = probabilities[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(torch.tensor([samples[i].nll for i in range(8)]).double(), -chosen.log().sum(-1), rtol=1e-6)
    assert {sample.chosen for sample in samples.values()} == {11}


# ---------------------------------------------------------------- where samples end


@pytest.mark.parametrize("ends", [[4], [4, 6]], ids=["one", "two"])
def test_an_end_token_ends_a_sample(ends):
    table = random_table()
    table[ends] = float("nan")  # what follows the end token is of no interest
    samples = write(table, range(64), [1, 2, 3], ends, rows=16, max_length=40, mode="sample")
    assert sorted(samples) == list(range(64))
    for sample in samples.values():
        found = torch.isin(sample.tokens, torch.tensor(ends))
        assert found[:-1].sum() == 0
        assert bool(found[-1]) or len(sample.tokens) == 40
    assert sum(int(sample.tokens[-1]) in ends for sample in samples.values()) > 50


def test_ids_the_tokenizer_does_not_know_are_never_drawn():
    table = random_table()
    table[:, 7] = 9.0
    assert 7 in stack(write(table, range(32), [1, 2]))
    for mode in ("sample", "greedy"):
        assert 7 not in stack(write(table, range(32), [1, 2], never=[7], mode=mode))


# ---------------------------------------------------------------- scripts with several spans


class Dialogue:
    """Two forced tokens, a user that ends with 4, one forced token, an answer that ends with 4 or 6."""

    identity, keeps_roles = {}, True

    def spans(self, index):
        yield Span([1, 2], USER, 0, frozenset({4}))
        yield Span([3], ASSISTANT, ALL, frozenset({4, 6}))


def test_spans_follow_each_other():
    samples = write(random_table(), range(64), script=Dialogue(), max_length=30, rows=16)
    finished = 0
    for sample in samples.values():
        tokens, roles = sample.tokens.tolist(), sample.roles.tolist()
        assert tokens[:2] == [1, 2]
        assert roles[:2] == [FORCED, FORCED]
        if ASSISTANT not in roles:
            continue
        seam = roles.index(FORCED, 2)
        assert roles == [FORCED] * 2 + [USER] * (seam - 2) + [FORCED] + [ASSISTANT] * (len(tokens) - seam - 1)
        assert (tokens[seam - 1], tokens[seam]) == (4, 3)
        assert tokens[seam + 1 :] == greedy_walk(random_table(), 3, len(tokens) - seam - 1)
        assert sample.chosen == len(tokens) - 3
        finished += tokens[-1] in (4, 6)
    assert finished > 40 or {len(sample.tokens) for sample in samples.values()} == {30}


def greedy_walk(table, token, length):
    walk = []
    for _ in range(length):
        token = int(table[token].argmax())
        walk.append(token)
    return walk


# ---------------------------------------------------------------- the teacher's distribution


def test_the_distribution_after_every_token_is_kept():
    table = random_table(40, 3.0)
    samples = write(table, range(20), [1, 2, 3], [5], logits=6, max_length=20)
    for sample in samples.values():
        probabilities = table[sample.tokens[:-1]].double().softmax(-1)
        ids, kept = unpack_targets(sample.targets, sample.tails, 40)
        assert ids.shape == (len(sample.tokens) - 1, 6)
        assert torch.equal(ids[:, 0], probabilities.argmax(-1))
        assert torch.allclose(probabilities.gather(-1, ids).float(), kept, rtol=2e-3, atol=1e-6)
        assert torch.allclose(sample.tails.double(), probabilities.topk(34, largest=False).values.sum(-1), rtol=1e-5, atol=1e-7)


def test_the_distribution_is_the_teachers_own_whatever_is_drawn_from():
    table = random_table(40)
    plain, bent = (write(table, [0], [1], logits=4, **options)[0] for options in ({}, {"temperature": 3.0, "top_k": 2}))
    for sample in (plain, bent):
        _, kept = unpack_targets(sample.targets[:1], sample.tails[:1], 40)
        assert torch.allclose(kept[0], table[1].softmax(-1).topk(4).values, rtol=2e-3)


def test_full_logits_are_kept():
    table = random_table(40)
    sample = write(table, [0], logits="full")[0]
    assert torch.equal(sample.targets, table[sample.tokens[:-1]].half())
    assert sample.tails is None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    table = random_table()
    table[3, 1] = bad
    with pytest.raises(ValueError, match=r"logits are not finite at position 1 of sample 16"):
        write(table, [16, 17], [3])


def test_a_teacher_that_only_ends_is_refused_before_anything_is_given_out():
    table = functional.one_hot(torch.full((8,), 4), 8).float() * 60
    given = []
    settings = GenerationSettings(max_length=50, rows=4)
    with pytest.raises(ValueError, match=r"the first 4 samples hold nothing but the end token"):
        given.extend(generate(Markov(table, 4), StartTokens([1], [4], 0, (3, 5)), settings, 8, range(100)))
    assert given == []
    with pytest.raises(ValueError, match=r"the first 3 samples hold nothing"):
        list(generate(Markov(table, 4), StartTokens([1], [4], 0, (3, 5)), settings, 8, range(3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "max_length: got 1, expected at least 2"),
        ({"rows": 0}, "rows: got 0, expected at least 1"),
        ({"greedy_tokens": (5, 3)}, r"greedy_tokens: got \(5, 3\)"),
        ({"greedy_tokens": (-1, 3)}, r"greedy_tokens: got \(-1, 3\)"),
        ({"mode": "hybird"}, r"mode: got 'hybird'.*hybrid"),
        ({"temperature": 0.0}, r"temperature: got 0\.0.*mode='greedy'"),
        ({"top_p": 0.0}, r"top_p: got 0\.0"),
        ({"top_p": 1.1}, r"top_p: got 1\.1"),
        ({"top_k": -1}, r"top_k: got -1"),
        ({"turns": 0}, r"turns: got 0"),
        ({"logits": 0}, r"logits: got 0"),
        ({"logits": "all"}, r"logits: got 'all'.*'full'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{"max_length": 8} | changes)
