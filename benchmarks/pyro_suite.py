"""Pyro's own tests with every loss compiled: which fail that pass without?

    python benchmarks/pyro_suite.py --pyro DIR [tests/infer/test_gradient.py ...]

DIR is a checkout of Pyro (its tests are not part of the wheel). Each file runs in a process of its own with
``loss``, ``loss_and_grads`` and ``differentiable_loss`` of all of Pyro's ELBOs going through ``CompiledELBO``
from the first call on, without Inductor; the tests that fail run again as they are. Prints passed, failed and
compiled calls for each file, and every test that fails only compiled. Counted apart are tests that expect a
warning or an error of Pyro's validation, which ``CompiledELBO`` leaves to its first, eager call, and tests
that ``--seconds`` cut off.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FILES = [
    "valid_models",
    "gradient",
    "enum",
    "inference",
    "elbo_mapdata",
    "autoguide",
    "multi_sample_elbos",
    "discrete",
]
_RESULTS = "PYROELBO_SUITE_RESULTS"
_COMPILED = "PYROELBO_SUITE_COMPILED"
_SECONDS = "PYROELBO_SUITE_SECONDS"
_EVERY = "PYROELBO_SUITE_EVERY"
_SLOW = "cut off by --seconds"


def pytest_configure(config):
    """Wrap the losses; this module is the plugin of the inner runs."""
    config._suite = {"passed": 0, "failed": [], "calls": 0, "reasons": {}}
    signal.signal(signal.SIGALRM, _cut)
    if os.environ[_COMPILED] == "1":
        _wrap(config._suite)


def pytest_collection_modifyitems(items):
    items[:] = items[:: int(os.environ[_EVERY])]


def _cut(*_):
    pytest.fail(_SLOW)  # no Exception: nothing between here and pytest catches it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    signal.alarm(int(os.environ[_SECONDS]))
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report):
    outcome, text = report.outcome, str(report.longrepr)
    if outcome == "failed":
        silent = any(t in text for t in ("No warnings were raised", "DID NOT WARN", "DID NOT RAISE"))
        outcome = "silent" if silent else "slow" if _SLOW in text else outcome
    _REPORTS.append((report.nodeid, report.when, outcome))


def pytest_unconfigure(config):
    suite = config._suite
    suite["failed"] = sorted({node for node, _, outcome in _REPORTS if outcome == "failed"})
    suite["silent"] = sum(outcome == "silent" for _, _, outcome in _REPORTS)
    suite["slow"] = sum(outcome == "slow" for _, _, outcome in _REPORTS)
    suite["passed"] = sum(when == "call" and outcome == "passed" for _, when, outcome in _REPORTS)
    Path(os.environ[_RESULTS]).write_text(json.dumps(suite))


_REPORTS: list[tuple[str, str, str]] = []


def _wrap(suite):
    import pyro.infer as infer

    from pyroelbo.compiled import CompiledELBO

    losses: dict = {}  # the newest alone, since each keeps its graphs
    inside = []

    def route(cls, name):
        original = vars(cls)[name]

        @functools.wraps(original)
        def routed(self, model, guide, *args, **kwargs):
            if inside:
                return original(self, model, guide, *args, **kwargs)
            if self not in losses:
                losses.clear()
                losses[self] = CompiledELBO(self, backend="eager")
                losses[self]._cache.patient = False
            compiled = losses[self]
            before = compiled.counters.compiled_calls
            inside.append(True)
            try:
                return getattr(compiled, name)(model, guide, *args, **kwargs)
            finally:
                inside.pop()
                suite["calls"] += compiled.counters.compiled_calls - before
                for reason in compiled.counters.reasons:
                    suite["reasons"][reason[:90]] = suite["reasons"].get(reason[:90], 0) + 1

        setattr(cls, name, routed)

    for cls in {c for c in vars(infer).values() if isinstance(c, type) and issubclass(c, infer.ELBO)}:
        if not cls.__name__.startswith("Jit"):
            for name in ("loss", "loss_and_grads", "differentiable_loss"):
                if name in vars(cls) and cls is not infer.ELBO:
                    route(cls, name)


def run(
    pyro: str, tests: list[str], compiled: bool, options: list[str], seconds: int = 0, every: int = 1
) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        here = Path(__file__).resolve()
        environment = dict(os.environ) | {
            _RESULTS: str(results),
            _COMPILED: str(int(compiled)),
            _SECONDS: str(seconds),
            _EVERY: str(every),
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent), pyro]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "pyro_suite", "-W", "ignore", "-c", os.devnull]
        command += ["--rootdir", pyro, "-p", "no:cacheprovider", *options, *tests]
        log = subprocess.run(command, cwd=pyro, env=environment, capture_output=True, text=True)
        if not results.exists():
            raise SystemExit(log.stdout[-2000:] + log.stderr[-2000:])
        return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyro", required=True, help="a checkout of Pyro")
    parser.add_argument("-k", help="pytest's selection")
    parser.add_argument("--seconds", type=int, default=0, help="limit for one test (0: none)")
    parser.add_argument("--every", type=int, default=1, help="run the first of each so many tests")
    parser.add_argument("files", nargs="*", default=[f"tests/infer/test_{name}.py" for name in FILES])
    arguments = parser.parse_args()
    options = ["-k", arguments.k] if arguments.k else []
    bad = 0
    for file in arguments.files:
        compiled = run(arguments.pyro, [file], True, options, arguments.seconds, arguments.every)
        failed = compiled["failed"]
        plain = run(arguments.pyro, failed, False, [])["failed"] if failed else []
        new = sorted(set(failed) - set(plain))
        bad += len(new)
        print(
            f"{file}: {compiled['passed']} pass, {compiled['calls']} compiled calls;"
            f" {len(plain)} fail also as they are, {compiled['silent']} miss a warning or error,"
            f" {compiled['slow']} cut off, {len(new)} fail only compiled",
            flush=True,
        )
        for node in new:
            print(f"    {node}")
        for reason, count in sorted(compiled["reasons"].items(), key=lambda item: -item[1])[:5]:
            print(f"    eager {count} times: {reason}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
