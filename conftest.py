"""What every test shares."""

import pytest
import torch


def pytest_ignore_collect(collection_path, config):
    """A file none of whose tests is wanted is not imported: the examples import a lot."""
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    unwanted = {
        "not long": "\npytestmark = pytest.mark.long" in text,
        "long": "pytest.mark.long" not in text,
    }
    return unwanted.get(config.option.markexpr) or None


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Threads only get in each other's way on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """nflows and normflows draw noise in the default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
