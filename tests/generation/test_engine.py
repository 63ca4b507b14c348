"""Samples are what section 3.1 of LLM-QAT says, and each is a function of (teacher, settings, seed, index) alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from models import character_tokenizer, gemma3, gpt2, llama, opt, qwen3, save_causal_lm, vit
from torch import nn
from transformers import LlamaConfig

from lightning_qat.generation import GenerationSettings, fingerprint, generate_rows, load_causal_lm, load_tokenizer, start_tokens
from lightning_qat.generation.engine import sample_token
from lightning_qat.generation.randomness import uniform

MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt, "qwen3": qwen3, "gemma3": gemma3}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


class Markov(nn.Module):
    """The next token depends on the last one only: row i of `table` holds the logits after token i."""

    def __init__(self, table, eos=None):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = LlamaConfig(vocab_size=len(table), num_hidden_layers=1, bos_token_id=None, eos_token_id=None)
        self.generation_config = SimpleNamespace(eos_token_id=eos)

    def forward(self, input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def random_table(size=8, spread=1.0):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(3)) * spread


def tile(model, first=0, allowed=None, **changes):
    settings = GenerationSettings(**{"max_length": 12, "rows": 8} | changes)
    return generate_rows(model, settings, first, list(range(2, 90)) if allowed is None else allowed)


# ---------------------------------------------------------------- a function of seed and index


@each_model
def test_a_tile_does_not_depend_on_what_was_generated_before(build):
    model = build()
    run = [tile(model, first) for first in (0, 8, 16)]
    tokens, lengths = tile(build(), 8)
    assert torch.equal(tokens, run[1][0])
    assert torch.equal(lengths, run[1][1])
    assert not torch.equal(run[0][0], run[1][0])


def test_a_sample_does_not_depend_on_its_place_in_the_tile():
    model, everything = Markov(random_table(96)), tile(Markov(random_table(96)), rows=32)[0]
    for first in (0, 3, 24):
        assert torch.equal(tile(model, first)[0], everything[first : first + 8])


def test_another_seed_gives_other_samples():
    model = Markov(random_table(96))
    assert torch.equal(tile(model, seed=1)[0], tile(model, seed=1)[0])
    assert (tile(model, seed=1)[0] != tile(model, seed=2)[0]).float().mean() > 0.5


# ---------------------------------------------------------------- the rule of the paper


def chi_square(observed, probabilities):
    expected = observed.sum(-1, keepdim=True) * probabilities
    return ((observed - expected) ** 2 / expected).sum().item()


def test_continuations_follow_the_full_softmax():
    table = random_table()
    tokens, _ = tile(Markov(table), allowed=list(range(8)), rows=4096, max_length=4, greedy_tokens=(0, 0))
    pairs = torch.cat([tokens[:, i : i + 2] for i in range(3)])
    observed = torch.zeros(8, 8).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)
    bound = 56 + 5 * math.sqrt(2 * 56)  # 8 rows of 7 degrees of freedom, five standard deviations
    assert chi_square(observed, table.softmax(-1)) < bound
    assert chi_square(observed, (table / 1.2).softmax(-1)) > bound  # the test would notice a temperature of 1.2
    starts = torch.bincount(tokens[:, 0], minlength=8).float()
    assert chi_square(starts, torch.full((8,), 1 / 8)) < 7 + 5 * math.sqrt(14)


@pytest.mark.parametrize(("low", "high"), [(3, 5), (0, 0), (2, 2)])
def test_the_greedy_prefix_is_drawn_from_its_range(low, high):
    table = torch.zeros(96, 96)
    table[torch.arange(96), torch.randperm(96)] = 0.5  # the most probable token has a chance of 1.7 %
    tokens, _ = tile(Markov(table), rows=3000, max_length=9, greedy_tokens=(low, high))
    best = table.argmax(-1)[tokens[:, :-1]] == tokens[:, 1:]
    run = best.long().cumprod(-1).sum(-1)  # most probable tokens in a row; a sampled one may follow by chance
    assert int(run.min()) == low
    assert (run > high).float().mean() < 0.04
    for length in range(low, high):
        assert (run > length).float().mean().item() == pytest.approx((high - length) / (high - low + 1), abs=0.04)


@each_model
def test_the_greedy_part_is_what_generate_gives(build):
    model = build()
    tokens, lengths = tile(model, greedy_tokens=(11, 11))
    wanted = model.generate(tokens[:, :1], attention_mask=torch.ones(8, 1).long(), max_new_tokens=11, do_sample=False)
    assert torch.equal(tokens, wanted)
    assert lengths.tolist() == [12] * 8


@each_model
@torch.no_grad()
def test_the_sampled_part_is_drawn_from_the_uncached_models_softmax(build):
    model = build().double()
    tokens, _ = tile(model, greedy_tokens=(0, 0), seed=7)
    logits = model(tokens).logits
    for position in range(1, 12):
        cumulative = logits[:, position - 1].float().softmax(-1).cumsum(-1)
        draw = uniform(7, torch.arange(8), position + 2).float() * cumulative[:, -1]
        assert torch.equal(tokens[:, position], (cumulative <= draw[:, None]).sum(-1)), position


@pytest.mark.parametrize("draw", [0.0, 0.2499, 0.25, 0.7499, 1 - 2**-53])
def test_inverse_cdf_by_hand(draw):
    """Probabilities 1/4, 0, 1/2, 1/4."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 1.0]]).log()
    assert sample_token(logits, torch.tensor([draw], dtype=torch.float64)).item() == (0 if draw < 0.25 else 2 if draw < 0.75 else 3)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 6), float("-inf"))
    logits[0, 2] = 0.0
    assert sample_token(logits.expand(3, 6), torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 2, 2]


