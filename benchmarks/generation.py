"""Tokens per second of the generation engine next to the reference loop and to plain batched `generate`, same model, same run.

python -m benchmarks.generation                # CPU, about 10 minutes on 2 idle cores; writes docs/results/generation-cpu.{json,md}
python -m benchmarks.generation --device cuda
python -m benchmarks.generation --quick --out runs/bench

The reference loop is LLM-QAT's: one sample at a time in fp32, `generate` greedily for a few tokens, then `generate` with sampling. Plain
batched is `generate` with sampling from the full softmax on many rows at once. Ours has the paper's rule, 256 rows.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import report
from benchmarks.models import llama
from benchmarks.timing import Spread, seconds_of
from lightning_qat.generation import GenerationSettings, TeacherSource, cast_parameters, load_causal_lm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = "reference loop, fp32"


@dataclass(frozen=True)
class Teacher:
    """What writes, and how much."""

    name: str
    max_length: int
    batches: tuple[int, ...] = (64, 128, 256)
    rows: int = 256
    reference_samples: int = 2
    samples: int = 0  # 0: as many as rows
    end_tokens: tuple[int, ...] = ()
    sizes: dict[str, Any] | None = None

    def build(self, dtype: torch.dtype, device: str) -> Any:
        """The model; without end tokens of its own every sample is as long as it may be, and all sides write the same number of tokens."""
        torch.manual_seed(0)
        model: Any = load_causal_lm("tiny-teacher") if self.sizes is None else LlamaForCausalLM(LlamaConfig(**self.sizes)).eval()
        ends = list(self.end_tokens) or None
        model.config.eos_token_id = model.generation_config.eos_token_id = ends
        model.generation_config.pad_token_id = 0
        return cast_parameters(model, dtype).to(device)


TEACHERS = [
    Teacher("bundled teacher, 2.75 M", 256),
    Teacher("25 M Llama", 192, batches=(64, 128), sizes=llama(512, 1408, 7, 8)),
    # About one token in 100 ends a sample: plain batches wait for their longest row, ours are refilled.
    Teacher("bundled teacher, samples that end early", 256, batches=(64, 256), samples=768, end_tokens=tuple(range(6, 2000, 40))),
]


def plain(model: Any, start: torch.Tensor, max_length: int) -> int:
    """`generate` by the paper's rule; returns the number of tokens written."""
    options: dict[str, Any] = {"pad_token_id": 0, "use_cache": True}
    out = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=4, do_sample=False, **options)
    alive = out[(out[:, 1:] != 0).all(-1)]
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    out = model.generate(alive, attention_mask=torch.ones_like(alive), max_length=max_length, **sampling, **options)
    return int((out != 0).sum()) - len(out)


def variants(teacher: Teacher, device: str) -> dict[str, Callable[[], int]]:
    """Every side as a call that returns the number of tokens it wrote."""
    models = {name: teacher.build(dtype, device) for name, dtype in DTYPES.items()}
    vocabulary = models["fp32"].config.vocab_size
    starts = torch.randint(2000, (4096, 1), generator=torch.Generator().manual_seed(0)) % vocabulary
    starts = torch.where(starts < 4, 5, starts).to(device)
    total = teacher.samples or teacher.rows

    def batched(name: str, batch: int) -> Callable[[], int]:
        return lambda: plain(models[name], starts[:batch], teacher.max_length)

    def ours(name: str, **options: Any) -> Callable[[], int]:
        settings = GenerationSettings(max_length=teacher.max_length, rows=teacher.rows, **options)
        source = TeacherSource(models[name], settings)
        return lambda: sum(len(sample.tokens) - 1 for sample in source.samples(range(total)))

    def reference() -> int:
        return sum(plain(models["fp32"], starts[i : i + 1], teacher.max_length) for i in range(teacher.reference_samples))

    calls: dict[str, Callable[[], int]] = {REFERENCE: reference}
    for name in DTYPES:
        calls |= {f"plain batched {batch}, {name}": batched(name, batch) for batch in teacher.batches if batch <= total}
        calls[f"ours, {name}"] = ours(name)
    calls["ours, bf16, 32 probabilities kept per token"] = ours("bf16", logits=32)
    return calls


def measure(teacher: Teacher, rounds: int, device: str) -> list[dict[str, Any]]:
    """Tokens per second of every side in every round, and ratios within a round."""
    calls = variants(teacher, device)
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                written: list[int] = []
                seconds = seconds_of(lambda call=call, written=written: written.append(call()), device)  # type: ignore[misc]
                speeds[name].append(written[0] / seconds)
                print(f"  {name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    return [
        {
            "teacher": teacher.name,
            "variant": name,
            "tokens_per_second": Spread.of(own).to_dict(),
            "to_reference": statistics.median(a / b for a, b in zip(own, speeds[REFERENCE], strict=True)),
            "to_best_plain": _to_best_plain(name, own, speeds),
        }
        for name, own in speeds.items()
    ]


def _to_best_plain(name: str, own: list[float], speeds: dict[str, list[float]]) -> float | None:
    """Against the fastest batch size of plain `generate` in the same dtype."""
    dtype = next((dtype for dtype in DTYPES if f", {dtype}" in name), None)
    rivals = [speed for rival, speed in speeds.items() if rival.startswith("plain") and rival.endswith(f", {dtype}")]
    if not name.startswith("ours") or not rivals:
        return None
    best = max(rivals, key=statistics.median)
    return statistics.median(a / b for a, b in zip(own, best, strict=True))


def page(result: dict[str, Any]) -> Iterator[str]:
    device, versions = result["device"], result["versions"]
    yield f"# Generation on {'a GPU' if 'gpu' in device else 'a CPU'}\n"
    yield f"```bash\n{result['command']}\n```\n"
    yield f"Run on {result['date']}: {device.get('gpu', '')} {device['cpu']}, {device['cpu_threads']} CPU threads."
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}.\n"
    yield 'Medians of rounds in which every side ran once. The reference loop is LLM-QAT\'s: one sample at a time in fp32. "To plain" is '
    yield "against the fastest batch size of `generate` in the same dtype."
    yield f"Tokens per sample: {', '.join(f'{teacher.name}: {teacher.max_length}' for teacher in TEACHERS)}.\n"
    for teacher in {row["teacher"]: None for row in result["rows"]}:
        yield f"## {teacher}\n\n| | tokens/s | min .. max | to the reference loop | to plain |\n|---|---|---|---|---|"
        for row in (row for row in result["rows"] if row["teacher"] == teacher):
            speed, plain_ratio = row["tokens_per_second"], row["to_best_plain"]
            yield (
                f"| {row['variant']} | {speed['median']:,.0f} | {speed['min']:,.0f} .. {speed['max']:,.0f} | {row['to_reference']:.1f} | "
                f"{'' if plain_ratio is None else f'{plain_ratio:.2f}'} |"
            )
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", default=list(range(len(TEACHERS))), help="numbers of teachers")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    result = {**report.head(args.device, "python -m benchmarks.generation"), "rows": []}
    for teacher in [TEACHERS[i] for i in args.only]:
        if args.quick:
            teacher = replace(teacher, max_length=12, batches=(4, 8), rows=8, samples=16)
        print(teacher.name, flush=True)
        result["rows"] += measure(teacher, 1 if args.quick else args.rounds, args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"generation-{'gpu' if args.device == 'cuda' else 'cpu'}"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
