"""A training step of a shallow model on fake tensors: the real layers, quantizers and autograd, with shapes and no values.

Every phase of a step needs memory that grows linearly with the number of blocks. So two shallow models are run, and what a deep one needs
follows. Fake quantization counts as the one kernel that it is on a GPU (and, once compiled, on a CPU).
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qat.losses import SoftCrossEntropy, TopK, base, chunked_sums, row_sums, sparse
from lightning_qat.modules import insert_quantizers
from lightning_qat.modules.blocks import blocks_of
from lightning_qat.modules.layer import quant_layers
from lightning_qat.numerics.backends import compiled, reference
from lightning_qat.plan.setting import KEPT_PROBABILITIES, Step
from lightning_qat.plan.shapes import shallow
from lightning_qat.plan.tracker import MemoryTracker

ACTIVATIONS, QUANTIZED, LOSS = "activations", "quantized weights", "loss"
STUDENT, TEACHER, LOSSES = "student", "teacher", "loss"
BACK_LOSS, BACK_LAST, BACK_MIDDLE, BACK_FIRST = "backward, loss", "backward, last block", "backward", "backward, first block"
FORWARD = (STUDENT, TEACHER, LOSSES)
DEPTHS = (2, 3)
VALUES = (reference.fake_quantize, reference.fake_quantize_dynamic)

Peaks = dict[str, Counter[str]]


def step_peaks(config: Any, step: Step) -> Peaks:
    """What a training step needs in one process beside weights, optimizer and teacher, at the highest moment of each phase.

    Args:
        config: Of the student, as transformers has it.
        step: How it is trained.

    Returns:
        Bytes by phase and category. Phases of the backward pass hold the gradients that exist by then.

    Raises:
        ValueError: The model cannot be run without values.
    """
    text, depth = json.dumps(config.to_dict(), default=str, sort_keys=True), config.num_hidden_layers
    if depth <= max(DEPTHS):
        return _run(text, depth, step)
    few, more = (_run(text, blocks, step) for blocks in DEPTHS)
    extra = depth - DEPTHS[0]
    return {
        phase: Counter({key: few[phase][key] + extra * (more[phase][key] - few[phase][key]) for key in {*few[phase], *more[phase]}})
        for phase in few
    }


@lru_cache(maxsize=256)
def _run(text: str, depth: int, step: Step) -> Peaks:
    """The peaks of a model with so many blocks."""
    settings = json.loads(text)
    config = shallow(AutoConfig.for_model(settings.pop("model_type"), **settings), depth)
    tracker = MemoryTracker(step.gradient_share)
    try:
        with FakeTensorMode(), _kernels(step.device):
            student = _build(config, step.dtype, step.attention).train()
            insert_quantizers(student, step.scheme)
            if step.gradient_checkpointing:
                student.activation_checkpointing_enable()
            teacher = None if step.teacher is None else _build(config, step.teacher, step.attention).eval().requires_grad_(False)
            tracker.ignore(t for model in (student, teacher) if model is not None for t in (*model.parameters(), *model.buffers()))
            _watch(student, tracker)
            with tracker:
                _step(student, teacher, step, tracker)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"model: a {config.model_type} cannot be run without values, so its memory cannot be told: {reason}") from error
    return tracker.peaks


def _build(config: Any, dtype: torch.dtype, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@contextmanager
def _kernels(device: str) -> Iterator[None]:
    """What runs on fake tensors, which are CPU tensors, as it runs on the device.

    Fake quantization makes what its kernel makes, the result and nothing else, and sets off no compilation; losses take as many rows at a
    time as they do there.
    """

    def run(formula: Any, x: Tensor, *args: Any) -> Any:
        return x.new_empty(x.shape, dtype=args[-1]) if formula in VALUES else formula(x, *args)

    before, sizes = compiled.run, [(table, dict(table)) for table in (base.ROW_ELEMENTS, sparse.CHUNKS)]
    compiled.run = run
    for table, _ in sizes if device != "cpu" else ():
        table.clear()
    try:
        yield
    finally:
        compiled.run = before
        for table, content in sizes:
            table.update(content)


def _watch(student: Any, tracker: MemoryTracker) -> None:
    """Tell the tracker what runs: kernels of quantizers, blocks of the backward pass, finished gradients."""
    for _, layer in quant_layers(student):
        for key in layer.weight_names:
            _count_as(QUANTIZED, getattr(layer, f"{key}_quantizer"), tracker)
    blocks = blocks_of(student)
    for i, block in enumerate(blocks):
        phase = BACK_LAST if i == len(blocks) - 1 else BACK_FIRST if i == 0 else BACK_MIDDLE
        block.register_forward_hook(_on_gradient_of_output(tracker, phase))
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.keep_gradient(p.grad))


def _count_as(category: str, quantizer: nn.Module | None, tracker: MemoryTracker) -> None:
    if quantizer is None:
        return
    before: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        before.append(tracker.category)
        tracker.category = category

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tracker.category = before.pop()

    quantizer.register_forward_pre_hook(enter)
    quantizer.register_forward_hook(leave)


def _on_gradient_of_output(tracker: MemoryTracker, phase: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: tracker.enter(phase, ACTIVATIONS))

    return hook


def _step(student: Any, teacher: Any, step: Step, tracker: MemoryTracker) -> None:
    """As DistillationModule does it, at a step whose metrics are logged, which needs most."""
    ids = torch.zeros((step.batch_size, step.max_length), dtype=torch.int64)
    mask = torch.ones_like(ids)
    autocast: Any = nullcontext() if step.autocast is None else torch.autocast("cpu", step.autocast)
    with autocast:
        tracker.enter(STUDENT, ACTIVATIONS)
        own = _forward(student, ids, mask, step, tracker)
        tracker.enter(TEACHER, LOSS)
        with torch.no_grad():
            other = None if teacher is None else _forward(teacher, ids, mask, step, tracker)
        tracker.enter(LOSSES, LOSS)
        loss = _loss(own, other, student, teacher, step)
        del own, other
    tracker.enter(BACK_LOSS, LOSS)
    loss.backward()


def _forward(model: Any, ids: Tensor, mask: Tensor, step: Step, tracker: MemoryTracker) -> Tensor:
    """Logits of all tokens, or the hidden states from which the loss computes them chunk by chunk."""
    hidden: Tensor = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    tracker.category = LOSS
    return model.get_output_embeddings()(hidden) if step.loss_chunk is None else hidden


def _loss(own: Tensor, other: Tensor | None, student: Any, teacher: Any, step: Step) -> Tensor:
    rows = torch.arange(step.batch_size * step.max_length)  # the tokens that count, here all: a mask picks them, which is a copy
    own, kept = own.flatten(0, 1)[rows], other.flatten(0, 1)[rows] if other is not None else _stored(len(rows))

    def of_teacher(chunk: slice) -> Any:
        if isinstance(kept, TopK):
            return TopK(*(part[chunk] for part in kept))
        return kept[chunk] if step.loss_chunk is None else teacher.get_output_embeddings()(kept[chunk])

    head = student.get_output_embeddings()
    function = row_sums([SoftCrossEntropy()], _same if step.loss_chunk is None else head, of_teacher, metrics=("kl",))
    sums = function(slice(None), own) if step.loss_chunk is None else chunked_sums(function, own, list(head.parameters()), step.loss_chunk)
    return sums[0]


def _same(logits: Tensor) -> Tensor:
    return logits


def _stored(rows: int) -> TopK:
    """Probabilities that came with the batch."""
    ids = torch.zeros((rows, KEPT_PROBABILITIES), dtype=torch.int64)
    return TopK(ids, ids.float(), torch.zeros(rows))
