"""An objective defined here alone trains in every way that the library's own do: eager, compiled, resumed, by
the command line; and what the steps share.
"""

import ast
import functools
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyroelbo.training
from pyroelbo import evidence, fit
from pyroelbo.cli import main
from pyroelbo.compiled import CompiledStep
from pyroelbo.objectives import OBJECTIVES, Hard_ELBO, Objective, Update, Weighted_ELBO
from pyroelbo.objectives.base import PerDatum, adapt
from pyroelbo.optim import UpdateRule
from pyroelbo.runs import RunDirectory
from pyroelbo.training.step import EagerStep
from tests.pairs import TABLE, Nonlinear


class Alternating(Objective):
    """The generator by the joint, then two steps of the encoder by the ELBO."""

    weightable = False

    def updates(self):
        return {
            "joint": Update(Hard_ELBO(), ("generator",)),
            "inner": Update(Trace_ELBO(), ("encoder",), times=2),
        }

    def check(self, pair, batch):
        if "encoder" not in dict(pair.named_children()):
            raise ValueError(f"objective 'alternating': expected a pair with an encoder, got {pair.name}")

    def validate(self, pair, y):
        return evidence.iwae(pair, y, particles=3)


class Overlapping(Objective):
    def updates(self):
        return {"a": Update(Trace_ELBO()), "b": Update(Trace_ELBO(), ("encoder",))}


@pytest.fixture
def graphs_without_a_compiler(monkeypatch):
    monkeypatch.setattr("pyroelbo.compiled.CompiledStep", functools.partial(CompiledStep, backend="eager"))


def fresh(seed=5):
    torch.manual_seed(seed)
    return Nonlinear()


def quiet(pair, y, **settings):
    return fit(pair, y, progress=False, **{"epochs": 4, "batch_size": 4, "learning_rate": 0.02, **settings})


def test_its_updates_are_those_written_by_hand():
    y, ours, theirs = torch.randn(4, 4), fresh(), fresh()
    run = quiet(ours, y, objective=Alternating(), epochs=3, seed=3)
    optimizers = {
        part: torch.optim.Adam(getattr(theirs, part).parameters(), lr=0.02)
        for part in ("generator", "encoder")
    }
    pyro.set_rng_seed(3)
    losses = []
    for _ in range(3):
        for name, part in (("joint", "generator"), ("inner", "encoder"), ("inner", "encoder")):
            loss = Alternating().updates()[name].loss.differentiable_loss(theirs.model, theirs.guide, y) / 4
            theirs.zero_grad()
            loss.backward()
            optimizers[part].step()
            losses.append(loss.item())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert [r["loss"] for r in run.metrics] == [r["loss_joint"] for r in run.metrics]
    assert run.losses == pytest.approx(losses[::3])
    assert [r["loss_inner"] for r in run.metrics] == pytest.approx(losses[2::3])


