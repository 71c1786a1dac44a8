"""Mixtures of experts: conditional pairs whose finite latent chooses a regression by the input."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo.models.precision import Floor, exact, regress
from pyroelbo.nn import MLP
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(ExactPair):
    """p(z = m | x) = softmax(V x + c)_m, p(y | z = m, x) a linear model of x: batches ``(x, y)``, bounds on
    ln p(y | x).

    ln p(y | x) = logsumexp_m [ln p(m | x) + ln p(y | m, x)] over M experts, and p(z | x, y) are the
    responsibilities. x is [B, inputs]; experts are

    - ``gaussian``: y [B, outputs] ~ N(W_m x + b_m, diag σ_m²);
    - ``logistic``: y a LongTensor [B] of classes 0 … outputs-1 with probabilities softmax(W_m x + b_m).

    EM starts from :meth:`initialize`, regressions on neighbouring data. Gaussian experts are weighted least
    squares; the gate and logistic experts, which have no M-step in closed form, make one step of Newton's
    method (iteratively reweighted least squares), shortened so that the expected log joint cannot fall.

    Parts: ``generator`` (gate [M, inputs], gate_bias [M], weight [M, outputs, inputs], bias [M, outputs],
    log_scale [M, outputs]; buffer unit [outputs]), ``encoder``. Raises ValueError for other shapes and
    classes. Cost: O(B·M·inputs·outputs); an epoch of EM O(B·(M·inputs)²) for the
    gate, and O(B·M·(inputs·outputs)²) for logistic experts.

    Args:
        inputs: number of coordinates of x.
        outputs: number of coordinates, or of classes, of y.
        components: M.
        experts: see above.
        guide: ``"exact"`` draws from the responsibilities; ``"encoder"`` is an amortized q(z | x, y), the
            softmax of a network of ``hidden`` units.
        hidden: width of the encoder's hidden layer.
        floor: smallest standard deviation of Gaussian experts, relative to the data's from
            :meth:`initialize` on; without it the likelihood of an expert on a single datum is unbounded.

    Source: Jacobs, Jordan, Nowlan and Hinton (1991); Jordan and Jacobs (1994).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        components: int = 4,
        experts: str = "gaussian",
        guide: str = "exact",
        hidden: int = 32,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("outputs", outputs), ("components", components)):
            positive_count(name, value)
        if experts not in ("gaussian", "logistic"):
            raise ValueError(f"experts: expected 'gaussian' or 'logistic', got {experts!r}")
        if guide not in ("exact", "encoder"):
            raise ValueError(f"guide: expected 'exact' or 'encoder', got {guide!r}")
        self.inputs, self.outputs, self.components, self.floor = inputs, outputs, components, Floor(floor)
        self.gaussian = experts == "gaussian"
        g = self.generator = nn.Module()
        shapes = {
            "gate": (inputs,),
            "gate_bias": (),
            "weight": (outputs, inputs),
            "bias": (outputs,),
        }
        for name, shape in shapes.items():
            g.register_parameter(name, nn.Parameter(0.5 * torch.randn(components, *shape)))
        if self.gaussian:
            g.register_parameter("log_scale", nn.Parameter(torch.zeros(components, outputs)))
            g.register_buffer("unit", torch.ones(outputs))
        self.encoder = MLP((inputs + outputs, hidden, components)) if guide == "encoder" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    @property
    def least_data(self) -> int:
        """Smallest number of data that EM accepts."""
        return self.components

    def _check(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.shape[-1] != self.inputs:
            raise ValueError(f"x: expected shape [B, {self.inputs}], got {tuple(x.shape)}")
        wanted = (len(x), self.outputs) if self.gaussian else (len(x),)
        if y.shape != wanted:
            raise ValueError(f"y: expected shape {list(wanted)} for x of {len(x)} rows, got {list(y.shape)}")
        dtype = self.generator.gate.dtype
        if self.gaussian:
            return x.to(dtype) if not x.is_floating_point() else x, y if y.is_floating_point() else y.to(
                dtype
            )
        if y.is_floating_point() or (y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.outputs):
            raise ValueError(
                f"y: expected classes as integers 0 … {self.outputs - 1}, got {y.dtype} from {y.min()} to "
                f"{y.max()}"
            )
        return x.to(dtype) if not x.is_floating_point() else x, y

    def model(self, x: Tensor, y: Tensor) -> None:
        x, _ = self._check(x, y)
        g, x = self.generator, x.to(self.generator.gate.dtype)
        with pyro.plate(PLATE, len(x)):
            z = pyro.sample("z", dist.Categorical(logits=F.linear(x, g.gate, g.gate_bias)))
            mean = (g.weight[z] @ x[..., None]).squeeze(-1) + g.bias[z]
            if self.gaussian:
                pyro.sample("y", dist.Normal(mean, g.log_scale[z].exp()).to_event(1), obs=y)
            else:
                pyro.sample("y", dist.Categorical(logits=mean), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate(PLATE, len(x)):
            if self.encoder is None:
                pyro.sample("z", self.posterior(x, y))
            else:
                x, y = self._check(x, y)
                seen = y if self.gaussian else F.one_hot(y, self.outputs)
                dtype = self.generator.gate.dtype
                logits = self.encoder(torch.cat([x.to(dtype), seen.to(dtype)], -1))
                pyro.sample("z", dist.Categorical(logits=logits))

    def gate(self, x: Tensor) -> Tensor:
        """ln p(z | x), [B, M]."""
        g = self.generator
        return F.linear(exact(x), exact(g.gate).to(exact(x)), exact(g.gate_bias).to(exact(x))).log_softmax(-1)

    def means(self, x: Tensor) -> Tensor:
        """W_m x + b_m of every expert, [B, M, outputs]."""
        x, g = exact(x), self.generator
        return torch.einsum("bi,moi->bmo", x, exact(g.weight).to(x)) + exact(g.bias).to(x)

    def _log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """ln p(y, z | x), [B, M], in nats."""
        x, y = self._check(x, y)
        means = self.means(x)
        if self.gaussian:
            expert = dist.Normal(means, exact(self.generator.log_scale).exp().to(means))
            return self.gate(x) + expert.log_prob(exact(y)[:, None]).sum(-1)
        return self.gate(x) + means.log_softmax(-1)[torch.arange(len(y), device=y.device), :, y]

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """ln p(y | x), [B], in nats; float64 without gradients."""
        return logsumexp(self._log_joint(x, y))

    def posterior(self, x: Tensor, y: Tensor) -> dist.Categorical:
        """p(z | x, y), the responsibilities."""
        return dist.Categorical(logits=self._log_joint(x, y), validate_args=False)

    @torch.no_grad()
    def e_step(
        self, x: Tensor, y: Tensor, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y | x) [B] (``hard``: ln p(y, z* | x)) and the statistics of :meth:`m_step`, in float64.

        ``weights`` [B] count each datum so many times in the statistics.
        """
        joint = self._log_joint(x, y)
        if hard:
            evidence, at = joint.max(-1)
            share = F.one_hot(at, self.components).to(joint)
        else:
            evidence, share = logsumexp(joint), joint.softmax(-1)
        share = share if weights is None else share * weights.to(share).unsqueeze(-1)
        means, wide = self.means(x), _with_one(exact(x))
        found = {"square": wide.T @ wide}
        count = share.sum(-1)
        found |= _slopes("gate", share[:, None], self.gate(x).exp()[:, None], count[:, None], wide)
        if self.gaussian:
            error = exact(y)[:, None] - means
            weighted = share[..., None] * error
            found["error"] = torch.einsum("bmo,bp->mop", weighted, wide)
            found["inputs"] = torch.einsum("bmp,bq->mpq", share[..., None] * wide[:, None], wide)
            found["squares"] = (weighted * error).sum(0)
            found["count"] = share.sum(0)
        else:
            seen = share[..., None] * F.one_hot(y, self.outputs)[:, None]
            found |= _slopes("expert", seen, means.softmax(-1), share, wide)
        return evidence, found

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Gaussian experts that maximize the expected log joint, and a step of the gate and of logistic
        experts that does not lower it."""
        g, square = self.generator, statistics["square"]
        (step,) = _newton(statistics["gate_slope"], statistics["gate_curve"], square)
        g.gate.add_(step[:, :-1])
        g.gate_bias.add_(step[:, -1])
        if not self.gaussian:
            steps = _newton(statistics["expert_slope"], statistics["expert_curve"], square)
            g.weight.add_(steps[..., :-1])
            g.bias.add_(steps[..., -1])
            return
        for m in (statistics["count"] > 0).nonzero().flatten().tolist():
            error, count = statistics["error"][m], statistics["count"][m]
            step = regress(statistics["inputs"][m], error)
            g.weight[m] += step[:, :-1]
            g.bias[m] += step[:, -1]
            variance = (statistics["squares"][m] - (step * error).sum(-1)).clamp_min(0) / count
            g.log_scale[m] = self.floor.log_scale("experts'", variance, g.unit.to(variance).square())

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor) -> None:
        """An even gate; each expert a least-squares fit to its share of the data, those nearest to a random
        one."""
        x, y = (part.double() if part.is_floating_point() else part for part in self._check(x, y))
        if len(x) < self.components:
            raise ValueError(f"x: expected at least {self.components} data, one per expert, got {len(x)}")
        g, size = self.generator, len(x)
        wide = _with_one(x)
        spread = x.std(0, correction=0)
        unit = x / torch.where(spread > 0, spread, 1.0)
        targets = y if self.gaussian else 2 * F.one_hot(y, self.outputs).double() - 1  # logits of ±1
        count = min(size, max(size // self.components, 2 * wide.shape[1]))
        if self.gaussian:
            own = y.std(0, correction=0)
            g.unit.copy_(torch.where(own > 0, own, 1.0))
            self.floor.reset()
        for m, centre in enumerate(torch.randperm(size, device=x.device)[: self.components].tolist()):
            near = (unit - unit[centre]).square().sum(-1).topk(count, largest=False).indices
            ridge = 1e-3 * count * torch.eye(wide.shape[1]).to(wide)
            rows = wide[near]
            solved = regress(rows.T @ rows + ridge * rows.square().mean(0), targets[near].T @ rows)
            g.weight[m] = solved[:, :-1].to(g.weight)
            g.bias[m] = solved[:, -1].to(g.bias)
            if self.gaussian:
                left = (targets[near] - rows @ solved.T).square().mean(0).sqrt()
                g.log_scale[m] = left.maximum(0.1 * g.unit.to(left)).log().to(g.log_scale)
        g.gate.zero_()
        g.gate_bias.zero_()

    def placeholder(self, n: int, *given: Tensor) -> Any:
        x = given[0] if given else self.generator.gate.new_zeros(n, self.inputs)
        blank = x.new_zeros(n, self.outputs) if self.gaussian else x.new_zeros(n, dtype=torch.long)
        return x, blank


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)


def _slopes(name: str, seen: Tensor, probs: Tensor, weight: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradient [M, C, P] and curvature [M, C·P, C·P] of Σ_n Σ_c seen_nmc ln softmax(W_m x_n)_c for M
    regressions on ``x`` [B, P], at their present ``probs`` [B, M, C]; ``weight`` [B, M] are the sums of
    ``seen``."""
    rows = weight[..., None] * probs
    classes, at = probs.shape[-1], torch.arange(probs.shape[-1], device=x.device)
    each, weighted = (_times(r, x) for r in (probs, rows))
    curve = -torch.einsum("bmi,bmj->mij", weighted.flatten(2), each.flatten(2))
    own = torch.einsum("bmcp,bq->cmpq", weighted, x)
    curve.unflatten(1, (classes, -1)).unflatten(3, (classes, -1))[:, at, :, at] += own
    return {
        f"{name}_slope": torch.einsum("bmc,bp->mcp", seen - rows, x),
        f"{name}_curve": curve,
    }


def _times(rows: Tensor, x: Tensor) -> Tensor:
    """rows [B, M, C] times x [B, P], [B, M, C, P]."""
    return rows[..., None] * x[:, None, None]


def _newton(slope: Tensor, curve: Tensor, square: Tensor) -> Tensor:
    """Steps [M, C, P] of Newton's method for M softmax regressions that cannot lower their likelihoods.

    Along a direction d the log-partition's third derivative at a datum is at most the range R of its classes'
    changes d_c x times the second, so that a step t gains at least t g - h (exp(tR) - 1 - tR) / R², with g
    and h the slope and curvature along d; t = ln(1 + R g / h) / R maximizes that. R over all data is at most
    the root of their sum of squares, from ``square`` = Σ x x'.

    Source: Bach (2010), proposition 1.
    """
    steps = []
    for g, h in zip(slope, curve, strict=True):
        d = regress(h, g.flatten()[None]).view_as(g)
        rise, bend = (d * g).sum(), d.flatten() @ h @ d.flatten()
        apart = d[:, None] - d
        reach = torch.einsum("cdp,pq,cdq->cd", apart, square, apart).clamp_min(0).max().sqrt()
        if not (rise > 0 and bend > 0 and reach > 0):
            steps.append(torch.zeros_like(d))
            continue
        steps.append(d * (reach * rise / bend).log1p() / reach)
    return torch.stack(steps)
