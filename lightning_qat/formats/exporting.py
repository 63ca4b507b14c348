"""The verb `export`: check everything, write to a temporary folder, verify it there, rename."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lightning_qat.formats.base import Format, Job, check_packages, formats
from lightning_qat.formats.exactness.executed import computed_anew, difference, example_for, executing, outputs_of
from lightning_qat.formats.exactness.fitting import Fit, check_drop, fit_model
from lightning_qat.formats.folder.card import check_results, write_card
from lightning_qat.formats.folder.company import find_tokenizer
from lightning_qat.formats.folder.hub import check_hub, push
from lightning_qat.formats.folder.manifest import MANIFEST, write_manifest
from lightning_qat.formats.folder.quiet import no_progress_bars
from lightning_qat.formats.folder.staging import check_folder, staged
from lightning_qat.modules import scheme_of
from lightning_qat.modules.insertion import quantized_roots
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.lora import adapted_layers, check_adapters
from lightning_qat.modules.weights import layer_weights


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "native",
    drop: tuple[str, ...] = (),
    inexact: bool = False,
    *,
    tokenizer: Any = None,
    example_inputs: Any = None,
    results: Mapping[str, float] | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Write a quantized model with exactly the integers that were trained.

    Everything is checked first, then written to a temporary folder, read back there with the library of the runtime and compared bit for
    bit, and renamed last: a failed export leaves nothing behind.

    Args:
        model: A module with quantizers; of one that names a ``quantization_root``, such as a DistillationModule, that part.
        path: Folder to create; it may exist if it is empty.
        format: Registered name of the format.
        drop: Parts of the scheme that the format may leave out: ``input``, ``kv``.
        inexact: Allow a runtime that computes codes by other conventions than those of training. Codes of weights stay as they are in any
            case. The difference is measured and written into the manifest.
        tokenizer: The tokenizer, or the folder or hub id to load it from; None to look where the model was loaded from.
        example_inputs: What the model's forward takes (a tensor, a tuple, or keyword arguments), for formats that run the model; language
            models and modules with an ``example_input_array`` need none.
        results: Figures for the model card, such as ``{"perplexity": 12.2}``.
        push_to_hub: Repository on the Hugging Face hub to upload the folder to.

    Returns:
        The folder.

    Raises:
        ValueError: Unknown format, a model without quantizers, with LoRA adapters or pruning masks, a scheme that the format cannot
            express, a folder that is not empty or cannot be written.
        RuntimeError: What was written reads back differently; nothing is left behind.
    """
    writer = formats.get(format)()
    check_packages(type(writer))
    check_drop(drop)
    whole = quantized_part(model)
    target = check_folder(path)
    check_hub(push_to_hub)
    check_results(results)
    job = _prepare(whole, writer, drop, inexact, tokenizer, example_inputs, results)
    writer.check(job)
    with staged(target) as folder, no_progress_bars():
        _write(job, writer, folder)
    if push_to_hub is not None:
        push(target, push_to_hub)
    return target


def _write(job: Job, writer: Format, folder: Path) -> None:
    measured = _measure(job)
    entries = writer.write(job, folder)
    verification = writer.verify(job, folder, entries)
    write_card(job, writer, folder, {"difference": measured, "verification": verification, **entries})
    write_manifest(job, writer, folder, {"difference": measured, "verification": verification, **entries})
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(folder / MANIFEST, file)  # safetensors makes files that only their owner can read


def _measure(job: Job) -> dict[str, float] | None:
    """What leaving parts out, or other conventions, does to the outputs; None where nothing differs."""
    if job.fit.is_exact or job.example is None:
        return None
    trained = outputs_of(job.model, job.example)
    with executing(job.model, job.fit):
        return difference(trained, outputs_of(job.model, job.example))


