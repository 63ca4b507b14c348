"""How a model shall be trained, as data: every choice that costs memory."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from lightning_qat.registry import did_you_mean
from lightning_qat.scheme import QuantScheme

UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a strategy keeps only a share of in each process.

    Attributes:
        weights: Weights are sharded, and gathered block by block for use.
        gradients: Gradients are sharded.
        optimizer: The state of the optimizer is sharded.
        gathers_in: Dtype in which weights are gathered under mixed precision; None: in their own unless the user says otherwise.
        bucketed: Gradients have a second copy in communication buckets.
        buffers: Bytes of communication buffers of a fixed size.
        master: Weights are cast to 16 bits under mixed precision, and the optimizer keeps fp32 ones (DeepSpeed).
    """

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    gathers_in: torch.dtype | None = None
    bucketed: bool = False
    buffers: int = 0
    master: bool = False


ZERO_BUFFERS = 2 * 2 * 200_000_000  # Lightning's buckets for reducing and gathering, 2e8 elements of 16 bits each
STRATEGIES = {
    "single": Strategy(),
    "ddp": Strategy(bucketed=True),  # Lightning leaves gradient_as_bucket_view off
    "fsdp": Strategy(weights=True, gradients=True, optimizer=True, gathers_in=torch.bfloat16),
    "fsdp2": Strategy(weights=True, gradients=True, optimizer=True),
    "deepspeed_stage_2": Strategy(gradients=True, optimizer=True, buffers=ZERO_BUFFERS, master=True),
    "deepspeed_stage_3": Strategy(
        weights=True, gradients=True, optimizer=True, gathers_in=torch.bfloat16, buffers=ZERO_BUFFERS, master=True
    ),
}
# Dtype of the weights, dtype of the products under autocast.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}
# Bytes of state for each parameter, in fp32 and in bf16. 8-bit: two codes and a scale in fp32 for each 256 of either.
OPTIMIZERS = {"adamw": (8.0, 4.0), "adamw8bit": (2 + 8 / 256, 2 + 8 / 256), "sgd": (0.0, 0.0)}
GPUS_OF_A_NODE = 8
KEPT_PROBABILITIES = 32  # of the teacher, with each token, where there is none in training
TEACHERS = {
    "bfloat16": "in this process, sharded with the student where weights are sharded",
    "float32": "the same in fp32",
    "replicated": "bf16, whole in every process although the student is sharded",
    "nf4": "4 bits through bitsandbytes, whole in every process",
    "int8": "8 bits through bitsandbytes, whole in every process",
    "offload": "bf16 in the memory of the host, a block at a time on the GPU",
    "none": "no teacher: its probabilities were stored with the samples",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides which tensors a training step makes."""

    scheme: QuantScheme
    dtype: torch.dtype
    autocast: torch.dtype | None
    teacher: torch.dtype | None
    gradient_checkpointing: bool
    loss_chunk: int | None
    batch_size: int
    max_length: int
    gradient_share: float
    attention: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Every choice that costs memory.

    Args:
        gpus: Processes, one to a GPU.
        strategy: One of ``STRATEGIES``.
        precision: One of ``PRECISIONS``, the Trainer's words.
        optimizer: One of ``OPTIMIZERS``; ``sgd`` is without momentum.
        teacher: One of ``TEACHERS``.
        scheme: Quantization scheme.
        batch_size: Samples per process and step.
        max_length: Tokens per sample.
        gradient_checkpointing: Whether blocks are computed again in the backward pass.
        loss_chunk: Tokens whose logits exist at once; None for the plain loss.
        param_dtype: Dtype in which FSDP2 gathers weights, ``bfloat16`` or None for fp32.
        lora_rank: Train only matrices of this rank beside each weight; None trains all weights.
        attention: ``sdpa``, or ``eager``, which keeps the probabilities of all pairs of tokens.
        device: ``cuda`` or ``cpu``: losses compute so many rows at a time as suit it.

    Raises:
        ValueError: A name or number that is not known, or a combination that cannot run.
    """

    gpus: int = 1
    strategy: str = "single"
    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    teacher: str = "bfloat16"
    scheme: str = "w4a8kv4"
    batch_size: int = 1
    max_length: int = 2048
    gradient_checkpointing: bool = True
    loss_chunk: int | None = 1024
    param_dtype: str | None = None
    lora_rank: int | None = None
    attention: str = "sdpa"
    device: str = "cuda"

    def __post_init__(self) -> None:
        names: dict[str, Any] = {"strategy": STRATEGIES, "precision": PRECISIONS, "optimizer": OPTIMIZERS, "teacher": TEACHERS}
        names |= {"attention": ("sdpa", "eager"), "device": ("cuda", "cpu")}
        for field, allowed in names.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, {did_you_mean(getattr(self, field), allowed)}")
        for field in ("gpus", "batch_size", "max_length", "loss_chunk", "lora_rank"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: got {value}, expected at least 1")
        if self.param_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"param_dtype: got {self.param_dtype!r}, expected 'bfloat16', 'float16' or None")
        if self.strategy == "single" and self.gpus > 1:
            raise ValueError(f"strategy: 'single' is for one GPU, got gpus={self.gpus}; use 'ddp' or 'fsdp2', or leave it out")
        QuantScheme.parse(self.scheme)

    @property
    def facts(self) -> Strategy:
        """What the strategy shards."""
        return STRATEGIES[self.strategy]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that autograd sees."""
        dtype, autocast = PRECISIONS[self.precision]
        return autocast if self.facts.master and autocast is not None else dtype

    @property
    def gather_dtype(self) -> torch.dtype:
        """In which sharded weights are gathered."""
        if self.param_dtype is not None:
            return getattr(torch, self.param_dtype)
        mixed = PRECISIONS[self.precision][1] is not None
        return self.facts.gathers_in if mixed and self.facts.gathers_in is not None else self.dtype

    @property
    def state_bytes(self) -> float:
        """Bytes of the optimizer's state for each trained parameter, fp32 weights of its own included."""
        in_fp32, in_bf16 = OPTIMIZERS[self.optimizer]
        return (in_bf16 if self.precision == "bf16-true" else in_fp32) + (4 if self.facts.master and self.dtype.itemsize == 2 else 0)

    @property
    def deferred(self) -> bool:
        """Whether weights are read when models are sharded, by one process."""
        return self.facts.weights and self.lora_rank is None and self.teacher not in ("nf4", "int8", "offload")

    def share(self, sharded: bool) -> float:
        """The part that one process keeps."""
        return 1 / self.gpus if sharded else 1.0

    @property
    def step(self) -> Step:
        """The part of it that decides which tensors a step makes."""
        teacher = {"none": None, "float32": torch.float32}.get(self.teacher, torch.bfloat16)
        return Step(
            scheme=QuantScheme.parse(self.scheme),
            dtype=self.gather_dtype,
            autocast=PRECISIONS[self.precision][1],
            teacher=teacher,
            gradient_checkpointing=self.gradient_checkpointing,
            loss_chunk=self.loss_chunk,
            batch_size=self.batch_size,
            max_length=self.max_length,
            # What autograd makes is in the gathered dtype, what stays is in the dtype of the weights.
            gradient_share=self.share(self.facts.gradients) * self.dtype.itemsize / self.gather_dtype.itemsize,
            attention=self.attention,
            device=self.device,
        )


def parse_memory(text: str) -> int:
    """Bytes of ``80GB`` (decimal, 80 * 10^9) or ``80GiB`` (80 * 2^30).

    Raises:
        ValueError: No unit, or something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"memory: got {text!r}, expected a number with a unit ({', '.join(UNITS)}), such as '80GB' or '80GiB'")
    return int(float(match[1]) * UNITS[match[2]])
