"""The verbs `export` and `load_quantized`, and what a format has to offer."""

import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from torch import nn

from lightning_qat.modules import scheme_of
from lightning_qat.modules.insertion import quantized_roots
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.lora import adapted_layers, check_adapters
from lightning_qat.modules.weights import layer_weights
from lightning_qat.registry import Registry


class Format(ABC):
    """One way of writing a quantized model."""

    @abstractmethod
    def write(self, model: nn.Module, folder: Path) -> None:
        """Write the model's codes and scales into an empty folder, and verify them there."""


formats: Registry[type[Format]] = Registry("format", "lightning_qat.formats")


def export(model: nn.Module, path: str | Path, format: str = "native", drop: tuple[str, ...] = (), inexact: bool = False) -> Path:
    """Write a quantized model with exactly the integers that were trained.

    Everything is written to a temporary folder, verified and then renamed, so a failed export leaves nothing behind.

    Args:
        model: A module with quantizers.
        path: Folder to create; it may exist if it is empty.
        format: Registered name of the format.
        drop: Parts of the scheme that the format may leave out; the native format needs none.
        inexact: Allow a format that executes another grid; the native format is exact.

    Returns:
        The folder.

    Raises:
        ValueError: Unknown format, a model without quantizers, with LoRA adapters or pruning masks, a folder that is not empty or cannot be
            written.
    """
    writer = formats.get(format)()
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    target = Path(path)
    if drop or inexact:
        raise ValueError(f"drop, inexact: got drop={drop!r}, inexact={inexact}; the {format!r} format expresses everything exactly")
    if scheme_of(model) is None:
        if next(quant_layers(model), None) is not None:
            raise ValueError("export: this is a part of what was quantized; export the whole, or set quantization_root to this part")
        raise ValueError(
            "export: the model holds no quantizers; call insert_quantizers(model, scheme) with the scheme it was trained with (also after "
            "load_from_checkpoint), or train with QuantizationCallback first"
        )
    if len(roots := quantized_roots(model)) > 1:
        raise ValueError(
            f"export: quantizers were inserted below {roots[0]!r} and {roots[1]!r} on their own; insert once at their common parent "
            "(with overrides), or export each part"
        )
    if (adapted := next(adapted_layers(model), None)) is not None:
        check_adapters(model)
        raise ValueError(f"export: {adapted[0]} has an adapter beside its weight; call lightning_qat.merge_lora(model) first")
    if masked := [weight.key for weight in layer_weights(model) if f"{weight.parameter}_mask" in weight.layer._buffers]:
        raise ValueError(
            f"export: {masked[0]} is under a pruning mask; make it permanent first: torch.nn.utils.prune.remove(layer, name), which "
            "ModelPruning does at the end of training unless make_pruning_permanent=False"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path: {str(target)!r} exists and is not an empty folder; choose another one")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"path: cannot write to {str(target)!r}: {error}") from error
    try:
        writer.write(model, temporary)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
