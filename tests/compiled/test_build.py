"""Inductor's builds: options, failures and torn caches."""

import contextlib
import importlib.util
import subprocess
import sys

import pyro
import pytest
from pyro.infer import Trace_ELBO

from pyroelbo.compiled import CompiledELBO, CompileWarning, build
from tests.compiled.cases import VAE, data


@pytest.mark.slow
def test_inductor_options_reach_the_build():
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), options={"cpp_wrapper": True})
    for _ in range(3):
        pyro.set_rng_seed(1)
        expected = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
        pyro.set_rng_seed(1)
        assert loss.loss_and_grads(module.model, module.guide, y) == pytest.approx(expected, rel=1e-9)
    assert (loss.counters.compiled_calls, loss.counters.compiles) == (2, 1)


def test_no_compiler():
    import torch._inductor.config as config

    module, y = VAE(dims=7), data(8, 7)
    loss = CompiledELBO(Trace_ELBO())
    patch = config.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False})
    with patch, pytest.warns(CompileWarning, match="C\\+\\+ compiler"):
        for _ in range(3):
            loss.loss_and_grads(module.model, module.guide, y)
    assert (loss.counters.compiled_calls, loss.counters.compiles) == (2, 0)


@pytest.mark.parametrize("again", [False, True])
def test_a_library_that_cannot_be_loaded_is_removed_once(again, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = tmp_path / "torn.so"
    path.touch()
    tries = []

    def inductor(graph, inputs, options):
        tries.append(path.exists())
        if again:
            path.touch()
        if path.exists():
            try:
                importlib.util.module_from_spec(importlib.util.spec_from_file_location("torn", path))
            except ImportError as error:
                raise RuntimeError("Inductor failed") from error
        return graph

    monkeypatch.setattr(build, "inductor", inductor)
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO())
    with pytest.warns(CompileWarning, match="Inductor failed") if again else contextlib.nullcontext():
        for _ in range(3):
            loss.loss_and_grads(module.model, module.guide, y)
    assert tries == [True, False]
    assert (loss.counters.compiled_calls, loss.counters.compiles) == (2, 0 if again else 1)


@pytest.mark.slow
def test_libraries_that_a_killed_compiler_left_are_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    code = (
        "import torch; from tests.compiled.cases import *; torch.set_default_dtype(torch.float64)\n"
        "module, y = VAE(dims=9), data(8, 9); loss = CompiledELBO(Trace_ELBO())\n"
        "for _ in range(3): loss.loss_and_grads(module.model, module.guide, y)\n"
        "print(loss.counters.compiles)"
    )

    def run():
        return subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", code], stdout=subprocess.PIPE, check=True
        )

    assert run().stdout.split() == [b"1"]
    libraries = list(tmp_path.rglob("*.main.so"))
    for path in libraries:
        path.write_bytes(b"")
    assert libraries and run().stdout.split() == [b"1"]
    assert all(path.stat().st_size for path in libraries)


def test_the_package_does_not_import_inductor():
    code = "import sys, pyroelbo.compiled; print('torch._inductor.compile_fx' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
