"""Every compiled kernel refuses, before it reads or writes anything, what would lead it out of its arrays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyroelbo import fit, models
from pyroelbo.distributions import (
    CTC,
    HMM,
    Alignment,
    LinearChain,
    LinearGaussianChain,
    ParseTree,
    SemiMarkov,
)
from pyroelbo.distributions.checks import check_lengths

numba = pytest.importorskip("numba")
from pyroelbo.distributions.kernels import (  # noqa: E402
    alignment,
    chain,
    gate,
    inside_outside,
    kalman,
    mixture,
    path,
    smoother,
)

B, T, S = 3, 5, 8
LENGTHS = torch.tensor([4, 2, 5])  # the last row to its end, beyond which nothing may be touched


def new(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def potentials():
    return randn(1, S), randn(1, 1, S, S), randn(B, T, S), LENGTHS.clone()


def forward():
    return *potentials(), 0.0, new(1, 1, S, S), new(B, T, S), new(B, T), new(B), new(B)


def evidence():
    return *potentials(), 0.0, new(B), new(B), new(0)


def smooth():
    return *potentials(), new(1, 1, S, S), new(B, T, S), new(B, S, S), new(B), new(B)


def backward():
    initial, transition, observation, lengths, _, exp_transition, alpha, scale, *found = forward()
    chain.forward(initial, transition, observation, lengths, 0.0, exp_transition, alpha, scale, *found)
    transposed = exp_transition.mT.contiguous()
    return (
        transposed,
        observation,
        lengths,
        alpha,
        scale,
        new(B) + 1,
        new(B, T, S),
        new(0, 0, 0),
        new(1, S, S),
    )


def draw():
    z = torch.zeros(2, B, T, dtype=torch.long)
    return randn(1, 1, S, S).exp(), randn(B, T, S).exp(), LENGTHS.clone(), randn(2, B, T).sigmoid(), z


def viterbi():
    initial, transition, observation, lengths = potentials()
    transposed = transition.mT.contiguous()
    return initial, transition, transposed, observation, lengths, torch.zeros(B, T, dtype=torch.long)


def alpha_beta():
    targets = torch.tensor([[1, 2], [3, -1], [2, 2]])
    log_probs = randn(B, T, 4).log_softmax(-1)
    return log_probs, targets, LENGTHS.clone(), torch.tensor([2, 1, 2]), 0, new(B), new(B, T, 4), True


N = 8


def charts():
    leaf = new(T, B, T + 1)
    chart = inside_outside.Charts(
        new(T, B, T + 1, N), new(T, B, T + 1, N), leaf, leaf.clone(), leaf.clone(), new(0, 0, 0, 0)
    )
    given = inside_outside.Upward(
        two=randn(T - 1, B, N).exp(),
        leaf_left=randn(T, B, N, N).exp(),
        leaf_right=randn(T, B, N, N).exp(),
        inner=randn(1, N * N, N).exp(),
        base=new(1),
        top=new(0, 0, 0),
        possible=new(0, 0, 0, 0),
        lengths=LENGTHS.clone(),
    )
    return chart, given


def inside():
    return *charts(), 0.0, 1e-300, False, torch.zeros(B, dtype=torch.bool)


def outside():
    chart, above = charts()
    inside_outside.inside(chart, above, 0.0, 1e-300, False, torch.zeros(B, dtype=torch.bool))
    given = inside_outside.Downward(
        leaf_left=above.leaf_left.mT.contiguous(),
        leaf_right=above.leaf_right.mT.contiguous(),
        inner=above.inner.view(1, N, N, N),
        transposed=above.inner.view(1, N, N, N).mT.contiguous(),
        posterior=new(B, N) + 1 / N,
        lengths=LENGTHS.clone(),
        nodes=LENGTHS - 1,
        slack=new(B) + 1e300,
        grad=new(B) + 1,
    )
    out = inside_outside.Gradients(
        reliable=torch.ones(B, dtype=torch.bool),
        spans=new(B, T, T, N),
        two=new(T - 1, B, N),
        to_left=new(T, B, N, N),
        to_right=new(T, B, N, N),
        total=new(1, N, N * N),
    )
    return chart, given, out


HIDDEN, OBSERVED = 2, 3


def kalman_filter():
    square = torch.eye(HIDDEN, dtype=torch.float64)
    parameters = kalman.Parameters(
        start=randn(1, HIDDEN),
        spread=square[None],
        move=randn(1, 1, HIDDEN, HIDDEN),
        drift=randn(1, 1, HIDDEN),
        noise=square[None, None],
        read=randn(1, 1, OBSERVED, HIDDEN),
        offset=randn(1, 1, OBSERVED),
        error=torch.eye(OBSERVED, dtype=torch.float64)[None, None],
    )
    states = kalman.States(new(B, T, HIDDEN), new(B, T, OBSERVED), new(B, T, OBSERVED))
    found = kalman.Covariances(
        predicted=new(1, T, HIDDEN, HIDDEN),
        filtered=new(1, T, HIDDEN, HIDDEN),
        gain=new(1, T, HIDDEN, OBSERVED),
        whiten=new(1, T, OBSERVED, OBSERVED),
        white_read=new(1, T, OBSERVED, HIDDEN),
        rest=new(1, T, HIDDEN, HIDDEN),
        log_det=new(1, T),
        settled=torch.zeros(1, dtype=torch.long),
    )
    return randn(B, T, OBSERVED), LENGTHS.clone(), parameters, new(B), states, found


def kalman_adjoint():
    y, lengths, parameters, value, states, found = kalman_filter()
    kalman.kalman_filter(y, lengths, parameters, value, states, found)
    kept = kalman.Kept(parameters.move, parameters.read, states, found)
    grads = kalman.Parameters(*(torch.zeros_like(x) for x in parameters))
    return new(B) + 1, lengths, kept, grads, torch.zeros_like(y)


def conditionals():
    y, lengths, parameters, value, states, found = kalman_filter()
    kalman.kalman_filter(y, lengths, parameters, value, states, found)
    gain, own = new(1, T, HIDDEN, HIDDEN), new(1, T, HIDDEN, HIDDEN)
    return lengths, parameters, states, found, gain, own, new(B, T, HIDDEN)


def sweep():
    return randn(1, T, HIDDEN, HIDDEN), randn(B, T, HIDDEN), new(B, T, HIDDEN)


def spread():
    return tuple(randn(B, T, HIDDEN, HIDDEN) for _ in range(3))


def e_step():
    rows, dims, parts = 20, 3, 8
    features = dims * dims + dims  # all products of a block of up to eight coordinates, and these
    out = mixture.Statistics(new(1, rows), new(1, rows), new(parts), new(parts, 16), new(dims))
    return randn(rows, dims), new(dims), randn(features, parts), new(parts), parts, False, False, out


# how to call each kernel, and its index arrays: where, name, lowest and highest
CASES = {
    (chain, "forward"): (forward, [((3,), "lengths", 1, T)]),
    (chain, "evidence"): (evidence, [((3,), "lengths", 1, T)]),
    (chain, "smooth"): (smooth, [((3,), "lengths", 1, T)]),
    (chain, "backward"): (backward, [((2,), "lengths", 1, T)]),
    (path, "draw"): (draw, [((2,), "lengths", 1, T)]),
    (path, "viterbi"): (viterbi, [((4,), "lengths", 1, T)]),
    (alignment, "alpha_beta"): (
        alpha_beta,
        [((1,), "y", 0, 3), ((2,), "lengths", 1, T), ((3,), "target_lengths", 0, 2)],
    ),
    (inside_outside, "inside"): (inside, [((1, "lengths"), "lengths", 1, T)]),
    (inside_outside, "outside"): (outside, [((1, "lengths"), "lengths", 1, T)]),
    (kalman, "kalman_filter"): (kalman_filter, [((1,), "lengths", 1, T)]),
    (kalman, "kalman_adjoint"): (
        kalman_adjoint,
        [((1,), "lengths", 1, T), ((2, "found", "settled"), "settled", 0, T - 1)],
    ),
    (smoother, "conditionals"): (conditionals, [((0,), "lengths", 1, T)]),
    (smoother, "sweep"): (sweep, []),
    (smoother, "spread"): (spread, []),
    (mixture, "e_step"): (e_step, []),
}
INDICES = [(*key, make, *index) for key, (make, indices) in CASES.items() for index in indices]


def find(arguments, where):
    found = arguments[where[0]]
    for name in where[1:]:
        found = getattr(found, name)
    return found


def flat(arguments):
    for x in arguments:
        if isinstance(x, tuple):
            yield from flat(x)
        elif isinstance(x, torch.Tensor):
            yield x


def test_python_enters_kernels_through_the_gate_alone():
    here = {(module, name) for module in (chain, path, alignment, inside_outside, kalman, smoother, mixture)
            for name, x in vars(module).items() if isinstance(x, gate.Kernel)}  # fmt: skip
    assert here == set(CASES)
    folder = Path(chain.__file__).parents[1]
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "njit" not in text and "numba" not in text.replace("needs numba", "").replace(
            "without numba", ""
        )


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_a_good_call(module, name):
    getattr(module, name)(*CASES[module, name][0]())


@pytest.mark.parametrize("apart", [1, 10**7])
@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize(
    ("module", "name", "make", "where", "argument", "low", "high"),
    INDICES,
    ids=[f"{name}-{argument}" for _, name, _, _, argument, _, _ in INDICES],
)
def test_an_index_out_of_range(module, name, make, where, argument, low, high, side, apart):
    bad = low - apart if side == "below" else high + apart
    arguments = make()
    index = find(arguments, where)
    index.view(-1)[-1] = bad
    before = [x.clone() for x in flat(arguments)]
    with pytest.raises(
        ValueError, match=rf"{argument}: expected integers in \[-?\d+, {high}\], got {bad} at index"
    ):
        getattr(module, name)(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(flat(arguments), before, strict=True))


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_an_array_too_short_or_not_contiguous(module, name):
    make = CASES[module, name][0]

    def shortened(x, axis):
        return x.narrow(axis, 0, x.shape[axis] - 1).contiguous()

    def replaced(arguments, place, new):
        """The arguments with their ``place``-th tensor replaced."""
        found, count = [], 0
        for x in arguments:
            if isinstance(x, tuple):
                inner = len(list(flat(x)))
                found.append(type(x)(*replaced(x, place - count, new)) if 0 <= place - count < inner else x)
                count += inner
            elif isinstance(x, torch.Tensor):
                found.append(new if count == place else x)
                count += 1
            else:
                found.append(x)
        return found

    arguments = make()
    for place, x in enumerate(flat(arguments)):
        if not x.numel():
            continue
        for axis in range(x.dim()):
            if name == "e_step" and x.shape[axis] == 16:  # more columns than needed are fine
                continue
            with pytest.raises(ValueError, match=rf"{name}: expected arrays of matching shapes|got 5 at"):
                getattr(module, name)(*replaced(arguments, place, shortened(x, axis)))
        if x.dim() > 1 and x.shape[-1] > 1 and x[0].numel() < x.numel():
            strided = x.transpose(0, -1).contiguous().transpose(0, -1)
            with pytest.raises(numba.core.errors.TypingError, match="expected C-contiguous arrays"):
                getattr(module, name)(*replaced(arguments, place, strided))
            break


# ---- the public face, with and without the kernels, validation on and off


def chain_with(lengths, **options):
    return LinearChain(randn(2, 3), randn(2, 3, 3), randn(2, 5, 3), torch.tensor(lengths), **options)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("bad", [0, -1, 6, 50, 10**7])
def test_lengths_of_every_structure(bad, validate, kernels):
    lengths, options = torch.tensor([bad, 3]), {"validate_args": validate}
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    makers = [
        lambda: chain_with([bad, 3], **options).log_partition,
        lambda: HMM(randn(3), randn(3, 3), dist.Normal(randn(3), 1.0), lengths=lengths, **options).log_prob(
            randn(2, 5)
        ),
        lambda: (
            SemiMarkov(
                randn(2, 3), randn(2, 3, 3), randn(2, 3, 2), randn(2, 5, 3), lengths=lengths, **options
            ).log_partition
        ),
        lambda: CTC(randn(2, 5, 4), lengths, **options).log_prob(torch.tensor([[1, 2], [3, 1]])),
        lambda: Alignment(randn(2, 5, 4), torch.tensor([[1, 2], [3, 1]]), lengths, **options).entropy(),
        lambda: (
            ParseTree(
                randn(2, 3), randn(2, 3, 5, 5), randn(2, 5, 2), lengths=lengths, **options
            ).log_partition
        ),
        lambda: LinearGaussianChain(
            normal, torch.eye(2), normal, torch.eye(2), normal, lengths=lengths, **options
        ).log_prob(randn(2, 5, 2)),
    ]
    for make in makers:
        with pytest.raises(
            ValueError, match=rf"lengths: expected integers in \[1, 5\], got {bad} at index \[0\]"
        ):
            make()


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("query", ["log_partition", "mode", "sample", "marginals"])
def test_lengths_changed_after_construction(query, validate, kernels):
    q = chain_with([5, 3], validate_args=validate)
    q.lengths = torch.tensor([5, 6])
    with pytest.raises(ValueError, match=r"lengths: expected integers in \[1, 5\], got 6 at index \[1\]"):
        q.sample() if query == "sample" else getattr(q, query)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("bad", [4, 5, -2, 10**7])
def test_labels_of_a_target(bad, validate, kernels):
    d = CTC(randn(2, 5, 4), validate_args=validate)
    with pytest.raises(ValueError, match=rf"y: expected integers .*got {bad} at index \[(0, 1|1)\]"):
        d.log_prob(torch.tensor([[1, bad], [2, 3]]))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("bad", [3, -1, 10**7])
def test_labels_of_a_chain(bad, validate):
    q = chain_with([5, 3], validate_args=validate)
    z = q.mode
    z[1, 2] = bad
    with pytest.raises(ValueError, match=rf"z: expected integers in \[0, 2\], got {bad} at index \[1, 2\]"):
        q.log_prob(z)


def test_training_refuses_a_length_beyond_the_data():
    """Training runs without validation: this corrupted memory and aborted the process."""
    lengths = torch.full((64,), 20)
    lengths[7] = 21
    with pytest.raises(ValueError, match=r"lengths: expected integers in \[1, 20\], got 21"):
        fit(models.HMM(3, 1, "gaussian"), (torch.randn(64, 20, 1), lengths), epochs=3, batch_size=4)


def run(code, **environment):
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, *code], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.slow
def test_without_assertions():
    """``python -O`` turns torch's validation off; the gate stays."""
    text = """
import torch
from pyroelbo.distributions import LinearChain
try:
    LinearChain(torch.randn(2, 3), torch.randn(2, 3, 3), torch.randn(2, 5, 3), torch.tensor([50,
    3])).log_partition
except ValueError as error:
    print(error)
"""
    done = run(["-O", "-c", text])
    assert "lengths: expected integers in [1, 5], got 50 at index [0]" in done.stdout, done.stderr