# ---------------------------------------------------------------- where samples end


@pytest.mark.parametrize("eos", [4, [4, 6]], ids=["one", "two"])
def test_the_end_token_ends_a_row(eos):
    table = random_table()
    table[torch.as_tensor(eos)] = float("nan")  # what follows the end token is of no interest
    tokens, lengths = tile(Markov(table, eos), allowed=[1, 2, 3], rows=64, max_length=40)
    ends = torch.isin(tokens, torch.as_tensor(eos))
    assert ends.any(-1).sum() > 50
    for row, length, end in zip(tokens, lengths.tolist(), ends, strict=True):
        assert end.sum() <= 1
        assert length == (int(end.nonzero()) + 1 if end.any() else 40)
        assert row[length:].count_nonzero() == 0


def test_without_an_end_token_rows_are_full():
    assert tile(Markov(random_table(96)))[1].tolist() == [12] * 8


def test_generation_stops_when_every_row_has_ended():
    table = torch.full((8, 8), -30.0)
    table[:, 4] = 30.0
    steps = []
    tokens, lengths = generate_rows(Markov(table, 4), GenerationSettings(max_length=50, rows=4), 0, [1], lambda: steps.append(1))
    assert (len(steps), lengths.tolist()) == (1, [2] * 4)
    assert tokens[:, :3].tolist() == [[1, 4, 0]] * 4


# ---------------------------------------------------------------- start tokens


def teacher_with(size, **ids):
    config = LlamaConfig(vocab_size=size, **{"bos_token_id": None, "eos_token_id": None} | ids)
    return SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(size, 2), config=config, generation_config=None)


def test_special_and_unused_ids_do_not_start_a_sample():
    tokenizer = character_tokenizer()
    assert start_tokens(teacher_with(97), tokenizer) == list(range(2, 97))
    assert start_tokens(teacher_with(128), tokenizer) == list(range(2, 97))  # ids that only pad the matrix
    assert start_tokens(teacher_with(50), tokenizer) == list(range(2, 50))
    assert start_tokens(teacher_with(9, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0), None) == [3, 4, 6, 7, 8]


class HoleyTokenizer:
    """Three tokens whose ids leave some out."""

    all_special_ids = [0]

    def get_vocab(self):
        return {"a": 0, "b": 2, "c": 5}

    def __len__(self):
        return 3


def test_ids_that_the_tokenizer_skips_do_not_start_a_sample():
    assert start_tokens(teacher_with(8), HoleyTokenizer()) == [2, 5]
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert start_tokens(teacher_with(98), tokenizer)[-1] == 97


