"""Pyro's own tests with every loss compiled: which fail that pass without?

    python benchmarks/pyro_suite.py --pyro DIR [tests/infer/test_gradient.py ...]

DIR is a checkout of Pyro (its tests are not part of the wheel). Each file runs in a process of its own with
``loss``, ``loss_and_grads`` and ``differentiable_loss`` of all of Pyro's ELBOs going through ``CompiledELBO``
from the first call on, without Inductor; the tests that fail run again as they are. A test that ``--seconds``
cuts off, or that ends the interpreter, ends its own process alone: the tests after it run in a new one.
Prints passed, failed and compiled calls for each file, and every test that fails only compiled. Counted apart
are tests that miss a warning or an error, pass as they are, and pass where the first call is eager, as
``CompiledELBO`` leaves it by default.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
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
_SETTINGS = "PYROELBO_SUITE"
_CUT_OFF = 99  # the exit status of a process whose test took too long
_BAD = ("failed", "silent", "crash")
_SILENT = ("No warnings were raised", "DID NOT WARN", "DID NOT RAISE")


class Suite:
    """The plugin of the inner runs: appends a line to ``results`` where a test starts and where it ends."""

    def __init__(self, results, compiled, patient=False, seconds=0, every=1, first=0):
        self.results, self.seconds = Path(results), seconds
        self.every, self.first = every, first
        self.deadline = float("inf")
        if compiled:
            _wrap(self, patient)
        if seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def pytest_collection_modifyitems(self, items):
        done = _read(self.results)
        items[:] = [item for item in items[self.first :: self.every] if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid):
        self.node, self.outcome, self.calls, self.reasons = nodeid, "crash", 0, collections.Counter()
        self._write()
        self.outcome, self.deadline = "passed", time.process_time() + self.seconds

    def pytest_runtest_logreport(self, report):
        if report.failed:
            silent = any(text in str(report.longrepr) for text in _SILENT)
            self.outcome = "silent" if silent else "failed"
        elif report.skipped:
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self):
        self.deadline = float("inf")
        self._write()

    def _write(self):
        with self.results.open("a") as file:
            line = {"node": self.node, "outcome": self.outcome, "calls": self.calls, "reasons": self.reasons}
            print(json.dumps(line), file=file)

    def _watch(self):
        """An exception raised into a capture would leave the interpreter in states that no program meets."""
        while time.process_time() < self.deadline:
            time.sleep(0.1)
        self.outcome = "cut off"
        self._write()
        os._exit(_CUT_OFF)


def pytest_configure(config):
    config.pluginmanager.register(Suite(**json.loads(os.environ[_SETTINGS])))


def _read(results: Path) -> dict[str, dict]:
    """The last line of each test: "crash" where its process ended in the midst of it."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {record["node"]: record for record in map(json.loads, lines)}


def _bad(records: list[dict]) -> set[str]:
    return {record["node"] for record in records if record["outcome"] in _BAD}


def _wrap(suite, patient):
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
                losses[self]._cache.patient = patient
            compiled = losses[self]
            before = compiled.counters.compiled_calls
            inside.append(True)
            try:
                return getattr(compiled, name)(model, guide, *args, **kwargs)
            finally:
                inside.pop()
                suite.calls += compiled.counters.compiled_calls - before
                suite.reasons.update(reason[:90] for reason in compiled.counters.reasons)

        setattr(cls, name, routed)

    for cls in {c for c in vars(infer).values() if isinstance(c, type) and issubclass(c, infer.ELBO)}:
        if not cls.__name__.startswith("Jit"):
            for name in ("loss", "loss_and_grads", "differentiable_loss"):
                if name in vars(cls) and cls is not infer.ELBO:
                    route(cls, name)


def run(pyro: str, tests: list[str], options: list[str] = (), **settings) -> list[dict]:
    """A record of each test. ``settings`` are those of ``Suite``."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        here = Path(__file__).resolve()
        environment = dict(os.environ) | {
            _SETTINGS: json.dumps({"results": str(results)} | settings),
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent), pyro]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "pyro_suite", "-W", "ignore", "-c", os.devnull]
        command += ["--rootdir", pyro, "-p", "no:cacheprovider", *options, *tests]
        while True:
            before = len(_read(results))
            log = subprocess.run(command, cwd=pyro, env=environment, capture_output=True, text=True)
            records = _read(results)
            if log.returncode in (0, 1, 5):  # all have run: passed, failed, none left
                return list(records.values())
            if len(records) == before:
                raise SystemExit(log.stdout[-2000:] + log.stderr[-2000:])
            if log.returncode != _CUT_OFF:
                print(log.stderr[-4000:], file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyro", required=True, help="a checkout of Pyro")
    parser.add_argument("-k", help="pytest's selection")
    parser.add_argument("--seconds", type=int, default=0, help="processor time for one test (0: no limit)")
    parser.add_argument("--every", type=int, default=1, help="run one of each so many tests")
    parser.add_argument("--first", type=int, default=0, help="the first test to run, counted from 0")
    parser.add_argument("files", nargs="*", default=[f"tests/infer/test_{name}.py" for name in FILES])
    arguments = parser.parse_args()
    options = ["-k", arguments.k] if arguments.k else []
    sample = {"seconds": arguments.seconds, "every": arguments.every, "first": arguments.first}
    status = False
    for file in arguments.files:
        records = run(arguments.pyro, [file], options, compiled=True, **sample)
        outcomes = {record["node"]: record["outcome"] for record in records}
        bad = _bad(records)
        also = _bad(run(arguments.pyro, sorted(bad), compiled=False)) if bad else set()
        silent = {node for node in bad - also if outcomes[node] == "silent"}
        late = _bad(run(arguments.pyro, sorted(silent), compiled=True, patient=True)) if silent else set()
        new = bad - also - silent | late
        status |= bool(new)
        count = collections.Counter(outcomes.values())
        print(
            f"{file}: {count['passed']} pass, {sum(record['calls'] for record in records)} compiled calls;"
            f" {len(also)} fail also as they are, {len(silent - late)} miss a warning or error of the first,"
            f" eager call, {count['cut off']} cut off, {count['crash']} crash, {len(new)} fail only compiled",
            flush=True,
        )
        for node, outcome in outcomes.items():
            if node in new or outcome in ("crash", "cut off"):
                print(f"    {outcome}: {node}")
        reasons = sum((collections.Counter(record["reasons"]) for record in records), collections.Counter())
        for reason, times in reasons.most_common(5):
            print(f"    eager {times} times: {reason}")
    sys.exit(status)


if __name__ == "__main__":
    main()
