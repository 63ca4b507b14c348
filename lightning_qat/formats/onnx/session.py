"""onnxruntime with settings under which it computes what was trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

# Weights of 2, 4 and 8 bits are multiplied with inputs rounded to int8 unless this says that they stay fp32: 0.5 % of the result.
SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "0"}
# WeightBiasQuantization rounds biases to multiples of two scales, so that a convolution runs on integers: a step of the next code in 0.03 %
# of them. MatMulAddFusion makes two-dimensional products with a bias a Gemm, which has no integer kernel but for rounded biases.
DISABLED = ("WeightBiasQuantization", "MatMulAddFusion")


def open_session(file: str | Path, optimize: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU that computes what was trained.

    Args:
        file: The model.
        optimize: Fuse operators; without, every node of the file is computed on its own.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(file), options, providers=providers, disabled_optimizers=list(DISABLED))


def run(session: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs of a session by name; inputs that the graph does not have are left out.

    Raises:
        ValueError: An input is missing.
    """
    wanted = [value.name for value in session.get_inputs()]
    if missing := [name for name in wanted if not isinstance(inputs.get(name), Tensor)]:
        raise ValueError(f"{missing[0]}: no tensor was given; the graph takes {', '.join(wanted)}")
    feed = {name: inputs[name].detach().cpu().contiguous().numpy() for name in wanted}
    names = [value.name for value in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, feed), strict=True)}


class OnnxModel(nn.Module):
    """An exported model in onnxruntime; it is called like the model that was exported.

    Args:
        file: The model.
        config: Configuration of a transformers model, or None.

    Attributes:
        session: The `onnxruntime.InferenceSession`.
    """

    def __init__(self, file: str | Path, config: Any = None) -> None:
        super().__init__()
        self.session, self.config = open_session(file), config
        # Whoever asks a model's parameters where it lives gets an answer.
        self.device_of = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    def forward(self, *args: Tensor, **inputs: Any) -> Any:
        """The results by name, such as ``.logits``, or the tensor where a module returns one.

        Args:
            args: Tensors in the order of the graph's inputs.
            inputs: The same by name; a missing ``attention_mask`` is all ones, ``use_cache`` is ignored.

        Raises:
            ValueError: An input is missing, or the graph does not know it.
        """
        known = [value.name for value in self.session.get_inputs()]
        given = dict(zip(known, args, strict=False)) | {name: value for name, value in inputs.items() if value is not None}
        given.pop("use_cache", None)
        if "attention_mask" in known and "input_ids" in given:
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{unknown[0]}: the graph has no such input; it takes {', '.join(known)}")
        found = run(self.session, given)
        return found["output"] if found.keys() == {"output"} else ModelOutput(**found)
