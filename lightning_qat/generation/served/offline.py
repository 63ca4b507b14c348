"""A teacher run by vLLM in this process, without a server."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.scripts import Script
from lightning_qat.generation.served.completions import Completion, Request, advance, check_settings, with_stop, writing
from lightning_qat.generation.settings import GenerationSettings

_LEAST_LOGPROBS = 20  # vLLM's own default


class OfflineVLLM:
    """Samples of a teacher that vLLM runs in this process (a :class:`~lightning_qat.generation.sample.SampleSource`).

    The same settings and seed may give other samples with another version of vLLM, on another GPU, or in chunks of another size.

    Args:
        model: Folder or hub id of the teacher.
        settings: How samples are written; `rows` plays no part.
        script: What samples start with and how they go on.
        vocab_size: Number of the teacher's token ids.
        chunk: Samples given to vLLM at once; the next ones wait until all of them are finished.
        engine_args: Further arguments of ``vllm.LLM``, for example ``tensor_parallel_size=2``.

    Raises:
        ValueError: vLLM is not installed, or cannot write samples with these settings.
    """

    def __init__(
        self, model: str, settings: GenerationSettings, script: Script, vocab_size: int, *, chunk: int = 1024, **engine_args: Any
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk: got {chunk}, expected at least 1")
        check_settings(settings, vocab_size)
        try:
            import vllm
        except ImportError as error:
            raise ValueError(f"engine: vLLM cannot be imported ({error}); run pip install 'lightning-qat[vllm]', or a server") from error
        self.settings, self.script, self.vocab_size, self.chunk = settings, script, vocab_size, chunk
        self._sampling_params = vllm.SamplingParams
        logprobs = settings.logits if isinstance(settings.logits, int) else 0
        defaults = {"max_model_len": settings.max_length, "max_logprobs": max(_LEAST_LOGPROBS, logprobs), "logprobs_mode": "raw_logprobs"}
        self._llm = vllm.LLM(model=model, **defaults | engine_args)
        self.identity: dict[str, Any] = {
            "engine": "vllm",
            "model": model,
            "vocab_size": vocab_size,
            "script": script.identity,
            **settings.to_dict(),
        }

    def samples(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The samples of these numbers, of which there may be no end, in the order in which they are finished.

        Raises:
            ValueError: vLLM answers something else than was asked for.
        """
        waiting = iter(indices)
        while chunk := list(islice(waiting, self.chunk)):
            writers = [writing(index, self.script, self.settings, self.vocab_size) for index in chunk]
            steps = [(writer, advance(writer)) for writer in writers]
            while steps:
                yield from (step for _, step in steps if isinstance(step, Sample))
                asked = [(writer, step) for writer, step in steps if isinstance(step, Request)]
                answers = self._complete([request for _, request in asked]) if asked else []
                steps = [(writer, advance(writer, answer)) for (writer, _), answer in zip(asked, answers, strict=True)]

    def _complete(self, requests: list[Request]) -> list[Completion]:
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [self._sampling_params(**request.sampling, detokenize=False) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [_read_output(output, request) for output, request in zip(outputs, requests, strict=True)]


def _read_output(output: Any, request: Request) -> Completion:
    """What vLLM answered (``vllm.RequestOutput``)."""
    answer = output.outputs[0]
    written = list(answer.token_ids)
    chosen = [row[token].logprob for token, row in zip(written, answer.logprobs, strict=True)]
    top = [{token: at.logprob for token, at in row.items()} for row in answer.logprobs]
    prompt_top = [row and {token: at.logprob for token, at in row.items()} for row in output.prompt_logprobs or []]
    reason, stop = answer.finish_reason, answer.stop_reason
    return Completion(with_stop(written, reason, stop, request), chosen, top, prompt_top, f"finish_reason={reason!r}, stop_reason={stop!r}")
