"""`fit`: that it learns, that it resumes bit for bit, and what it refuses before it starts."""

import dataclasses
import functools
import inspect
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyroelbo import Pair, evidence, fit, models
from pyroelbo.runs import RunDirectory
from pyroelbo.training.settings import FitSettings
from tests.pairs import TABLE, Nonlinear


def quiet(pair, data, **settings):
    return fit(pair, data, progress=False, **{"epochs": 3, "batch_size": 4, **settings})


def weights(pair):
    return {k: v.detach().clone() for k, v in pair.named_parameters()}


def fresh(seed=5, **kwargs):
    torch.manual_seed(seed)
    return Nonlinear(**kwargs)


def test_ppca_reaches_its_maximum_likelihood():
    torch.manual_seed(2)
    y = torch.randn(200, 2) @ torch.randn(2, 5) + 0.3 * torch.randn(200, 5) + 1.0
    best = float(models.PPCA(5, 2).solve(y).log_evidence(y).mean().detach())
    pair = models.PPCA(5, 2)
    run = fit(pair, y, epochs=400, batch_size=200, learning_rate=0.05, schedule="cosine", progress=False)
    assert abs(float(pair.log_evidence(y).mean().detach()) - best) < 1e-3
    assert run.losses[-1] == pytest.approx(-best, abs=2e-3)


def test_one_step_is_what_svi_does():
    """The same seed, the same draws: fit's gradient and update are Pyro's, whose loss is a sum over the
    batch."""
    y = torch.randn(8, 4)
    ours, theirs = fresh(), fresh()
    run = fit(ours, y, epochs=1, batch_size=8, learning_rate=0.1, optimizer="sgd", seed=3, progress=False)
    pyro.set_rng_seed(3)
    loss = SVI(theirs.model, theirs.guide, pyro.optim.SGD({"lr": 0.1 / 8}), Trace_ELBO()).step(y)
    assert run.losses[0] == pytest.approx(loss / 8)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("objective", ["elbo", "mean_field", Trace_ELBO(num_particles=2)])
def test_objectives(objective):
    run = quiet(fresh(), torch.randn(10, 4), objective=objective, epochs=30, learning_rate=0.02)
    assert run.losses[-1] < run.losses[0] and run.stopped == "epochs"


def test_enumeration_in_the_loss():
    make, draw = TABLE["mixture"]
    mixture, y = make(), draw(12)
    pair = Pair.of(pyro.infer.config_enumerate(mixture.model, "parallel"), lambda y: None)
    before = -float(mixture.log_evidence(y).mean().detach())
    run = quiet(pair, y, objective="enum", epochs=1, batch_size=12)
    assert run.losses[0] == pytest.approx(before)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_by_the_evidence_is_training_by_its_exact_bound(compiled):
    make, draw = TABLE["autoregressive-pixelcnn"]
    y = draw(12)
    settings = {"valid": y[:5], "epochs": 3, "batch_size": 6, "learning_rate": 0.05}
    runs = []
    for objective in ("elbo", "evidence"):
        pyro.set_rng_seed(0)
        pair = make()
        captured = compiled and objective == "evidence"
        runs.append(quiet(pair, y, objective=objective, compile=captured, **settings))
    torch.testing.assert_close(
        torch.tensor(runs[0].losses), torch.tensor(runs[1].losses), rtol=1e-7, atol=1e-7
    )
    # Of the second run: what was validated is the exact evidence of the weights as they were left.
    assert runs[1].metrics[-1]["valid_exact"] == pytest.approx(
        float(pair.log_evidence(y[:5]).mean().detach()), rel=1e-10
    )


def test_particles_reduce_the_noise_and_keep_the_mean():
    y = torch.randn(6, 4)
    few = [quiet(fresh(), y, epochs=1, batch_size=6, seed=s).losses[0] for s in range(40)]
    many = [quiet(fresh(), y, epochs=1, batch_size=6, seed=s, particles=50).losses[0] for s in range(40)]
    few, many = torch.tensor(few), torch.tensor(many)
    assert many.std() < few.std() / 3
    assert abs(few.mean() - many.mean()) < 6 * few.std() / 40**0.5


