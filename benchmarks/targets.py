"""Training from kept probabilities instead of a live teacher: final perplexity, step time and memory; and what mixing and packing change.

python -m benchmarks.targets                   # CPU, about 20 minutes on 2 idle cores; writes docs/results/targets-cpu.{json,md}
python -m benchmarks.targets --quick --out runs/bench

Every run trains the bundled teacher's w4a8kv4 student on the same generated samples, in the same order (mix, packing and
stream: in orders of their own), and is scored on the same held-out text. Each is a process of its own, which measures its
own time and memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_qat
from benchmarks import report
from benchmarks.memory import status_bytes
from lightning_qat import DistillationModule, QuantizationCallback, SyntheticDataModule
from lightning_qat.evaluation import HELD_OUT, read_documents, score_text, text_windows
from lightning_qat.generation import TINY_TEACHER, load_causal_lm, load_tokenizer

SCHEME, LENGTH, BATCH, STEPS, SAMPLES, VAL = "w4a8kv4", 256, 8, 120, 1024, 64
LIVE = "live teacher"
HELD_OUT_FILE = Path(lightning_qat.__file__).parent / "assets" / "held_out" / "text.jsonl"
RUNS: dict[str, dict[str, Any]] = {
    LIVE: {},
    "kept, k = 32": {"teacher": None, "teacher_logits": 32},
    "kept, k = 8": {"teacher": None, "teacher_logits": 8},
    "kept, full logits": {"teacher": None, "teacher_logits": "full"},
    "live teacher, checkpointing": {"checkpointing": True},
    "kept, k = 32, checkpointing": {"teacher": None, "teacher_logits": 32, "checkpointing": True},
    "short samples, 32 in a batch": {"short": True, "batch_size": 32},
    "short samples, packed into 8 rows": {"short": True, "packing": True},
    "live teacher, mix with real text": {"mode": "mix", "text_ratio": 0.5},
    "live teacher, real text only": {"mode": "mix", "text_ratio": 0.98},
    "stream, k = 32": {"mode": "stream", "teacher_logits": 32, "live": False},
}


class StepTimes(pl.Callback):
    """Seconds of each step, without the loader."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def run(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """One training run in this process."""
    options = dict(RUNS[name])
    steps, samples, length = (6, 64, 32) if quick else (STEPS, SAMPLES, LENGTH)
    checkpointing, live, short = options.pop("checkpointing", False), options.pop("live", True), options.pop("short", False)
    teacher: Any = options.pop("teacher", TINY_TEACHER)
    if short:
        teacher = short_winded()
    pl.seed_everything(0, verbose=False)
    module = DistillationModule(
        teacher if live else None,
        student=TINY_TEACHER if teacher is None or not live else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
        ),
        gradient_checkpointing=checkpointing,
    )
    if options.get("mode") == "mix":
        options["text"] = str(folder / "text.jsonl")
    store = folder / (f"gen-{options.get('teacher_logits', 'plain')}" if not short else "gen-short")
    data = SyntheticDataModule(
        teacher,
        samples * (8 if short else 1),
        length,
        options.pop("batch_size", BATCH),
        store=store,
        val_samples=VAL if not quick else 8,
        rows=256 if not quick else 8,
        dtype="float32",
        tokenizer=TINY_TEACHER,
        **options,
    )
    times = StepTimes()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="bf16-mixed",
        limit_val_batches=0,
        callbacks=[QuantizationCallback(SCHEME), times],
        **quiet,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    fit_seconds = time.perf_counter() - start
    peak = status_bytes("VmHWM")  # not ru_maxrss, which a new process inherits from the one that started it
    windows = text_windows(load_tokenizer(TINY_TEACHER), read_documents(HELD_OUT), 512)[: 4 if quick else None]
    score = score_text(module.student, windows)
    return {
        "run": name,
        "perplexity": score.perplexity,
        "step_seconds": statistics.median(times.seconds[len(times.seconds) // 10 :]),
        "fit_seconds": fit_seconds,
        "peak_bytes": peak,
        "parameters_bytes": sum(p.numel() * p.element_size() for p in module.parameters()),
    }


def short_winded() -> Any:
    """The bundled teacher with many end tokens: short samples, of which several fit into a row."""
    model = load_causal_lm(TINY_TEACHER)
    model.generation_config.eos_token_id = model.config.eos_token_id = list(range(6, 2000, 40))
    return model


def write_stores(folder: Path, quick: bool) -> None:
    """What the runs read, before any of them is timed."""
    samples, length = (64, 32) if quick else (SAMPLES, LENGTH)
    for logits in (None, 32, 8, "full"):
        data = SyntheticDataModule(
            TINY_TEACHER,
            samples,
            length,
            store=folder / f"gen-{logits or 'plain'}",
            rows=256 if not quick else 8,
            dtype="float32",
            teacher_logits=logits,
            val_samples=VAL if not quick else 8,
        )
        data.setup("fit")
    SyntheticDataModule(
        short_winded(),
        samples * 8,
        length,
        store=folder / "gen-short",
        rows=256 if not quick else 8,
        dtype="float32",
        tokenizer=TINY_TEACHER,
    ).setup("fit")
    # Real text to train on: modules of this Python's standard library, except those that are scored.
    scored = {json.loads(line)["name"] for line in HELD_OUT_FILE.read_text("utf-8").splitlines()}
    root = Path(json.__file__).parent.parent
    documents = [path.read_text("utf-8", errors="replace") for path in sorted(root.glob("*.py")) if path.name not in scored][:80]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)


def page(result: dict[str, Any]) -> Iterator[str]:
    device, versions = result["device"], result["versions"]
    live = {row["run"]: row for row in result["rows"]}
    yield "# Training from kept probabilities\n"
    yield f"```bash\n{result['command']}\n```\n"
    yield f"Run on {result['date']}: {device['cpu']}, {device['cpu_threads']} CPU threads."
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}.\n"
    yield f"{SCHEME} student of the bundled teacher, {STEPS} steps of {BATCH} samples of {LENGTH} tokens, bf16-mixed. Perplexity on the "
    yield "held-out text; step: median seconds, and the ratio to the live teacher (with checkpointing: to the one with checkpointing).\n"
    yield "| run | perplexity | to live | step, s | to live | peak memory, MB |\n|---|---|---|---|---|---|"
    for row in result["rows"]:
        # Shorter samples are other samples: their base is the run without packing.
        same = "short samples, 32 in a batch" if row["run"].startswith("short") else LIVE
        base = live.get("live teacher, checkpointing" if "checkpointing" in row["run"] else same, row)
        yield (
            f"| {row['run']} | {row['perplexity']:.3f} | {row['perplexity'] / live[same]['perplexity']:.4f} | {row['step_seconds']:.3f} | "
            f"{row['step_seconds'] / base['step_seconds']:.3f} | {row['peak_bytes'] / 1e6:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/targets"), help="stores of generated samples")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.child:
        print(json.dumps(run(args.child, args.work, args.quick)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_stores(args.work, args.quick)
    result: dict[str, Any] = {**report.head("cpu", "python -m benchmarks.targets"), "rows": []}
    for name in args.only:
        command = [sys.executable, "-m", "benchmarks.targets", "--child", name, "--work", str(args.work), *["--quick"] * args.quick]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        result["rows"].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(result["rows"][-1], flush=True)
        (args.out / "targets-cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if LIVE in args.only:
        (args.out / "targets-cpu.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
