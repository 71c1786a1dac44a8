import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyroelbo import Pair, audit, evidence
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.models import PPCA, DequantizedFlow
from pyroelbo.results import Bound
from tests.pairs import EXACT, TABLE, Nonlinear


@pytest.mark.parametrize("name", EXACT)
def test_exact_pairs_are_audited_against_their_evidence(name):
    make, draw = TABLE[name]
    result = audit(make(), draw(5), particles=200)
    assert result.reference == "exact"
    assert [b.method for b in result.bounds] == ["exact", "elbo", "iwae-200"]
    for gap in result.gaps:
        assert (gap.value > -6 * gap.error - 1e-6).all()


def test_the_reference_is_named_and_why_others_are_not():
    result = audit(Nonlinear(latent=2), torch.randn(3, 4))
    assert result.reference == "quadrature" and "no exact value" in result.notes[0]
    result = audit(Nonlinear(latent=3), torch.randn(3, 4))
    assert result.reference is None and result.gaps == ()
    first = ("no exact value", "no quadrature value")
    assert all(start in note for start, note in zip(first, result.notes, strict=False))
    assert "no reference, hence no gap" in str(result)


def test_a_reference_asked_for_is_not_replaced():
    with pytest.raises(evidence.Unavailable):
        audit(Nonlinear(), torch.randn(3, 4), references=("exact",))
    with pytest.raises(ValueError, match="references: expected"):
        audit(Nonlinear(), torch.randn(3, 4), references=("truth",))
    make, draw = TABLE["ppca"]
    both = audit(make(), draw(2), references=("quadrature", "exact"))
    assert both.reference == "quadrature" and abs(both["exact"].mean - both["quadrature"].mean) < 1e-6


def test_ais_as_a_reference_is_labelled():
    result = audit(Nonlinear(latent=3), torch.randn(2, 4), references=("ais",), temperatures=3)
    assert result.reference == "ais-3" and result["ais-3"].kind == "lower"
    assert "gaps to it are lower estimates" in str(result)


def test_dict_and_tuple_batches():
    def model(x, y):
        import pyro
        import pyro.distributions as dist

        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y):
        import pyro
        import pyro.distributions as dist

        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.5**0.5))

    from pyroelbo import Pair

    x, y = torch.randn(2, 6)
    for batch in ((x, y), {"y": y, "x": x}):
        result = audit(Pair.of(model, guide), batch)
        exact = torch.distributions.Normal(x, 2**0.5).log_prob(y)
        assert (result["elbo"].value - exact).abs().max() < 1e-9


def test_latents_summed_out_of_the_model_leave_the_exact_row():
    from pyroelbo import Pair
    from pyroelbo.models import GaussianMixture

    mixture, y = GaussianMixture(3, 2), torch.randn(4, 3)
    result = audit(Pair.of(mixture.model, lambda y: None), y)
    assert [b.method for b in result.bounds] == ["exact"] and "missing in the guide" in result.notes[0]


def test_references_found_elsewhere():
    make, draw = TABLE["own"]
    pair, y = make(), draw(4)
    better = evidence.iwae(pair, y, 2000)
    result = audit(pair, y, references=(better,))
    assert result.reference == "iwae-2000" and "lower estimates" in str(result)
    with pytest.raises(ValueError, match="references: expected .* got 'iwae-2000'"):
        audit(pair, y[:2], references=(better,))


def test_a_budget_of_evaluations():
    make, draw = TABLE["ppca-mean-field"]
    result = audit(make(), draw(5), budget=5000)
    assert result.reference == "exact" and 490 < result["elbo"].draws <= 500
    assert "a budget of 5000 chose exact, 499 draws" in str(result)
    plane = audit(Nonlinear(), torch.randn(2, 4), budget=1_000_000)
    assert plane.reference == "quadrature"
    # Too little for quadrature or chains: the lower bounds stand alone, and the notes say why.
    alone = audit(Nonlinear(), torch.randn(2, 4), budget=4000)
    assert (
        alone.reference is None
        and "no quadrature value: it needs" in str(alone)
        and "no AIS: 20" in str(alone)
    )
    total = sum(b.cost for b in alone.bounds)
    assert 3000 < total <= 4000


