"""The verb `load_trained`: a module with the quantizers and weights of its checkpoint, ready to be exported."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_qat.callbacks.quantization import ROOT, quantization_root
from lightning_qat.callbacks.unfinished import unfinished_schedule
from lightning_qat.distillation import DistillationModule
from lightning_qat.modules import insert_quantizers, merge_lora
from lightning_qat.modules.lora import adapted_layers
from lightning_qat.modules.weights import WEIGHT_DTYPES, set_weight_dtypes
from lightning_qat.scheme import QuantScheme
from lightning_qat.trained.reading import read_checkpoint

Model = pl.LightningModule | type[pl.LightningModule] | None


def load_trained(checkpoint: str | Path, model: Model = None) -> Any:
    """A model as it was trained, from a checkpoint of Lightning.

    Its codes are exactly those of the last training step's weights. Checkpoints are read as plain data and never unpickled; the index of a
    folder, which is a pickle, may name torch's own record types only.

    Example::

        export(load_trained("last.ckpt"), "out")                         # of a DistillationModule: its student
        export(load_trained("last.ckpt", model=MyModule()), "out")       # of a module of your own, trained with QuantizationCallback

    Args:
        checkpoint: A .ckpt file, or the folder that several processes wrote (`ModelParallelStrategy`), which is put together here.
        model: What was trained, where that is not a :class:`~lightning_qat.DistillationModule` whose teacher or student has a name: an
            instance, or a class that saved its arguments with ``save_hyperparameters``. The weights of an instance are replaced.

    Returns:
        In eval mode, with LoRA adapters merged: the student of a DistillationModule, else the module itself, with quantizers below its
        ``quantization_root``.

    Raises:
        ValueError: Nothing is there, not a checkpoint, pickled objects, trained without QuantizationCallback, below another root or in the
            middle of a schedule, or `model` is missing, of another kind, or has other weights.
    """
    module = load_module(checkpoint, model)
    return module.student if isinstance(module, DistillationModule) else module


def load_module(checkpoint: str | Path, model: Model = None) -> pl.LightningModule:
    """The whole LightningModule of :func:`load_trained`; arguments and errors are the same."""
    if model is not None and not isinstance(model, pl.LightningModule) and not _is_class(model):
        kind = model if isinstance(model, type) else type(model)
        raise ValueError(f"model: got {kind.__name__}, expected a LightningModule or a class of such")
    saved, place = read_checkpoint(checkpoint), str(checkpoint)
    if model is None and "quantization_scheme" not in saved:
        raise ValueError(
            f"model: {place!r} is not a checkpoint of a DistillationModule; pass what was trained, "
            "load_trained(path, model=MyModule(...)), or lightning-qat export --module package.module.MyModule"
        )
    module = _restored(model, saved) if isinstance(model, pl.LightningModule) else _built(model or DistillationModule, saved, place)
    root = _root(module, saved, place)
    insert_quantizers(root, _scheme_in(saved, place), allow_partial=True)  # those that are there have to be of the same scheme
    set_weight_dtypes(root, saved.get(WEIGHT_DTYPES, {}))
    _load_weights(module, saved["state_dict"], place)
    if next(adapted_layers(root), None) is not None:
        merge_lora(root)
    return module.eval()


def _is_class(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, pl.LightningModule)


def _restored(module: pl.LightningModule, saved: dict[str, Any]) -> pl.LightningModule:
    """An instance as Lightning has it before weights are loaded."""
    if is_overridden("configure_model", module):
        module.configure_model()
    module.on_load_checkpoint(saved)
    return module


def _built(cls: type[pl.LightningModule], saved: dict[str, Any], place: str) -> pl.LightningModule:
    """An instance with the hyper-parameters of the checkpoint, by the rules of `load_from_checkpoint`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found keys that are")  # what quantizers learned has no place yet
            module = _load_state(cls, saved, strict=False)
    except (TypeError, ValueError) as error:
        if cls is DistillationModule and str(error).startswith("student: needed"):
            raise ValueError(
                f"checkpoint: {place!r} names neither its teacher nor its student, which were models in memory; load it in Python with "
                "load_trained(path, model=DistillationModule(teacher=model))"
            ) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"model: a {cls.__name__} cannot be built from the hyper-parameters in {place!r} {sorted(saved.get('hyper_parameters', {}))}: "
            f"{error}; pass an instance in Python, load_trained(path, model={cls.__name__}(...)), and call save_hyperparameters() in its "
            "constructor before the next training"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"model: the weights in {place!r} do not fit: {error}") from error
    assert isinstance(module, pl.LightningModule)
    return module


def _root(module: pl.LightningModule, saved: Mapping[str, Any], place: str) -> nn.Module:
    here = getattr(module, "quantization_root", None)
    if (there := saved.get(ROOT, here)) != here:
        raise ValueError(
            f"quantization_root: {place!r} was trained with quantizers below {there!r} (None is the whole module), and the given "
            f"{type(module).__name__} names {here!r}; set its quantization_root to {there!r}"
        )
    try:
        return quantization_root(module)
    except AttributeError as error:
        raise ValueError(f"quantization_root: {type(module).__name__} has no submodule {here!r}") from error


def _scheme_in(saved: Mapping[str, Any], place: str) -> QuantScheme:
    if saved.get("quantization_scheme") is not None:  # of a DistillationModule: the stage that was trained last
        return QuantScheme.parse(saved["quantization_scheme"])
    states = (state for state in saved.get("callbacks", {}).values() if isinstance(state, Mapping))
    state = next((state for state in states if {"format_version", "scheme"} <= state.keys()), None)
    if state is None:
        raise ValueError(
            f"callbacks: {place!r} holds no state of QuantizationCallback; it was trained without one, or saved with "
            "save_weights_only=True. Where you know the scheme: insert_quantizers(model, scheme), then model.load_state_dict(...)"
        )
    if (unfinished := unfinished_schedule(saved, present=())) is not None:
        raise ValueError(f"{unfinished[0]}; take a checkpoint from after that step")
    return QuantScheme.parse(state["scheme"])


def _load_weights(module: pl.LightningModule, state: dict[str, Any], place: str) -> None:
    """Strictly, except for what the module itself leaves out of its checkpoints."""
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"model: the weights in {place!r} do not fit: {error}") from error
    partial = isinstance(module, DistillationModule) or not module.strict_loading
    needed = f"{module.quantization_root}." if partial and getattr(module, "quantization_root", None) else ""
    missing = [name for name in result.missing_keys if name.startswith(needed)]
    unknown = [] if partial and not isinstance(module, DistillationModule) else result.unexpected_keys
    if missing or unknown:
        raise ValueError(
            f"model: the given {type(module).__name__} is not what {place!r} was saved from; missing in the checkpoint: {missing[:3]}, "
            f"unknown to the module: {unknown[:3]}"
        )
