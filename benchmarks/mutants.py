"""Would the tests notice? Bugs are planted one by one, and the tests that run the changed line must fail.

``python -m benchmarks.mutants trace`` runs the tests once under coverage and keeps, for each line, the tests
that run it. ``plant`` draws ``--mutants`` bugs by ``--seed`` (``_bugs.py``) and runs for each the tests of
its line, the file's own and the fast ones first, in a copy of the tree made of links. Rows are appended to
``--out``; a run that was stopped goes on where it was. ``again`` runs the survivors anew after tests were
written, ``show`` prints the table and the survivors. Bugs that change no value which anyone can see are
listed, with the reason, in ``mutants.jsonl``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._bugs import ROOT, SHARES, Mutant, draw

TESTS = [
    "test_numerics.py",
    "objectives",
    "evaluation",
    "evidence",
    "training",
    "distributions",
    "results",
    *("test_batch.py", "test_pair.py", "test_priors.py", "test_encoders.py", "test_flows.py", "test_runs.py"),
]
PRELOADED = [
    *("torch", "pyro", "pyro.distributions", "pyro.infer", "pyro.infer.autoguide", "pyro.contrib.gp"),
    *("numpy", "scipy.stats", "scipy.special", "sklearn.mixture", "numba", "matplotlib.pyplot", "arviz"),
    *("safetensors.torch", "tqdm", "pytest", "coverage"),
]
# Compiled lines cannot be traced.
KERNEL_TESTS = {
    "kalman": ("gaussian",),
    "inside_outside": ("grammar", "tree"),
    "path": ("chain",),
    "arithmetic": ("chain", "gaussian"),
    "simd": ("chain", "gaussian"),
    "dispatch": ("chain",),
}
SECONDS = 60  # of tests a bug, by the clock of the traced run


# --- running tests in children ------------------------------------------------------------------------------


def preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "pyroelbo" not in sys.modules


def in_child(work: Callable[[], int], log: Path, cpu_seconds: float, seconds: float = 3600) -> int | None:
    """The exit status of ``work`` in a forked process; None where it used up its time."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(log, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = 99
        try:
            status = work()
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline, done, status = time.monotonic() + seconds, 0, 0
    try:
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0 if done else 0.05)
    finally:  # what it has started too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        return None
    if os.WIFSIGNALED(status):
        return None if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


class Recorder:
    """A pytest plugin: seconds and outcome of each test; a context of coverage for each."""

    def __init__(self, coverage=None, wanted: list[str] | None = None) -> None:
        self.coverage, self.wanted = coverage, wanted
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items) -> None:
        if self.wanted is not None:
            order = {name: i for i, name in enumerate(self.wanted)}
            items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid, location) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def enter(tree: Path) -> None:
    """Make ``tree`` the place where packages are looked for."""
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, tree))]
    os.environ["PYTHONPATH"] = str(tree)