def quantized_part(model: nn.Module) -> nn.Module:
    """The quantized module that is to be written.

    Raises:
        ValueError: No quantizers, those of a part only, sharded weights, adapters beside weights, or pruning masks.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: got a {type(model).__name__}, expected a module with quantizers; load_trained reads one from a checkpoint"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    model = model.module if isinstance(model, DistributedDataParallel) else model
    root = getattr(model, "quantization_root", None)
    part = model.get_submodule(root) if isinstance(root, str) else model
    if scheme_of(part) is None:
        if next(quant_layers(part), None) is not None:
            raise ValueError("export: this is a part of what was quantized; export the whole, or set quantization_root to this part")
        raise ValueError(
            "export: the model holds no quantizers; call insert_quantizers(model, scheme) with the scheme it was trained with (also after "
            "load_from_checkpoint), or train with QuantizationCallback first"
        )
    if len(roots := quantized_roots(part)) > 1:
        raise ValueError(
            f"export: quantizers were inserted below {roots[0]!r} and {roots[1]!r} on their own; insert once at their common parent "
            "(with overrides), or export each part"
        )
    sharded = [name for name, parameter in part.named_parameters() if isinstance(parameter, DTensor)]
    sharded += [name for name, module in part.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if sharded:
        raise ValueError(
            f"export: {sharded[0]!r} is sharded over processes; save a checkpoint and export that: "
            "export(load_trained(checkpoint), path), or lightning-qat export"
        )
    if (adapted := next(adapted_layers(part), None)) is not None:
        check_adapters(part)
        raise ValueError(f"export: {adapted[0]} has an adapter beside its weight; call lightning_qat.merge_lora(model) first")
    if masked := [weight.key for weight in layer_weights(part) if f"{weight.parameter}_mask" in weight.layer._buffers]:
        raise ValueError(
            f"export: {masked[0]} is under a pruning mask; make it permanent first: torch.nn.utils.prune.remove(layer, name), which "
            "ModelPruning does at the end of training unless make_pruning_permanent=False"
        )
    return part


def _prepare(
    whole: nn.Module, writer: Format, drop: tuple[str, ...], inexact: bool, tokenizer: Any, example_inputs: Any, results: Any
) -> Job:
    scheme = scheme_of(whole)
    assert scheme is not None
    traced_whole = writer.traces and example_for(whole, example_inputs) is not None
    model = whole if traced_whole else _written_part(whole, writer)
    if writer.runtime is None:
        if drop or inexact:
            raise ValueError(f"drop, inexact: got drop={drop!r}, inexact={inexact}; {writer.name!r} expresses everything exactly")
        fit = Fit(inputs={}, kv={}, scale_dtypes={}, keeps_buffers=True)
    else:
        fit = _with_fresh_buffers(model, fit_model(model, writer.runtime, writer.name, writer.scale_dtype(model), drop, inexact))
    found = find_tokenizer(whole, model, tokenizer)
    return Job(model=model, scheme=scheme, fit=fit, tokenizer=found, example=example_for(model, example_inputs), results=results)


def _with_fresh_buffers(model: nn.Module, fit: Fit) -> Fit:
    """A model cast to bf16 has rounded rotary tables, which no file holds: runtimes compute them anew, and that is a difference."""
    fresh = sorted(computed_anew(model))
    notes = [f"buffers: {fresh[0]} is computed anew, not rounded as in the trained model"] if fresh else []
    return replace(fit, notes=(*fit.notes, *notes))


def _written_part(whole: nn.Module, writer: Format) -> nn.Module:
    """The module itself, or for formats of transformers its model (itself or a part of it) that holds all that is quantized."""
    if not (writer.transformers_only or writer.transformers_first):
        return whole
    layers = {id(layer) for _, layer in quant_layers(whole)}
    models = (module for module in whole.modules() if isinstance(module, PreTrainedModel))
    for model in models:  # outermost first
        if layers <= {id(module) for module in model.modules()}:
            return model
    if writer.transformers_first:
        return whole
    raise ValueError(f"format: {writer.name!r} writes models of transformers; {type(whole).__name__} is none and holds none; use 'native'")
