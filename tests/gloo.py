"""Several real processes of one run, over gloo: forked, so that they need not import everything first.

    losses = run_ranks(train, folder, world=2)       # what train(folder) returned on rank 0, rank 1

Each process sees what `torchrun` sets, so `pl.Trainer(strategy="ddp" | ModelParallelStrategy(...), devices=2)` starts none of its own.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def run_ranks(job: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 120.0) -> list[Any]:
    """Run `job(*args)` in so many processes at once.

    Args:
        job: A function; it reads its rank from the trainer, or from the environment (RANK).
        args: Its arguments.
        world: How many processes; with 1, the job runs in one forked process without a group.
        timeout: Seconds after which the processes are killed.

    Returns:
        What the job returned in each process; it is pickled.

    Raises:
        AssertionError: A process failed or hangs; with its traceback.
    """
    context, port = multiprocessing.get_context("fork"), _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [context.Process(target=_work, args=(job, args, rank, world, port, pipes[rank][1])) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        return [_result(rank, pipe, time.monotonic() + timeout) for rank, (pipe, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _result(rank: int, pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise AssertionError(f"rank {rank} did not answer in time")
    done, content = pickle.loads(pipe.recv_bytes())
    assert done, f"rank {rank} failed:\n{content}"
    return content


def _work(job: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests"}
    try:
        pipe.send_bytes(pickle.dumps((True, job(*args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
    os._exit(0)  # no exit handlers of the parent, which this process inherited