def test_end_tokens_of_the_generation_config_do_not_start_a_sample():
    model = llama()
    model.generation_config.eos_token_id = [7, 8]  # where Llama 3 keeps its second end token
    assert {7, 8}.isdisjoint(start_tokens(model, None))


def test_an_empty_start_set_is_refused():
    with pytest.raises(ValueError, match=r"none of the 2 token ids is neither special nor unused"):
        start_tokens(teacher_with(2), character_tokenizer())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("build", "positions"), [(llama, 64), (gpt2, 64), (opt, 32)])
def test_a_sample_longer_than_the_teachers_positions_is_refused(build, positions):
    model = build()
    assert tile(model, max_length=positions, rows=2)[0].shape == (2, positions)
    with pytest.raises(ValueError, match=rf"max_length: got {positions + 1}, the teacher has {positions} positions"):
        tile(model, max_length=positions + 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    table = random_table()
    table[3, 1] = bad
    with pytest.raises(ValueError, match=r"logits are not finite at position 1 from sample 16 on"):
        tile(Markov(table), first=16, allowed=[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "max_length: got 1, expected at least 2"),
        ({"rows": 0}, "rows: got 0, expected at least 1"),
        ({"greedy_tokens": (5, 3)}, r"greedy_tokens: got \(5, 3\)"),
        ({"greedy_tokens": (-1, 3)}, r"greedy_tokens: got \(-1, 3\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{"max_length": 8} | changes)


def test_teachers_that_are_none(tmp_path):
    for path in (tmp_path / "nothing", "./nothing/here"):
        with pytest.raises(ValueError, match=r"teacher: no folder at '.*nothing.*tiny-teacher"):
            load_causal_lm(path)
    with pytest.raises(ValueError, match=r"teacher: cannot read a model configuration from"):
        load_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: none can be read from"):
        load_tokenizer(tmp_path)
    vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"is a ViTConfig, which has no causal language model"):
        load_causal_lm(tmp_path / "vit")


@pytest.mark.parametrize("build", [llama, gpt2, qwen3])
def test_a_folder_without_a_tokenizer_is_refused(build, tmp_path):
    """transformers makes up an empty one for some model types."""
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: none can be read from"):
        load_tokenizer(tmp_path)


def test_a_teacher_without_weights_is_refused(tmp_path):
    folder = save_causal_lm(llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="teacher: "):
        load_causal_lm(folder)


def test_a_saved_teacher_writes_the_same_samples(tmp_path):
    model = load_causal_lm(save_causal_lm(llama(), tmp_path))
    assert not model.training
    assert torch.equal(tile(model)[0], tile(llama())[0])
    assert fingerprint(model) == fingerprint(llama())


def test_the_fingerprint_changes_with_any_weight():
    def changed(edit):
        model = llama()
        with torch.no_grad():
            edit(model.model.layers[1].mlp.up_proj.weight)
        return fingerprint(model)

    found = [
        changed(lambda weight: None),
        changed(lambda weight: weight[3, 4].mul_(1 + 1e-6)),
        changed(lambda weight: weight.neg_()),
        changed(lambda weight: weight[3].copy_(weight[3].flip(0))),  # the same numbers in another order
    ]
    assert len(set(found)) == 4


# ---------------------------------------------------------------- randomness


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    numbers = torch.stack([uniform(seed, torch.arange(20_000), position) for seed in (0, 1, 2**62) for position in (0, 1, 2000)])
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(-1) - 1 / 2).abs().max() < 5 * math.sqrt(1 / 12 / 20_000)
    assert (numbers.var(-1) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 20_000)
    assert numbers.unique().numel() == numbers.numel()


NEIGHBOURS = {
    "index": lambda i: (uniform(0, i, 5), uniform(0, i + 1, 5)),
    "position": lambda i: (uniform(0, i, 5), uniform(0, i, 6)),
    "seed": lambda i: (uniform(0, i, 5), uniform(1, i, 5)),
    "far-index": lambda i: (uniform(0, i, 5), uniform(0, i + 2**40, 5)),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbouring_draws_are_independent(pair):
    first, second = pair(torch.arange(20_000))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 5 / math.sqrt(20_000)
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100).float()
    assert chi_square(cells, torch.full((100,), 0.01)) < 99 + 5 * math.sqrt(2 * 99)