@pytest.mark.slow
def test_every_access_is_in_bounds(tmp_path):
    """All kernels with bounds checks, of vectors too, on the structures' own tests."""
    tests = Path(__file__).parent
    picked = "compiled and not derivatives and not fit and not topk"
    files = ["test_chain.py", "test_alignment.py", "test_grammar.py", "test_gaussian.py", "test_mixture.py"]
    code = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        picked,
        "-p",
        "no:cacheprovider",
        *(str(tests / f) for f in files),
    ]
    done = run(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]


# a planted offset of one for each kernel
PLANTED = {
    "forward": ("chain", "store(alpha, (r * alpha.shape[1] + t) * size + j,", "size + j,", "size + j + 1,"),
    "evidence": ("chain", "store(out, j, value)", "j,", "j + 1,"),
    "backward": ("chain", "store(gamma, row + j,", "j,", "j + 1,"),
    "smooth": ("chain", "out.counts[r, i, j] +=", "j]", "j + 1]"),
    "draw": ("path", "z[n, b, t] = _choose(", "t]", "t + 1]"),
    "viterbi": ("path", "store(delta, r * far + t * padded + j,", "j,", "j + 1,"),
    "alpha_beta": ("alignment", "occupancy[t, used[u]]", "[t,", "[t + 1,"),
    "inside": ("inside_outside", "relative[0, 1], child, 0, wide)", "child, 0,", "child, 1,"),
    "outside": ("inside_outside", "out.two[i, b] = flow", "[i,", "[i + 1,"),
    "kalman_filter": ("kalman", "states.mean[row, t + 1, i] = x", "t + 1", "t + 2"),
    "kalman_adjoint": ("kalman", "by_y[row, t, i] = s", "t,", "t + 1,"),
    "conditionals": ("smoother", "shift[row, t, i] = x", "t,", "t + 1,"),
    "sweep": ("smoother", "x += gain[b, t, i, k] * z[row, t + 1, k]", "t + 1", "t + 2"),
    "spread": ("smoother", "_mm(gain[row, t], covariance[row, t + 1], x)", "t + 1", "t + 2"),
    "e_step": ("mixture", "store(counts, r * size + j,", "j,", "j + 1,"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_offset_is_caught(name, tmp_path):
    file, line, old, wrong = PLANTED[name]
    root = Path(__file__).parents[2]
    for folder in ("pyroelbo", "tests"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "pyroelbo" / "distributions" / "kernels" / f"{file}.py"
    text = source.read_text(encoding="utf-8")
    assert text.count(line) == 1 and line.count(old) == 1
    source.write_text(text.replace(line, line.replace(old, wrong)), encoding="utf-8")
    code = f"""
from tests.distributions.test_kernels import *
from pyroelbo.distributions.kernels import {file}
assert {file}.__file__.startswith({str(tmp_path)!r})
try:
    {file}.{name}(*{name}())
except IndexError as error:
    print("caught:", error)
"""
    paths = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), **paths},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert "caught:" in done.stdout, done.stderr[-2000:]


def test_the_check_of_lengths_alone():
    check_lengths(torch.tensor([1, 5]), 5)
    with pytest.raises(ValueError, match="lengths: expected integers, got dtype torch.float64"):
        check_lengths(torch.tensor([1.0]), 5)


def test_compiling_is_announced_once(caplog):
    def start(function):
        dispatcher = SimpleNamespace(py_func=function)
        notice.on_start(SimpleNamespace(data={"dispatcher": dispatcher}))

    notice = gate._Notice()
    start(torch.nn.Linear)  # somebody else's code
    assert not caplog.records
    start(chain.forward._run.py_func)
    start(path.draw._run.py_func)
    (record,) = caplog.records
    assert "compiling kernels" in record.message and "cache" in record.message
