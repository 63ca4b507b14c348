"""What a file holds, compared bit for bit with what was trained, through the eyes of onnx and onnxruntime.

    weights        codes, scales and zero points are read from the file: equal
    activations    onnxruntime computes every node of the file on its own; each quantizer of the model is given the very tensor that its
                   nodes were given and has to make the same values: equal
    all between    the model runs once more with onnxruntime's values in place of those its quantizers make; what it computes from one
                   quantizer to the next, and its output, may differ by the rounding of fp32 kernels: `TOLERANCE`

Comparing outputs alone cannot tell a rounding that fell on the other side from a mistake; this can. Outputs with onnxruntime's own fusions
are compared too, and the difference is told in the manifest: with quantized activations it may be a step of a code here and there.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.exactness.executed import executing
from lightning_qat.formats.onnx.graph import FILE, QUANTIZED, Quantized
from lightning_qat.formats.onnx.session import open_session, run
from lightning_qat.formats.onnx.stand_ins import activation_quantizers, is_quantize_linear, replaced, stored_under
from lightning_qat.formats.onnx.tracing import graph_inputs, in_eval_mode, outputs_by_name
from lightning_qat.formats.verification import Stored, compare_weights

TOLERANCE = 1e-4  # of the largest value of a tensor
FUSED_TOLERANCE = 0.1  # mean difference over mean value, with quantized activations: more than roundings on the other side make


def verify_file(job: Job, folder: Path) -> dict[str, Any]:
    """Compare a folder with the model it was written from.

    Raises:
        RuntimeError: Something differs.
    """
    import onnx

    file = folder / FILE
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"export: {FILE} is not valid ONNX: {error}") from error
    file_model = onnx.load(str(file))
    compared = compare_weights(job, _reader(job.model, file_model))
    inputs = graph_inputs(job)
    tensors, outputs = _run_every_node(file_model, folder, inputs)
    quantized = [Quantized(*row) for row in _metadata(file_model)]
    with executing(job.model, job.fit):
        expected = outputs_by_name(job)
        _compare_activations(job, quantized, tensors)
        largest = _compare_between(job, quantized, tensors, outputs)
    fused = run(open_session(file), inputs)
    _compare_fused(expected, fused, is_rounded=bool(quantized))
    return {
        **compared,
        "activations": len(quantized),
        "activations_different": 0,
        "largest_relative_difference_between_activations": largest,
        "relative_tolerance": TOLERANCE,
        "max_logit_difference": max(_largest(expected[name], fused[name]) for name in expected),
        "max_logit_difference_without_fusions": max(_largest(expected[name], outputs[name]) for name in expected),
    }


def _reader(model: nn.Module, file_model: Any) -> Any:
    """What the file holds for a weight, found at the node that is named like it."""
    import onnx

    nodes = {node.name: node for node in file_model.graph.node}
    tensors = {tensor.name: tensor for tensor in file_model.graph.initializer}
    first = stored_under(model)

    def tensor(name: str) -> Tensor:
        array = onnx.numpy_helper.to_array(tensors[name])
        is_code = "int" in array.dtype.name
        return torch.from_numpy(np.array(array.astype("uint8" if array.dtype.name.startswith("u") else "int8") if is_code else array))

    def read(weight: IntegerWeight) -> Stored:
        node = nodes.get(first[weight.name])
        if node is None or node.op_type != "DequantizeLinear":
            raise RuntimeError(f"export: {weight.name}: no DequantizeLinear in the file is named like it")
        rows, groups = weight.scale.shape
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        size = attributes.get("block_size")
        if size != (weight.group_size if groups > 1 else None):
            raise RuntimeError(f"export: {weight.name}: blocks of {size} are stored, {weight.group_size} were trained")
        codes, scale, *zero_point = (tensor(name) for name in node.input)
        if weight.has_float_zero:
            zero_point = [tensor(_added_to(node.output[0], file_model))]
        if attributes.get("axis") == (1 if groups == 1 else 0):  # turned
            codes, scale, *zero_point = (values.t() if values.dim() == 2 else values for values in (codes, scale, *zero_point))
        by_row = [values.reshape(-1, groups).expand(rows, groups) for values in (scale, *zero_point)]
        return Stored(codes.reshape(rows, -1), by_row[0], by_row[1] if zero_point else None)

    return read


def _added_to(name: str, file_model: Any) -> str:
    """The initializer that is added to a tensor, perhaps after it was viewed in groups."""
    stored = {tensor.name for tensor in file_model.graph.initializer}
    for node in file_model.graph.node:
        if name in node.input and node.op_type == "Reshape":
            return _added_to(node.output[0], file_model)
        if name in node.input and node.op_type == "Add":
            return next(other for other in node.input if other in stored)
    raise RuntimeError(f"export: nothing is added to {name}, which has a zero point")


def _metadata(file_model: Any) -> list[list[str]]:
    rows: list[list[str]] = json.loads(next(entry.value for entry in file_model.metadata_props if entry.key == QUANTIZED))
    return rows


def _run_every_node(file_model: Any, folder: Path, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors that quantizers read and make, and the outputs, from nodes that are computed one by one."""
    import onnx

    probe = onnx.load(str(folder / FILE), load_external_data=False)
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    given |= {tensor.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor))) for tensor in file_model.graph.initializer
              if tensor.data_type == onnx.TensorProto.FLOAT}  # fmt: skip
    outputs = [value.name for value in probe.graph.output]
    names = {name for row in _metadata(file_model) for name in row[1:]} - given.keys() - set(outputs)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(names))
    path = folder / "probe.onnx"
    onnx.save(probe, str(path))
    try:
        found = run(open_session(path, optimize=False), inputs)
    finally:
        path.unlink()
    return given | found, {name: found[name] for name in outputs}


