"""`lightning-qat demo`: generate, insert, distil, evaluate, export, reload in a new process, report."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lightning_qat
from lightning_qat.cli.demo.plots import plot_loss, plot_perplexity
from lightning_qat.cli.fit import run_trainer_command
from lightning_qat.data import GenerationStore, SyntheticDataModule
from lightning_qat.evaluation import HELD_OUT, TextScore, read_documents, score_text, text_windows
from lightning_qat.formats import export
from lightning_qat.generation import TINY_TEACHER, load_causal_lm, load_tokenizer
from lightning_qat.modules import insert_quantizers
from lightning_qat.report import write_generation_report
from lightning_qat.scheme import QuantScheme

SCHEMES = ("w4a8kv4", "w2a8kv4")
CONTEXT = 512  # tokens per evaluation window: the bundled teacher's positions
PROMPT = "def read_lines(path):\n"


class Stopwatch:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"generate": 0.0, "train": 0.0, "evaluate": 0.0}
        self._start = time.monotonic()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - start

    def rounded(self) -> dict[str, float]:
        """All stages and the total."""
        total = time.monotonic() - self._start
        return {name: round(seconds, 1) for name, seconds in {**self.seconds, "total": total}.items()}


def demo(
    out: str = "runs/demo", seed: int = 0, schemes: tuple[str, ...] = SCHEMES, text: str = HELD_OUT, fit_args: tuple[str, ...] = ()
) -> None:
    """Train the bundled teacher's low-bit students without data, evaluate, save and reload them.

    Args:
        out: Folder for the YAML, checkpoints, exports, plots and results.json; a second run generates nothing anew.
        seed: Seed of generation and training.
        schemes: One row of the table each.
        text: Text to evaluate on: a .txt or .jsonl file, or held-out for the bundled text.
        fit_args: More arguments of `lightning-qat fit`, for example --trainer.max_steps=20.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the demo says itself what happens
    run = Demo(Path(out), seed, text, fit_args)
    tokens = run.generate()
    run.score_teacher()
    rows = [run.train(scheme) for scheme in schemes]
    results = {
        "seed": seed,
        "teacher": run.teacher,
        "runs": rows,
        "generated_tokens": tokens,
        "seconds": run.watch.rounded(),
        "versions": {"lightning_qat": lightning_qat.__version__, **{n: version(n) for n in ("torch", "lightning", "transformers")}},
    }
    (run.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_perplexity(rows, run.folder / "perplexity.png")
    _show(results, run.folder, run.console)


class Demo:
    """One run of the demo.

    Args:
        folder: Where everything goes.
        seed: Seed of generation and training.
        text: What models are scored on.
        fit_args: More arguments of `lightning-qat fit`.
    """

    def __init__(self, folder: Path, seed: int, text: str, fit_args: tuple[str, ...]) -> None:
        self.folder, self.text, self.console, self.watch = folder, text, Console(), Stopwatch()
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("demo: its pictures need matplotlib; pip install 'lightning-qat[plots]'")
        documents = read_documents(text)
        self.tokenizer = load_tokenizer(TINY_TEACHER)
        self.windows = text_windows(self.tokenizer, documents, CONTEXT)
        self.text_bytes = sum(len(document.encode()) for document in documents)
        self.teacher: dict[str, Any] = {"name": TINY_TEACHER}
        self.full: TextScore | None = None
        # What `fit` is told besides the YAML.
        self.fit = ["fit", "--config", str(self._write_config()), f"--seed_everything={seed}", f"--data.init_args.seed={seed}", *fit_args]

    def _write_config(self) -> Path:
        """A copy of the YAML with its paths below the folder."""
        template = (Path(__file__).parent / "llm_qat.yaml").read_text("utf-8")
        path = self.folder / "llm_qat.yaml"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(template.replace("runs/demo", str(self.folder)), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"out: cannot write to {str(self.folder)!r}: {error}") from error
        return path

    def generate(self) -> int:
        """Fill the store that the training runs will read; returns the number of tokens."""
        self.console.rule("The teacher writes the data")
        with self.watch("generate"):
            data = run_trainer_command([*self.fit, "--trainer.logger=false"], run=False).datamodule
            data.setup("fit")
        store = GenerationStore.existing(data.folder)
        self.console.print(self.tokenizer.decode(store.read(0).tokens[:80]), markup=False, highlight=False, style="dim")
        write_generation_report(store, self.folder / "generations.html", tokenizer=self.tokenizer, teacher=load_causal_lm(TINY_TEACHER))
        return int(store.records["tokens"][: data.num_samples].sum())

    def score_teacher(self) -> None:
        """Full precision on the text."""
        model = load_causal_lm(TINY_TEACHER)
        with self.watch("evaluate"):
            self.full = score_text(model, self.windows, text_bytes=self.text_bytes)
        self.teacher |= {"parameters": sum(p.numel() for p in model.parameters()), "bits_per_byte": self.full.bits_per_byte}

    def train(self, scheme: str) -> dict[str, Any]:
        """One row of the table: round to nearest, LLM-QAT, and the exported file in a new process."""
        assert self.full is not None
        self.console.rule(f"{scheme}: insert quantizers, distil, evaluate")
        with self.watch("evaluate"):
            rounded = load_causal_lm(TINY_TEACHER)
            self.console.print(str(insert_quantizers(rounded, scheme)), highlight=False)
            nearest = score_text(rounded, self.windows).perplexity
        with self.watch("train"):
            run = run_trainer_command([*self.fit, "--quantization.scheme", scheme, f"--trainer.logger.init_args.version={scheme}"])
        plot_loss(self.folder / "logs" / scheme / "metrics.csv", self.folder / f"loss-{scheme}.png", scheme)
        student = run.model.student
        with self.watch("evaluate"):
            trained = score_text(student, self.windows).perplexity
            reloaded, snippet = self._in_a_new_process(_export(student, self.folder / f"export-{scheme}"))
        self.console.print(f"[bold]{scheme}[/] reloaded in a new process continues {PROMPT!r}:")
        self.console.print(snippet, markup=False, highlight=False, style="dim")
        full = self.full.perplexity
        return {
            "scheme": scheme,
            "perplexity": {"full_precision": full, "round_to_nearest": nearest, "llm_qat": trained, "reloaded": reloaded},
            "recovered": (nearest - trained) / (nearest - full),
            "training_tokens": _trained_tokens(run),
            "effective_bits": QuantScheme.parse(scheme).effective_bits(student),
        }

    def _in_a_new_process(self, saved: Path) -> tuple[float, str]:
        """(perplexity, generated text) of the exported folder, from a process that knows nothing else."""
        out = self.folder / "reloaded.json"
        evaluate = [sys.executable, "-m", "lightning_qat.cli", "evaluate", "--model", str(saved), "--text", self.text]
        options = ["--context", str(CONTEXT), "--prompt", PROMPT, "--out", str(out)]
        done = subprocess.run([*evaluate, *options], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the export could not be evaluated in a new process:\n{done.stderr}")
        figures = json.loads(out.read_text("utf-8"))
        out.unlink()
        return figures["perplexity"], figures["continuation"]


def _trained_tokens(run: Any) -> int:
    """Tokens in the batches of the finished run; all samples are equally long unless the teacher ended some early."""
    data: SyntheticDataModule = run.datamodule
    assert data.train_dataset is not None
    samples = data.train_dataset
    mean = sum(len(samples[i]["input_ids"]) for i in range(len(samples))) / len(samples)
    return round(run.trainer.global_step * data.batch_size * mean)


def _export(student: torch.nn.Module, target: Path) -> Path:
    """Export beside an earlier run's result, then take its place: a failed export leaves the old one."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    export(student, fresh)
    shutil.rmtree(target, ignore_errors=True)
    return fresh.rename(target)


def _show(results: dict[str, Any], folder: Path, console: Console) -> None:
    names = ("scheme", "full precision", "round to nearest", "LLM-QAT", "reloaded", "recovered", "bits/weight")
    table = Table(*names, title="held-out perplexity")
    for row in results["runs"]:
        figures = [f"{value:.3f}" for value in row["perplexity"].values()]
        table.add_row(row["scheme"], *figures, f"{row['recovered']:.0%}", f"{row['effective_bits']:.2f}")
    console.print(table)
    seconds = results["seconds"]
    console.print(f"{results['generated_tokens']:,} generated tokens; seconds: {seconds}; everything is in {folder}", highlight=False)
