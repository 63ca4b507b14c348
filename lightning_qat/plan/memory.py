"""The memory of a training step: what lasts is counted, what comes and goes is taken from the simulated step."""

from collections import Counter
from dataclasses import dataclass

import torch

from lightning_qat.plan.setting import GPUS_OF_A_NODE, Setting
from lightning_qat.plan.shapes import Shape
from lightning_qat.plan.simulation import ACTIVATIONS, BACK_MIDDLE, FORWARD, LOSS, LOSSES, QUANTIZED, STUDENT, TEACHER, step_peaks
from lightning_qat.plan.tracker import GRADIENTS

CONTEXT = 1_500_000_000  # of the CUDA context, cuBLAS and NCCL; no allocator counts them
FRAGMENTS = 0.05  # of what comes and goes: a caching allocator keeps blocks that do not fit the next request
PARTS = ("student", GRADIENTS, "optimizer", "teacher", "gathered weights", QUANTIZED, ACTIVATIONS, LOSS, "buckets", "reserve")
NF4_BYTES = 0.5 + 4 / 64  # a scale in fp32 for each 64 codes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that one process needs on its GPU.

    Attributes:
        phase: When in a step that is.
        parts: What they are for, at that moment.
        phases: The sum in each phase of a step.
        loading: Bytes of host memory on one node while models are loaded.
        host: Bytes of host memory on one node that stay in use.
    """

    phase: str
    parts: dict[str, int]
    phases: dict[str, int]
    loading: int
    host: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What an allocator counts: without the reserve."""
        return self.total - self.parts["reserve"]


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """What a training step of a model needs.

    Args:
        shape: The model; the teacher has the same.
        setting: How it is trained.

    Raises:
        ValueError: The model cannot be run without values.
    """
    lasting, phases = _lasting(shape, setting), {}
    for phase, peak in step_peaks(shape.config, setting.step).items():
        if phase != BACK_MIDDLE:
            phases[phase] = _at(phase, peak, lasting, shape, setting)
    worst = max(phases, key=lambda phase: sum(phases[phase].values()))
    parts = {name: phases[worst].get(name, 0) for name in PARTS}
    comes_and_goes = sum(parts[name] for name in (ACTIVATIONS, QUANTIZED, LOSS, "gathered weights"))
    parts["reserve"] = CONTEXT + int(FRAGMENTS * comes_and_goes)
    return Estimate(
        phase=worst,
        parts=parts,
        phases={phase: sum(values.values()) for phase, values in phases.items()},
        loading=_loading(shape, setting),
        host=teacher_bytes(shape, "bfloat16") * min(setting.gpus, GPUS_OF_A_NODE) if setting.teacher == "offload" else 0,
    )


def at_least(shape: Shape, setting: Setting) -> int:
    """What a step needs if it made no tensor at all: known without running anything."""
    return sum(_lasting(shape, setting).values()) + CONTEXT


def trained(shape: Shape, setting: Setting) -> int:
    """How many parameters are trained."""
    return shape.parameters if setting.lora_rank is None else setting.lora_rank * shape.widths


def _lasting(shape: Shape, setting: Setting) -> dict[str, int]:
    facts, count, size = setting.facts, trained(shape, setting), setting.dtype.itemsize
    beside = 0 if setting.lora_rank is None else count * 4
    return {
        "student": int((shape.parameters * size + beside) * setting.share(facts.weights)),
        GRADIENTS: int(count * size * setting.share(facts.gradients)),
        "optimizer": int(count * setting.state_bytes * setting.share(facts.optimizer)),
        "teacher": _teacher_on_gpu(shape, setting),
        "buckets": (count * size if facts.bucketed else 0) + facts.buffers,
    }


def teacher_bytes(shape: Shape, kind: str) -> int:
    """Bytes of a whole teacher; bitsandbytes leaves embeddings and head in bf16."""
    if kind in ("nf4", "int8"):
        return int(shape.linear * (NF4_BYTES if kind == "nf4" else 1) + (shape.parameters - shape.linear) * 2)
    return shape.parameters * {"none": 0, "float32": 4}.get(kind, 2)


def _teacher_on_gpu(shape: Shape, setting: Setting) -> int:
    if setting.teacher == "offload":
        return 2 * max(shape.block, shape.head)  # one block, or the embedding or the head, is on the GPU at a time
    sharded = setting.facts.weights and setting.teacher in ("bfloat16", "float32")
    root = shape.root * (4 if setting.teacher == "float32" else 2) if sharded else 0  # the outermost group stays whole once gathered
    return int(teacher_bytes(shape, setting.teacher) * setting.share(sharded)) + root


def _at(phase: str, peak: Counter[str], lasting: dict[str, int], shape: Shape, setting: Setting) -> dict[str, int]:
    """Bytes by part at the highest moment of a phase."""
    parts = {**lasting, **{name: int(size) for name, size in peak.items() if name != GRADIENTS}}
    if phase not in FORWARD:
        share = trained(shape, setting) / shape.parameters if setting.lora_rank is not None else 1.0
        parts[GRADIENTS] = min(int(peak[GRADIENTS] * share), lasting[GRADIENTS])
    parts["gathered weights"] = _gathered(phase, shape, setting)
    return parts


def _gathered(phase: str, shape: Shape, setting: Setting) -> int:
    """Full weights: the block at work, the next one, and what stands outside the blocks; going back, their gradients too."""
    if not setting.facts.weights:
        return 0
    size = setting.gather_dtype.itemsize
    if phase == TEACHER and setting.teacher in ("bfloat16", "float32"):
        return 2 * shape.block * (4 if setting.teacher == "float32" else 2) + shape.root * size
    whole = (0 if phase == LOSSES else 2 * shape.block) + shape.root
    going_back = phase not in (STUDENT, *FORWARD) and setting.lora_rank is None
    return whole * size * (2 if going_back else 1)


def _loading(shape: Shape, setting: Setting) -> int:
    """Deferred, one process reads the files, in 16 bits; else every process of a node builds both models."""
    if setting.deferred:
        return shape.parameters * torch.bfloat16.itemsize
    return int(
        min(setting.gpus, GPUS_OF_A_NODE)
        * (shape.parameters * 4 + teacher_bytes(shape, "bfloat16" if setting.teacher == "offload" else setting.teacher))
    )
