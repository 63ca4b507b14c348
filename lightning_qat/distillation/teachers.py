"""Teachers and the students beside them: a frozen teacher in floats, in 4 or 8 bits, or in CPU memory, and never by accident.

bitsandbytes' layers are loaded by transformers. Lightning's ``BitsandbytesPrecision`` would convert the student too.
"""

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_qat.distillation.offload import bring_back, is_offloaded, offload_weights
from lightning_qat.generation import cast_parameters, check_causal_lm, load_causal_lm
from lightning_qat.generation.teacher import read_config, resolve

QUANTIZATIONS = ("nf4", "int8")
BLOCK = 64  # weights that share a scale in NF4


def load_teacher(name_or_model: str | nn.Module, dtype: str = "float32", quantization: str | None = None, offload: bool = False) -> Any:
    """A frozen teacher in eval mode, in CPU memory; a Trainer moves it to the device.

    Args:
        name_or_model: Folder, hub id, ``tiny-teacher``, or a causal language model in memory, which is frozen in place.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the dtype it was saved in; of a model loaded by name. With
            ``quantization``, the dtype of what is not quantized, and of NF4's matrix products.
        quantization: ``nf4`` (4 bits in blocks of 64, arXiv 2305.14314) or ``int8`` (LLM.int8(), arXiv 2208.07339, whose products are in
            fp16 whatever the dtype): the linear layers except the head. Needs the package accelerate. Also the consent to a teacher that
            is quantized already.
        offload: Leave the weights in CPU memory, and have one block's on the device at a time.

    Raises:
        ValueError: It cannot be loaded, is quantized and ``quantization`` does not say so, or the choices exclude each other.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"teacher_quantization: got {quantization!r}, expected one of {QUANTIZATIONS} or None")
    if quantization is not None and offload:
        raise ValueError(f"teacher_offload: cannot be combined with teacher_quantization={quantization!r}; choose one of them")
    if isinstance(name_or_model, nn.Module):
        model = bring_back(check_causal_lm(name_or_model, "teacher"))
        _check_consent(model.config, type(model).__name__, quantization, in_memory=True)
    else:
        _check_consent(read_config(name_or_model), name_or_model, quantization, in_memory=False)
        model = load_causal_lm(name_or_model, dtype) if quantization is None else _load_quantized(name_or_model, dtype, quantization)
    if quantization is not None:
        _keep_layout(model)
    model.requires_grad_(False).eval()
    return offload_weights(model) if offload else model


def build_student(teacher: Any, teacher_name: str | nn.Module | None, student: str | nn.Module | None) -> Any:
    """The student, in fp32 and training mode.

    Args:
        teacher: From :func:`load_teacher`; None without.
        teacher_name: What the user called it.
        student: Folder, hub id, a causal language model in memory, or None for a copy of the teacher.

    Raises:
        ValueError: It cannot be loaded, its weights are quantized, or it shares parameters with the teacher.
    """
    if student is None:
        return cast_parameters(_float_copy(teacher, teacher_name), torch.float32).requires_grad_(True).train()
    in_memory = isinstance(student, nn.Module)
    config = check_causal_lm(student, "student").config if in_memory else read_config(str(student))
    if found := quantized_as(config):
        raise ValueError(
            f"student: its weights are quantized to {found} and cannot be trained; pass the float model, the callback quantizes it"
        )
    model: Any = student if in_memory else load_causal_lm(str(student), "float32")
    if teacher is not None and (shared := _shared(model, teacher)):
        raise ValueError(
            f"student: shares {len(shared)} parameters with the teacher, the first is {shared[0]!r}; pass None for a copy of it"
        )
    return cast_parameters(model, torch.float32).train()


def move_teacher(teacher: Any, fn: Callable[[Tensor], Tensor]) -> None:
    """Move a teacher where `fn` moves things, without casting it: rounded codes and rotary frequencies would be other ones.

    Args:
        teacher: From :func:`load_teacher`, or None; an offloaded one stays where it is.
        fn: What ``nn.Module._apply`` is called with.
    """
    if teacher is None or is_offloaded(teacher):
        return

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta or not tensor.is_floating_point():
            return fn(tensor)
        return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

    teacher._apply(move)
    for layer in teacher.modules():
        if type(layer).__name__ == "Linear8bitLt":
            _move_statistics(layer)


def outside_ddp(teacher: Any) -> list[str]:
    """Names of the tensors that DDP must leave alone: it would look for an offloaded teacher's on the device, and overwrite codes."""
    if teacher is None or not (is_offloaded(teacher) or quantized_as(teacher.config)):
        return []
    return [name for named in (teacher.named_parameters, teacher.named_buffers) for name, _ in named()]


