"""Teacher and student of a distillation: how they are built, and how they come to the processes of a Trainer."""

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_qat.distillation.deferred import DeferredWeights
from lightning_qat.distillation.sharding import shard
from lightning_qat.generation import cast_parameters, check_causal_lm, load_causal_lm
from lightning_qat.generation.skeleton import causal_lm_skeleton

Model = str | nn.Module | None


def build_student(teacher: Any, teacher_name: Model, student: Model) -> nn.Module:
    """The student, fp32 and in training mode.

    Args:
        teacher: The teacher, built.
        teacher_name: What the user called it.
        student: Folder, hub id, a model in memory, or None for a copy of the teacher.

    Raises:
        ValueError: It cannot be loaded, or is the teacher itself.
    """
    if student is None:
        same = isinstance(teacher_name, nn.Module) or next(teacher.parameters()).dtype == torch.float32
        model = copy.deepcopy(teacher) if same else load_causal_lm(str(teacher_name), "float32")
        return cast_parameters(model, torch.float32).requires_grad_(True).train()
    if student is teacher and not isinstance(student, str):
        raise ValueError("student: is the teacher itself; pass None for a copy of it")
    model = load_causal_lm(student, "float32") if isinstance(student, str) else check_causal_lm(student, "student")
    return cast_parameters(model, torch.float32).train()


def skeletons(teacher: Model, student: Model, teacher_dtype: str) -> tuple[Any, Any]:
    """(teacher or None, student) without weights.

    Raises:
        ValueError: One of them is a model in memory, or a dtype is not known.
    """
    for field, value in (("teacher", teacher), ("student", student)):
        if isinstance(value, nn.Module):
            raise ValueError(f"defer_loading: {field} is a model in memory and has its weights; name it by folder or hub id, or load now")
    if teacher_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"teacher_dtype: got {teacher_dtype!r}, expected 'float32', 'bfloat16' or 'float16' with defer_loading")
    frozen = None if teacher is None else causal_lm_skeleton(str(teacher), getattr(torch, teacher_dtype))
    return frozen, causal_lm_skeleton(str(teacher if student is None else student), torch.float32).train()


def distribute(module: Any) -> None:
    """Give a :class:`~lightning_qat.DistillationModule` its deferred weights, and shard it where its Trainer has a device mesh.

    Raises:
        MisconfigurationException: Tensor parallelism is asked for.
        ValueError: Weights cannot be read.
    """
    mesh = module.device_mesh
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            f"ModelParallelStrategy(tensor_parallel_size={mesh['tensor_parallel'].size()}): DistillationModule is sharded (FSDP2) and not "
            f"split within a layer; use data_parallel_size={mesh.size()}, tensor_parallel_size=1"
        )
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
    """(model, its name, dtype to gather its weights in), the teacher first: its weights go before the student's come."""
    names = module.hparams
    student = (module.student, names.get("student") or names.get("teacher") or "", module.param_dtype)
    return [student] if module.teacher is None else [(module.teacher, names.get("teacher") or "", None), student]
