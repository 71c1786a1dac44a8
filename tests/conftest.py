"""Every test runs in float64, with validation, from a fixed seed, and leaves Pyro's param store empty."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

# Tests run side by side; threads that wait for one another would only get in the way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _clean_state():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    with pyro.validation_enabled(True):
        yield
    assert not torch._C._get_tracing_state()
    pyro.clear_param_store()
    torch.set_default_dtype(before)