def run_pytest(tests: list[str], place: Path, recorder: Recorder, *more: str) -> int:
    import pytest

    arguments = [*tests, *more, "-q", "-n0", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={place}/tmp"]
    return int(pytest.main(arguments, plugins=[recorder]))


# --- which tests run a line ---------------------------------------------------------------------------------


def test_files() -> list[Path]:
    found = []
    for name in TESTS:
        place = ROOT / "tests" / name
        found += [place] if place.is_file() else sorted(place.glob("test_*.py"))
    return found


def trace(folder: Path) -> None:
    """A database of coverage and a list of durations for each file of tests; files that stand are kept."""
    preload()
    for path in test_files():
        name = str(path.relative_to(ROOT / "tests").with_suffix("")).replace("/", ".")
        done = folder / f"{name}.json"
        if done.exists() and done.stat().st_mtime > path.stat().st_mtime:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            work = functools.partial(_traced, path, Path(place), folder / f"{name}.db", done)
            status = in_child(work, folder / f"{name}.log", cpu_seconds=3600)
        print(f"{name:<40} status {status}  {time.monotonic() - began:.0f} s", flush=True)


def _traced(path: Path, place: Path, database: Path, done: Path) -> int:
    import coverage

    enter(ROOT)
    database.unlink(missing_ok=True)
    config = place / "rc"
    config.write_text("[run]\nrelative_files = true\ncore = ctrace\n")
    tool = coverage.Coverage(data_file=str(database), source=["pyroelbo"], config_file=str(config))
    tool.start()
    recorder = Recorder(tool)
    status = run_pytest([str(path)], place, recorder)
    tool.stop()
    tool.save()
    done.write_text(json.dumps({"seconds": recorder.seconds, "failed": recorder.failed}))
    return status


class Lines:
    """The tests that run a line, in the order in which they are tried."""

    def __init__(self, folder: Path) -> None:
        import coverage

        self.seconds: dict[str, float] = {}
        self.databases = []
        self.lines: dict[str, dict[int, set[str]]] = {}
        for done in sorted(folder.glob("*.json")):
            row = json.loads(done.read_text())
            bad = {name.split("::")[0] for name in row["failed"] if "::" not in name} | set(row["failed"])
            self.seconds.update((k, v) for k, v in row["seconds"].items() if k not in bad)
            self.databases.append(coverage.CoverageData(str(done.with_suffix(".db"))))
            self.databases[-1].read()

    def _of(self, path: str) -> dict[int, set[str]]:
        if path not in self.lines:
            merged = self.lines[path] = collections.defaultdict(set)
            for database in self.databases:
                for line, names in database.contexts_by_lineno(path).items():
                    merged[line].update(n for n in names if n in self.seconds or not n)
        return self.lines[path]

    def tests(self, mutant: Mutant, seconds: float) -> tuple[list[str], bool]:
        """Its tests, those of its own file and package first, and whether the limit left some out."""
        package, stem = Path(mutant.path).parent.name, Path(mutant.path).stem
        if package == "kernels" and stem != "gate":
            names = ("kernels", *KERNEL_TESTS.get(stem, (stem,)))
            files = {f"tests/distributions/test_{name}.py" for name in names}
            found = {n for n in self.seconds if n.split("::")[0] in files}
        else:
            lines = self._of(mutant.path)
            found = set().union(*(lines[i] for i in (mutant.statement, *range(mutant.line, mutant.last + 1))))
            # What runs as the module is imported belongs to all who use the module.
            found = (found if found != {""} else set().union(*lines.values())) - {""}

        def order(name: str) -> tuple:
            file = name.split("::")[0]
            own = file.endswith(f"test_{stem.strip('_')}.py")
            return not own, f"/{package}/" not in file, self.seconds[name]

        chosen, spent = [], 0.0
        for name in sorted(found, key=order):
            if spent + self.seconds[name] <= seconds:
                chosen.append(name)
                spent += self.seconds[name]
        return chosen, len(chosen) < len(found)


# --- planting -----------------------------------------------------------------------------------------------


def overlay(mutant: Mutant | None, place: Path) -> Path:
    """A copy of the tree made of links, but for the changed file."""
    tree = place / "tree"
    tree.mkdir()
    path = Path(mutant.path) if mutant else Path("pyroelbo/__init__.py")
    here, there = ROOT, tree
    for part in path.parts:
        for entry in here.iterdir():
            if entry.name not in (part, "__pycache__", ".git", "tmp"):
                (there / entry.name).symlink_to(entry)
        here, there = here / part, there / part
        if here.is_dir():
            there.mkdir()
    content = (ROOT / path).read_bytes()
    if mutant:
        content = content[: mutant.start] + mutant.after.encode() + content[mutant.stop :]
    there.write_bytes(content)
    return tree


def _tested(tree: Path, names: list[str], verdict: Path, fresh: bool) -> int:
    enter(tree)
    if fresh:  # numba's cache does not see that a function of another file has changed
        os.environ["NUMBA_CACHE_DIR"] = str(tree / "numba")
        if "numba" in sys.modules:
            sys.modules["numba"].config.CACHE_DIR = str(tree / "numba")
    recorder = Recorder(wanted=names)
    status = run_pytest(sorted({n.split("::")[0] for n in names}), tree, recorder, "-x")
    verdict.write_text(json.dumps({"failed": recorder.failed, "ran": len(recorder.seconds)}))
    return status


def plant(mutant: Mutant, lines: Lines, seconds: float) -> dict:
    """What became of one bug: caught (by which test), hung, crashed or survived."""
    names, left_out = lines.tests(mutant, seconds)
    row = {**dataclasses.asdict(mutant), "key": mutant.key, "diff": diff_of(mutant), "tests": len(names)}
    began = time.monotonic()
    if not names:
        return {**row, "outcome": "survived", "by": "no test runs the line", "seconds": 0.0}
    with tempfile.TemporaryDirectory() as place:
        tree, verdict = overlay(mutant, Path(place)), Path(place) / "verdict.json"
        compiled = "/kernels/" in mutant.path
        limit = 60 + 4 * seconds + 900 * compiled
        status = in_child(
            lambda: _tested(tree, names, verdict, compiled), Path(place) / "log", limit, 20 * limit
        )
        said = json.loads(verdict.read_text()) if verdict.exists() else {"failed": [], "ran": 0}
        log = (Path(place) / "log").read_text(errors="replace")
    if status is None:
        outcome, by = "caught", "time limit"
    elif said["failed"]:
        outcome, by = "caught", said["failed"][0]
    elif status == 0:
        outcome, by = "survived", f"{said['ran']} tests" + (", some left out" if left_out else "")
    else:
        outcome, by = "caught", f"exit status {status}: " + (log.strip().splitlines() or [""])[-1][:200]
    return {**row, "outcome": outcome, "by": by, "seconds": round(time.monotonic() - began, 1)}


def diff_of(mutant: Mutant) -> str:
    old = (ROOT / mutant.path).read_bytes()
    new = old[: mutant.start] + mutant.after.encode() + old[mutant.stop :]
    rows = difflib.unified_diff(old.decode().splitlines(), new.decode().splitlines(), n=0, lineterm="")
    return "\n".join(list(rows)[3:])


def read(path: Path) -> dict[str, dict]:
    """The last row of each bug."""
    rows = path.read_text().splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, rows)}


