"""The traced graph made ready for a file: codes in the fewest bits, quantized tensors by name, weights beside the graph where they are many."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from lightning_qat.formats.codes import IntegerWeight
from lightning_qat.formats.onnx.tracing import MARK, NAME

FILE, DATA = "model.onnx", "model.onnx.data"
SINGLE_FILE_BYTES = 2**30  # a protobuf ends at 2 GiB
QUANTIZED = "lightning_qat.quantized_tensors"  # metadata: [[name of the quantizer, what it reads, what it makes], ...]
CODE_BITS = (2, 4, 8)


class Quantized(NamedTuple):
    """What one quantizer of the model became.

    Attributes:
        name: Name of the quantizer in the model.
        source: The tensor that it reads.
        values: The tensor that it makes: values on the grid.
    """

    name: str
    source: str
    values: str


def code_dtype(weight: IntegerWeight) -> Any:
    """The numpy dtype that codes of a weight are stored in: int2, int4 or int8, unsigned where zero points are values."""
    bits = next(bits for bits in CODE_BITS if bits >= weight.bits)
    if bits == 8:
        return np.dtype(np.uint8 if weight.has_float_zero else np.int8)
    return np.dtype(getattr(ml_dtypes, f"{'u' if weight.has_float_zero else ''}int{bits}"))


def finish(model: Any, dtypes: dict[str, Any], metadata: dict[str, str]) -> list[Quantized]:
    """Change a traced `onnx_ir.Model` in place.

    Args:
        model: The model.
        dtypes: For each module that holds codes the numpy dtype to store them in.
        metadata: Further properties of the model.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # that of the module which was traced
    for name, dtype in dtypes.items():
        for part in ("codes", "zero_point"):
            _cast(graph.initializers.get(f"{name}.{part}"), dtype)
    quantized = _without_marks(graph)
    model.opset_imports.pop(MARK, None)
    model.metadata_props.clear()
    model.metadata_props.update(metadata | {QUANTIZED: json.dumps(quantized)})
    for node in graph:
        node.name = node.metadata_props.get(NAME, node.name)
    for item in (*graph, *graph.initializers.values()):
        item.metadata_props.clear()  # stack traces with paths of the machine that exported
    return quantized


def _cast(value: Any, dtype: Any) -> None:
    import onnx_ir as ir

    if value is None or ir.DataType.from_numpy(dtype) == value.dtype or value.dtype == ir.DataType.FLOAT:
        return
    value.const_value = ir.tensor(value.const_value.numpy().astype(dtype), name=value.name)
    value.dtype = value.const_value.dtype


def _without_marks(graph: Any) -> list[Quantized]:
    """Take out the marks; what they tell is returned."""
    import onnx_ir as ir

    found = []
    for node in list(graph):
        if node.domain != MARK:
            continue
        source, values = node.inputs
        ir.convenience.replace_all_uses_with(node.outputs[0], values)
        graph.remove(node, safe=True)
        found.append(Quantized(node.attributes["name"].as_string(), source.name, values.name))
    return found


def save(model: Any, folder: Path) -> None:
    """Write the model; beside large ones the weights get a file of their own."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size < SINGLE_FILE_BYTES:
        ir.save(model, folder / FILE)
    else:
        ir.save(model, folder / FILE, external_data=DATA)


def quantized_tensors(model: Any) -> list[Quantized]:
    """What the metadata of a model (an `onnx.ModelProto`) tells about its quantized tensors."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return [Quantized(*row) for row in json.loads(entries.get(QUANTIZED, "[]"))]


def to_torch(tensor: Any) -> torch.Tensor:
    """An initializer of any integer type as int8 (or uint8, where it is unsigned), others as they are."""
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    name = array.dtype.name
    if name.startswith(("int", "uint")) and array.dtype.itemsize == 1:
        array = array.astype(np.uint8 if name.startswith("uint") else np.int8)
    return torch.from_numpy(np.array(array))