def test_a_budget_chooses_ais_where_nothing_is_exact():
    result = audit(Nonlinear(latent=3), torch.randn(2, 4), budget=40_000, progress=False)
    assert result.reference.startswith("ais-") and "lower estimates" in str(result)
    assert sum(b.cost for b in result.bounds) < 60_000


def test_a_budget_of_time():
    import time

    start = time.monotonic()
    result = audit(Nonlinear(latent=3), torch.randn(3, 4), budget="3s")
    # Not a measurement of speed: a machine of any speed keeps within a multiple of what it was given.
    assert time.monotonic() - start < 60 and "evaluations a second chose" in str(result)


def test_the_pilot_looks_past_what_each_call_costs(monkeypatch):
    """A clock of our own: 10 ms a call and a microsecond an evaluation."""
    from pyroelbo.evidence import budget as module

    now = [0.0]

    def fake(pair, batch, particles, scope):
        now[0] += 0.01 + 1e-6 * particles * len(batch)
        value = torch.zeros(len(batch))
        return Bound("elbo", value, value, "lower", cost=particles * len(batch))

    monkeypatch.setattr(module, "elbo", fake)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    plan = module.Budget("10s", Nonlinear(), torch.randn(20, 4), "datum")
    assert 5e5 < plan.speed <= 1e6 and now[0] < 3


@pytest.mark.parametrize("budget", ["soon", "0s", "1 year", 0, True, 2.5, "-1s"])
def test_what_is_no_budget(budget):
    with pytest.raises(ValueError, match="budget: expected a time"):
        audit(Nonlinear(), torch.randn(2, 4), budget=budget)


def test_one_reference_is_still_a_sequence():
    with pytest.raises(ValueError, match="references: expected a sequence"):
        audit(Nonlinear(), torch.randn(2, 4), references="ais")


def test_a_budget_too_small_is_refused():
    with pytest.raises(
        ValueError, match="budget: expected at least 640 evaluations for any estimate of 40 data"
    ):
        audit(Nonlinear(), torch.randn(40, 4), budget=100)


@pytest.mark.parametrize("budget", [None, 3000, "3s"])
def test_a_scale_within_the_datum_leaves_the_elbo(budget):
    import pyro
    import pyro.distributions as dist

    from pyroelbo import Pair, within_datum

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with within_datum(2.0):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.8))

    result = audit(Pair.of(model, guide), torch.randn(3), budget=budget)
    assert [b.method for b in result.bounds] == ["elbo"] and "no iwae value: site 'y' carries a scale" in str(
        result
    )


def test_a_budget_for_latents_that_no_guide_draws():
    from pyroelbo import Pair
    from pyroelbo.models import GaussianMixture

    mixture, y = GaussianMixture(3, 2), torch.randn(4, 3)
    result = audit(Pair.of(mixture.model, lambda y: None), y, budget="0.2s")
    assert [b.method for b in result.bounds] == ["exact"]


def test_a_guide_that_leaves_out_part_of_the_support_is_told():
    import pyro
    import pyro.distributions as dist

    from pyroelbo import Pair

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(y)), 1.0))

    result = audit(Pair.of(model, guide), torch.randn(40))
    assert result["iwae-64"].k_hat.nanmedian() < 0.7  # the weights look well
    assert any("the guide cannot draw 6" in note for note in result.notes)  # 66 %
    assert "cannot draw" not in str(audit(Nonlinear(), torch.randn(3, 4)))
    # A cell holds all that a grey level may come from, and a prior's draw in another cell has made another
    # datum.
    flow = DequantizedFlow(3, 5, layers=1, hidden=(4,))
    assert "cannot draw" not in str(audit(flow, torch.full((200, 3), 2.0), particles=4))
    # The lowest level has a tail below its cell as well.
    assert "the guide cannot draw" in str(audit(flow, torch.full((200, 3), 0.0), particles=4))


