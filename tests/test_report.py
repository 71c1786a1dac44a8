import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from pyroelbo import audit, evidence, report
from pyroelbo.results import Audit, Bound, Run
from tests.pairs import TABLE, Nonlinear


@pytest.fixture
def result():
    make, draw = TABLE["ppca-mean-field"]
    return audit(make(), draw(6), particles=30)


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_pictures_are_written(result, tmp_path):
    run = Run(
        tuple({"epoch": e, "step": e, "loss": 5.0 / e, "valid_elbo": -6.0 / e} for e in range(1, 20)),
        "epochs",
        1.0,
    )
    without = audit(Nonlinear(latent=3), torch.randn(4, 4), particles=8)
    paths = [
        report.plot(result, tmp_path / "new" / "a.png"),
        report.plot(without, tmp_path / "b.png"),
        report.plot_curve(run, tmp_path / "c.png"),
        report.images(
            [torch.rand(5, 12), torch.rand(3, 12)], (3, 4), tmp_path / "d.png", ["data", "decoded"]
        ),
        report.plot_latents(
            torch.randn(9, 2), torch.arange(9) % 3, torch.rand(16, 12), (3, 4), 2.0, tmp_path / "e.png"
        ),
        report.plot_latents(torch.randn(9, 2), None, None, (5,), 2.0, tmp_path / "h.png"),
        report.plot_sequences([torch.randn(5, 2), torch.randn(3, 2)], tmp_path / "f.png", names=("a", "b")),
        report.plot_sequences([torch.rand(5, 8)], tmp_path / "g.png", ["digits"]),
    ]
    assert all(is_picture(p) for p in paths)


def test_titles_of_pictures_are_not_cut(tmp_path):
    titles = ["L2, learned weight: decoded"] * 13
    path = report.images([torch.rand(12, 560)] * 13, (28, 20), tmp_path / "a.png", titles)
    seen = imread(path)[..., :3]
    assert (seen[:, :2] == 1).all() and (seen[:, 2:200] < 1).any()


def test_large_values_are_ink_or_light(tmp_path):
    """The same picture from ink, from light, and from colours."""
    y = torch.linspace(0, 1, 24).reshape(2, 12)
    rows = {"ink": [1 - y], "light": [y], "colours": [y.reshape(2, 3, 4, 1).expand(-1, -1, -1, 3)]}
    seen = {}
    for name, row in rows.items():
        axes = Figure().subplots()
        report._pictures(axes, report._as_ink(row, name == "light"), (3, 4), None)
        seen[name] = axes.images[0].get_array()
    np.testing.assert_allclose(seen["ink"], seen["light"])
    np.testing.assert_allclose(seen["ink"], seen["colours"])
    assert seen["light"][0, 0, 0] == 0 and seen["ink"][2, 3, 0] == pytest.approx(float(y[0, -1]))


def test_the_axis_of_data_counts_them(result):
    axis = Figure().subplots()
    report._each_datum(axis, result, [b for b in result.bounds if b.method != "exact"])
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_arviz_export_carries_values_and_kinds(result):
    exported = report.to_arviz(result)
    bounds = exported["bounds"]
    np.testing.assert_allclose(bounds["value"].sel(estimator="exact"), result["exact"].value.numpy())
    assert str(bounds["kind"].sel(estimator="elbo").item()) == "lower"
    assert "log_likelihood" not in groups_of(exported)  # bounds are no likelihoods
    joint = Audit("J", (Bound("ais", torch.tensor(1.0), torch.tensor(0.1), "lower", scope="joint"),))
    assert report.to_arviz(joint)["bounds"]["value"].dims == ("estimator",)


def groups_of(exported):
    return {
        g.strip("/") for g in (exported.groups if isinstance(exported.groups, tuple) else exported.groups())
    }


def test_arviz_export_of_draws(tmp_path):
    make, draw = TABLE["own"]
    pair, y = make(), draw(5)
    terms = evidence.terms(pair, y, 30)
    result = audit(pair, y, particles=30)
    exported = report.to_arviz(result, terms)
    stats, likelihood = exported["sample_stats"], exported["log_likelihood"]
    log_w = np.asarray(stats["log_p"]) - np.asarray(stats["log_q"])
    np.testing.assert_allclose(log_w[0], terms.log_weight.detach().numpy())
    np.testing.assert_allclose(np.asarray(likelihood["y"])[0], terms.log_model["y"].detach().numpy())
    assert exported["posterior"]["z"].shape == (1, 30, 5, 2)
    assert {"bounds", "posterior", "sample_stats", "log_likelihood"} <= groups_of(exported)
    with pytest.raises(ValueError, match="terms are of 5 data, the audit of 2"):
        report.to_arviz(audit(pair, y[:2]), terms)


def test_sandwiches_and_decompositions_are_shown_and_exported(result, tmp_path):
    make, draw = TABLE["ppca-mean-field"]
    pair, y = make(), draw(4)
    parts = evidence.gap(pair, y, 20, steps=3, draws=2)
    sandwich = evidence.bdmc(pair, 5, 3, 2, progress=False)
    joint = Audit("J", (Bound("exact", torch.tensor(1.0), torch.tensor(0.0), "exact", scope="joint"),))
    paths = [
        report.plot(parts, tmp_path / "a.png"),
        report.plot(sandwich, tmp_path / "b.png"),
        report.plot(result, tmp_path / "c.png", parts),
        report.plot(joint, tmp_path / "d.png"),
    ]
    assert all(is_picture(p) for p in paths)
    for record, rows in ((parts, 4), (sandwich, 2)):
        assert report.to_arviz(record)["bounds"]["value"].shape[0] == rows
        assert record.as_audit().bounds and json.loads(record.to_json())["unit"] == "nats"


def test_bits_per_dimension():
    one = Audit("T", (Bound("exact", torch.full((3,), -8 * np.log(2.0)), torch.zeros(3), "exact"),))
    assert "2.0000" in report.bits_table(one, 4)


def test_pictures_of_diagnostics(tmp_path):
    make, draw = TABLE["own"]
    found = evidence.diagnostics(make(), draw(20), points=200)
    assert is_picture(report.plot_holes(found, tmp_path / "holes.png"))
    other = evidence.diagnostics(Nonlinear(latent=3), draw(5), points=20)
    with pytest.raises(ValueError, match="two latent dimensions"):
        report.plot_holes(other, tmp_path / "no.png")
    ranks = evidence.calibration(make(), 60, 19)
    assert is_picture(report.plot_calibration(ranks, tmp_path / "ranks.png"))
    for record in (found, ranks):
        assert json.loads(record.to_json())["name"] == "Nonlinear"


def test_a_bound_by_layer(tmp_path):
    path = report.plot_layers(
        {"one": torch.tensor([-9.0, -1.0, 0.0]), "two": -torch.ones(5)}, tmp_path / "l.png"
    )
    assert path.stat().st_size > 5000