def show(rows: dict[str, dict], equivalent: dict[str, str]) -> None:
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows.values():
        kind = "equivalent" if row["key"] in equivalent and row["outcome"] == "survived" else row["outcome"]
        for name in (next(p for p in SHARES if row["path"].startswith(f"pyroelbo/{p}")), "all"):
            table[name][kind] += 1
        if kind != "caught":
            print(f"{kind} {row['path']}:{row['line']} ({row['kind']}; {row['by']})\n{row['diff']}\n")
    print(f"{'package':<24}{'planted':>9}{'caught':>8}{'equivalent':>12}{'survived':>10}")
    for name in [*SHARES, "all"]:
        c = table[name]
        print(f"{name:<24}{sum(c.values()):>9}{c['caught']:>8}{c['equivalent']:>12}{c['survived']:>10}")
    total = table["all"]
    counted = total["caught"] + total["survived"]
    print(json.dumps({"benchmark": "mutants", **total, "share": round(total["caught"] / max(1, counted), 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=["all", "trace", "plant", "again", "show"], nargs="?", default="all")
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of tests a bug, when not mutated")
    parser.add_argument("--map", type=Path, default=Path("runs/mutants"), help="folder of the traced lines")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.jsonl"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder, out = options.map.resolve(), options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.work in ("all", "trace"):
        trace(folder)
    if options.work in ("all", "plant", "again"):
        preload()
        lines, rows = Lines(folder), read(out)
        for mutant in draw(options.mutants, options.seed):
            known = rows.get(mutant.key, {}).get("outcome")
            if known == "caught" or (known and options.work != "again"):
                continue
            row = plant(mutant, lines, options.seconds)
            said = f"{mutant.kind} ({row['seconds']} s, {row['by']})"
            print(f"{row['outcome']:<9}{mutant.path}:{mutant.line} {said}", flush=True)
            with out.open("a") as f:
                f.write(json.dumps(row) + "\n")
    if options.work != "trace":
        show(read(out), {key: row["why"] for key, row in read(Path(__file__).with_suffix(".jsonl")).items()})


if __name__ == "__main__":
    main()
