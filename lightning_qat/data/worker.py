"""A stream's teacher in a process of its own, so that it writes while the student trains."""

import multiprocessing
import os
import pickle
import queue
import signal
import traceback
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from lightning_qat.data.order import StreamPlan
from lightning_qat.data.stream import GenerationHere, Request, SampleStream
from lightning_qat.data.teachers import Recipe
from lightning_qat.generation.sample import Sample

_READY, _FAILED = 0, -1  # what a message is; samples carry the count of their request, from 1 on
_PATIENCE = 1.0  # seconds between two looks whether the other process lives


def open_stream(recipe: Recipe, plan: StreamPlan, buffer: int, device: torch.device, worker: str, private: bool) -> SampleStream:
    """A stream of samples.

    Args:
        recipe: Builds the teacher.
        plan: Which samples this rank trains on.
        buffer: As in :func:`~lightning_qat.data.stream.in_order`.
        device: Where the teacher computes.
        worker: ``inline`` or ``process``.
        private: Copy a teacher in memory.

    Raises:
        ValueError: The teacher cannot be built, or `buffer` is too small.
    """
    if worker == "process":
        return SampleStream(plan, GenerationInProcess(recipe, device, plan, buffer))
    return SampleStream(plan, GenerationHere(recipe.build(device, private), plan, buffer))


class GenerationInProcess:
    """A process that builds the teacher and writes samples into a queue (a :class:`~lightning_qat.data.stream.Generation`).

    The queue holds `buffer` finished samples, beside those that the process itself keeps in order. The process ends when it is closed,
    when nobody holds this object any more, and when the process that started it has died.

    Args:
        recipe: Builds the teacher.
        device: Where it computes.
        plan: Which samples this rank trains on.
        buffer: As in :func:`~lightning_qat.data.stream.in_order`.

    Raises:
        ValueError: The teacher cannot be sent there, or cannot be built.
    """

    def __init__(self, recipe: Recipe, device: torch.device, plan: StreamPlan, buffer: int) -> None:
        job = {"recipe": recipe, "device": device, "plan": plan, "buffer": buffer}
        # Both change how sums are rounded, and so what is generated.
        numerics = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
        try:
            content = pickle.dumps({**job, **numerics})  # copies: the default would move the teacher's weights into shared memory
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"stream_worker: got 'process', but the teacher cannot be sent to another process ({error}); name it, or use 'inline'"
            ) from error
        context = multiprocessing.get_context("spawn")
        self._requests, there = context.Pipe()
        self._results = context.Queue(buffer)
        self._process = context.Process(target=_work, args=(content, there, self._results), name="lightning-qat-teacher", daemon=True)
        self._process.start()
        there.close()
        self.close = weakref.finalize(self, _stop, self._process, self._requests, self._results)
        self._request = _READY
        self.vocab_size: int = self._receive()

    def samples(self, request: Request) -> Iterator[Sample]:
        """See :class:`~lightning_qat.data.stream.Generation`."""
        self._request += 1
        self._requests.send(request)
        while True:
            yield self._receive()

    def _receive(self) -> Any:
        """The next message that belongs to the present request."""
        while True:
            try:
                request, content = self._results.get(timeout=_PATIENCE)
            except queue.Empty:
                if not self._process.is_alive() and self._results.empty():
                    self.close()
                    raise RuntimeError(
                        f"the process that generates has ended with exit code {self._process.exitcode}; was it out of memory? "
                        "A script that starts processes must guard its own start with `if __name__ == '__main__'`"
                    ) from None
                continue
            if request == _FAILED:
                self.close()
                raise content
            if request == self._request:
                return pickle.loads(content)


def _stop(process: Any, requests: Connection, results: Any) -> None:
    requests.close()
    process.terminate()
    process.join()
    results.close()


def _work(content: bytes, requests: Connection, results: Any) -> None:
    """The process: builds the teacher and answers requests until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the trainer ends this one
    try:
        job = pickle.loads(content)
        torch.set_num_threads(job["threads"])
        torch.set_float32_matmul_precision(job["precision"])
        generation = GenerationHere(job["recipe"].build(job["device"]), job["plan"], job["buffer"])
        _send(results, _READY, generation.vocab_size)
        count = _READY
        while True:
            request, count = requests.recv(), count + 1
            for sample in generation.samples(request):
                _send(results, count, sample)
                if requests.poll():
                    break
    except EOFError:  # the trainer has closed its end, or is gone
        os._exit(0)
    except ValueError as error:
        results.put((_FAILED, ValueError(str(error))))
    except BaseException:
        results.put((_FAILED, RuntimeError(f"the process that generates failed:\n{traceback.format_exc()}")))


def _send(results: Any, request: int, message: Any) -> None:
    """Put a message into the queue when there is room, as bytes: tensors would each take a file descriptor of shared memory."""
    content = pickle.dumps(message)
    while True:
        try:
            return results.put((request, content), timeout=_PATIENCE)
        except queue.Full:
            if not multiprocessing.parent_process().is_alive():  # type: ignore[union-attr]
                os._exit(1)
