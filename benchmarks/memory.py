"""Peak memory of one training step, each variant in a process of its own.

CPU: what is alive before the step is counted tensor by tensor; the rise during the step is the high-water mark of the resident set, which
``/proc/self/clear_refs`` resets right before it. So neither imports nor compilation, which swell a process by hundreds of megabytes, take
part. The process runs with a fixed mmap threshold, so that freed tensors leave the resident set at once and the mark is exact.
CUDA: the allocator's own high-water mark.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import BY_NAME, PLAIN, Workload, make_optimizer, make_step, ready_at_once, variant_of

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TIMEOUT = 600


def status_bytes(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _alive() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(workload: Workload, mode: str, name: str, device: str) -> dict[str, int]:
    """Bytes alive before a step, and at its peak."""
    ready_at_once()
    plain, inputs = workload.build(device), workload.inputs(device)
    model = plain
    if name != PLAIN:
        model = variant_of(plain, BY_NAME[name])
        del plain
    step = make_step(workload, model, inputs, make_optimizer(model), mode, device)
    step()  # compiles what there is to compile and makes the optimizer's state
    return peak_of(step, device)


def peak_of(step: Callable[[], object], device: str) -> dict[str, int]:
    """Bytes alive before a call, and at its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    before = _alive()
    gc.disable()
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    resident = status_bytes("VmRSS")
    step()
    return {"before": before, "peak": before + status_bytes("VmHWM") - resident}


def in_fresh_process(workload: Workload, mode: str, name: str, device: str) -> dict[str, int]:
    """:func:`measure` in a process of its own."""
    return run_module("benchmarks.memory", {"workload": vars(workload), "mode": mode, "name": name, "device": device})


def run_module(module: str, request: dict[str, Any]) -> dict[str, int]:
    """What a module prints, as JSON, when it is run with a request as its argument; freed tensors leave its resident set at once."""
    result = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        env={**os.environ, **EXACT},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["the process died without a word"])[-1][:200])
    bytes_of: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return bytes_of


def measure_all(workload: Workload, mode: str, names: list[str], device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows, each with its ratio to the unquantized step, and what was skipped."""
    print(f"memory: {workload.name}, {mode}", flush=True)
    rows: list[dict[str, Any]] = []
    skipped = []
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return rows, [{"workload": workload.name, "mode": mode, "variant": "all", "reason": "needs Linux's /proc/self/clear_refs"}]
    for name in names:
        try:
            if reason := BY_NAME[name].missing():
                raise RuntimeError(reason)
            found = in_fresh_process(workload, mode, name, device)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            skipped.append({"workload": workload.name, "mode": mode, "variant": name, "reason": str(error)})
            print(f"  skipped {name}: {error}", flush=True)
            continue
        rows.append({"workload": workload.name, "mode": mode, "variant": name, **found})
        # The unquantized model comes first; without it there is nothing to compare with.
        rows[-1]["ratio"] = round(found["peak"] / rows[0]["peak"], 4) if rows[0]["variant"] == PLAIN else None
        print(
            f"  {name:24s} {found['peak'] / 2**20:9.1f} MiB (before the step {found['before'] / 2**20:.1f})  {rows[-1]['ratio']}",
            flush=True,
        )
    return rows, skipped


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure(Workload(**asked["workload"]), asked["mode"], asked["name"], asked["device"])))
