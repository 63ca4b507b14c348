"""Tokens per second, from one real block on this machine: the only way this room says anything about speed."""

import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_qat.modules import insert_quantizers
from lightning_qat.plan.setting import Setting
from lightning_qat.plan.shapes import Shape, shallow

LIMIT = 60.0  # seconds after which no further run begins; at least two are made
COPIES = 8  # of the weights of a block, in fp32: weights, gradients, the optimizer's state, the teacher's, and room for activations


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An estimate from one block on this machine.

    Attributes:
        seconds: Of one step of the whole model in one process, embeddings, head, loss and communication left out.
        tokens_per_second: In one process.
        block_seconds: What was measured, the median of `runs` steps of one block.
        runs: How many.
        device: Where.
    """

    seconds: float
    tokens_per_second: float
    block_seconds: float
    runs: int
    device: str


def measure_speed(shape: Shape, setting: Setting) -> Speed:
    """Time a quantized step of one block: the student forward and backward, and the teacher forward.

    Args:
        shape: The model.
        setting: How it is trained.

    Raises:
        ValueError: This machine has not enough memory for one block.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free, needed = _free(device), COPIES * 4 * shape.block
    if free < needed:
        raise ValueError(f"measure: one block needs about {needed / 1e9:.1f} GB, this machine has {free / 1e9:.1f} GB free; leave it out")
    step = _step(shape, setting, device)
    times: list[float] = []
    end = time.monotonic() + LIMIT
    while len(times) < 2 or (len(times) < 12 and time.monotonic() < end):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    block = statistics.median(times[1:])  # the first compiles kernels
    seconds = block * shape.config.num_hidden_layers
    tokens = setting.batch_size * setting.max_length
    return Speed(seconds=seconds, tokens_per_second=tokens / seconds, block_seconds=block, runs=len(times) - 1, device=_name(device))


def _step(shape: Shape, setting: Setting, device: torch.device) -> Any:
    """One step of a model of one block, without embeddings and head, as a call."""
    config = shallow(shape.config, 1)
    config.vocab_size, config.pad_token_id = 8, None
    with device:
        student: Any = AutoModelForCausalLM.from_config(config, dtype=setting.dtype).get_decoder().train()
        teacher: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).get_decoder().eval().requires_grad_(False)
        hidden = torch.randn(setting.batch_size, setting.max_length, config.hidden_size)
    insert_quantizers(student, setting.scheme)
    if setting.gradient_checkpointing:
        student.activation_checkpointing_enable()
    autocast: Any = nullcontext() if setting.step.autocast is None else torch.autocast(device.type, setting.step.autocast)

    def step() -> None:
        with autocast:
            if setting.teacher != "none":
                with torch.no_grad():
                    teacher(inputs_embeds=hidden.to(torch.bfloat16), use_cache=False)
            out = student(inputs_embeds=hidden.to(setting.dtype).requires_grad_(), use_cache=False).last_hidden_state
        out.float().pow(2).mean().backward()
        student.zero_grad(set_to_none=True)

    return step


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
