"""`lightning-qat plan`: what a training run needs, before anything is loaded."""

import json as json_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_qat import plan as planning

PHASES = {
    "student": "forward pass of the student",
    "teacher": "forward pass of the teacher",
    "loss": "loss",
    "backward, loss": "begin of the backward pass",
    "backward, last block": "backward pass, last block",
    "backward, first block": "backward pass, first block",
}
COMPARED = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
COMPARED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def plan(
    model: str | None = None,
    fit_config: str | None = None,
    gpus: int | None = None,
    memory: str = "80GB",
    scheme: str = "w4a8kv4",
    batch_size: int = 1,
    max_length: int = 2048,
    strategy: str | None = None,
    precision: str = "bf16-mixed",
    optimizer: str | None = None,
    teacher: str | None = None,
    gradient_checkpointing: bool | None = None,
    loss_chunk: int | None = 1024,
    param_dtype: str | None = None,
    attention: str = "sdpa",
    samples: int = 96000,
    compare: bool = False,
    measure: bool = False,
    out: str | None = None,
    json: str | None = None,
) -> None:
    """Tell the memory that training a model needs, the best way that fits, and its YAML; nothing is loaded.

    What is left out is chosen: the first way that fits, of those that give up as little as possible.

    Args:
        model: llama-7b, llama-13b, llama-30b, llama-65b, llama-70b, a folder with config.json, that file, a hub id, or tiny-teacher.
        fit_config: A YAML of lightning-qat fit to read instead; also as --config.
        gpus: GPUs, one process each; default 8, or what the YAML says.
        memory: Memory of one GPU with its unit, 80GB (10^9 bytes) or 80GiB (2^30 bytes).
        scheme: Scheme string such as w4a8kv4, or a preset's name.
        batch_size: Samples per GPU and step.
        max_length: Tokens per sample.
        strategy: single, ddp, fsdp, fsdp2, deepspeed_stage_2 or deepspeed_stage_3; left out: chosen of the first two and fsdp2.
        precision: 32-true, bf16-mixed, 16-mixed or bf16-true.
        optimizer: adamw, adamw8bit or sgd; left out: adamw, and 8-bit where nothing else fits.
        teacher: bfloat16, float32, replicated, nf4, int8, offload, or none for stored probabilities; left out: chosen.
        gradient_checkpointing: Compute blocks again in the backward pass; left out: where it is needed.
        loss_chunk: Tokens whose logits exist at once; null for the plain loss.
        param_dtype: bfloat16: fsdp2 gathers weights in it; left out: where it is needed.
        attention: sdpa or eager.
        samples: How many samples the YAML asks for.
        compare: Also show the memory under each strategy and precision.
        measure: Also time one block on this machine, about a minute: an estimate of tokens per second here.
        out: Write the YAML to this file instead of showing it.
        json: Also write all figures to this file.
    """
    limit = planning.parse_memory(memory)
    fixed: dict[str, Any] = {"scheme": scheme, "batch_size": batch_size, "max_length": max_length, "precision": precision}
    fixed |= {"loss_chunk": loss_chunk, "attention": attention, "gpus": 8 if gpus is None else gpus}
    chosen = {"strategy": strategy, "optimizer": optimizer, "teacher": teacher, "param_dtype": param_dtype}
    fixed |= {key: value for key, value in {**chosen, "gradient_checkpointing": gradient_checkpointing}.items() if value is not None}
    text = None
    if fit_config is not None:
        text, model, read = _read(fit_config, model)
        fixed = {"gpus": fixed["gpus"], **read} if gpus is None else {**read, "gpus": gpus}
    if model is None:
        raise ValueError(f"model: got none, expected one of {sorted(planning.SHAPES)}, a folder with config.json, or a hub id; or --config")
    planning.Setting(**{**fixed, "strategy": fixed.get("strategy", "ddp")})  # refuses what is wrong before anything is built
    shape = planning.read_shape(model, fixed["scheme"])
    best = planning.best_plan(shape, limit, fixed)
    console = Console(soft_wrap=True, highlight=False)
    _show(console, shape, best)
    found = [] if best.fits else planning.remedies(shape, best, fixed)
    for line in found:
        console.print(f"  - {line}", markup=False)
    cells = _compare(console, shape, best) if compare else None
    speed = planning.measure_speed(shape, best.setting) if measure else None
    if speed is not None:
        _show_speed(console, speed)
    if text is None and best.fits:
        text = planning.recipe(shape.name, best.setting, samples)
    _write(console, text, out)
    if json is not None:
        Path(json).write_text(json_module.dumps(_figures(shape, best, found, cells, speed), indent=1) + "\n", encoding="utf-8")


