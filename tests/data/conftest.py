import gc

import pytest


@pytest.fixture(scope="package", autouse=True)
def _little_garbage():
    """Data modules collect garbage; what was imported before need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