def test_a_time_buys_temperatures_at_the_speed_of_chains(monkeypatch):
    """A clock of our own: an ELBO takes no time, three temperatures of AIS, from the prior, a second."""
    from pyroelbo.evidence import budget as module

    now, begun = [0.0], []

    def draws(pair, batch, particles, scope):
        now[0] += 1e-3
        return Bound("elbo", torch.zeros(len(batch)), torch.zeros(len(batch)), "lower", cost=particles)

    def chains(pair, batch, temperatures, scope, progress, start="guide"):
        begun.append(start)
        if start == "guide":
            raise Unavailable("not from there")
        now[0] += 1.0
        return Bound("ais", torch.zeros(len(batch)), torch.zeros(len(batch)), "lower", cost=72_000)

    monkeypatch.setattr(module, "elbo", draws)
    monkeypatch.setattr(module, "ais", chains)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    plan = module.Budget("100s", Nonlinear(latent=3), torch.randn(20, 4), "datum")
    assert plan.temperatures(["exact"]) == 2 and not begun
    # 0.7 of what 100 s buy, for 20 data at 360 evaluations a temperature
    assert plan.temperatures(["ais"]) == 700 and begun == ["guide", "prior"]
    now[0] = plan.started + 50
    assert plan._affords(34.9, 1e99) and not plan._affords(35.1, 0.0)
    of_count = module.Budget(10_000, Nonlinear(), torch.randn(20, 4), "datum")
    assert of_count._affords(1e9, 7000) and not of_count._affords(0.0, 7001)


def test_what_has_no_exact_posterior_or_scope_is_refused():
    class Renamed(PPCA):
        latent = "other"

    y = torch.randn(3, 4)
    with pytest.raises(Unavailable, match="the exact posterior is that of 'other'"):
        evidence.eubo(Renamed(4, 2), y, 4)
    with pytest.raises(ValueError, match="scope: expected 'datum' or 'joint', got 'all'"):
        evidence.exact(PPCA(4, 2), y, scope="all")
    with pytest.raises(ValueError, match=r"reference: expected shape \(3,\), one value per datum"):
        evidence.gap(Nonlinear(), y, reference=evidence.elbo(Nonlinear(), y[:2]))


def test_a_flat_prior_leaves_the_rows_that_need_no_prior_draws():
    y = torch.randn(20) + 1

    def model(y):
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(y):  # the posterior: its ELBO is the integral over m
        pyro.sample("m", dist.Normal(y.mean(), len(y) ** -0.5))

    n, spread = len(y), float((y - y.mean()).square().sum())
    exact = -(n - 1) / 2 * math.log(2 * math.pi) - math.log(n) / 2 - spread / 2
    result = audit(Pair.of(model, guide), y, scope="joint", particles=8)
    for row in ("elbo", "iwae-8"):
        assert float(result[row].value) == pytest.approx(exact, abs=1e-9)
    assert any("ImproperUniform" in note and "prior" in note for note in result.notes)
    with pytest.raises(Unavailable, match="cannot be sampled from their prior"):
        audit(Pair.of(model, guide), y, scope="joint", references=("quadrature",))


def test_a_part_that_the_guide_misses_is_seen_with_one_datum():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Uniform(-1.5, 8.0))  # 7 % of the prior are missing

    for seed in range(3):  # 64 draws see it with a probability of .99 each
        pyro.set_rng_seed(seed)
        result = audit(Pair.of(model, guide), torch.zeros(1), particles=4)
        assert any("the guide cannot draw" in note for note in result.notes)


def test_an_audit_without_progress_prints_nothing(capsys):
    audit(Nonlinear(), torch.randn(3, 4), particles=4, references=("ais",), progress=False)
    assert capsys.readouterr().err == ""