def test_a_subsampled_plate_is_normalized_per_datum():
    y = torch.randn(8, 4)
    plain = quiet(fresh(), y, epochs=2)
    large = quiet(fresh(full_size=50_000), y, epochs=2)
    torch.testing.assert_close(torch.tensor(plain.losses), torch.tensor(large.losses))


def test_frozen_parts_stay():
    pair, y = fresh(), torch.randn(8, 4)
    before = weights(pair)
    quiet(pair, y, freeze=("encoder",))
    after = weights(pair)
    assert all(torch.equal(after[k], before[k]) == k.startswith("encoder") for k in before)
    with pytest.raises(ValueError, match="no part 'decoder'"):
        quiet(pair, y, freeze=("decoder",))
    with pytest.raises(ValueError, match="freeze: expected to leave parameters"):
        quiet(pair, y, freeze=("encoder", "generator"))
    with pytest.raises(TypeError, match="sequence of part names"):
        quiet(pair, y, freeze="encoder")


def test_schedules_of_rate_and_kl():
    seen = []
    quiet(
        fresh(),
        torch.randn(8, 4),
        epochs=4,
        schedule=lambda epoch: 1 / (1 + epoch),
        kl_weight=lambda epoch: min(1.0, epoch / 2),
        callbacks=[seen.append],
    )
    # Rows show what the epoch's last step had: two steps an epoch, so epoch + 1/2.
    assert [r["kl_weight"] for r in seen] == pytest.approx([0.25, 0.75, 1.0, 1.0])
    assert [r["learning_rate"] for r in seen] == pytest.approx([1e-3 / (1 + e + 0.5) for e in range(4)])


def test_clipping_bounds_the_step():
    pair = fresh()
    before = weights(pair)
    quiet(pair, 100 * torch.randn(4, 4), epochs=1, optimizer="sgd", learning_rate=1.0, clip_norm=1e-3)
    norm = torch.cat([(p.detach() - before[k]).reshape(-1) for k, p in pair.named_parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)


def test_eager_training_under_a_callers_autocast_sees_its_own_updates():
    """Casts of weights are kept until the outermost autocast ends: all steps would see the first one's,
    without a word.
    """
    torch.set_default_dtype(torch.float32)
    y, found = torch.randn(8, 4), []
    for keeping in (True, False):
        pair = fresh()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeping):
            quiet(pair, y, epochs=4, learning_rate=0.1)
        found.append(weights(pair))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("ema", [0.999, 0.25])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_moving_average_is_what_is_kept(ema, optimizer, tmp_path):
    """The first weights are soon forgotten, whatever the decay: in 12 steps of 0.999 they would keep 99 %."""
    y, settings = torch.randn(8, 4), {"learning_rate": 0.05, "optimizer": optimizer, "batch_size": 8}
    average, share = weights(fresh()), 1.0
    for step in range(1, 13):
        # Every step of the run again, one more each time: no access to the inside of fit is needed.
        again = fresh()
        quiet(again, y, epochs=step, **settings)
        newest = max(1 - ema, 9 / (9 + step))
        share *= 1 - newest
        average = {k: (1 - newest) * average[k] + newest * v for k, v in weights(again).items()}
    pair = fresh()
    quiet(pair, y, epochs=7, ema=ema, out=tmp_path / "run", **settings)
    pair = fresh()
    quiet(pair, y, epochs=12, ema=ema, out=tmp_path / "run", resume=True, **settings)
    torch.testing.assert_close(weights(pair), average, rtol=1e-9, atol=1e-12)
    assert share < 1e-5


