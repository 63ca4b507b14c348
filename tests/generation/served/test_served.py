"""A teacher behind a server writes what the same teacher would write here, or says why it cannot."""

import itertools
import math
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from completion_server import CompletionServer, fake_vllm
from models import llama
from torch import nn
from transformers import LlamaConfig

from lightning_qat.generation.sample import ASSISTANT, FORCED, USER
from lightning_qat.generation.scripts import Span, StartTokens
from lightning_qat.generation.scripts.prompts import Prompts
from lightning_qat.generation.served import ServedTeacher
from lightning_qat.generation.served.offline import OfflineVLLM
from lightning_qat.generation.settings import GenerationSettings
from lightning_qat.generation.targets import top_targets, unpack_targets

VOCABULARY = 97
PROMPTS = [[5, 6, 7], [8], list(range(20, 30))]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("lightning_qat.generation.served.transport.FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture
def server(model):
    with CompletionServer(model) as server:
        yield server


class Markov(nn.Module):
    """The next token depends on the last one only: row i of `table` holds the logits after token i."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = LlamaConfig(vocab_size=len(table))

    def forward(self, input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


class Dialogue:
    """Two turns, the second begins with tokens of its own; token 3 ends a turn."""

    keeps_roles = True
    identity = {"dialogue": 2}

    def spans(self, index):
        yield Span([1, 40 + index], USER, 0, frozenset({3}))
        yield Span([50, 51], ASSISTANT, 2, frozenset({3}))


def settings_of(**changes):
    return GenerationSettings(**{"max_length": 12, "mode": "hybrid", "seed": 5} | changes)


def script_of(settings, ends=(), vocab=VOCABULARY, bos=None):
    if settings.mode == "prefix":
        return Prompts(PROMPTS, ends, bos, vocab_size=vocab, max_length=settings.max_length)
    return StartTokens(list(range(2, vocab)), list(ends), settings.seed, settings.greedy_tokens, bos, settings.mode)


def served(server, script=None, settings=None, vocab=VOCABULARY, ends=(), bos=None, **more):
    settings = settings or settings_of()
    return ServedTeacher(server.url, settings, script or script_of(settings, ends, vocab, bos), vocab, **more)


def by_index(samples):
    return sorted(samples, key=lambda sample: sample.index)


def rows_of(samples):
    return torch.stack([sample.tokens for sample in by_index(samples)])


# ---------------------------------------------------------------- the rule of the paper, over HTTP


def test_greedy_is_what_generate_gives(server, model):
    settings = settings_of(mode="greedy")
    samples = by_index(served(server, settings=settings).samples(range(6)))
    tokens = rows_of(samples)
    wanted = model.generate(tokens[:, :1], attention_mask=torch.ones(6, 1).long(), max_new_tokens=11, do_sample=False)
    assert torch.equal(tokens, wanted)
    assert len(server.requests) == 6
    assert [sample.chosen for sample in samples] == [11] * 6
    assert len({int(row[0]) for row in tokens}) > 1


def test_the_start_of_a_hybrid_sample_is_greedy_then_it_is_sampled(server, model):
    settings = settings_of(greedy_tokens=(4, 4), temperature=2.0)
    tokens = rows_of(served(server, settings=settings).samples(range(8)))
    greedy = model.generate(tokens[:, :1], attention_mask=torch.ones(8, 1).long(), max_new_tokens=11, do_sample=False)
    assert torch.equal(tokens[:, :5], greedy[:, :5])
    assert (tokens[:, 5:] != greedy[:, 5:]).float().mean() > 0.5
    assert [request["max_tokens"] for request in server.requests if request["temperature"] == 0] == [4] * 8
    assert [request["max_tokens"] for request in server.requests if request["temperature"] == 2] == [7] * 8


def test_continuations_follow_the_full_softmax():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    with CompletionServer(Markov(table)) as server:
        settings = settings_of(mode="sample", max_length=60)
        script = StartTokens(list(range(8)), [], 5, (0, 0), None, "sample")
        tokens = rows_of(served(server, script, settings, vocab=8).samples(range(40)))
    pairs = torch.cat([tokens[:, i : i + 2] for i in range(59)])
    observed = torch.zeros(8, 8).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)

    def chi_square(logits):
        expected = observed.sum(-1, keepdim=True) * logits.softmax(-1)
        return ((observed - expected) ** 2 / expected).sum().item()

    bound = 56 + 5 * math.sqrt(2 * 56)  # 8 rows of 7 degrees of freedom, five standard deviations
    assert chi_square(table) < bound
    assert chi_square(table / 1.6) > bound


def test_how_tokens_are_drawn_is_said_in_full(server):
    """A model's generation_config, which vLLM takes its defaults from, must not change what the teacher writes."""
    settings = settings_of(mode="sample", temperature=0.7, top_k=11, top_p=0.9)
    list(served(server, settings=settings, ends=[3, 4]).samples([0]))
    request = server.requests[0]
    wanted = {"temperature": 0.7, "top_k": 11, "top_p": 0.9, "min_p": 0, "repetition_penalty": 1, "stop_token_ids": [3, 4], "logprobs": 0}
    assert request.items() >= (wanted | {"ignore_eos": True, "presence_penalty": 0, "frequency_penalty": 0, "model": "teacher"}).items()
    assert 0 <= request["seed"] < 2**31


# ---------------------------------------------------------------- a function of seed and index


def test_samples_do_not_depend_on_concurrency_or_order(server):
    alone = rows_of(served(server, concurrency=1).samples(range(12)))
    assert torch.equal(rows_of(served(server, concurrency=7).samples(reversed(range(12)))), alone)
    assert not torch.equal(rows_of(served(server, settings=settings_of(seed=6)).samples(range(12))), alone)
    assert len({request["seed"] for request in server.requests if request["temperature"] > 0}) == 24


def test_spans_of_a_sample_have_seeds_of_their_own(server):
    list(served(server, Dialogue(), settings_of(max_length=40)).samples([0, 1]))
    assert len({request["seed"] for request in server.requests if request["temperature"] > 0}) >= 3


# ---------------------------------------------------------------- where samples end


def test_an_end_token_ends_a_sample_and_stays(server):
    ends = list(range(2, 60))  # more than half of all tokens
    samples = list(served(server, settings=settings_of(mode="sample", max_length=20), ends=ends).samples(range(12)))
    assert any(len(sample.tokens) < 20 for sample in samples)
    for sample in samples:
        found = torch.isin(sample.tokens[1:], torch.tensor(ends))
        assert found.sum() == (1 if len(sample.tokens) < 20 else int(found[-1]))
        assert found[-1] or len(sample.tokens) == 20
        assert sample.chosen == len(sample.tokens) - 1


def test_the_models_own_end_does_not_end_what_the_script_goes_on_with():
    """A script may end with other tokens than the model, and a conversation goes on behind them."""
    table = torch.full((8, 8), -30.0)
    table[:, 4] = 30.0
    with CompletionServer(Markov(table), eos=4) as server:
        (sample,) = served(server, StartTokens([1], [5], 5, (3, 3)), vocab=8).samples([0])
    assert sample.tokens.tolist() == [1] + [4] * 11


def test_an_end_token_in_the_greedy_part_ends_the_sample():
    table = torch.full((8, 8), -30.0)
    table[:, 4] = 30.0
    with CompletionServer(Markov(table)) as server:
        script = StartTokens([1], [4], 5, (3, 3))
        (sample,) = served(server, script, vocab=8).samples([0])
    assert sample.tokens.tolist() == [1, 4]
    assert len(server.requests) == 1


@pytest.mark.parametrize("stop_reason", [True, False], ids=["named", "the-only-end"])
def test_an_end_token_that_the_server_leaves_out_is_put_back(server, stop_reason):
    def leave_out(choice):
        if choice["finish_reason"] == "stop":
            choice["token_ids"] = choice["token_ids"][:-1]
            choice["logprobs"] = {key: value[:-1] for key, value in choice["logprobs"].items()}
            choice["stop_reason"] = choice["stop_reason"] if stop_reason else None

    def dialogues():
        return by_index(served(server, Dialogue(), settings_of(logits=3, max_length=40)).samples(range(2)))

    complete = dialogues()
    server.edits.append(leave_out)
    for got, wanted in zip(dialogues(), complete, strict=True):
        assert torch.equal(got.tokens, wanted.tokens)
        assert torch.equal(got.targets, wanted.targets)
    assert any(3 in sample.tokens.tolist() for sample in complete)


def test_what_a_server_writes_behind_an_end_is_dropped(server):
    def ramble(choice):
        if choice["finish_reason"] == "stop":
            choice |= {"token_ids": [*choice["token_ids"], 9, 9], "finish_reason": "length", "stop_reason": None}
            for values in choice["logprobs"].values():
                values += values[:1] * 2

    def samples():
        return by_index(served(server, settings=settings_of(mode="sample", logits=3), ends=range(2, 60)).samples(range(5)))

    wanted = samples()
    server.edits = [ramble]
    for got, want in zip(samples(), wanted, strict=True):
        assert (got.tokens.tolist(), got.nll, got.chosen) == (want.tokens.tolist(), want.nll, want.chosen)
        assert torch.equal(got.targets, want.targets)


@pytest.mark.parametrize("greedy", [(0, 0), (3, 3), (11, 11), (99, 99)])
def test_without_an_end_samples_have_the_maximum_length(server, greedy):
    samples = list(served(server, settings=settings_of(greedy_tokens=greedy)).samples(range(3)))
    assert [len(sample.tokens) for sample in samples] == [12] * 3
    assert len(server.requests) == 3 * (1 if greedy[0] in (0, 11, 99) else 2)


# ---------------------------------------------------------------- what is forced


def test_prompts_are_continued(server):
    samples = by_index(served(server, settings=settings_of(mode="prefix")).samples(range(7)))
    for sample in samples:
        prompt = PROMPTS[sample.index % 3]
        assert sample.tokens[: len(prompt)].tolist() == prompt
        assert sample.roles.tolist() == [FORCED] * len(prompt) + [ASSISTANT] * (12 - len(prompt))
    assert samples[0].tokens.tolist() != samples[3].tokens.tolist()


def test_a_dialogue_has_its_roles(server):
    for sample in served(server, Dialogue(), settings_of(max_length=60)).samples(range(4)):
        tokens, roles = sample.tokens.tolist(), sample.roles.tolist()
        assert tokens[:2] == [1, 40 + sample.index]
        assert roles[:3] == [FORCED, FORCED, USER]
        if len(tokens) < 60 or ASSISTANT in roles:
            turn = tokens.index(3) + 1
            assert tokens[turn : turn + 2] == [50, 51]
            assert roles == [0] * 2 + [USER] * (turn - 2) + [0] * 2 + [ASSISTANT] * (len(tokens) - turn - 2)
            assert tokens[-1] == 3 or len(tokens) == 60
        assert sample.chosen == sum(role != FORCED for role in roles)


# ---------------------------------------------------------------- the teacher's probabilities

MODES = {
    "hybrid": {"greedy_tokens": (3, 3)},
    "greedy": {"mode": "greedy"},
    "sample": {"mode": "sample", "temperature": 1.7, "top_k": 20},
    "prefix": {"mode": "prefix"},
}


@torch.no_grad()
def check_targets(sample, model, width):
    logprobs = model(sample.tokens.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
    values, order = logprobs.topk(width)
    ids, probabilities = unpack_targets(sample.targets, sample.tails, VOCABULARY)
    assert torch.equal(ids, order)
    torch.testing.assert_close(probabilities.double(), values.exp(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sample.tails.double(), 1 - values.exp().sum(-1), rtol=0, atol=1e-6)
    words, _ = top_targets(logprobs, width)  # what the teacher in this process keeps, in fp32
    assert sample.targets.dtype == torch.int32
    assert ((sample.targets >> 7) - (words >> 7)).abs().max() <= 1


@pytest.mark.parametrize("bos", [None, 1], ids=["", "bos"])
@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_top_targets_are_the_teachers_log_softmax(server, model, changes, bos):
    for sample in served(server, settings=settings_of(logits=4, **changes), bos=bos).samples(range(3)):
        check_targets(sample, model, 4)
        assert len(sample.targets) == len(sample.tails) == 11


@pytest.mark.parametrize("max_length", [40, 5])
def test_targets_of_a_dialogue_cover_what_was_forced(server, model, max_length):
    for sample in served(server, Dialogue(), settings_of(logits=4, max_length=max_length)).samples(range(3)):
        check_targets(sample, model, 4)


def test_targets_behind_forced_tokens_at_the_very_end(server, model):
    """The maximum length cuts the second turn inside what is forced: no completion says what the teacher thinks of that."""

    class Forced(Dialogue):
        def spans(self, index):
            yield Span([1, 2], USER, 1, frozenset(range(VOCABULARY)))
            yield Span([60, 61, 62, 63], ASSISTANT, 0, frozenset({3}))

    (sample,) = served(server, Forced(), settings_of(logits=4, max_length=6)).samples([0])
    assert sample.tokens[3:].tolist() == [60, 61, 62]
    assert sample.chosen == 1
    check_targets(sample, model, 4)
    assert [len(request["prompt"]) for request in server.requests] == [2, 5]


@torch.no_grad()
def test_the_likelihood_is_that_of_the_plain_softmax(server, model):
    for changes in MODES.values():
        for sample in served(server, settings=settings_of(**changes)).samples(range(3)):
            chosen = slice(len(sample.tokens) - sample.chosen, None)
            logprobs = model(sample.tokens.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
            at = logprobs.gather(-1, sample.tokens[1:, None])[:, 0]
            assert sample.nll == pytest.approx(-float(at[chosen.start - 1 :].sum()), abs=1e-4)
            assert sample.targets is None


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("faults", [[503, 503], [429], ["reset"], ["reset", 500]], ids=str)
def test_what_may_pass_is_tried_again(server, faults):
    wanted = rows_of(served(server).samples(range(3)))
    server.faults = list(faults)
    assert torch.equal(rows_of(served(server, concurrency=1).samples(range(3))), wanted)
    assert server.faults == []


def refused(server, faults, message, **more):
    server.faults = faults
    with pytest.raises(ValueError, match=message):
        list(served(server, **{"concurrency": 1} | more).samples(range(3)))


def test_a_server_that_keeps_failing(server):
    refused(server, [503] * 9, r"failed 3 times, at last with status 503, 'too much to do'; is the server running", retries=2)
    refused(server, ["reset"] * 9, r"failed 1 times, at last with RemoteDisconnected|ConnectionResetError", retries=0)


def test_garbage_is_not_tried_again(server):
    refused(server, ["garbage"], "got '<html>I am a proxy</html>' from /v1/completions, expected JSON")
    refused(server, [422], "refused the request: status 422, 'too much to do'; change what it complains of")


def test_a_slow_answer(server):
    refused(server, ["hang"] * 3, r"timeout: got no answer from .*/v1/completions in 0.2 s; raise timeout", timeout=0.2)


def edited(server, edit, message, **more):
    server.edits = [edit]
    refused(server, [], message, **more)


def test_a_server_without_token_ids_is_refused(server):
    def plain(choice):
        del choice["token_ids"], choice["prompt_token_ids"]
        choice["logprobs"] = choice["logprobs"] | {"tokens": [" the"] * len(choice["logprobs"]["tokens"])}

    edited(server, plain, "returned text without token ids.*does not tokenize back to the same ids, so serve the teacher with `vllm serve`")
    edited(server, lambda choice: choice.update(token_ids=None, logprobs=None), "returned text without token ids")
    edited(server, lambda choice: choice.update(logprobs=None), "returned no log-probabilities")


def test_token_ids_may_come_as_placeholders(server):
    wanted = rows_of(served(server).samples(range(3)))
    server.edits = [lambda choice: choice.pop("token_ids")]
    assert torch.equal(rows_of(served(server).samples(range(3))), wanted)


def test_an_answer_that_is_not_what_was_asked_for(server):
    edited(server, lambda choice: choice.update(token_ids=choice["token_ids"][:-1]), r"got \d tokens that end with finish_reason='length'")
    own_stop = {"finish_reason": "stop", "stop_reason": 9}
    edited(
        server,
        lambda choice: choice.update(own_stop, token_ids=[*choice["token_ids"][:-2], 9]),
        "that end with finish_reason='stop', stop_reason=9",
    )
    edited(server, lambda choice: choice["token_ids"].__setitem__(0, 500), "vocab_size: got 97, but the teacher wrote token 500")
    edited(server, lambda choice: choice["prompt_token_ids"].insert(0, 1), "the server changed the prompt")
    edited(server, lambda choice: choice.update(logprobs=7), "got .* from /v1/completions, expected a completion as vLLM writes it")
    settings = settings_of(mode="prefix", logits=2)
    given = "logits: got log-probabilities at 0 given tokens, expected them at "
    edited(server, lambda choice: choice.update(prompt_logprobs=None), given, settings=settings)
    settings = settings_of(mode="sample", logits=5)
    few = "logits: got 1 log-probabilities, expected 5; start the server with --max-logprobs 5"
    edited(server, lambda choice: choice["logprobs"].update(top_logprobs=[{"token_id:4": -1.0}]), few, settings=settings)


def test_too_many_log_probabilities(server):
    refused(server, [], r"logprobs of 30, which is greater than max allowed: 20'; .*--max-logprobs", settings=settings_of(logits=30))


# ---------------------------------------------------------------- stopping


def threads_end(server):
    """All threads of the client end while the server still does not answer."""
    for thread in threading.enumerate():
        if thread.name.startswith("served-teacher"):
            thread.join(10)
            assert not thread.is_alive()
    assert server.patient


def test_indices_may_be_endless_and_only_few_are_taken(server):
    indices = itertools.count()
    samples = served(server, concurrency=3).samples(indices)
    assert len({sample.index for sample in itertools.islice(samples, 10)}) == 10
    samples.close()
    assert next(indices) <= 10 + 2 * 3
    threads_end(server)


def test_closing_cuts_requests_that_are_under_way(server):
    server.faults = [None, None, "hang"]  # the two requests of the first sample are answered, the next is not
    samples = served(server, concurrency=1).samples(itertools.count())
    assert next(samples).index == 0
    assert server.hanging.wait(10)
    samples.close()
    threads_end(server)


def test_an_interrupt_cuts_requests_that_are_under_way(server):
    def interrupt():
        server.hanging.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    server.faults = ["hang"] * 4
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(served(server, concurrency=2).samples(itertools.count()))
    threads_end(server)


def test_an_error_cuts_requests_that_are_under_way(server):
    server.faults = ["hang", 422, "hang"]
    with pytest.raises(ValueError, match="refused the request"):
        list(served(server, concurrency=3).samples(range(3)))
    threads_end(server)


# ---------------------------------------------------------------- before any work starts


def test_the_model_is_found_by_its_name(server):
    assert served(server).identity == {"engine": "served", "model": "teacher", "vocab_size": 97} | {
        "script": script_of(settings_of()).identity,
        **settings_of().to_dict(),
    }
    assert ServedTeacher(f"{server.url}/v1/", settings_of(), script_of(settings_of()), 97).model == "teacher"
    with pytest.raises(ValueError, match=r"model: got 'student', the server has \['teacher'\]; name one of them, or serve 'student'"):
        served(server, model="student")
    server.cards.append({"id": "adapter"})
    assert served(server, model="adapter").model == "adapter"
    with pytest.raises(ValueError, match=r"model: got None, but the server has \['adapter', 'teacher'\]; name one of them"):
        served(server)


def test_keys_come_from_the_environment(model, monkeypatch):
    with CompletionServer(model, key="secret") as server:
        with pytest.raises(ValueError, match=r"status 401, .*Unauthorized.*; name the environment variable"):
            served(server)
        with pytest.raises(ValueError, match="api_key: got 'TEACHER_KEY', expected an environment variable that is set"):
            served(server, api_key="TEACHER_KEY")
        monkeypatch.setenv("TEACHER_KEY", "secret")
        teacher = served(server, api_key="TEACHER_KEY")
        assert len(list(teacher.samples([0]))) == 1
        assert "secret" not in str(teacher.identity)


BEFORE = {
    "full": ({"settings": settings_of(logits="full")}, "logits: got 'full', expected a number of tokens or None"),
    "vocabulary": ({"settings": settings_of(logits=98)}, "logits: got 98, the teacher has 97 tokens"),
    "hot": ({"settings": settings_of(temperature=2.5)}, "temperature: got 2.5, expected 0.01 to 2 as in vLLM"),
    "cold": ({"settings": settings_of(temperature=0.001)}, "temperature: got 0.001"),
    "long": ({"settings": settings_of(max_length=65)}, "max_length: got 65, the server has 64 positions; start it with --max-model-len 65"),
    "concurrency": ({"concurrency": 0}, "concurrency: got 0, expected at least 1"),
    "retries": ({"retries": -1}, "retries: got -1, expected at least 0"),
    "timeout": ({"timeout": 0}, "timeout: got 0, expected seconds, more than 0"),
}


@pytest.mark.parametrize(("changes", "message"), BEFORE.values(), ids=BEFORE)
def test_what_cannot_work_is_refused_at_once(server, changes, message):
    with pytest.raises(ValueError, match=message):
        served(server, **changes)
    assert server.requests == []


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://here", "http://"])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match=rf"url: got '{url}', expected the address of a server"):
        ServedTeacher(url, settings_of(), script_of(settings_of()), 97)


def test_nobody_listens(server):
    with CompletionServer(None) as gone:
        pass
    with pytest.raises(ValueError, match=r"/v1/models failed 2 times, at last with ConnectionRefusedError.*; is the server running"):
        served(gone, retries=1)
    with pytest.raises(ValueError, match=r"status 404, .*Not Found.*; is this the address"):
        ServedTeacher(f"{server.url}/other", settings_of(), script_of(settings_of()), 97)


def test_a_server_of_something_else(server):
    server.cards = "yes"
    with pytest.raises(ValueError, match="from /v1/models, expected a list of models"):
        served(server)


# ---------------------------------------------------------------- vLLM in this process


def offline(monkeypatch, model, settings, script=None, **more):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(model))
    return OfflineVLLM("owner/teacher", settings, script or script_of(settings), VOCABULARY, **more)


@pytest.mark.parametrize("changes", [*MODES.values(), {"logits": 4}, {"mode": "prefix", "logits": 4}], ids=str)
def test_offline_samples_are_those_of_the_server(server, model, monkeypatch, changes):
    settings = settings_of(**changes)
    wanted = by_index(served(server, settings=settings).samples(range(5)))
    for got, want in zip(by_index(offline(monkeypatch, model, settings, chunk=3).samples(range(5))), wanted, strict=True):
        assert torch.equal(got.tokens, want.tokens)
        assert got.nll == pytest.approx(want.nll)
        assert (got.targets is None) == (settings.logits is None)
        if got.targets is not None:
            assert torch.equal(got.targets, want.targets)
            assert torch.equal(got.tails, want.tails)


def test_offline_chunks_go_through_the_spans_together(model, monkeypatch):
    teacher = offline(monkeypatch, model, settings_of(), Dialogue(), chunk=4, tensor_parallel_size=2)
    indices = itertools.count()
    samples = list(itertools.islice(teacher.samples(indices), 6))
    assert len({sample.index for sample in samples}) == 6
    assert next(indices) == 8
    (engine,) = sys.modules["vllm"].engines
    assert engine.batches[0] == 4
    assert engine.engine_args == {"max_model_len": 12, "max_logprobs": 20, "logprobs_mode": "raw_logprobs", "tensor_parallel_size": 2}
    assert teacher.identity.items() >= {"engine": "vllm", "model": "owner/teacher", "script": {"dialogue": 2}, "seed": 5}.items()


def test_offline_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"engine: vLLM cannot be imported \(.*\); run pip install 'lightning-qat\[vllm\]'"):
        OfflineVLLM("owner/teacher", settings_of(), script_of(settings_of()), VOCABULARY)


def test_offline_refusals(model, monkeypatch):
    for settings, more, message in (
        (settings_of(logits="full"), {}, "logits: got 'full'"),
        (settings_of(), {"chunk": 0}, "chunk: got 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            offline(monkeypatch, model, settings, **more)