def _compare_activations(job: Job, quantized: list[Quantized], tensors: dict[str, Tensor]) -> None:
    quantizers = activation_quantizers(job.model)
    for name, source, values in quantized:
        with in_eval_mode(job) as (model, _):
            device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
            mine = quantizers[name](tensors[source].to(device)).cpu()
        if different := int((mine != tensors[values]).sum()):
            raise RuntimeError(f"export: {name}: {different} of {mine.numel()} values that onnxruntime makes of the same input differ")


class _Replayed(nn.Module):
    """Hands out the values that onnxruntime made, and notes how far what it was given is from what onnxruntime was given."""

    def __init__(self, calls: list[tuple[Tensor, Tensor]], enabled: bool, notes: dict[str, float], name: str) -> None:
        super().__init__()
        self.calls: Iterator[tuple[Tensor, Tensor]] = iter(calls)
        self.enabled, self.notes, self.name = enabled, notes, name

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        source, values = next(self.calls, (x.cpu(), x))  # nothing left: the graph has no such call, its result is not used
        self.notes[self.name] = max(self.notes.get(self.name, 0.0), _relative(x.cpu(), source))
        return values.to(x.device)

    bypass = forward


def _compare_between(job: Job, quantized: list[Quantized], tensors: dict[str, Tensor], outputs: dict[str, Tensor]) -> float:
    """The largest relative difference of what is computed between quantizers."""
    notes: dict[str, float] = {}
    with ExitStack() as stack:
        for name, quantizer in activation_quantizers(job.model).items():
            calls = [(tensors[row.source], tensors[row.values]) for row in quantized if row.name == name]
            stack.enter_context(replaced(job.model, name, _Replayed(calls, not is_quantize_linear(quantizer), notes, name)))
        notes |= {name: _relative(mine, outputs[name]) for name, mine in outputs_by_name(job).items()}
    name = max(notes, key=lambda key: notes[key])
    if not all(note <= TOLERANCE for note in notes.values()):
        raise RuntimeError(
            f"export: {name}: onnxruntime computes something else, by {notes[name]:.3g} of the largest value; allowed is {TOLERANCE:g}"
        )
    return notes[name]


def _relative(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        raise RuntimeError(f"export: a tensor has shape {tuple(theirs.shape)} in onnxruntime, {tuple(mine.shape)} in the model")
    scale = mine.double().abs().max().item() if mine.numel() else 0.0
    return _largest(mine, theirs) / (scale or 1.0)


def _largest(mine: Tensor, theirs: Tensor) -> float:
    return (mine.double() - theirs.double()).abs().max().item() if mine.numel() else 0.0


def _compare_fused(expected: dict[str, Tensor], fused: dict[str, Tensor], is_rounded: bool) -> None:
    """A fused kernel rounds like any other, but with quantized activations a rounding may fall on the other side, and grow."""
    for name, mine in expected.items():
        theirs = fused[name]
        mean = (mine.double() - theirs.double()).abs().mean().item() / (mine.double().abs().mean().item() or 1.0)
        found, allowed = (mean, FUSED_TOLERANCE) if is_rounded else (_relative(mine, theirs), TOLERANCE)
        if not found <= allowed:
            raise RuntimeError(
                f"export: {name}: with its own fusions onnxruntime computes something else, by {found:.3g} of its size, not {allowed:g}"
            )
