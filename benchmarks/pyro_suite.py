"""Pyro's own tests with every loss compiled: which fail that pass without?

    python benchmarks/pyro_suite.py --pyro DIR [tests/infer/test_gradient.py ...]

DIR is a checkout of Pyro (its tests are not part of the wheel). Each file runs twice in a process of its own:
as it is, and with ``loss``, ``loss_and_grads`` and ``differentiable_loss`` of all of Pyro's ELBOs going
through ``CompiledELBO`` from the first call on, without Inductor. Prints passed, failed and compiled calls
for each file, and every test that fails only compiled. Tests that expect a warning of Pyro are counted apart:
a graph repeats none (``CompiledELBO`` leaves them to its first, eager call).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def pytest_configure(config):
    """Wrap the losses; this module is the plugin of the inner runs."""
    config._suite = {"passed": 0, "failed": [], "calls": 0, "reasons": {}}
    if os.environ[_COMPILED] == "1":
        _wrap(config._suite)


def pytest_runtest_logreport(report):
    silent = report.outcome == "failed" and "No warnings were raised" in str(report.longrepr)
    _REPORTS.append((report.nodeid, report.when, "silent" if silent else report.outcome))


def pytest_unconfigure(config):
    suite = config._suite
    suite["failed"] = sorted({node for node, _, outcome in _REPORTS if outcome == "failed"})
    suite["silent"] = sum(outcome == "silent" for _, _, outcome in _REPORTS)
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


def run(pyro: str, file: str, compiled: bool, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        here = Path(__file__).resolve()
        environment = dict(os.environ) | {
            _RESULTS: str(results),
            _COMPILED: str(int(compiled)),
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent), pyro]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "pyro_suite", "-W", "ignore", "-c", os.devnull]
        command += ["--rootdir", pyro, "-p", "no:cacheprovider", *options, file]
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
    parser.add_argument("files", nargs="*", default=[f"tests/infer/test_{name}.py" for name in FILES])
    arguments = parser.parse_args()
    options = ["-k", arguments.k] if arguments.k else []
    bad = 0
    for file in arguments.files:
        plain, compiled = (run(arguments.pyro, file, on, options) for on in (False, True))
        new = sorted(set(compiled["failed"]) - set(plain["failed"]))
        bad += len(new)
        print(
            f"{file}: {plain['passed']} pass, {len(plain['failed'])} fail;"
            f" compiled {compiled['passed']} pass, {compiled['calls']} compiled calls,"
            f" {compiled['silent']} miss a warning, {len(new)} fail that passed",
            flush=True,
        )
        for node in new:
            print(f"    {node}")
        for reason, count in sorted(compiled["reasons"].items(), key=lambda item: -item[1])[:5]:
            print(f"    eager {count} times: {reason}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