def test_early_stopping_keeps_the_best_weights():
    torch.manual_seed(0)
    train, valid = torch.randn(6, 4), 3 + torch.randn(30, 4)
    pair = fresh()
    run = quiet(pair, train, valid=valid, epochs=400, patience=5, learning_rate=0.05)
    assert run.stopped == "early" and len(run.metrics) < 400
    scores = [row["valid_elbo"] for row in run.metrics]
    assert max(scores) not in scores[-5:]
    torch.manual_seed(7)  # the seed that validation uses
    assert evidence.elbo(pair, valid, particles=8).mean == pytest.approx(max(scores))


class Rows(Dataset):
    def __init__(self, y):
        self.y = y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.y[i]


def test_datasets_and_loaders():
    y = torch.randn(9, 4)
    tensors = quiet(fresh(), y)
    rows = quiet(fresh(), Rows(y))
    assert tensors.losses == rows.losses
    loader = quiet(fresh(), DataLoader(TensorDataset(y), batch_size=4, shuffle=True))
    assert len(loader.losses) == 3 and loader.metrics[-1]["step"] == 9
    with pytest.raises(ValueError, match="empty Dataset"):
        quiet(fresh(), Rows(y[:0]))


@pytest.mark.parametrize("kind", ["tensor", "loader"])
@pytest.mark.parametrize("extras", [{}, {"ema": 0.9, "clip_norm": 1.0, "patience": 50}, {"optimizer": "sgd"}])
def test_resuming_anywhere_is_bit_for_bit(kind, extras, tmp_path):
    """Stopped after any number of steps, in the middle of an epoch too, and gone on with: the same as
    unbroken."""
    y, valid = torch.randn(10, 4), torch.randn(5, 4)

    def data():
        return y if kind == "tensor" else DataLoader(TensorDataset(y), batch_size=4, shuffle=True)

    def run(out, **more):
        return quiet(
            fresh(),
            data(),
            valid=valid,
            epochs=4,
            learning_rate=0.02,
            out=out,
            checkpoint_seconds=0.0,
            **extras,
            **more,
        )

    whole = run(tmp_path / "whole")
    final = RunDirectory(tmp_path / "whole").load_weights()[0]
    for stop in (1, 3, 5, 8):
        out = tmp_path / f"stopped-{stop}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDirectory, "save_checkpoint", dying_after(stop))
            with pytest.raises(OSError, match="power"):
                run(out)
        torch.randn(7)  # what the process does in between must not matter
        again = run(out, resume=True)
        assert again.metrics == whole.metrics
        assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        weights_again = RunDirectory(out).load_weights()[0]
        assert all(torch.equal(weights_again[k], final[k]) for k in final)


def dying_after(checkpoints):
    """A ``save_checkpoint`` after whose so-manieth call the process is gone."""
    original, left = RunDirectory.save_checkpoint, iter(range(checkpoints - 1, -1, -1))

    def save(self, tensors, meta):
        original(self, tensors, meta)
        if next(left) == 0:
            raise OSError("the power went out")

    return save


