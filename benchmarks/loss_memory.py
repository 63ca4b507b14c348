"""Peak memory of the loss, from final hidden states through the heads of student and teacher, and of a whole distillation step.

python -m benchmarks.loss_memory                # CPU, some minutes; writes docs/results/loss-memory-cpu.{json,md}
python -m benchmarks.loss_memory --device cuda
python -m benchmarks.loss_memory --quick --out runs/bench

Each form runs in a process of its own, counted as in :mod:`benchmarks.memory`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report
from benchmarks.memory import peak_of, run_module
from lightning_qat import DistillationModule, insert_quantizers
from lightning_qat.distillation.batches import read_batch
from lightning_qat.losses import SoftCrossEntropy, chunked_sums, row_sums, soft_cross_entropy
from lightning_qat.losses.base import OTHER_ROW_ELEMENTS, ROW_ELEMENTS

HIDDEN = 256
CHUNKS = (1024, 256)
PLAIN, WHOLE = "plain", "all logits at once"
FORMS = {
    PLAIN: "logits of student and teacher of all tokens, their log-softmax kept in fp32 by autograd (`soft_cross_entropy`)",
    WHOLE: "logits of all tokens, fp32 for a few rows at a time, one gradient kept (`loss_chunk=None`)",
    **{f"chunks of {chunk}": f"logits of {chunk} tokens at a time (`loss_chunk={chunk}`)" for chunk in CHUNKS},
}
# (vocabulary, batch, tokens, forms). The plain form at 128k x 4 x 2048 tokens would take more than 20 GB, so it runs on a quarter of them.
CASES = [
    (32_000, 4, 2048, list(FORMS)),
    (128_000, 4, 512, list(FORMS)),
    (128_000, 4, 2048, [WHOLE, *list(FORMS)[2:]]),
]
QUICK = [(1000, 2, 64, list(FORMS))]
STEP = {"hidden_size": HIDDEN, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def measure(vocabulary: int, tokens: int, form: str, device: str) -> dict[str, int]:
    """Bytes alive before the loss, and at the peak of its forward and backward pass."""
    torch.manual_seed(0)
    with torch.device(device):
        student, teacher = (nn.Linear(HIDDEN, vocabulary, bias=False) for _ in range(2))
        own, other = torch.randn(tokens, HIDDEN, requires_grad=True), torch.randn(tokens, HIDDEN)
    teacher.requires_grad_(False)

    def step(rows: int) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(form)(student, teacher, own[:rows], other[:rows])
        loss.backward()
        own.grad = student.weight.grad = None

    step(16)  # what libraries allocate once
    return peak_of(lambda: step(tokens), device)


class Plain(nn.Module):
    """The plain form as a loss of the user's own, which is called with all logits."""

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher, mask)


