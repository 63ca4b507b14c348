from models import gpt2, llama, mixtral
from torch import nn

from lightning_qat.modules.blocks import blocks_of


def test_blocks_are_the_list_that_holds_most_of_the_model():
    model = llama()
    assert blocks_of(model) == list(model.model.layers)
    model = gpt2()
    assert blocks_of(model) == list(model.transformer.h)
    model = mixtral()
    assert blocks_of(model) == list(model.model.layers)


def test_experts_in_a_block_are_no_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    model = nn.ModuleList(Block() for _ in range(2))
    assert blocks_of(model) == list(model)


def test_a_model_without_lists_has_no_blocks():
    assert blocks_of(nn.Linear(2, 2)) == []
