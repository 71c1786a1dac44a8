"""Tests of structures run with the compiled kernels, and as without numba."""

import pytest

from pyroelbo.distributions.kernels import dispatch


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """With the compiled kernels, then without."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "_load", lambda name: None)
    else:
        pytest.importorskip("numba")
    return request.param


@pytest.fixture
def no_kernels(monkeypatch):
    """A function from whose call on the compiled kernels are not used."""
    pytest.importorskip("numba")
    return lambda: monkeypatch.setattr(dispatch, "_load", lambda name: None)
