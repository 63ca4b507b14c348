"""Layers and whole training steps of every variant, in turn, as ratios to the unquantized one."""

import gc
from typing import Any

import torch

from benchmarks.models import BY_NAME, PLAIN, Workload, make_optimizer, make_step, variant_of
from benchmarks.timing import Calls, Spread, interleave, ratios, warm_up

Result = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def time_steps(workload: Workload, mode: str, names: list[str], rounds: int, device: str) -> Result:
    """Rows of one workload in one mode, and what was skipped."""
    print(f"{workload.name}, {mode}", flush=True)
    plain, inputs = workload.build(device), workload.inputs(device)
    optimizer = make_optimizer(plain)
    calls: Calls = {}
    skipped: dict[str, str] = {}
    for name in names:
        if reason := BY_NAME[name].missing():
            skipped[name] = reason
            print(f"  skipped {name}: {reason}", flush=True)
            continue
        try:
            model = plain if name == PLAIN else variant_of(plain, BY_NAME[name])
        except Exception as error:  # a peer of another version
            skipped[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"  skipped {name}: {skipped[name]}", flush=True)
            continue
        calls[name] = make_step(workload, model, inputs, optimizer, mode, device)
    skipped |= warm_up(calls, 2, device)
    seconds = interleave(calls, rounds, device)
    rows = []
    for name, ratio in ratios(seconds, PLAIN).items():
        time = Spread.of(seconds[name])
        rows.append(
            {
                "workload": workload.name,
                "mode": mode,
                "variant": name,
                "ratio": ratio.to_dict(),
                "seconds": time.to_dict(),
                "tokens_per_second": round(workload.batch * workload.tokens / time.median, 1),
                "rounds": rounds,
            }
        )
        print(f"  {name:24s} {ratio.median:6.3f}  [{ratio.min:.3f} .. {ratio.max:.3f}]  {time.median:.3f} s", flush=True)
    del calls, plain, optimizer
    torch.compiler.reset()  # graphs hold on to models
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows, [{"workload": workload.name, "mode": mode, "variant": name, "reason": reason} for name, reason in skipped.items()]
