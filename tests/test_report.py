import json

import numpy as np
import pytest
import torch

from pyroelbo import audit, evidence, report
from pyroelbo.records import Audit, Bound, Run
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
    ]
    assert all(is_picture(p) for p in paths)


def test_arviz_export_carries_values_and_kinds(result):
    exported = report.to_arviz(result)
    bounds = exported["bounds"]
    np.testing.assert_allclose(bounds["value"].sel(estimator="exact"), result["exact"].value.numpy())
    assert str(bounds["kind"].sel(estimator="elbo").item()) == "lower"
    likelihood = exported["log_likelihood"]["y"]
    np.testing.assert_allclose(np.asarray(likelihood).ravel(), result["exact"].value.numpy())
    joint = Audit("J", (Bound("ais", torch.tensor(1.0), torch.tensor(0.1), "lower", scope="joint"),))
    with pytest.raises(ValueError, match="joint bounds only"):
        report.to_arviz(joint)


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
