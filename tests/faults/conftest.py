import tempfile
from pathlib import Path

import pytest
from resuming import synthetic


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The samples of `synthetic`, written once."""
    folder = tmp_path_factory.mktemp("store")
    synthetic(folder).setup("fit")
    return folder


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory, where syncing costs nothing; a kill leaves the same there as on a disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
