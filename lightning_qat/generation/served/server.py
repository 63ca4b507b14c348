"""A teacher behind a server: vLLM's OpenAI-compatible completions, token ids in and token ids out.

A server promises the distribution, not the bytes: what else is in a batch changes how matrix products round, so that the same seed may give
other samples another time. ``docs/served-teachers.md`` says how to start one.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.scripts import Script
from lightning_qat.generation.served.completions import Completion, Request, advance, check_settings, with_stop, writing
from lightning_qat.generation.served.transport import Server, brief
from lightning_qat.generation.settings import GenerationSettings

_TOKEN_ID = "token_id:"  # how vLLM writes a token that is asked for by its id


class ServedTeacher:
    """Samples of a teacher that a vLLM server runs (a :class:`~lightning_qat.generation.sample.SampleSource`).

    Args:
        url: Of the server, for example ``http://localhost:8000``.
        settings: How samples are written; `rows` plays no part, the server batches as it likes.
        script: What samples start with and how they go on.
        vocab_size: Number of the teacher's token ids.
        model: Name under which the server knows the teacher; None for the only one it has.
        concurrency: Samples under way at once.
        timeout: Seconds to wait for one answer.
        retries: How often a request is repeated when the connection fails or the server is overloaded (status 429 or 5xx).
        api_key: Name of the environment variable that holds the server's key; None for none.

    Raises:
        ValueError: The server cannot be reached, does not have the teacher, or cannot write samples with these settings.
    """

    def __init__(
        self,
        url: str,
        settings: GenerationSettings,
        script: Script,
        vocab_size: int,
        *,
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        api_key: str | None = None,
    ) -> None:
        for field, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"{field}: got {value}, expected at least {least}")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, expected seconds, more than 0")
        if api_key is not None and not os.environ.get(api_key):
            raise ValueError(f"api_key: got {api_key!r}, expected an environment variable that is set; None for a server without keys")
        check_settings(settings, vocab_size)
        self.settings, self.script, self.vocab_size, self.concurrency = settings, script, vocab_size, concurrency
        key = None if api_key is None else os.environ[api_key]
        self._connect: dict[str, Any] = {"url": url, "timeout": timeout, "retries": retries, "key": key}
        self.model = self._find_model(model)
        self.identity: dict[str, Any] = {
            "engine": "served",
            "model": self.model,
            "vocab_size": vocab_size,
            "script": script.identity,
            **settings.to_dict(),
        }

    def samples(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The samples of these numbers, of which there may be no end, in the order in which they are finished.

        Raises:
            ValueError: The server fails, or answers something else than was asked for.
        """
        waiting, server = iter(indices), Server(**self._connect)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="served-teacher")
        try:
            running = {pool.submit(self._sample, server, index) for index in islice(waiting, self.concurrency)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(self._sample, server, index) for index in islice(waiting, len(done))}
                for future in done:
                    yield future.result()
        finally:  # at the end, and also when the caller stops early, is interrupted, or a sample failed
            server.close()
            pool.shutdown(cancel_futures=True)

    def _sample(self, server: Server, index: int) -> Sample:
        writer = writing(index, self.script, self.settings, self.vocab_size)
        step = advance(writer)
        while isinstance(step, Request):
            step = advance(writer, self._complete(server, step))
        return step

    def _complete(self, server: Server, request: Request) -> Completion:
        form = {"add_special_tokens": False, "include_stop_str_in_output": True, "skip_special_tokens": False}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"model": self.model, "prompt": request.prompt, **request.sampling, **form, **ids}
        return read_completion(server.call("/v1/completions", body), request)

    def _find_model(self, model: str | None) -> str:
        answer = Server(**self._connect).call("/v1/models")
        try:
            cards = {card["id"]: card for card in answer["data"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"url: got {brief(answer)} from /v1/models, expected a list of models; is this the right server?") from error
        if model is None and len(cards) != 1:
            raise ValueError(f"model: got None, but the server has {sorted(cards)}; name one of them")
        name = next(iter(cards)) if model is None else model
        if name not in cards:
            raise ValueError(f"model: got {name!r}, the server has {sorted(cards)}; name one of them, or serve {name!r}")
        length, limit = self.settings.max_length, cards[name].get("max_model_len")
        if isinstance(limit, int) and length > limit:
            raise ValueError(f"max_length: got {length}, the server has {limit} positions; start it with --max-model-len {length}")
        return name


def read_completion(answer: Any, request: Request) -> Completion:
    """What a server answered.

    Raises:
        ValueError: It is no completion, or it lacks token ids or log-probabilities.
    """
    try:
        choice = answer["choices"][0]
        logprobs = choice.get("logprobs") or {}
        tokens, chosen = choice.get("token_ids"), logprobs.get("token_logprobs")
        if tokens is None:
            tokens = [_token_id(token) for token in logprobs.get("tokens", [""])]
        wanted = request.sampling["logprobs"] > 0
        top = [{_token_id(token): value for token, value in row.items()} for row in logprobs.get("top_logprobs") or [] if wanted]
        prompt_top = [row and {int(token): at["logprob"] for token, at in row.items()} for row in choice.get("prompt_logprobs") or []]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"url: got {brief(answer)} from /v1/completions, expected a completion as vLLM writes it ({error!r})") from error
    if chosen is None:
        raise ValueError("url: the server returned no log-probabilities, expected them with each token; serve the teacher with vLLM")
    if choice.get("prompt_token_ids") not in (None, request.prompt):
        raise ValueError("url: the server changed the prompt, expected the token ids as they were sent; does it add a BOS token or cut?")
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    return Completion(with_stop(tokens, reason, stop, request), chosen, top, prompt_top, f"finish_reason={reason!r}, stop_reason={stop!r}")


def _token_id(token: str) -> int:
    number = token.removeprefix(_TOKEN_ID)
    if number == token or not number.isdecimal():
        raise ValueError(
            "url: the server returned text without token ids, expected `token_ids` or 'token_id:N' as vLLM 0.10.2 and newer return them; "
            "text does not tokenize back to the same ids, so serve the teacher with `vllm serve`"
        )
    return int(number)
