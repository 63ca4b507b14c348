"""`lightning-qat export`: from a training checkpoint to the files that are deployed."""

import importlib
import os
import sys
from typing import Any

import lightning.pytorch as pl

from lightning_qat.formats import export as export_model
from lightning_qat.trained import load_trained


def export(
    checkpoint: str,
    out: str,
    format: str = "native",
    drop: str = "",
    inexact: bool = False,
    module: str | None = None,
    tokenizer: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write what a training checkpoint holds with exactly the integers that were trained.

    Args:
        checkpoint: A .ckpt file, or the folder that several processes wrote.
        out: Folder to create.
        format: What to write: native, compressed-tensors, vllm, gguf, torchao or onnx.
        drop: Parts of the scheme that the format may leave out, separated by commas, such as input,kv.
        inexact: Allow a runtime that computes codes by other conventions; the difference is measured.
        module: package.module.Class of your own that was trained, found from the working directory, and built with the hyper-parameters of
            the checkpoint; not for a DistillationModule.
        tokenizer: Folder or hub id of the tokenizer to write along; by default that of the model that training began with.
        push_to_hub: Repository on the Hugging Face hub to upload the folder to.
    """
    trained = load_trained(checkpoint, model=None if module is None else import_module_class(module))
    options: dict[str, Any] = {"format": format, "drop": names_in(drop), "inexact": inexact}
    print(f"written to {export_model(trained, out, **options, tokenizer=tokenizer, push_to_hub=push_to_hub)}")


def names_in(text: str) -> tuple[str, ...]:
    """The names in an option such as ``input,kv``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def import_module_class(name: str) -> type[pl.LightningModule]:
    """A LightningModule's class by its dotted name, as ``python`` would find it in the working directory.

    Raises:
        ValueError: No such module or class, or a class of something else.
    """
    home, _, leaf = name.rpartition(".")
    if not home:
        raise ValueError(f"module: got {name!r}, expected package.module.Class")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(home), leaf)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"module: cannot import {name!r} (seen from {here}): {error}") from error
    if not (isinstance(found, type) and issubclass(found, pl.LightningModule)):
        raise ValueError(f"module: {name} is a {found!r}, expected the class of a LightningModule")
    return found