@pytest.mark.slow
@pytest.mark.parametrize(
    "extras", [{}, {"ema": 0.9, "clip_norm": 1.0, "kl_weight": lambda epoch: min(1.0, epoch)}]
)
def test_compiled_training_is_eager_training_and_resumes(extras, tmp_path):
    y = torch.randn(8, 4)

    def run(compile, **more):
        pair = fresh()
        return quiet(
            pair, y, epochs=4, learning_rate=0.02, checkpoint_seconds=0.0, compile=compile, **extras, **more
        ), pair

    (eager, _), (whole, pair) = run(False), run(True, out=tmp_path / "whole")
    torch.testing.assert_close(torch.tensor(eager.losses), torch.tensor(whole.losses), rtol=1e-9, atol=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", dying_after(3))
        with pytest.raises(OSError, match="power"):
            run(True, out=tmp_path / "stopped")
    again, resumed = run(True, out=tmp_path / "stopped", resume=True)
    assert again.metrics == whole.metrics
    assert all(torch.equal(v, weights(resumed)[k]) for k, v in weights(pair).items())


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_run(tmp_path):
    """kill -9 of the real command, then --resume."""

    def command(out, *more):
        arguments = [
            "train",
            "vae",
            "--out",
            str(out),
            "-n",
            "60",
            "--set",
            "hidden=16,16",
            "--checkpoint-seconds",
            "0.2",
            "--quiet",
        ]
        return [sys.executable, "-m", "pyroelbo", *arguments, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    subprocess.run(command(tmp_path / "killed", "--resume"), check=True, env=environment, capture_output=True)
    for name in ("metrics.jsonl", "weights.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupt_stops_between_steps_and_can_be_resumed(tmp_path):
    y = torch.randn(10, 4)
    before = signal.getsignal(signal.SIGINT)  # a process in the background may have it ignored

    def interrupt(row):
        if row["epoch"] == 2:
            signal.raise_signal(signal.SIGINT)

    run = quiet(fresh(), y, epochs=5, out=tmp_path / "r", callbacks=[interrupt])
    assert run.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    again = quiet(fresh(), y, epochs=5, out=tmp_path / "r", resume=True)
    assert again.metrics == quiet(fresh(), y, epochs=5).metrics


def test_more_epochs_can_be_added(tmp_path):
    y = torch.randn(10, 4)
    quiet(fresh(), y, epochs=2, out=tmp_path / "r")
    assert (
        quiet(fresh(), y, epochs=5, out=tmp_path / "r", resume=True).metrics
        == quiet(fresh(), y, epochs=5).metrics
    )


def model_without_plate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([1]).to_event(1), obs=y)


def guide_without_plate(y):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def model_with_global(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("pair", "y", "settings", "error", "message"),
    [
        (Nonlinear, torch.full((3, 4), float("nan")), {}, ValueError, "data: expected finite entries"),
        (Nonlinear, torch.zeros(0, 4), {}, ValueError, "data: expected at least one row"),
        (
            Nonlinear,
            (torch.zeros(3, 4), torch.zeros(2)),
            {},
            ValueError,
            "expected parts with the same first dimension",
        ),
        (
            Nonlinear,
            torch.zeros(3, 5),
            {},
            ValueError,
            r"expected a batch that Nonlinear can be run on, got shapes and types \{'batch': \(\(3, 5\)",
        ),
        (
            TABLE["vae-bernoulli"][0],
            torch.full((3, 6), 0.5),
            {},
            ValueError,
            "Grey pixels have no Bernoulli probability",
        ),
        (
            TABLE["vae-categorical"][0],
            torch.full((3, 6), 7.0),
            {},
            ValueError,
            "expected values in IntegerInterval",
        ),
        (
            TABLE["vae-l2"][0],
            torch.zeros(3, 5),
            {},
            ValueError,
            r"y: expected shape \[B, 6\] .*, got \(3, 5\)$",
        ),
        (
            lambda: Pair.of(model_without_plate, guide_without_plate),
            torch.zeros(3, 1),
            {},
            ValueError,
            "no plate 'data'",
        ),
        (
            lambda: Pair.of(model_with_global, guide_without_plate),
            torch.zeros(9),
            {},
            ValueError,
            "'z' stands outside the plate",
        ),
        (
            lambda: Pair.of(model_with_global, lambda y: None),
            torch.zeros(3),
            {},
            ValueError,
            "'z' is missing in the guide",
        ),
        (Nonlinear, torch.zeros(3, 4), {"epochs": 0}, ValueError, "epochs: expected a positive"),
        (
            Nonlinear,
            torch.zeros(3, 4),
            {"learning_rate": -1.0},
            ValueError,
            "learning_rate: expected a positive",
        ),
        (Nonlinear, torch.zeros(3, 4), {"ema": 1.0}, ValueError, "ema: expected a decay"),
        (Nonlinear, torch.zeros(3, 4), {"patience": 3}, ValueError, "give valid="),
        (Nonlinear, torch.zeros(3, 4), {"objective": "elbow"}, ValueError, "objective: expected one of"),
        (Nonlinear, torch.zeros(3, 4), {"objective": 3}, TypeError, "pyro.infer.ELBO"),
        (Nonlinear, torch.zeros(3, 4), {"objective": TraceGraph_ELBO()}, TypeError, "differentiable_loss"),
        (Nonlinear, torch.zeros(3, 4), {"optimizer": "lion"}, ValueError, "optimizer: expected one of"),
        (Nonlinear, torch.zeros(3, 4), {"schedule": "linear"}, ValueError, "schedule: expected"),
        (Nonlinear, torch.zeros(3, 4), {"kl_weight": -1.0}, ValueError, "kl_weight: expected"),
        (Nonlinear, torch.zeros(3, 4), {"resume": True}, ValueError, "give out="),
        (
            Nonlinear,
            torch.zeros(3, 4),
            {"objective": "evidence"},
            TypeError,
            "'evidence': expected an ExactPair",
        ),
        (
            TABLE["ppca"][0],
            torch.zeros(3, 5),
            {"objective": "evidence", "kl_weight": 0.5},
            ValueError,
            "no KL to weigh",
        ),
    ],
)
def test_bad_input_is_refused_before_training(pair, y, settings, error, message, tmp_path):
    pair = pair()
    y = tuple(p.double() for p in y) if isinstance(y, tuple) else y.double()
    before = weights(pair)
    with pytest.raises(error, match=message):
        quiet(pair, y, **settings)
    assert all(torch.equal(v, before[k]) for k, v in weights(pair).items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent():
    with pytest.raises(RuntimeError, match="no CUDA device"):
        quiet(Nonlinear(), torch.zeros(3, 4), device="cuda")


def test_run_directories_are_never_overwritten(tmp_path):
    y = torch.randn(8, 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        quiet(fresh(), y, out=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        quiet(fresh(), y, out=tmp_path / "none", resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        quiet(fresh(), y, out=tmp_path / "file" / "run")

    quiet(fresh(), y, out=tmp_path / "run")
    with pytest.raises(ValueError, match="cannot resume.*batch_size was 4"):
        quiet(fresh(), y, batch_size=3, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="belongs to another pair"):
        quiet(fresh(latent=3), y, out=tmp_path / "run", resume=True)
    quiet(fresh(), y, objective=Trace_ELBO(num_particles=2), out=tmp_path / "objective")
    with pytest.raises(ValueError, match="cannot resume.*num_particles=2"):
        quiet(fresh(), y, objective=Trace_ELBO(num_particles=3), out=tmp_path / "objective", resume=True)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        quiet(fresh(), y, out=tmp_path / "run", resume=True)


def test_a_diverging_loss_is_named():
    with pytest.raises(FloatingPointError, match="epoch 1"):
        quiet(fresh(), torch.randn(8, 4), learning_rate=1e30, optimizer="sgd", epochs=50)


@pytest.mark.cuda
def test_on_a_gpu():
    pair = fresh()
    run = quiet(pair, torch.randn(64, 4), epochs=20, learning_rate=0.02)
    assert pair.device.type == "cuda" and run.losses[-1] < run.losses[0]


def test_all_data_in_memory_are_checked():
    make, draw = TABLE["vae-bernoulli"]
    y = draw(50)
    y[49, 0] = 0.5
    with pytest.raises(ValueError, match="expected values in Boolean"):
        quiet(make(), y)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kl_weight": 0.5}, "kl_weight was 1.0"),
        ({"schedule": "cosine"}, "schedule was 'constant'"),
        ({"data": 1.0}, "fingerprint was"),
        ({"patience": 3}, "patience was None"),
        ({"valid": None}, "valid was"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(changed, message, tmp_path):
    y, valid = torch.randn(8, 4), torch.randn(3, 4)
    quiet(fresh(), y, valid=valid, out=tmp_path / "r")
    settings = {"valid": valid, **{k: v for k, v in changed.items() if k != "data"}}
    with pytest.raises(ValueError, match=message):
        quiet(fresh(), y + changed.get("data", 0.0), **settings, epochs=6, out=tmp_path / "r", resume=True)


def test_a_callback_that_raises_loses_nothing(tmp_path):
    y = torch.randn(8, 4)

    def fail(row):
        if row["epoch"] == 2:
            raise RuntimeError("the plot server is down")

    with pytest.raises(RuntimeError, match="plot server"):
        quiet(fresh(), y, epochs=4, out=tmp_path / "r", checkpoint_seconds=1e9, callbacks=[fail])
    again = quiet(fresh(), y, epochs=4, out=tmp_path / "r", resume=True)
    assert again.metrics == quiet(fresh(), y, epochs=4).metrics


@pytest.mark.parametrize("kind", ["eager", "compiled", "fallback"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_with_a_long_gradient_are_left_out(kind, optimizer):
    """A batch of outliers, and one that is not finite, leave parameters and optimizer as if they had never
    come.
    """
    from pyroelbo.compiled import CompiledStep
    from pyroelbo.training.step import EagerStep

    good, bad = torch.randn(8, 4), 20 * torch.randn(8, 4)
    ended = []
    for batches in ((good, good), (good, bad, bad * math.inf, good)):
        torch.manual_seed(0)
        pair = Nonlinear()
        make = EagerStep if kind == "eager" else functools.partial(CompiledStep, backend="eager")
        step = make(
            Trace_ELBO(),
            pair.model,
            pair.guide,
            dict(pair.named_parameters()),
            optimizer=optimizer,
            skip_norm=300.0,
        )
        for y in batches:
            torch.manual_seed(1)
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step._eager((y,), {}) if kind == "fallback" else step(y)
        ended.append([p.detach().clone() for p in pair.parameters()])
        assert int(step.skipped) == len(batches) - 2
        again = make(
            Trace_ELBO(),
            pair.model,
            pair.guide,
            dict(pair.named_parameters()),
            optimizer=optimizer,
            skip_norm=300.0,
        )
        again.load_state_dict(step.state_dict())
        assert int(again.skipped) == len(batches) - 2
    for a, b in zip(*ended, strict=True):
        assert torch.equal(a, b)


def test_skipped_steps_are_counted_in_the_metrics():
    y = torch.cat([torch.randn(8, 4), 20 * torch.randn(1, 4)])
    run = fit(Nonlinear(), y, epochs=2, batch_size=1, skip_norm=100.0, progress=False)
    assert 0 < run.metrics[0]["skipped"] <= run.metrics[1]["skipped"] <= 4
    with pytest.raises(ValueError, match="skip_norm: expected a positive number"):
        fit(Nonlinear(), y, skip_norm=0.0)


def test_the_documentation_of_fit_lists_its_settings():
    for name in inspect.signature(fit).parameters:
        assert f"\n    {name}: " in fit.__doc__, name
    assert "{settings}" not in fit.__doc__


def test_a_run_is_not_resumed_with_other_validation_data(tmp_path):
    y = torch.bernoulli(torch.full((20, 6), 0.5))
    settings = {"batch_size": 10, "progress": False, "out": tmp_path / "run"}
    fit(models.VAE(6, 2, (4,)), y, valid=y[:5], epochs=1, **settings)
    with pytest.raises(ValueError, match="cannot resume .*: valid was"):
        fit(models.VAE(6, 2, (4,)), y, valid=y[5:9], epochs=2, resume=True, **settings)
    fit(models.VAE(6, 2, (4,)), y, valid=y[:5], epochs=2, resume=True, **settings)


def test_whole_numbers_of_the_command_line_are_whole_numbers():
    for field in dataclasses.fields(FitSettings):
        if field.type == "int":
            assert field.metadata["kind"] is int, field.name
