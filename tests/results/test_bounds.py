import json
import math

import pytest
import torch

from pyroelbo import audit
from pyroelbo.data import Dataset
from pyroelbo.models import PPCA, StateSpace
from pyroelbo.results import Audit, Bound, Gap, Terms


def bound(method="elbo", kind="lower", **kwargs):
    return Bound(
        method, torch.tensor([-3.0, -5.0]), torch.tensor([0.3, 0.4]), kind, draws=4, cost=8, **kwargs
    )


def test_means_and_errors():
    assert bound().mean == -4.0
    assert bound().mean_error == pytest.approx(0.25)
    rule = bound("quadrature", "estimate", resolution=torch.tensor([1e-3, 3e-3]))
    assert rule.mean_error == pytest.approx(2e-3)


def test_gap_combines_errors():
    exact = Bound("exact", torch.tensor([-2.0, -4.5]), torch.zeros(2), "exact")
    gap = Gap.between(exact, bound())
    torch.testing.assert_close(gap.value, torch.tensor([1.0, 0.5]))
    assert gap.mean == pytest.approx(0.75) and gap.mean_error == pytest.approx(0.25)


def test_audit_prints_and_survives_json():
    exact = Bound("exact", torch.tensor([-2.0, -math.inf]), torch.zeros(2), "exact", cost=2)
    low = bound(ess=torch.tensor([3.0, 2.0]), k_hat=torch.tensor([0.2, math.nan]), notes=("a note",))
    audit = Audit("Toy", (exact, low), "exact", ("another",))
    again = Audit.from_dict(json.loads(audit.to_json()))
    assert str(again) == str(audit)
    assert torch.equal(again["exact"].value, exact.value) and again["elbo"].notes == ("a note",)
    assert "note: elbo: a note" in str(audit) and "note: another" in str(audit)
    unknown = Audit("Few draws", (bound(k_hat=torch.full((2,), math.nan)),))
    assert "nan" not in str(unknown) and "?" in str(unknown)
    joint = Audit("J", (Bound("ais", torch.tensor(-3.0), torch.tensor(0.1), "lower", scope="joint"),))
    assert Audit.from_dict(json.loads(joint.to_json()))["ais"].value.shape == ()


JUNK = [None, True, -1, 0.5, "x", [], [None], [[1]], ["x"], {}, 2**70, [10**400], [1.0, 2.0, 3.0]]


def stored():
    low = bound(ess=torch.tensor([3.0, 2.0]), k_hat=torch.tensor([0.2, math.nan]), notes=("a note",))
    exact = Bound("exact", torch.tensor([-2.0, -math.inf]), torch.zeros(2), "exact", cost=2)
    return json.loads(Audit("Toy", (exact, low), "exact", ("another",)).to_json())


@pytest.mark.parametrize("name", ["name", "reference", "notes", "bounds"])
def test_a_stored_audit_with_other_fields_is_refused_or_read(name):
    row, read = stored(), 0
    del row[name]
    if name != "reference":
        with pytest.raises(ValueError, match=rf"Audit\.{name}: expected .*, got a record without it"):
            Audit.from_dict(row)
    for junk in JUNK:
        try:
            read += str(Audit.from_dict({**stored(), name: junk})) is not None
        except ValueError as error:
            assert str(error).startswith((f"Audit.{name}: expected", "Bound"))
    assert read <= 2  # texts and empty lists


@pytest.mark.parametrize(
    "name", ["method", "kind", "scope", "draws", "cost", "value", "stderr", "ess", "notes", "by_draw"]
)
def test_a_stored_bound_with_other_fields_is_refused_or_read(name):
    row, read = stored(), 0
    del row["bounds"][1][name]
    if name not in ("ess", "by_draw"):
        with pytest.raises(ValueError, match=rf"Bound\.{name}: expected .*, got a record without it"):
            Audit.from_dict(row)
    for junk in JUNK:
        row = stored()
        row["bounds"][1][name] = junk
        try:
            read += str(Audit.from_dict(row)) is not None
        except ValueError as error:
            assert name in str(error) or "number" in str(error)
    assert read <= 2
    for junk in JUNK:
        with pytest.raises(ValueError, match=r"(Audit|Bound)[:.].* expected"):
            Audit.from_dict(junk)
        with pytest.raises(ValueError, match=r"(Audit|Bound)[:.].* expected"):
            Audit.from_dict({**stored(), "bounds": [junk]})


