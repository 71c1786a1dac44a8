"""Run directories and files: nothing is lost, nothing damaged is believed, two trainings keep apart."""

import json
import os
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from pyroelbo import data, files, fit, fit_em, models
from pyroelbo.runs import RunDirectory
from tests.pairs import Nonlinear


def quiet(pair, y, **settings):
    return fit(pair, y, progress=False, **{"epochs": 2, "batch_size": 4, **settings})


@pytest.fixture
def finished(tmp_path):
    out, y = tmp_path / "run", torch.randn(8, 4)
    torch.manual_seed(0)
    quiet(Nonlinear(), y, out=out)
    return out, y


def test_a_resume_that_fails_deletes_nothing(finished):
    out, y = finished
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(before["checkpoint.safetensors"][:100])
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged"):
        quiet(Nonlinear(), y, out=out, epochs=3, resume=True)
    assert (out / "weights.safetensors").read_bytes() == before["weights.safetensors"]
    assert (out / "run.json").read_bytes() == before["run.json"]


def test_weights_are_those_of_the_newer_file(finished):
    out, y = finished
    old = RunDirectory(out).load_weights()[0]

    def stop(row):
        raise RuntimeError("the machine is needed")

    with pytest.raises(RuntimeError, match="machine"):
        quiet(Nonlinear(), y, out=out, epochs=4, resume=True, callbacks=[stop])
    tensors, meta = RunDirectory(out).load_weights()
    assert meta["step"] == 6 and not torch.equal(tensors["encoder.weight"], old["encoder.weight"])
    assert (out / "weights.safetensors").exists()


HOLD = """
import sys, time
from pyroelbo.runs import RunDirectory
run = RunDirectory(sys.argv[1])
run._acquire()
print("holds", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_train_in_one_place(finished):
    out, y = finished
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "holds\n"
            with pytest.raises(RuntimeError, match="another process trains in"):
                quiet(Nonlinear(), y, out=out, resume=True)
        finally:
            holder.kill()
    (out / ".config.json.99999.partial").write_text("half")
    quiet(Nonlinear(), y, out=out, epochs=3, resume=True)
    assert not list(out.glob(".*.partial"))


def test_a_run_that_was_killed_before_it_began_can_be_started_again(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.4711.partial").write_text("{")
    run = RunDirectory.create(tmp_path, {"model": "vae"})
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.json", "metrics.jsonl"}
    run.close()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        RunDirectory.create(tmp_path, {"model": "vae"})


@pytest.mark.parametrize("damage", ["delete", "empty", "shorten", "list"])
def test_lost_metrics_are_noticed(finished, damage):
    out, y = finished
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    if damage == "delete":
        metrics.unlink()
    else:
        kept = {"empty": [], "shorten": lines[:1], "list": ["[1]", "[2]"]}[damage]
        metrics.write_text("".join(line + "\n" for line in kept))
    with pytest.raises(ValueError, match=r"metrics.jsonl: expected"):
        quiet(Nonlinear(), y, out=out, epochs=3, resume=True)


@pytest.mark.parametrize("em", [False, True])
@pytest.mark.parametrize(
    "hostile",
    [{"epoch": -5}, {"epoch": 2.5}, {"rows": True}, {"step": None}, {"step": 2**60}, {"best_value": "x"}],
)
def test_hostile_metadata_are_refused(hostile, em, tmp_path):
    y, out = torch.randn(12, 3), tmp_path / "run"

    def train(**more):
        if em:
            return fit_em(models.GaussianMixture(3, 2), y, epochs=2, out=out, progress=False, **more)
        return quiet(models.GaussianMixture(3, 2), y, out=out, **more)

    train()
    tensors, meta = files.read_tensors(out / "checkpoint.safetensors")
    files.write_tensors(out / "checkpoint.safetensors", tensors, meta | hostile)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged"):
        train(resume=True)


def test_a_write_error_is_told_even_where_nothing_can_be_cleaned_up(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, **_: full(self))
    with pytest.raises(OSError, match=r"cannot write .*audit.json: No space left"):
        run.write_text("audit.json", "{}")


def test_files_have_the_modes_that_the_user_asked_for(finished):
    out, _ = finished
    before = os.umask(0o022)
    try:
        files.write_tensors(out / "samples.safetensors", {"y": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "samples.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"[1]"),
        ("config.json", b'{"pyroelbo": 3}'),
        ("checkpoint.safetensors", b""),
        ("checkpoint.safetensors", b"\xff" * 64),
        ("checkpoint.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    ],
)
def test_damaged_files_are_named(finished, name, content):
    out, y = finished
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        quiet(Nonlinear(), y, out=out, epochs=3, resume=True)


def bomb(path):
    """A small file whose header promises 8 GB."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 784), }".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "train.npy",
            b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 99,
        )


@pytest.mark.parametrize("kind", ["bomb", "text", "empty", "missing array", "objects", "shape", "cut"])
def test_npz_files_are_checked_before_they_are_unpacked(kind, tmp_path):
    path = tmp_path / "binarized_mnist.npz"
    good = {k: np.zeros((2, 98), np.uint8) for k in ("train", "valid", "test")}
    if kind == "bomb":
        bomb(path)
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "empty":
        path.touch()
    elif kind == "missing array":
        np.savez(path, train=good["train"])
    elif kind == "objects":
        np.savez(path, **(good | {"train": np.array([{}, {}], object)}))
    elif kind == "shape":
        np.savez(path, **(good | {"train": np.zeros((2, 97), np.uint8)}))
    else:
        np.savez_compressed(path, **good)
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="binarized_mnist.npz is damaged"):
        data.load("binarized_mnist", root=tmp_path)


def test_metrics_that_are_not_finite_survive(tmp_path):
    run = RunDirectory.create(tmp_path / "r", {"epochs": 1})
    run.append_metrics({"epoch": 1, "valid_elbo": -float("inf")})
    run.close()
    assert json.dumps(run.keep_metrics(1)) == json.dumps([{"epoch": 1, "valid_elbo": -float("inf")}])


def test_a_time_limit_stops_with_the_best_weights(tmp_path):
    y = torch.randn(8, 4)
    run = quiet(Nonlinear(), y, epochs=10**6, budget="1s", out=tmp_path / "r")
    assert run.stopped == "budget" and run.seconds < 20
    again = quiet(Nonlinear(), y, epochs=len(run.metrics) + 1, out=tmp_path / "r", resume=True)
    assert again.stopped == "epochs" and again.metrics[: len(run.metrics)] == run.metrics
    with pytest.raises(ValueError, match="budget: expected a time such as"):
        quiet(Nonlinear(), y, budget="1 fortnight")


def test_an_interrupt_from_a_callback_keeps_the_run(tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    run = quiet(Nonlinear(), torch.randn(8, 4), callbacks=[stop], out=tmp_path / "r")
    assert run.stopped == "interrupted" and len(run.metrics) == 1
