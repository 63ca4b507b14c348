"""A local stand-in for vLLM: its completions protocol over HTTP, and a fake `vllm` module, both around a model in memory.

Sampling is written down once more here, on purpose: temperature, top-k, top-p, then a draw from a generator of the request's own seed.
"""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

SAMPLING = {  # the sampling parameters of vLLM that are implemented here; any other is an error
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "prompt_logprobs", "stop_token_ids", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
}  # fmt: skip
FORM = {
    "model", "prompt", "add_special_tokens", "include_stop_str_in_output", "skip_special_tokens",
    "return_token_ids", "return_tokens_as_token_ids",
}  # fmt: skip


@torch.inference_mode()
def complete(model, prompt, params, eos=None):
    """(tokens, finish_reason, stop_reason, log-probabilities at each token, the same at each token of the prompt) as vLLM has them."""
    assert params["min_p"] == params["presence_penalty"] == params["frequency_penalty"] == 0
    assert params["repetition_penalty"] == 1
    assert prompt
    generator = torch.Generator().manual_seed(params["seed"])
    tokens, rows, reason, stop = list(prompt), [], "length", None
    for _ in range(params["max_tokens"]):
        logits = logits_of(model, tokens)[-1]
        token = draw(logits, params, generator)
        rows.append(top_of(logits, token, params["logprobs"]))
        tokens.append(token)
        if token in params["stop_token_ids"]:
            reason, stop = "stop", token
            break
        if token == eos and not params["ignore_eos"]:
            reason = "stop"
            break
    prompt_rows = None
    if params.get("prompt_logprobs") is not None:
        logits = logits_of(model, prompt)
        prompt_rows = [None, *(top_of(logits[i - 1], prompt[i], params["prompt_logprobs"]) for i in range(1, len(prompt)))]
    return tokens[len(prompt) :], reason, stop, rows, prompt_rows


def logits_of(model, tokens):
    return model(input_ids=torch.tensor([tokens]), past_key_values=None, use_cache=False).logits[0].double()


def draw(logits, params, generator):
    if params["temperature"] == 0:
        return int(logits.argmax())
    probabilities = (logits / params["temperature"]).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    if params["top_k"] > 0:
        ordered[params["top_k"] :] = 0
    ordered[ordered.cumsum(-1) - ordered >= params["top_p"] * ordered.sum()] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


def top_of(logits, token, width):
    """The chosen token, then the most probable ones: one more than asked for if it is none of them."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(width)
    return {token: float(logprobs[token])} | dict(zip(ids.tolist(), values.tolist(), strict=True))


class CompletionServer:
    """vLLM's HTTP protocol on a free port of this machine.

    Attributes:
        faults: What goes wrong with the next completions, one entry each: a status, "garbage", "reset" or "hang".
        edits: Functions that change an answer before it is sent.
        requests: Bodies received, in order.
        hanging: Set when a request hangs.
        gate: What it waits for.
        patient: Whether no request waited in vain.
    """

    def __init__(self, model, name="teacher", limit=64, eos=None, key=None, max_logprobs=20):
        self.model, self.eos, self.key, self.max_logprobs = model, eos, key, max_logprobs
        self.cards = [{"id": name, "max_model_len": limit}]
        self.faults, self.edits, self.requests, self.lock = [], [], [], threading.Lock()
        self.hanging, self.gate, self.patient = threading.Event(), threading.Event(), True
        handler = type("Handler", (_Handler,), {"served": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()

    def completion(self, body):
        """(status, answer)."""
        with self.lock:
            self.requests.append(body)
        if unknown := set(body) - SAMPLING - FORM:
            return 400, error(f"unknown fields {sorted(unknown)}")
        if max(body["logprobs"], body.get("prompt_logprobs", 0)) > self.max_logprobs:
            return 400, error(f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: {self.max_logprobs}")
        tokens, reason, stop, rows, prompt_rows = complete(self.model, body["prompt"], body, self.eos)
        logprobs = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [max(row[token], -9999.0) for token, row in zip(tokens, rows, strict=True)],
            "top_logprobs": [{f"token_id:{token}": max(value, -9999.0) for token, value in row.items()} for row in rows],
        }
        choice = {"index": 0, "text": "?" * len(tokens), "token_ids": tokens, "finish_reason": reason, "stop_reason": stop}
        choice |= {"prompt_token_ids": body["prompt"], "logprobs": logprobs, "prompt_logprobs": None}
        if prompt_rows:
            choice["prompt_logprobs"] = [row and {str(t): {"logprob": v, "rank": 1} for t, v in row.items()} for row in prompt_rows]
        for edit in self.edits:
            edit(choice)
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice]}


def error(message):
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


class _Handler(BaseHTTPRequestHandler):
    served: CompletionServer

    def do_GET(self):  # the name is http.server's
        if self.path == "/v1/models" and self.allowed():
            self.answer(200, {"object": "list", "data": self.served.cards})
        elif self.path != "/v1/models":
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.served.lock:
            fault = self.served.faults.pop(0) if self.served.faults else None
        if fault == "reset":
            self.connection.close()
        elif fault == "garbage":
            self.answer(200, b"<html>I am a proxy</html>")
        elif isinstance(fault, int):
            self.answer(fault, error("too much to do"))
        elif self.allowed():
            if fault == "hang":
                self.served.hanging.set()
                self.served.patient &= self.served.gate.wait(10)
            self.answer(*self.served.completion(body))

    def allowed(self):
        if self.served.key is None or self.headers["Authorization"] == f"Bearer {self.served.key}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False

    def answer(self, status, data):
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass

    def handle(self):
        with suppress(OSError):  # the client may be gone
            super().handle()


def fake_vllm(model):
    """A module with the part of vLLM's offline interface that is used; its `engines` are the LLMs made."""
    module = SimpleNamespace(engines=[])

    class SamplingParams:
        def __init__(self, *, detokenize=True, **params):
            assert set(params) <= SAMPLING, sorted(set(params) - SAMPLING)
            self.params = params

    class LLM:
        def __init__(self, model, **engine_args):
            self.model, self.engine_args, self.batches = model, engine_args, []
            module.engines.append(self)

        def generate(self, prompts, sampling_params, *, use_tqdm=True):
            self.batches.append(len(prompts))
            return [self._output(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]

        def _output(self, prompt, params):
            tokens, reason, stop, rows, prompt_rows = complete(model, prompt["prompt_token_ids"], params.params)
            answer = SimpleNamespace(token_ids=tuple(tokens), logprobs=_wrapped(rows), finish_reason=reason, stop_reason=stop)
            return SimpleNamespace(outputs=[answer], prompt_logprobs=_wrapped(prompt_rows))

    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


def _wrapped(rows):
    """Log-probabilities as objects."""
    return rows and [row and {token: SimpleNamespace(logprob=value) for token, value in row.items()} for row in rows]
