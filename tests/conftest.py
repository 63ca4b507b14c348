import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
