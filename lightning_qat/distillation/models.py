"""Teacher and student of a distillation: how they are built, and how they come to the processes of a Trainer."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_qat.distillation.deferred import DeferredWeights
from lightning_qat.distillation.offload import is_offloaded
from lightning_qat.distillation.sharding import shard
from lightning_qat.distillation.teachers import build_student, load_teacher, quantized_as
from lightning_qat.generation.skeleton import causal_lm_skeleton

Model = str | nn.Module | None


def build_models(settings: Mapping[str, Any], teacher: Model, student: Model) -> tuple[Any, Any]:
    """(teacher or None, student), the teacher frozen and in eval mode, the student fp32 and in training mode.

    Args:
        settings: The arguments of :class:`~lightning_qat.DistillationModule` that concern them.
        teacher: What the user called it.
        student: The same, or None for a copy of the teacher.

    Raises:
        ValueError: They cannot be loaded, both are None, or settings exclude each other.
    """
    if teacher is None and student is None:
        raise ValueError("student: needed when teacher is None; pass a folder, a hub id or a causal language model, or give a teacher")
    if (dtype := settings["param_dtype"]) not in (None, "bfloat16", "float16"):
        raise ValueError(f"param_dtype: got {dtype!r}, expected 'bfloat16', 'float16' or None for the weights' own")
    quantization, offload = settings["teacher_quantization"], settings["teacher_offload"]
    if settings["defer_loading"]:
        for name in ("teacher_quantization", "teacher_offload", "lora"):
            if settings[name]:
                raise ValueError(f"defer_loading: cannot be combined with {name}; load now, or leave {name} out")
        return _skeletons(teacher, student, settings["teacher_dtype"])
    frozen = None if teacher is None else load_teacher(teacher, settings["teacher_dtype"], quantization, offload)
    return frozen, build_student(frozen, teacher, student)


def _skeletons(teacher: Model, student: Model, teacher_dtype: str) -> tuple[Any, Any]:
    for field, value in (("teacher", teacher), ("student", student)):
        if isinstance(value, nn.Module):
            raise ValueError(f"defer_loading: {field} is a model in memory and has its weights; name it by folder or hub id, or load now")
    if teacher_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"teacher_dtype: got {teacher_dtype!r}, expected 'float32', 'bfloat16' or 'float16' with defer_loading")
    frozen = None if teacher is None else causal_lm_skeleton(str(teacher), getattr(torch, teacher_dtype)).requires_grad_(False)
    return frozen, causal_lm_skeleton(str(teacher if student is None else student), torch.float32).train()


def check_strategy(trainer: pl.Trainer, param_dtype: str | None) -> None:
    """Refuse what a strategy cannot do for a :class:`~lightning_qat.DistillationModule`.

    Args:
        trainer: Its Trainer, which need not have started its processes.
        param_dtype: What the user called it.

    Raises:
        MisconfigurationException: Tensor parallelism, sizes that do not multiply to the processes, or a dtype that nobody gathers in.
    """
    strategy, world = trainer.strategy, trainer.num_nodes * trainer.num_devices
    if not isinstance(strategy, ModelParallelStrategy):
        if param_dtype is not None and trainer.state.fn == "fit":
            raise MisconfigurationException(
                f"param_dtype: got {param_dtype!r} with {type(strategy).__name__}, which gathers no weights; it is for "
                "ModelParallelStrategy (FSDP2). Leave it out, or see precision='bf16-mixed'"
            )
        return
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    # Lightning's "auto": data parallel over nodes, tensor parallel over the devices of each.
    sizes = (trainer.num_nodes if data == "auto" else data, trainer.num_devices if tensor == "auto" else tensor)
    if sizes != (world, 1):
        raise MisconfigurationException(
            f"ModelParallelStrategy(data_parallel_size={data!r}, tensor_parallel_size={tensor!r}) on {world} processes: DistillationModule "
            f"is sharded (FSDP2) and not split within a layer; use data_parallel_size={world}, tensor_parallel_size=1"
        )


def distribute(module: Any) -> None:
    """Give a :class:`~lightning_qat.DistillationModule` its deferred weights, and shard it where its Trainer has a device mesh.

    Raises:
        ValueError: Weights cannot be read.
    """
    mesh = module.device_mesh
    sources: dict[str, DeferredWeights] = {}
    for model, name, dtype in _models(module):
        if isinstance(model, FSDPModule):
            continue  # by an earlier call: Lightning asks once for every fit, validate, test and predict

        def fill(part: nn.Module, model: nn.Module = model, name: str = name) -> None:
            if any(parameter.is_meta for parameter in part.parameters()):
                sources[name] = sources.get(name) or DeferredWeights(name, module.device)
                sources[name].fill(model, part)

        if mesh is None:
            fill(model)
        else:
            shard(model, mesh["data_parallel"], dtype, fill)


def _models(module: Any) -> list[tuple[nn.Module, str, torch.dtype | None]]:
    """(model, its name, dtype to gather its weights in), the teacher first: its weights go before the student's come.

    A teacher in CPU memory stays there, and codes of a quantized one cannot be sharded.
    """
    names, teacher, dtype = module.hparams, module.teacher, module.hparams.param_dtype
    student = (module.student, names.get("student") or names.get("teacher") or "", None if dtype is None else getattr(torch, dtype))
    stays = teacher is None or is_offloaded(teacher) or quantized_as(teacher.config) is not None
    return [student] if stays else [(teacher, names.get("teacher") or "", None), student]