def test_it_trains_compiled_and_resumes_either_way(graphs_without_a_compiler, tmp_path):
    y, valid = torch.randn(12, 4), torch.randn(5, 4)
    extras = {"objective": Alternating(), "valid": valid, "ema": 0.9, "clip_norm": 5.0}
    whole, pair = {}, {}
    for compile in (False, True):
        pair[compile] = fresh()
        whole[compile] = quiet(pair[compile], y, compile=compile, **extras)
        assert "valid_iwae-3" in whole[compile].metrics[0]
    assert whole[True].losses == pytest.approx(whole[False].losses, rel=1e-9)
    for first in (False, True):
        out = tmp_path / str(first)
        quiet(fresh(), y, compile=first, epochs=2, out=out, **extras)
        resumed = fresh()
        again = quiet(resumed, y, compile=not first, out=out, resume=True, **extras)
        assert again.losses == pytest.approx(whole[False].losses, rel=1e-9)
        for a, b in zip(resumed.parameters(), pair[False].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_it_refuses_before_training_and_leaves_out_frozen_parts(tmp_path):
    class Flat(Nonlinear):
        def __init__(self):
            super().__init__()
            self.inference, self.encoder = self.encoder, None

        def guide(self, y):
            self.__dict__["encoder"] = self.inference
            return super().guide(y)

    with pytest.raises(ValueError, match="expected a pair with an encoder"):
        quiet(Flat(), torch.randn(4, 4), objective=Alternating(), out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="expected updates with parts of their own, got 'encoder"):
        quiet(fresh(), torch.randn(4, 4), objective=Overlapping())
    with pytest.raises(ValueError, match="has no KL to weigh"):
        quiet(fresh(), torch.randn(4, 4), objective=Alternating(), kl_weight=0.5)
    pair = fresh()
    before = [p.detach().clone() for p in pair.encoder.parameters()]
    run = quiet(pair, torch.randn(4, 4), objective=Alternating(), freeze=("encoder",))
    assert all(torch.equal(a, b) for a, b in zip(before, pair.encoder.parameters(), strict=True))
    assert "loss_inner" not in run.metrics[0]


def test_it_is_on_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(OBJECTIVES, "alternating", lambda pair, particles: Alternating())
    out = str(tmp_path / "run")
    arguments = ["train", "vae", "--out", out, "-n", "1", "--set", "hidden=8", "--quiet"]
    assert main([*arguments, "--objective", "alternating"]) == 0
    assert "validation iwae-3" in capsys.readouterr().out
    assert RunDirectory(out).config()["objective"] == "alternating"


def test_training_asks_no_loss_for_its_type():
    asked = []
    for file in Path(pyroelbo.training.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "isinstance",
                "type",
                "hasattr",
            ):
                about = ast.unparse(node.args[0])
                if any(word in about for word in ("loss", "objective", "update", "inner")):
                    asked.append((file.name, ast.unparse(node)))
    # A setting is a name or a loss; which loss is not asked.
    assert asked == [("settings.py", "isinstance(self.objective, str)")]


class Committed(Nonlinear):
    """Adds a loss of its own that pulls the encoder's output to zero."""

    def auxiliary_loss(self, y):
        return self.encoder(y).square().sum(-1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
def test_an_auxiliary_loss_is_trained_and_enters_no_bound(compile, particles, graphs_without_a_compiler):
    y = torch.randn(6, 4)
    torch.manual_seed(5)
    pair = Committed()
    plain = fresh()
    before = pair.auxiliary_loss(y).mean().item()
    runs = [
        quiet(
            p, y, valid=y, batch_size=6, epochs=1, learning_rate=1e-12, compile=compile, particles=particles
        )
        for p in (pair, plain)
    ]
    assert runs[0].losses[0] - runs[1].losses[0] == pytest.approx(before, rel=1e-9)
    assert runs[0].metrics[0]["valid_elbo"] == pytest.approx(runs[1].metrics[0]["valid_elbo"], rel=1e-9)
    quiet(pair, y, batch_size=6, epochs=300, compile=compile)
    quiet(plain, y, batch_size=6, epochs=300, compile=compile)
    assert pair.auxiliary_loss(y).mean() < 0.5 * Committed.auxiliary_loss(plain, y).mean()


@pytest.mark.parametrize("kind", ["eager", "compiled", "fallback"])
def test_gradients_pass_the_reduction_before_they_are_clipped(kind):
    y, seen, ended = torch.randn(6, 4), [], []

    def halve(gradients):
        seen.append([g.clone() for g in gradients])
        return [g / 2 for g in gradients]

    for reduce in (None, halve):
        pair = fresh()
        make = EagerStep if kind == "eager" else functools.partial(CompiledStep, backend="eager")
        objective = PerDatum(Trace_ELBO(), float if reduce else (lambda rows: 2.0 * rows))
        step = make(
            objective,
            pair.model,
            pair.guide,
            dict(pair.named_parameters()),
            optimizer="sgd",
            lr=0.1,
            clip_norm=0.2,
            reduce=reduce,
        )
        for _ in range(3):
            torch.manual_seed(1)
            step._eager((y,), {}) if kind == "fallback" else step(y)
        ended.append([p.detach().clone() for p in pair.parameters()])
    assert len(seen) == 3 and torch.cat([g.reshape(-1) for g in seen[0]]).norm() > 0.4
    torch.testing.assert_close(*ended, rtol=1e-10, atol=1e-12)


def test_the_layout_of_a_steps_state_is_one():
    y = torch.randn(6, 4)
    for rule in (
        {},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adamw", "ema": 0.9, "skip_norm": 1e3},
    ):
        states = []
        for make in (EagerStep, functools.partial(CompiledStep, backend="eager")):
            pair = fresh()
            step = make(Trace_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), **rule)
            for _ in range(3):
                torch.manual_seed(1)
                step(y)
            states.append(step.state_dict())
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of"),
        ({"clip_norm": 0.0}, "clip_norm: expected a positive"),
        ({"skip_norm": float("inf")}, "skip_norm: expected a positive"),
        ({"ema": 1.0}, "ema: expected a decay"),
        ({"nesterov": True}, "nesterov: expected a positive momentum"),
    ],
)
def test_an_update_rule_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        UpdateRule(**fields)


