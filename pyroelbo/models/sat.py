"""Satisfiability as inference: assignments drawn at random, observed to satisfy a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.distributions import CNF, Models, compile_formula
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.nn import masked_mlp
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["SAT"]

GUIDES = ("compiled", "autoregressive")
_NO_MODELS = "formula: expected one that can be satisfied, got one without models"


class SAT(ExactPair):
    """z_i ~ Bernoulli(w_i) for i = 1 … n, y = φ(z) for a formula φ; data are ones: φ was seen to hold.

    ln p(y = 1) is the logarithm of φ's weighted count of models, for w = ½ ln(models) - n ln 2. It is exact
    by a decision diagram (:func:`~pyroelbo.distributions.compile_formula`), compiled at first use, and -inf
    for an unsatisfiable formula.

    Guides (any mass on assignments that are no models makes the ELBO -inf):

    - ``compiled``: the diagram, which is the posterior; the bound is tight;
    - ``autoregressive``: variable after variable, by a masked network, kept to values whose prefix extends
      to a model, as a solver says (``python-sat``). Untrained it is uniform over the values that extend.
      Train it with ``fit(objective="rloo")``. Cost: up to two solver calls for each variable and draw,
      remembered.

    A sampled bound proves nothing by itself: with probability 1 - δ, ln p(y) ≥ ln Ẑ - ln(1/δ), where Ẑ is the
    mean of the importance weights (Markov's inequality); the compiled one is exact.

    Raises ValueError for data other than ones and for draws from a formula without models, ImportError
    without the compiler or the solver, :class:`~pyroelbo.evidence.Unavailable` for the evidence where the
    compiler is missing or out of time. Values of z are LongTensors [B, n]; data [B].

    Args:
        formula: a :class:`~pyroelbo.distributions.CNF`.
        guide: see above.
        weights: the probability w_i of each variable to be true, one number or [n].
        hidden: widths of the autoregressive guide's hidden layers.
        seconds: time limit of the compiler.
    """

    def __init__(
        self,
        formula: CNF,
        guide: str = "compiled",
        weights: float | Sequence[float] | Tensor = 0.5,
        hidden: Sequence[int] = (64,),
        seconds: float = 60.0,
    ) -> None:
        super().__init__()
        if guide not in GUIDES:
            raise ValueError(f"guide: expected one of {GUIDES}, got {guide!r}")
        probs = torch.as_tensor(weights, dtype=torch.get_default_dtype()).expand(formula.variables).clone()
        if not bool(((probs > 0) & (probs < 1)).all()):
            raise ValueError(f"weights: expected probabilities in (0, 1), got {weights!r}")
        self.formula, self.seconds = formula, seconds
        self.register_buffer("log_weights", torch.stack([1 - probs, probs], -1).log())
        self.encoder = _network(formula.variables, hidden) if guide == "autoregressive" else None
        self.__dict__["_circuit"] = self.__dict__["_prefixes"] = None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 1 or not bool((y == 1).all()):
            raise ValueError("y: expected ones [B], the formula's value in each datum, got others")
        return y

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(self._check(y))):
            z = pyro.sample("z", dist.Categorical(logits=self.log_weights).to_event(1))
            pyro.sample("y", _Holds(self.formula.satisfied(z)), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            if self.encoder is None:
                pyro.sample("z", self._models(y))
            else:
                pyro.sample("z", _Extendable(self.encoder, self._oracle(), self.log_weights, (len(y),)))

    def log_evidence(self, y: Tensor) -> Tensor:
        try:
            return self.posterior(self._check(y)).log_partition
        except (ImportError, TimeoutError) as error:
            raise Unavailable(str(error)) from error

    def posterior(self, y: Tensor) -> Models:
        if self.__dict__["_circuit"] is None:
            self.__dict__["_circuit"] = compile_formula(self.formula, self.seconds)
        return Models(self.__dict__["_circuit"], self.log_weights).expand((len(y),))

    def _models(self, y: Tensor) -> Models:
        """The posterior, for draws."""
        posterior = self.posterior(y)
        if bool((posterior.log_partition == -torch.inf).any()):
            raise ValueError(f"{_NO_MODELS}, as its decision diagram proves: ln p(y) is -inf")
        return posterior

    def _oracle(self) -> _Prefixes:
        if self.__dict__["_prefixes"] is None:
            self.__dict__["_prefixes"] = _Prefixes(self.formula)
        return self.__dict__["_prefixes"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prefixes": None}

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.ones(n, dtype=self.log_weights.dtype, device=self.log_weights.device)

    def simulate(self, n: int, *given: Tensor, like: Any = None) -> Any:
        """Models of the formula, drawn from the posterior, as the data are always ones."""
        y = self.placeholder(n)
        return {"z": self._models(y).sample()}, y

    def lines(self, latents: dict[str, Tensor], batch: Any, names: Sequence[str]) -> list[str]:
        """Each assignment as the literals that are true, and 0, as solvers print it."""
        signs = 2 * latents["z"].reshape(-1, self.formula.variables) - 1
        rows = (signs * torch.arange(1, 1 + self.formula.variables, device=signs.device)).tolist()
        return [f"v {' '.join(map(str, row))} 0" for row in rows]


def _network(variables: int, hidden: Sequence[int]) -> nn.Module:
    network = masked_mlp(variables, hidden, 1)
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


class _Holds(TorchDistribution):
    """A certain value: probability one for y = value, zero for any other."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.boolean

    def __init__(self, value: Tensor) -> None:
        self.value = value
        super().__init__(value.shape, torch.Size(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Holds:
        return _Holds(self.value.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return (value == self.value.to(value.dtype)).to(torch.get_default_dtype()).log()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.value.to(torch.get_default_dtype()).expand(*sample_shape, *self.value.shape)


class _Prefixes:
    """Which values of the next variable extend a prefix to a model, by a solver, remembered."""

    def __init__(self, formula: CNF) -> None:
        try:
            from pysat.solvers import Solver
        except ImportError as error:
            raise ImportError(
                "guide='autoregressive' needs a solver: pip install 'pyroelbo[logic]'"
            ) from error
        self.solver = Solver("cadical153", bootstrap_with=[list(c) for c in formula.clauses])
        self.known: dict[tuple[int, ...], tuple[bool, bool]] = {}

    def values(self, prefix: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether 0 and whether 1 may follow a prefix of literals."""
        if prefix not in self.known:
            variable = len(prefix) + 1
            found = [self.solver.solve([*prefix, sign * variable]) for sign in (-1, 1)]
            self.known[prefix] = found[0], found[1]
        return self.known[prefix]


class _Extendable(TorchDistribution):
    """Assignments variable by variable: values whose prefix extends to a model, in proportion to σ(±logit)
    and the variable's weights; certain where only one extends."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, network: nn.Module, oracle: _Prefixes, log_weights: Tensor, batch_shape: Any) -> None:
        self.network, self.oracle, self.log_weights = network, oracle, log_weights
        super().__init__(torch.Size(batch_shape), log_weights.shape[:1], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Extendable:
        return _Extendable(self.network, self.oracle, self.log_weights, batch_shape)

    def _log_odds(self, z: Tensor) -> Tensor:
        logits = self.network(z.to(self.log_weights.dtype))
        return logits + self.log_weights[:, 1] - self.log_weights[:, 0]

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        z = torch.zeros(*sample_shape, *self.batch_shape, *self.event_shape, dtype=torch.long)
        rows = z.reshape(-1, *self.event_shape)
        prefixes: list[tuple[int, ...]] = [()] * len(rows)
        for i in range(rows.shape[-1]):
            odds = self._log_odds(rows)[:, i]
            drawn = torch.bernoulli(odds.sigmoid())
            allowed = torch.tensor([self.oracle.values(p) for p in prefixes])
            if not bool(allowed.any(-1).all()):
                raise ValueError(f"{_NO_MODELS}, as the solver proves: ln p(y) is -inf")
            rows[:, i] = torch.where(allowed.all(-1), drawn, allowed[:, 1].to(drawn)).long()
            prefixes = [
                (*p, (i + 1) * (2 * v - 1)) for p, v in zip(prefixes, rows[:, i].tolist(), strict=True)
            ]
        return z.to(self.log_weights.device)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        value = value.expand(*shape, -1)
        rows = value.reshape(-1, value.shape[-1])
        allowed = []
        for row in rows.tolist():
            literals = [(i + 1) * (2 * v - 1) for i, v in enumerate(row)]
            allowed.append([self.oracle.values(tuple(literals[:i])) for i in range(len(literals))])
        both = torch.tensor(allowed, device=value.device)
        odds = self._log_odds(rows)
        log_p = torch.where(rows > 0, nn.functional.logsigmoid(odds), nn.functional.logsigmoid(-odds))
        own = both.gather(-1, rows.unsqueeze(-1)).squeeze(-1)
        log_p = torch.where(both.all(-1), log_p, torch.zeros_like(log_p))
        log_p = torch.where(own, log_p, torch.full_like(log_p, -torch.inf))
        return log_p.sum(-1).reshape(shape)
