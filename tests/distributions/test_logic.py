"""Models of formulas as a distribution, against lists of all assignments, and what compilers hand over."""

import math

import pyro
import pytest
import torch

from pyroelbo.distributions import CNF, Circuit, Models, compile_formula, read_dimacs
from tests.distributions.structured_contract import StructuredContract
from tests.distributions.test_chain import nested, randn
from tests.oracles import Listing, models_of

pytest.importorskip("py_d4")
FORMULAS = {
    "chain": (3, [[1, 2], [-2, 3]]),
    "free": (5, [[1, 2], [-2, 4]]),
    "parity": (4, [[1, 2, 3], [1, -2, -3], [-1, 2, -3], [-1, -2, 3]]),
    "one": (3, [[1], [-2], [3]]),
    "everything": (3, []),
    "sparse": (5, [[1, -2], [2, 3, 4], [-4, 5]]),
    "apart": (6, [[1, 2], [3, -4], [5, 6], [-5, -6]]),
}
CIRCUITS = {}


def circuit(name):
    if name not in CIRCUITS:
        CIRCUITS[name] = compile_formula(CNF(*FORMULAS[name]))
    return CIRCUITS[name]


@pytest.mark.parametrize("case", FORMULAS)
class TestModels(StructuredContract):
    def make(self, case, seed=0):
        literal = randn(seed, 3, FORMULAS[case][0], 2, sparse="sparse" in case)
        q = Models(circuit(case), literal)
        q.clauses = FORMULAS[case][1]
        return q

    def construct(self, q, potentials):
        made = Models(q.circuit, *potentials)
        made.clauses = q.clauses
        return made

    def listing(self, q, b):
        return Listing(models_of(q.clauses, nested(q.potentials[0].expand(3, -1, -1)[b])))


def test_counts_and_entropy_of_free_variables():
    q = Models(circuit("free"), torch.zeros(5, 2))
    assert float(q.log_partition.exp()) == pytest.approx(16)
    assert float(q.entropy()) == pytest.approx(math.log(16))
    assert len(q.sample((2000,)).unique(dim=0)) == 16


def test_weights_make_it_a_posterior():
    """With independent variables as weights, ln Z is the probability of the formula."""
    p = torch.tensor([0.3, 0.6, 0.2])
    q = Models(circuit("chain"), torch.stack([1 - p, p], -1).log())
    by_hand = sum(math.exp(w) for _, w, _ in models_of(FORMULAS["chain"][1], q.potentials[0].tolist()))
    assert float(q.log_partition.exp()) == pytest.approx(by_hand)


def test_false_formulas_have_probability_zero():
    for clauses in ([[1], [-1]], [[]], [[1, 2], [1, -2], [-1, 2], [-1, -2]]):
        q = Models(compile_formula(CNF(2, clauses)), torch.zeros(1, 2, 2))
        assert q.log_partition.item() == -math.inf
        with pytest.raises(ValueError, match="no structure has positive probability"):
            q.sample()


def test_it_is_a_site():
    q = Models(circuit("apart"), torch.zeros(4, 6, 2))
    trace = pyro.poutine.trace(lambda: pyro.sample("z", q)).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (4,)
    assert CNF(*FORMULAS["apart"]).satisfied(trace.nodes["z"]["value"]).all()


@pytest.mark.parametrize(
    "nodes, edges, message",
    [
        # x or y: both may hold
        (["o", "t"], [(0, 1, (1,)), (0, 1, (2,))], "expected alternatives that exclude each other"),
        (["a", "o", "t"], [(0, 1, (1,)), (1, 2, (1,)), (1, 2, (-1,))], "without common variables, got 1"),
        (["o", "o"], [(0, 1, (1,)), (1, 0, ())], "expected no cycle"),
    ],
)
def test_circuits_that_would_count_wrongly_are_refused(nodes, edges, message):
    with pytest.raises(ValueError, match=message):
        Circuit(2, nodes, edges)


def test_a_circuit_of_another_formula_is_found():
    assert circuit("chain").violated(CNF(3, [[1, 2], [-2, 3]])) is None
    assert circuit("chain").violated(CNF(3, [[1, 2], [-1, -3]])) == 1


def test_compiling_stops_in_time(monkeypatch):
    monkeypatch.setattr("pyroelbo.distributions.logic._CHILD", "import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match=r"took more than 0.2 s: give it more by seconds="):
        compile_formula(CNF(2, [[1, 2]]), seconds=0.2)
    monkeypatch.setattr("pyroelbo.distributions.logic._CHILD", "raise SystemExit('out of order')")
    with pytest.raises(ValueError, match="the compiler failed: out of order"):
        compile_formula(CNF(2, [[1, 2]]))


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyroelbo\[logic\]'"):
        compile_formula(CNF(2, [[1, 2]]))


def test_dimacs_files(tmp_path):
    file = tmp_path / "f.cnf"
    file.write_text("c an example\np cnf 3 2\n1 -3\n 0 2 3 -1 0\n%\n0\n")
    assert read_dimacs(file) == CNF(3, ((1, -3), (2, 3, -1)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 2 0\n", "line 1: expected 'p cnf VARIABLES CLAUSES' first"),
        ("p cnf 2\n", "line 1: expected one header"),
        ("p cnf 2 1\n1 3 0\n", "line 2: expected literals ±1 … ±2, got 3"),
        ("p cnf 2 1\n1 x 0\n", "line 2: expected literals, got 'x'"),
        ("p cnf 2 1\n1 2\n", "expected 0 at the end"),
        ("p cnf 2 2\n1 2 0\n", "expected 2 clauses, as the header says, got 1"),
        ("", "got no header"),
    ],
)
def test_damaged_dimacs_files(tmp_path, text, message):
    file = tmp_path / "f.cnf"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dimacs(file)


def test_formulas_of_other_variables_are_refused():
    with pytest.raises(ValueError, match="got 3 in clause 1"):
        CNF(2, [[1], [3]])
    with pytest.raises(ValueError, match=r"literal: expected shape \[\*B, 3, 2\]"):
        Models(circuit("chain"), torch.zeros(4, 2))