def test_eager_steps_are_those_of_torchs_optimizers():
    y = torch.randn(6, 4)
    for rule, reference in (
        ({}, torch.optim.Adam),
        ({"optimizer": "adamw"}, torch.optim.AdamW),
        ({"optimizer": "sgd", "momentum": 0.9}, functools.partial(torch.optim.SGD, momentum=0.9)),
    ):
        ours, theirs = fresh(), fresh()
        step = EagerStep(
            Trace_ELBO(),
            ours.model,
            ours.guide,
            dict(ours.named_parameters()),
            lr=0.01,
            clip_norm=1.0,
            **rule,
        )
        optimizer = reference(theirs.parameters(), lr=0.01)
        for i in range(5):
            torch.manual_seed(i)
            step(y)
            torch.manual_seed(i)
            theirs.zero_grad()
            Trace_ELBO().differentiable_loss(theirs.model, theirs.guide, y).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_a_mean_field_loss_is_checked_inside_a_weighted_one():
    from pyroelbo.objectives import Weighted_ELBO

    make, draw = TABLE["hierarchy-bottom-up"]
    for objective in (TraceMeanField_ELBO(), Weighted_ELBO(TraceMeanField_ELBO(), 0.5)):
        with pytest.raises(ValueError, match="objective 'mean_field'"):
            quiet(make(), draw(4), objective=objective)


def test_unknown_settings_are_named():
    with pytest.raises(TypeError, match=r"fit: expected settings among .*'epochs'.*, got 'epoch'"):
        quiet(fresh(), torch.randn(4, 4), epoch=3)


@pytest.mark.parametrize(
    ("name", "objective", "particles", "message"),
    [
        ("pcfg", "mean_field", 1, "expected a guide site for every latent.* AttributeError"),
        ("own-conv", "iwae", 3, "expected networks that accept a leading dimension of particles"),
    ],
)
def test_losses_that_cannot_run_are_refused_with_the_reason(name, objective, particles, message):
    make, draw = TABLE[name]
    with pytest.raises(ValueError, match=message):
        quiet(make(), draw(4), objective=objective, particles=particles)


def test_a_weighted_loss_is_described_validated_and_traced_like_its_inner_one():
    inner, pair, y = Trace_ELBO(num_particles=2), Nonlinear(), torch.randn(3, 4)
    outer = Weighted_ELBO(inner, 0.5)
    assert outer.describe() == f"Weighted_ELBO({adapt(inner).describe()})"
    assert (
        "num_particles=2" in outer.describe() and outer.describe() != Weighted_ELBO(Trace_ELBO()).describe()
    )
    found = []
    for objective in (outer, adapt(inner)):
        torch.manual_seed(1)
        found.append(objective.validate(pair, y))
    assert torch.equal(found[0].value, found[1].value) and found[0].method == "elbo"
    model, guide = outer._get_trace(pair.model, pair.guide, (y,), {})
    assert float(model.nodes["z"]["scale"]) == float(guide.nodes["z"]["scale"]) == 0.5
    assert float(model.nodes["y"]["scale"]) == 1.0
    with pytest.raises(AttributeError, match="has no KL weight: wrap it in Weighted_ELBO"):
        adapt(inner).weight = 0.5


def test_a_wrapped_loss_keeps_its_particles():
    inner = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    for loss in (Weighted_ELBO(inner), PerDatum(inner, float)):
        assert (loss.num_particles, loss.vectorize_particles) == (3, True)
        assert loss.max_plate_nesting == inner.max_plate_nesting