def quantized_as(config: Any) -> str | None:
    """How the weights of a model with this configuration are quantized: ``nf4``, ``int8``, another method's name, or None."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    method = settings.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def _check_consent(config: Any, name: str, quantization: str | None, in_memory: bool) -> None:
    found = quantized_as(config)
    if found == quantization:
        return
    if found is None:
        if in_memory:
            raise ValueError(
                f"teacher_quantization: got {quantization!r} and a float {name} in memory, which stays as it is; pass the folder or hub id"
            )
    elif found in QUANTIZATIONS and quantization is None:
        raise ValueError(f"teacher: the weights of {name} are quantized; pass teacher_quantization={found!r} if that is meant")
    else:
        raise ValueError(
            f"teacher: the weights of {name} are quantized to {found}, teacher_quantization is {quantization!r}; pass the float model"
        )


def _load_quantized(name: str, dtype: str, quantization: str) -> Any:
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            f"teacher_quantization: {quantization!r} needs the package accelerate, with which transformers loads it: pip install accelerate"
        )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: got {dtype!r}, expected 'float32', 'bfloat16', 'float16' or 'auto'")
    config = read_config(name)
    number = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    if quantization == "nf4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=number)
    else:
        how = BitsAndBytesConfig(load_in_8bit=True)
    new = {} if quantized_as(config) else {"quantization_config": how}
    try:
        # Not the GPU that happens to be the current one: which of them this process gets, the Trainer knows.
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=number, device_map={"": "cpu"}, **new)
    except OSError as error:
        raise ValueError(f"teacher: cannot read weights from {name!r}: {error}") from error


def _keep_layout(model: Any) -> None:
    """Weights as loaded: on some CPUs bitsandbytes would repack NF4 codes, rounding scales to bf16, for good and not fit for a GPU.

    Raises:
        ValueError: That has happened, or a row is no multiple of a block: bitsandbytes 0.50 reads such rows wrongly on a CPU.
    """
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            if layer.in_features % BLOCK:
                raise ValueError(
                    f"teacher_quantization: 'nf4' needs rows of a multiple of {BLOCK}, {name} has {layer.in_features}; take 'int8'"
                )
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"teacher: bitsandbytes has repacked {name} for this CPU, which cannot be undone; pass the folder or hub id"
                )
            layer.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not the line that every int8 layer writes in every call unless the teacher is in fp16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _move_statistics(layer: Any) -> None:
    """Codes and scales beside the weight of an int8 layer, which bitsandbytes moves only in the layer's own ``to``."""
    for holder in (layer.weight, layer.state):
        if holder.CB is not None:
            holder.CB = layer.weight.data
        if holder.SCB is not None:
            holder.SCB = holder.SCB.to(layer.weight.device)


def _float_copy(teacher: Any, teacher_name: str | nn.Module | None) -> Any:
    in_memory = isinstance(teacher_name, nn.Module)
    if found := quantized_as(teacher.config if in_memory else read_config(str(teacher_name))):
        raise ValueError(
            f"student: no copy of a teacher whose weights are quantized to {found} can be trained; pass the float model as student"
        )
    if in_memory or (quantized_as(teacher.config) is None and next(teacher.parameters()).dtype == torch.float32):
        return bring_back(copy.deepcopy(teacher))
    return load_causal_lm(str(teacher_name), "float32")


def _shared(student: nn.Module, teacher: nn.Module) -> list[str]:
    theirs = {parameter.data_ptr() for parameter in teacher.parameters() if not parameter.is_meta}
    return [name for name, parameter in student.named_parameters() if not parameter.is_meta and parameter.data_ptr() in theirs]