def measure_step(vocabulary: int, batch: int, length: int, form: str, device: str) -> dict[str, int]:
    """The same for a whole distillation step: w4a8kv4, AdamW, activation checkpointing, teacher in memory."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, **STEP))
    chunk = int(form.split()[-1]) if form.startswith("chunks") else None
    module = DistillationModule(teacher, loss=Plain() if form == PLAIN else None, loss_chunk=chunk, gradient_checkpointing=True).to(device)
    insert_quantizers(module.student, "w4a8kv4")
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-4)

    def step(rows: int, tokens: int) -> None:
        ids = torch.randint(vocabulary, (rows, tokens), device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = module.objective(module.student, module.teacher, read_batch({"input_ids": ids}))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1, 16)  # what libraries and the optimizer allocate once
    return peak_of(lambda: step(batch, length), device)


def loss_of(form: str) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """The mean over tokens, from heads and hidden states of student and teacher."""

    def plain(student: nn.Module, teacher: nn.Module, own: Tensor, other: Tensor) -> Tensor:
        counts = torch.ones(1, len(own), dtype=torch.bool, device=own.device)
        return soft_cross_entropy(student(own)[None], teacher(other)[None], counts)

    def whole(student: nn.Module, teacher: nn.Module, own: Tensor, other: Tensor) -> Tensor:
        logits = teacher(other)
        return row_sums([SoftCrossEntropy()], student, lambda rows: logits[rows])(slice(None), own)[0] / len(own)

    def chunked(student: nn.Module, teacher: nn.Module, own: Tensor, other: Tensor) -> Tensor:
        function = row_sums([SoftCrossEntropy()], student, lambda rows: teacher(other[rows]))
        return chunked_sums(function, own, list(student.parameters()), int(form.split()[-1]))[0] / len(own)

    return {PLAIN: plain, WHOLE: whole}.get(form, chunked)


def bound(vocabulary: int, tokens: int, form: str, device: str) -> int | None:
    """The bytes that lightning_qat/losses/chunked.py promises, with two bytes per logit."""
    if not form.startswith("chunks"):
        return None
    chunk, copies = int(form.split()[-1]), 12 * 4 * ROW_ELEMENTS.get(device, OTHER_ROW_ELEMENTS)
    return 3 * 2 * chunk * vocabulary + (8 + 2 * 2) * vocabulary * HIDDEN + 12 * tokens * HIDDEN + copies


def rows(cases: list[tuple[int, int, int, list[str]]], device: str, whole_step: bool = False) -> Iterator[dict[str, Any]]:
    for vocabulary, batch, length, forms in cases:
        for form in forms:
            case = {"vocabulary": vocabulary, "form": form, "device": device}
            row = {**case, "batch": batch, "length": length, "tokens": batch * length}
            try:
                size = {"batch": batch, "length": length} if whole_step else {"tokens": batch * length}
                found = run_module("benchmarks.loss_memory", case | size)
                row |= {"before": found["before"], "rise": found["peak"] - found["before"], "peak": found["peak"]}
                row["bound"] = None if whole_step else bound(vocabulary, batch * length, form, device)
                print(f"{vocabulary} x {batch} x {length}, {form}: {row['rise'] / 2**20:,.0f} MiB", flush=True)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row["reason"] = str(error)
                print(f"{vocabulary} x {batch} x {length}, {form}: not measured, {error}", flush=True)
            yield row


def page(result: dict[str, Any]) -> Iterator[str]:
    device, versions = result["device"], result["versions"]
    yield "# Memory of the loss\n"
    yield f"```bash\n{result['command']}\n```\n"
    yield f"Run on {result['date']}: {device.get('gpu', device['cpu'])}, {device['cpu_threads']} CPU threads, torch {versions['torch']}.\n"
    yield (
        f"Soft cross-entropy of a student and a teacher, from final hidden states of {HIDDEN} features in fp32 through heads with fp32 "
        "weights under bf16 autocast, forward and backward. What is alive at the peak beside hidden states and heads; each form in a "
        "process of its own. The bound is that of `lightning_qat/losses/chunked.py`.\n"
    )
    yield "| vocabulary | tokens | form | peak MiB | bound MiB | one fp32 copy of all logits, MiB |\n|---:|---:|---|---:|---:|---:|"
    for row in result["rows"]:
        peak = f"**{row['rise'] / 2**20:,.0f}**" if "rise" in row else f"not measured: {row['reason']}"
        limit = f"{row['bound'] / 2**20:,.0f}" if row.get("bound") else "-"
        copy = f"{4 * row['tokens'] * row['vocabulary'] / 2**20:,.0f}"
        yield f"| {row['vocabulary']:,} | {row['batch']} x {row['length']} | {row['form']} | {peak} | {limit} | {copy} |"
    yield ""
    yield from (f"- {form}: {meaning}" for form, meaning in FORMS.items())
    yield "\n## Of a distillation step\n"
    yield (
        "The whole step of `DistillationModule`: a Llama of 4 layers and 256 features as teacher and student (fp32, bf16 autocast), "
        "`w4a8kv4`, "
        "AdamW, activation checkpointing. Everything that is alive at the peak, weights and optimizer among it.\n"
    )
    yield "| vocabulary | tokens | form | before the step, MiB | peak MiB |\n|---:|---:|---|---:|---:|"
    for row in result["steps"]:
        peak = f"{row['before'] / 2**20:,.0f} | **{row['peak'] / 2**20:,.0f}**" if "peak" in row else f"not measured: {row['reason']} |"
        yield f"| {row['vocabulary']:,} | {row['batch']} x {row['length']} | {row['form']} | {peak} |"
    yield "\nThe plain form was not run at 128,000 x 4 x 2048 tokens: it would take four times what it takes at 4 x 512."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_memory", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test at a size that means nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    command = f"python -m benchmarks.loss_memory --device {args.device}" + " --quick" * args.quick
    result = report.head(args.device, command) | {"hidden": HIDDEN, "mode": "bf16-mixed"}
    result["rows"] = list(rows(QUICK if args.quick else CASES, args.device))
    result["steps"] = list(rows(QUICK if args.quick else [(*case, forms[:-1]) for *case, forms in CASES], args.device, whole_step=True))
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"loss-memory-{'gpu' if args.device == 'cuda' else 'cpu'}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        asked = json.loads(sys.argv[1])
        print(json.dumps(measure(**asked) if "tokens" in asked else measure_step(**asked)))
    else:
        main()
