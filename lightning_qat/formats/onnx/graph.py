"""The traced graph made ready for a file: codes in the fewest bits, tensors with names, weights beside the graph where they are large."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.onnx.stand_ins import MARK, NAME

FILE, DATA = "model.onnx", "model.onnx.data"
SINGLE_FILE_BYTES = 2**30  # a protobuf ends at 2 GiB
QUANTIZED = "lightning_qat.quantized_tensors"  # metadata: [[name of a quantizer, tensor it reads, tensor it makes], ...]
IR_VERSIONS = {21: 10, 25: 13}  # by opset, the first that has its types
PARTS = ("codes", "scale", "zero_point")


class Quantized(NamedTuple):
    """What one call of a quantizer became.

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
    import ml_dtypes

    sign = "u" if weight.has_float_zero else ""
    bits = next(bits for bits in (2, 4, 8) if bits >= weight.bits)
    return np.dtype(f"{sign}int8") if bits == 8 else np.dtype(getattr(ml_dtypes, f"{sign}int{bits}"))


def opset_of(weights: list[IntegerWeight]) -> int:
    """The first opset that has every type: int4 and blocks of scales came with 21, int2 with 25."""
    return 25 if any(weight.bits <= 2 for weight in weights) else 21


def finish(model: Any, dtypes: dict[str, Any], metadata: dict[str, str]) -> None:
    """Change a traced `onnx_ir.Model` in place.

    Args:
        model: The model.
        dtypes: The numpy dtype of codes, by name of the weight.
        metadata: Properties to give to the model.

    Raises:
        ValueError: A weight is no part of the graph.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # that of the module which was traced
    _store_codes(graph, dtypes)
    quantized = _without_marks(graph)
    model.opset_imports.pop(MARK, None)
    model.ir_version = IR_VERSIONS[model.opset_imports[""]]
    for item in (model, graph, *graph, *graph.initializers.values()):
        item.metadata_props.clear()  # stack traces, with paths of the machine that exported
    model.metadata_props.update(metadata | {QUANTIZED: json.dumps(quantized)})


def _store_codes(graph: Any, dtypes: dict[str, Any]) -> None:
    """Give every weight tensors of its own, named like it: the exporter stores equal ones of several weights once."""
    stored: dict[str, list[Any]] = {}
    for node in list(graph):
        if (name := node.metadata_props.get(NAME)) is None:
            continue
        again = name in stored
        if not again:
            parts = zip(node.inputs, PARTS, strict=False)
            stored[name] = [_initializer(graph, value, f"{name}.{part}", dtypes[name]) for value, part in parts]
        node.name = f"{name}.again" if again else name
        for i, value in enumerate(stored[name]):
            node.replace_input_with(i, value)
    if unused := sorted(dtypes.keys() - stored.keys()):
        raise ValueError(
            f"{unused[0]}: the forward pass does not use it for this example, so that it is no part of the graph; leave it out of the "
            "scheme (exclude=...), or pass other example_inputs"
        )
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _initializer(graph: Any, value: Any, name: str, dtype: Any) -> Any:
    import onnx_ir as ir

    array = value.const_value.numpy()
    tensor = ir.tensor(array if array.dtype.kind == "f" else array.astype(dtype), name=name)
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(new)
    return new


def _without_marks(graph: Any) -> list[Quantized]:
    """Take out the marks; what they told is returned."""
    import onnx_ir as ir

    found = []
    for node in list(graph):
        if node.domain == MARK:
            source, values = node.inputs
            ir.convenience.replace_all_uses_with(node.outputs[0], values)
            graph.remove(node, safe=True)
            found.append(Quantized(node.attributes["name"].as_string(), source.name, values.name))
    return found


def save(model: Any, folder: Path) -> None:
    """Write the model; large ones get a file for their weights beside it."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, folder / FILE, external_data=None if size < SINGLE_FILE_BYTES else DATA)