def test_bad_records_are_refused():
    with pytest.raises(ValueError, match="kind"):
        bound(kind="likelihood")
    with pytest.raises(ValueError, match="scope"):
        bound(scope="everything")
    with pytest.raises(ValueError, match="stderr"):
        Bound("x", torch.zeros(2), torch.zeros(3), "lower")
    with pytest.raises(KeyError, match="no row 'ais'"):
        Audit("Toy", (bound(),))["ais"]


def test_terms_sum_over_sites():
    terms = Terms(
        {"z": torch.ones(2, 3), "y": torch.full((2, 3), 2.0)}, {"z": torch.ones(2, 3)}, frozenset({"y"}), {}
    )
    assert torch.equal(terms.log_joint, torch.full((2, 3), 3.0)) and torch.equal(
        terms.log_weight, torch.full((2, 3), 2.0)
    )


def test_an_audit_of_standardized_data_is_that_of_the_raw_ones():
    """p(z) and p(y | z) in units of the data: the same Gaussians with scaled parameters."""
    loc, scale = torch.tensor([5.0, -2.0, 0.1]), torch.tensor([10.0, 0.3, 2.0])
    own, raw = PPCA(3, 1, "mean_field", noise="diagonal"), PPCA(3, 1, "mean_field", noise="diagonal")
    y = torch.randn(6, 3)
    with torch.no_grad():
        g, r = own.generator, raw.generator
        r.weight.copy_(scale[:, None] * g.weight)
        r.loc.copy_(loc + scale * g.loc)
        r.log_scale.copy_(g.log_scale + scale.log())
        q, e = own.encoder, raw.encoder
        e.weight.copy_(q.weight / scale)
        e.bias.copy_(q.bias - e.weight @ loc)
        e.log_scale.copy_(q.log_scale)
    torch.manual_seed(1)
    found = audit(own, y, particles=5).in_units(scale.log().sum().expand(6))
    torch.manual_seed(1)
    wanted = audit(raw, loc + scale * y, particles=5)
    for a, b in zip(found.bounds, wanted.bounds, strict=True):
        torch.testing.assert_close(a.value, b.value)
        torch.testing.assert_close(a.stderr, b.stderr)
        assert a.kind == b.kind and a.method == b.method
    assert [g.mean for g in found.gaps] == pytest.approx([g.mean for g in wanted.gaps])
    with pytest.raises(
        ValueError, match=r"log_scale: expected one number for each of 6 data, got shape \(5,\)"
    ):
        found.in_units(torch.zeros(5))


def test_the_units_of_sequences_count_their_steps():
    lengths = torch.tensor([4, 1, 3])
    y = torch.randn(3, 4, 2) * torch.tensor([4.0, 0.2]) + 3
    raw = Dataset("d", "series", (2,), {"train": (y, lengths)}, 0, 4)
    scaled = raw.standardized()
    own, other = StateSpace(2, 1), StateSpace(2, 1)
    loc, scale = torch.tensor(scaled.loc), torch.tensor(scaled.scale)
    with torch.no_grad():
        for name, p in own.prior.named_parameters():
            getattr(other.prior, name).copy_(p)
        other.generator.read.copy_(scale[:, None] * own.generator.read)
        other.generator.offset.copy_(loc + scale * own.generator.offset)
        other.generator.log_scale.copy_(own.generator.log_scale + scale.log())
    found = audit(own, scaled["train"], particles=2).in_units(scaled.log_scale(scaled["train"]))
    torch.testing.assert_close(found["exact"].value, other.log_evidence(y, lengths).detach())