def _read(path: str, model: str | None) -> tuple[str, str, dict[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"config: no file at {path!r}")
    text = Path(path).read_text("utf-8")
    name, fields = planning.read_recipe(text)
    return text, model or name, fields


def _show(console: Console, shape: planning.Shape, best: planning.Plan) -> None:
    share = shape.linear / shape.parameters
    bits = "no weights quantized" if shape.effective_bits is None else f"{shape.effective_bits:.3f} effective bits each"
    console.print(f"{shape.name}: {shape.parameters:,} parameters, {share:.1%} of them quantized, {bits}", markup=False)
    setting, need = best.setting, best.estimate
    console.print(f"{setting.gpus} GPUs of {best.memory / 1e9:.1f} GB: {planning.describe(setting)}", markup=False)
    console.print(
        f"batch {setting.batch_size} x {setting.max_length} tokens per GPU, "
        + ("plain loss" if setting.loss_chunk is None else f"loss of {setting.loss_chunk} tokens at a time"),
        highlight=False,
    )
    console.print(f"memory of one GPU at its highest, {PHASES[need.phase]}:", highlight=False)
    table = Table("for", "GB")
    for name, size in need.parts.items():
        if size >= 5_000_000:
            table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("sum", f"{need.total / 1e9:.2f}")
    console.print(table)
    console.print(f"host memory per node: {need.loading / 1e9:.1f} GB while loading, {need.host / 1e9:.1f} GB after it", highlight=False)
    if best.fits:
        console.print("It fits." + "".join(f"\n  given up: {cost}" for cost in best.costs), highlight=False)
    else:
        console.print(
            f"It does not fit: {(need.total - best.memory) / 1e9:.1f} GB too much. What would help, preferred first:", highlight=False
        )


def _compare(console: Console, shape: planning.Shape, best: planning.Plan) -> dict[str, dict[str, float]]:
    strategies = COMPARED if best.setting.gpus > 1 else ("single",)
    console.print("GB per GPU with other strategies and precisions:")
    table = Table("precision", *strategies)
    cells: dict[str, dict[str, float]] = {}
    for precision in COMPARED_PRECISIONS:
        settings = [planning.Setting(**{**vars(best.setting), "strategy": name, "precision": precision}) for name in strategies]
        needs = [planning.estimate(shape, setting).total for setting in settings]
        cells[precision] = {name: round(need / 1e9, 2) for name, need in zip(strategies, needs, strict=True)}
        table.add_row(precision, *(f"{need / 1e9:.1f}{'' if need <= best.memory else ' (no)'}" for need in needs))
    console.print(table)
    return cells


def _show_speed(console: Console, speed: planning.Speed) -> None:
    console.print(
        f"Estimate from this machine ({speed.device}): one block took {speed.block_seconds:.3f} s (median of {speed.runs}), so all take "
        f"{speed.seconds:.1f} s a step, {speed.tokens_per_second:.1f} tokens/s in one process; embeddings, head, loss and communication "
        "are left out.",
        highlight=False,
    )


def _write(console: Console, text: str | None, out: str | None) -> None:
    if text is None:
        return
    if out is None:
        console.rule("YAML for lightning-qat fit")
        console.print(text, markup=False)
    else:
        Path(out).write_text(text, encoding="utf-8")
        console.print(f"written to {out}: lightning-qat fit --config {out}", highlight=False)


def _figures(shape: planning.Shape, best: planning.Plan, found: list[str], cells: Any, speed: planning.Speed | None) -> dict[str, Any]:
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "quantized": shape.linear,
        "effective_bits": shape.effective_bits,
        "memory": best.memory,
        "fits": best.fits,
        "costs": list(best.costs),
        "setting": vars(best.setting),
        **{key: getattr(best.estimate, key) for key in ("phase", "parts", "phases", "loading", "host", "total")},
        "remedies": found,
        "by_strategy": cells,
        "speed": None if speed is None else vars(speed),
    }
