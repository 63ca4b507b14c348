"""Wall-clock time of several variants of the same work, as ratios that a noisy machine can be trusted with.

Variants are timed in turn (A B C A B C ...), and each is divided by the first one's time *of the same round*: what slows the machine for
seconds slows both. What is reported is the median of those ratios with its spread, never a ratio of two separate runs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Spread:
    """Median, extremes and quartiles."""

    median: float
    min: float
    q1: float
    q3: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), min(values), q1, q3, max(values))

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in vars(self).items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call, over `repeats` calls in a row; CUDA is drained on both sides."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(calls: Calls, rounds: int, device: str, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round; the order is the same in each, so each call always follows the same neighbour."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, repeats))
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """Per-round ratios to `base`."""
    return {name: Spread.of([own / plain for own, plain in zip(times, seconds[base], strict=True)]) for name, times in seconds.items()}


def warm_up(calls: Calls, times: int, device: str) -> dict[str, str]:
    """Run every call before the clock starts; those that fail are taken out of `calls` and returned with the reason.

    The first call compiles what there is to compile, the second settles what the first one changed (optimizer state exists now, allocators
    have seen every size).
    """
    failed = {}
    for name, call in list(calls.items()):
        start = time.perf_counter()
        try:
            for _ in range(times):
                call()
            synchronize(device)
        except Exception as error:  # one variant that a version of torch cannot run must not cost the others
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
            del calls[name]
            print(f"  skipped {name}: {failed[name]}", flush=True)
        else:
            print(f"  warmed up {name} in {time.perf_counter() - start:.1f} s", flush=True)
    return failed
