"""Eight schools, one of Pyro's own examples, audited: how good are Pyro's automatic guides here?

The latents of a Bayesian model are shared by all data, so there is one evidence, ln p(y) of all eight schools
together, and its bounds are *joint*. Here the effects and their mean can be integrated in closed form, and
tau numerically, so each guide can be compared with the exact posterior. The gap in the table is KL(guide,
posterior).

The third guide is the second one with its scales divided by five, as by a bug or by training that ended
early. Its draws look fine. Its gap is large.

    python examples/audit_a_pyro_model.py --out runs/eight-schools
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyroelbo import Pair, audit, evidence
from pyroelbo.results import Bound

# Rubin (1981): coaching's estimated effects on test scores in eight schools, and their standard errors.
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y, sigma):
    """As in Pyro's examples/eight_schools: a mean, a scale, and each school's deviation in units of it."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


class Exact:
    """The posterior by integration over tau: given tau, y ~ N(0, diag(sigma² + tau²) + 100), and mu is
    Gaussian."""

    def __init__(self, points=4000):
        # The integrand is smooth in ln tau and vanishes at both ends, so the trapezoidal rule is accurate.
        self.log_tau = torch.linspace(-14.0, 12.0, points, dtype=torch.float64)
        self.tau = self.log_tau.exp()
        y, sigma = EFFECTS.double(), ERRORS.double()
        variance = sigma.square() + self.tau[:, None].square()
        covariance = torch.diag_embed(variance) + 100.0
        likelihood = dist.MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance).log_prob(y)
        prior = dist.HalfCauchy(torch.tensor(25.0, dtype=torch.float64)).log_prob(self.tau)
        # The prior is a density of tau, the grid one of ln tau.
        weight = likelihood + prior + self.log_tau + (self.log_tau[1] - self.log_tau[0]).log()
        self.log_evidence = float(weight.logsumexp(0))
        self.weight = weight.softmax(0)
        precision = (1 / variance).sum(1) + 0.01
        self.mu_mean, self.mu_scale = (y / variance).sum(1) / precision, precision**-0.5

    def density(self, name: str, x: Tensor) -> Tensor:
        """The posterior density of mu, or of ln tau."""
        if name == "mu":
            return (dist.Normal(self.mu_mean, self.mu_scale).log_prob(x[:, None]).exp() * self.weight).sum(-1)
        index = torch.searchsorted(self.log_tau, x).clamp(0, len(self.tau) - 1)
        return self.weight[index] / (self.log_tau[1] - self.log_tau[0])

    def bound(self) -> Bound:
        """The evidence as a row of the audit: quadrature, whose error is the change with half the points."""
        value = torch.tensor(self.log_evidence, dtype=torch.float64)
        change = (value - Exact(len(self.tau) // 2).log_evidence).abs()
        return Bound(
            "quadrature", value, torch.zeros_like(value), "estimate", "joint",
            cost=len(self.tau), resolution=change,
        )  # fmt: skip


def trained(auto, steps, seed):
    """Pyro's usual loop, with several draws per step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = auto(model, init_scale=0.1)
    decay = 0.02 ** (1 / steps)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": decay})
    svi = SVI(
        model, guide, optimizer, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    )
    for _ in range(steps):
        svi.step(EFFECTS, ERRORS)
    return guide


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--particles", type=int, default=20_000)
    parser.add_argument("--temperatures", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/eight-schools"))
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.particles, options.temperatures = 20, 200, 5

    exact = Exact()
    data, results, draws = (EFFECTS, ERRORS), {}, {}

    def judge(name, guide):
        pair = Pair.of(model, guide)
        # Latents outside the data plate allow only a joint bound, which has to be requested. AIS starts from
        # the prior: an automatic guide draws its latents through auxiliary sites, so its density is not
        # available.
        ais = evidence.ais(
            pair, data, options.temperatures, 64, start="prior", scope="joint", progress=not options.smoke
        )
        results[name] = audit(
            pair, data, scope="joint", particles=options.particles, references=(exact.bound(), ais)
        )
        draws[name] = evidence.terms(pair, data, 4000, scope="joint").latents
        print(f"\n--- {name}\n{results[name]}")

    judge("AutoMultivariateNormal", trained(AutoMultivariateNormal, options.steps, options.seed))
    guide = trained(AutoNormal, options.steps, options.seed)
    judge("AutoNormal", guide)
    for name in ("mu", "tau", "eta"):
        setattr(guide.scales, name, getattr(guide.scales, name).detach() / 5)
    judge("a fifth as wide", guide)
    print("\npicture:", figure(results, draws, exact, options.out / "eight-schools.png"))
    return results


def figure(results, draws, exact, path):
    """The bounds of each guide, and its draws of mu and tau next to the exact posterior."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(12.5, 3.8), layout="constrained")
    left, middle, right = page.subplots(1, 3)
    colours = dict(zip(results, ("tab:blue", "tab:green", "tab:red"), strict=True))
    left.axvline(exact.log_evidence, color="black", lw=1, label="ln p(y), exact")
    for i, (name, result) in enumerate(results.items()):
        for bound in result.bounds[1:]:
            left.errorbar(
                bound.mean, -i, xerr=2 * bound.mean_error, fmt="^", ms=7, capsize=3, color=colours[name],
                alpha=0.8,
            )  # fmt: skip
            left.annotate(
                bound.method.split("-")[0], (bound.mean, -i), textcoords="offset points", xytext=(0, 9),
                ha="center", fontsize=8,
            )  # fmt: skip
    left.set_yticks([-i for i in range(len(results))], results, fontsize=8)
    left.set_ylim(-len(results) + 0.5, 0.6)
    left.set_xlabel("joint lower bounds, nats")
    left.legend(fontsize=8, loc="lower left")
    for axis, site, name, grid in (
        (middle, "mu", "mu", torch.linspace(-20, 30, 300, dtype=torch.float64)),
        (right, "tau", "ln tau", torch.linspace(-4, 4.5, 300, dtype=torch.float64)),
    ):
        axis.plot(grid, exact.density(site, grid), color="black", label="exact posterior")
        for guide, latents in draws.items():
            values = latents[site].flatten().double()
            values = values.log() if site == "tau" else values
            values = values.clamp(grid[0], grid[-1]).numpy()
            axis.hist(values, 60, density=True, histtype="step", color=colours[guide], label=guide)
        axis.set_xlabel(name)
        axis.set_ylim(0, 2.5 * float(exact.density(site, grid).max()))
    middle.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    main()
