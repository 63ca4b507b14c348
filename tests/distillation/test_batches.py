"""What a batch has to be."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import llama, token_ids

from lightning_qat import DistillationModule


def test_a_batch_that_is_no_dictionary_is_refused():
    with pytest.raises(MisconfigurationException, match=r"data: got a batch of type list, expected a dictionary with 'input_ids'"):
        DistillationModule(llama()).training_step([token_ids()], 0)


def test_without_a_mask_every_token_counts():
    module, ids = DistillationModule(llama()), token_ids()
    module.log = lambda *args, **kwargs: None
    whole = module.training_step({"input_ids": ids}, 0)
    assert torch.equal(whole, module.training_step({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0))
    half = torch.ones_like(ids)
    half[:, 5:] = 0
    assert not torch.equal(whole, module.training_step({"input_ids": ids, "attention_mask": half}, 0))
