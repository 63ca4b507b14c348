"""Whether a graph of ``torch.compile`` runs in place of a module's own code."""

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module or to one inside it, in any of its forms, a whole LightningModule among them.

    A graph calls the hooks that were there when it was traced, and no later ones.
    """
    parts = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in module.modules())
    return parts or getattr(module, "_compiler_ctx", None) is not None
