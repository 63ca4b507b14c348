"""Every part of the benchmark, and what it is run on.

python -m benchmarks                           # CPU, about 10 minutes on 2 cores; writes docs/results/performance-cpu.{json,md,png}
python -m benchmarks --device cuda             # GPU; docs/results/performance-gpu.*
python -m benchmarks --only op step --rounds 3 --out runs/bench
python -m benchmarks --quick --out runs/bench  # a smoke test: tiny sizes, two rounds, the numbers mean nothing
"""

import argparse
import logging
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, models, op, report, step
from benchmarks.models import BY_NAME, PLAIN, Workload, llama

EAGER, COMPILED, FP32 = "bf16-mixed eager", "bf16-mixed compiled", "fp32 eager"
ALL = list(BY_NAME)
SCHEMES = [PLAIN, "w4a8kv4", "w8a8", "w4g128"]
FOR_LAYER = [*SCHEMES[:2], "torchao 8da4w g128"]
PEERS = ["formula w4a8kv4", "8da4w g128", "torchao 8da4w g128"]


@dataclass(frozen=True)
class Run:
    """One workload in one mode."""

    workload: Workload
    mode: str
    variants: list[str]
    rounds: int = 0


LAYER = Workload("decoder layer", 4, 256, trains=False, llama=llama(1024, 2816, 1, 16, vocab=128))
STEP = Workload("25 M Llama", 8, 256, llama=llama(512, 1408, 7, 8))
GPU_LAYER = Workload("decoder layer", 8, 1024, trains=False, llama=llama(4096, 11008, 1, 32, vocab=128))
GPU_STEPS = [
    Workload("1 B Llama", 8, 1024, llama=llama(2048, 8192, 16, 32, vocab=32000, kv_heads=8)),
    Workload("four layers of a 7 B Llama", 4, 1024, llama=llama(4096, 11008, 4, 32)),
]


def plan(device: str, rounds: int | None) -> dict[str, list[Run]]:
    """What each part runs.

    Compiling a whole model costs a CPU some minutes per variant, so there it is done for one scheme; the others are compiled on one layer.
    """

    def often(by_default: int) -> int:
        return rounds or by_default

    if device == "cuda":
        modes = (EAGER, COMPILED)
        return {
            "layer": [Run(GPU_LAYER, mode, ALL, often(25)) for mode in modes],
            "step": [Run(workload, mode, ALL, often(10)) for workload in GPU_STEPS for mode in modes],
            "memory": [Run(workload, mode, ALL) for workload in GPU_STEPS for mode in modes],
        }
    return {
        "layer": [Run(LAYER, EAGER, ALL, often(9)), Run(LAYER, COMPILED, FOR_LAYER, often(9))],
        "step": [Run(STEP, EAGER, ALL, often(5)), Run(STEP, COMPILED, SCHEMES[:2], often(7)), Run(STEP, FP32, SCHEMES[:2], often(5))],
        "memory": [Run(STEP, EAGER, [PLAIN, "w4a8kv4", "w8a8 int8 forward", PEERS[-1]])],
    }


def smaller(runs: list[Run]) -> list[Run]:
    """The same code paths at sizes that take seconds; only two variants of the step are compiled."""
    tiny = llama(128, 256, 1, 4, vocab=128)
    few = [PLAIN, "w4a8kv4"]
    out = []
    for run in runs:
        if not run.workload.trains and run.mode == COMPILED:
            continue
        variants = [name for name in run.variants if name in few or not run.mode.endswith("compiled")]
        rounds = min(run.rounds, 2)
        out.append(
            Run(
                replace(run.workload, name=f"smoke test of {run.workload.name}", batch=2, tokens=32, llama=tiny), run.mode, variants, rounds
            )
        )
    return out


def _command(args: argparse.Namespace) -> str:
    """What repeats this run; a run with settings of its own never passes for the whole benchmark."""
    options = ["--quick"] * args.quick + ([f"--rounds {args.rounds}"] if args.rounds else [])
    options += [f"--only {' '.join(args.only)}"] if args.only != list(report.PARTS) else []
    options += [f"--modes {' '.join(shlex.quote(mode) for mode in args.modes)}"] if args.modes else []
    if options:
        return " ".join([f"python -m benchmarks --device {args.device}", *options])
    return "make bench-gpu" if args.device == "cuda" else "make bench"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modes", nargs="+", choices=(EAGER, COMPILED, FP32), help="some modes")
    parser.add_argument("--rounds", type=int, help="rounds of every part instead of its own number")
    parser.add_argument("--only", nargs="+", choices=tuple(report.PARTS), default=list(report.PARTS), help="some parts")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds: at least 1")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what torchao tells torch about its enums
    warnings.filterwarnings("ignore", category=FutureWarning)
    models.ready_at_once()
    planned = plan(args.device, args.rounds)
    if args.quick:
        planned = {part: smaller(runs) for part, runs in planned.items()}
        planned["memory"] = [replace(run, variants=run.variants[:2]) for run in planned["memory"][:1]]
    if args.modes:
        planned = {part: [run for run in runs if run.mode in args.modes] for part, runs in planned.items()}
    result: dict[str, Any] = report.head(args.device, _command(args))
    result["workloads"] = {run.workload.name: run.workload.meaning for runs in planned.values() for run in runs}
    result["part_seconds"], result["skipped"] = {}, []
    for part in args.only:
        start = time.perf_counter()
        result[part] = []
        if part == "op":
            result["op"] = op.time_op(args.rounds or (2 if args.quick else 7), args.device, args.quick)
        for run in planned.get(part, []):
            if part == "memory":
                rows, skipped = memory.measure_all(run.workload, run.mode, run.variants, args.device)
            else:
                rows, skipped = step.time_steps(run.workload, run.mode, run.variants, run.rounds, args.device)
            result[part] += rows
            result["skipped"] += skipped
        result["part_seconds"][part] = round(time.perf_counter() - start, 1)
        report.write(result, args.out, f"performance-{'gpu' if args.device == 'cuda' else 'cpu'}")
    print(result["part_seconds"])


if __name__ == "__main__":
    main()
