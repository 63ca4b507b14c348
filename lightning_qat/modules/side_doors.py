"""What would silently bypass or lose the quantizers of a module, and how it is switched off and on again.

- The fused inference paths of `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` read the raw weights.
- `save_pretrained` would write a checkpoint that loads as full precision without a word.
"""

from typing import Any

from torch import nn

_KEPT = "float_attributes"  # where a module keeps the attributes it had before


def close_side_doors(module: nn.Module) -> None:
    """Switch off the side doors of one module that holds quantizers; harmless when called twice."""
    if isinstance(module, nn.TransformerEncoderLayer):
        _replace(module, "activation_relu_or_gelu", 0)  # a precondition of the fused path
    if isinstance(module, nn.TransformerEncoder):
        _replace(module, "use_nested_tensor", False)
    if hasattr(type(module), "save_pretrained"):
        _replace(module, "save_pretrained", refuse_save_pretrained)


def open_side_doors(module: nn.Module) -> None:
    """The inverse of :func:`close_side_doors`."""
    for name, (had, value) in vars(module).pop(_KEPT, {}).items():
        vars(module).pop(name, None)
        if had:
            setattr(module, name, value)


def _replace(module: nn.Module, name: str, value: Any) -> None:
    kept = vars(module).setdefault(_KEPT, {})
    if name not in kept:
        kept[name] = (name in vars(module), vars(module).get(name))
        vars(module)[name] = value


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    """Stands in for `save_pretrained`; a module-level function, so that the model still pickles."""
    raise ValueError(
        "save_pretrained: this model holds quantizers, and a plain checkpoint would load as full precision; use "
        "lightning_qat.export(model, path), or remove_quantizers(model) first to save the float weights"
    )
