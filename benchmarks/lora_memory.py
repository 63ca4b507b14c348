"""Peak memory of a training step: LoRA-QAT against full QAT, each in a process of its own, counted as in :mod:`benchmarks.memory`.

python -m benchmarks.lora_memory
"""

import json
import sys

import torch
from torch import nn

from benchmarks.memory import measure, run_module
from benchmarks.models import BY_NAME, Variant, Workload, llama
from lightning_qat import LoraSettings, insert_quantizers
from lightning_qat.distillation.lora import add_lora

SCHEME, RANK = "w4a8kv4", 16
FULL, LORA = SCHEME, f"{SCHEME} LoRA"
SIZES = llama(512, 1408, 7, 8)
WORKLOADS = [Workload(f"25 M Llama, {rows} x 256 tokens", rows, 256, llama=SIZES) for rows in (1, 8)]


def insert(model: nn.Module) -> None:
    add_lora(model, LoraSettings(rank=RANK))
    insert_quantizers(model, SCHEME)


def in_fresh_process(workload: Workload, name: str, device: str) -> dict[str, int]:
    return run_module("benchmarks.lora_memory", {"workload": vars(workload), "name": name, "device": device})


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device {device}, torch {torch.__version__}; fp32, fused AdamW; rank {RANK}")
    print("| step | training | before the step | peak | ratio |\n|---|---|---:|---:|---:|")
    for workload in WORKLOADS:
        full = in_fresh_process(workload, FULL, device)
        for name, found in ((FULL, full), (LORA, in_fresh_process(workload, LORA, device))):
            sizes = " | ".join(f"{found[when] / 2**20:.1f} MiB" for when in ("before", "peak"))
            print(f"| {workload.name} | {name} | {sizes} | {found['peak'] / full['peak']:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asked = json.loads(sys.argv[1])
        BY_NAME[LORA] = Variant(LORA, f"{SCHEME} on top of LoRA adapters of rank {RANK}", insert)
        print(json.dumps(measure(Workload(**asked["workload"]), "fp32", asked["name"], asked["device"])))
    else:
        main()
