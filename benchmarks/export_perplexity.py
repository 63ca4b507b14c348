"""Perplexity of one trained model in every runtime: the fake-quantized model, and what each format's own library makes of the export.

python -m benchmarks.export_perplexity                # CPU, about 15 minutes; writes docs/results/export-perplexity.{json,md}
python -m benchmarks.export_perplexity --steps 3 --windows 4 --presets gguf-q4_0 --out runs/bench

The bundled teacher is distilled with each preset from its own generations; held-out text in windows of 512 tokens. A runtime that does not
execute the preset is refused by `export`, whose message stands in the table.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks import report
from lightning_qat import DistillationModule, QuantizationCallback, SyntheticDataModule, export, load_quantized
from lightning_qat.evaluation import HELD_OUT, read_documents, score_text, text_windows
from lightning_qat.generation import TINY_TEACHER, load_tokenizer
from lightning_qat.runtime import runtimes
from lightning_qat.scheme import PRESETS

TOLERANCE = 1e-4  # relative


def train(preset: str, steps: int, store: Path) -> Any:
    """The student after some steps of distillation, in fp32."""
    pl.seed_everything(0, verbose=False)
    module = DistillationModule(TINY_TEACHER, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0))
    data = SyntheticDataModule(TINY_TEACHER, num_samples=8 * steps, max_length=128, batch_size=8, store=store)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        callbacks=[QuantizationCallback(preset)],
    )  # fmt: skip
    trainer.fit(module, data)
    return module.student.eval()


def measure(preset: str, student: Any, windows: Sequence[Tensor]) -> dict[str, Any]:
    """Perplexities by format, or why a format refuses."""
    mine = score_text(student, windows).perplexity
    control = _with_other_rounding(student, windows)
    row: dict[str, Any] = {"preset": preset, "fake_quantized": mine, "control": abs(control - mine) / mine, "runtimes": {}}
    for name in ("native", *runtimes.names()):
        with tempfile.TemporaryDirectory() as folder:
            try:
                exported = export(student, Path(folder) / "out", format=name, tokenizer=TINY_TEACHER)
            except ValueError as error:
                row["runtimes"][name] = {"refused": str(error)}
                continue
            theirs = score_text(load_quantized(exported), windows).perplexity
        row["runtimes"][name] = {"perplexity": theirs, "relative": abs(theirs - mine) / mine}
        print(preset, name, mine, theirs, flush=True)
    return row


def _with_other_rounding(student: Any, windows: Sequence[Tensor]) -> float:
    """The same model whose linear layers return results in which the last bits of fp32 differ, as those of another kernel do."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * (1 + 6e-8 * torch.randn(output.shape, generator=generator))

    handles = [module.register_forward_hook(disturb) for module in student.modules() if isinstance(module, torch.nn.Linear)]
    try:
        return score_text(student, windows).perplexity
    finally:
        for handle in handles:
            handle.remove()


def page(result: dict[str, Any]) -> Iterator[str]:
    """Markdown: one line a preset, one column a runtime; then what was refused and why."""
    rows, device = result["rows"], result["device"]
    names = list(rows[0]["runtimes"])
    yield "# One trained model in every runtime\n"
    yield f"```bash\n{result['command']}\n```\n"
    yield f"Run on {result['date']}: {device['cpu']}, {device['cpu_threads']} CPU threads."
    yield f"{', '.join(f'{name} {version}' for name, version in result['versions'].items() if version)}.\n"
    yield f"Perplexity on {result['tokens']:,} held-out tokens after {result['steps']} steps of distillation of the bundled teacher;"
    yield "in brackets the relative distance to the fake-quantized model. *Control* is that distance for the fake-quantized model itself"
    yield "when the last bits of what its linear layers return are changed at random (6e-8): where activations are quantized, a rounding"
    yield "that falls on the other side grows, and a runtime with products of its own (ONNX Runtime) is about as far away.\n"
    yield f"| preset | fake-quantized | control | {' | '.join(names)} |"
    yield "|---" * (len(names) + 3) + "|"
    for row in rows:
        cells = " | ".join(_cell(row["runtimes"][name]) for name in names)
        yield f"| `{row['preset']}` | {row['fake_quantized']:.4f} | {row['control']:.1e} | {cells} |"
    yield "\nNot the same model on purpose: transformers reads `gguf` and leaves the inputs of `llama.cpp-w4a8` in floating point; it reads"
    yield "`vllm` too, and divides by 127.5 where vLLM and `vllm-w8a8` divide by 127."
    yield "\nRefused:\n"
    for row in rows:
        refused = [(name, cell["refused"]) for name, cell in row["runtimes"].items() if "refused" in cell]
        yield from (f"- `{row['preset']}` as `{name}`: {_brief(message)}" for name, message in refused)


def _cell(cell: dict[str, Any]) -> str:
    return "refused" if "refused" in cell else f"{cell['perplexity']:.4f} ({cell['relative']:.1e})"


def _brief(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines()[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--windows", type=int, default=None, help="windows of 512 tokens; all by default")
    parser.add_argument("--presets", nargs="+", default=PRESETS.names())
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    windows = text_windows(load_tokenizer(TINY_TEACHER), read_documents(HELD_OUT), 512)[: args.windows]
    result = report.head("cpu", "python -m benchmarks.export_perplexity") | {
        "steps": args.steps,
        "tokens": sum(len(window) - 1 for window in windows),
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for preset in args.presets:
        result["rows"].append(measure(preset, train(preset, args.steps, Path("runs/export_perplexity")), windows))
        (args.out / "export-perplexity.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "export-perplexity.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")
    rows = result["rows"]
    far = [(row["preset"], name) for row in rows for name, cell in row["runtimes"].items() if cell.get("relative", 0.0) > TOLERANCE]
    print(f"farther than {TOLERANCE:g}: {far or 'none'}")


if __name__ == "__main__":
    main()
