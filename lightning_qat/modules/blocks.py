"""The blocks of a network: what is sharded, recomputed and counted as one."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: of the lists of modules of one type, the one that holds most parameters; none where there is no list.

    Lists may lie in each other: the experts of one block are more than blocks sometimes, but never more of the model.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1]
    return max(lists, key=lambda blocks: sum(p.numel() for block in blocks for p in block.parameters()), default=[])
