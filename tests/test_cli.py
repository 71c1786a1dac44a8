import itertools
import json

import numpy as np
import pytest
import torch

from pyroelbo import data, models
from pyroelbo.cli import main


@pytest.fixture
def run(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    out = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "vae",
                "--out",
                str(out),
                "-n",
                "1",
                "--set",
                "hidden=8",
                "--set",
                "hidden=8,8",
                "--quiet",
            ]
        )
        == 0
    )
    capsys.readouterr()
    return out


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in models.REGISTRY) and "latent=2" in printed


CHAINS = ("hierarchy", "ladder", "conv_ladder", "discrete_vae", "sbn")


@pytest.mark.parametrize(
    "words",
    [
        *models.REGISTRY,
        *(f"{name} --set prior=vamp" for name in ("vae", "hierarchy", "ladder", "conv_ladder")),
    ],
)
def test_train_audit_and_sample(words, tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    out = str(tmp_path / "run")
    assert main(["train", *words.split(), "--out", out, "-n", "1", "--quiet"]) == 0
    assert main(["audit", out, "--num-data", "3", "--particles", "4"]) == 0
    assert main(["sample", out, "-n", "5"]) == 0
    printed = capsys.readouterr().out
    assert "nats per datum" in printed and "(5, 64)" in printed
    assert ("The ELBO by layer" in printed) == words.startswith(CHAINS)
    for file in (
        "config.json",
        "metrics.jsonl",
        "weights.safetensors",
        "audit.json",
        "audit.png",
        "samples.png",
        "curve.png",
    ):
        assert (tmp_path / "run" / file).stat().st_size > 0
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["unit"] == "nats"
    rows = {row["method"]: row for row in found["bounds"]}
    ordered = [rows[method] for method in ("exact", "quadrature", "iwae-4", "elbo") if method in rows]
    for above, below in itertools.pairwise(ordered):
        error = above["mean_error"] + below["mean_error"]  # of four draws a datum
        assert above["mean"] > below["mean"] - 8 * error - 1e-3


def test_errors_are_one_line_and_status_one(run, tmp_path, capsys):
    cases = [
        (["train", "gan", "--out", str(tmp_path / "x")], "model: expected one of vae"),
        (["train", "vae", "--out", str(run)], "not empty"),
        (["train", "vae", "--out", str(tmp_path / "x"), "--set", "depth=3"], "got 'depth'"),
        (["train", "vae", "--out", str(tmp_path / "x"), "--set", "latent"], "--set: expected NAME=VALUE"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--data", "mnist", "--data-dir", str(tmp_path)],
            "mnist.npz: no such file",
        ),
        (["train", "vae", "--out", str(tmp_path / "x"), "-n", "0"], "epochs: expected a positive"),
        (["train", "vae", "--out", str(tmp_path / "x"), "--kl-warmup", "-3"], "--kl-warmup: expected"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--set", "likelihood=foo"],
            "likelihood: expected one of",
        ),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--set", "latent=abc"],
            "latent: expected a value like",
        ),
        (["audit", str(run), "--num-data", "-1"], "--num-data: expected"),
        (["audit", str(tmp_path / "none")], "holds no run"),
        (["sample", str(tmp_path / "none")], "holds no run"),
        (["audit", str(run), "--reference", "exact"], "no finite set"),
    ]
    if not torch.cuda.is_available():
        cases.append((["train", "vae", "--out", str(tmp_path / "x"), "--cuda"], "no CUDA device"))
    for arguments, message in cases:
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert not (tmp_path / "x").exists()


def test_damaged_runs_are_refused(run, capsys):
    (run / "weights.safetensors").write_bytes(b"not weights")
    assert main(["audit", str(run)]) == 1
    assert "damaged" in capsys.readouterr().err
    (run / "config.json").write_text("{}")
    assert main(["audit", str(run)]) == 1
    assert "not written by pyroelbo" in capsys.readouterr().err


def test_a_run_of_other_code_is_refused_by_name(run, capsys):
    """Such as a VAE from before there were priors: N(0, I) had no buffer then."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(run / "weights.safetensors", "pt") as file:
        meta = file.metadata()
        kept = {k: file.get_tensor(k) for k in file.keys() if k != "prior.loc"}  # noqa: SIM118
    save_file(kept, run / "weights.safetensors", meta)
    assert main(["audit", str(run)]) == 1
    message = capsys.readouterr().err
    assert "lacks 'prior.loc'" in message and "built the model 'vae' otherwise; train it anew" in message


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(
        flag in printed
        for flag in ("--num-epochs", "--batch-size", "--learning-rate", "--seed", "--cuda", "--resume")
    )


def test_audit_with_a_budget(run, capsys):
    assert main(["audit", str(run), "--num-data", "2", "--budget", "2000"]) == 0
    assert "a budget of 2000 chose" in capsys.readouterr().out
    assert main(["audit", str(run), "--num-data", "2", "--budget", "soon"]) == 1
    assert "budget: expected a time" in capsys.readouterr().err


def test_audit_against_ais(run, capsys):
    assert (
        main(
            [
                "audit",
                str(run),
                "--num-data",
                "2",
                "--particles",
                "4",
                "--reference",
                "ais",
                "--temperatures",
                "2",
            ]
        )
        == 0
    )
    assert "ais-2" in capsys.readouterr().out


def test_an_interrupted_command_tells_it_in_one_line(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyroelbo.cli._models", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "pyroelbo: interrupted\n"


def test_compress_and_decompress(run, tmp_path, capsys):
    pytest.importorskip("constriction")
    y = data.load("digits")["test"].to(torch.uint8).numpy()
    np.save(tmp_path / "y.npy", y)
    run, file, code, again = (str(x) for x in (run, *(tmp_path / n for n in ("y.npy", "y.code", "a.npy"))))
    assert main(["compress", run, file]) == 0
    assert "300 data" in (printed := capsys.readouterr().out) and "not in the file: the model" in printed
    assert main(["decompress", run, code, "--out", again]) == 0
    np.testing.assert_array_equal(np.load(again), y)
    assert np.load(again).dtype == np.uint8

    as_set = str(tmp_path / "set")
    words = ["--as-set", "--precision", "int8", "--chunk", "8", "--out", as_set]
    assert main(["compress", run, file, *words]) == 0
    assert main(["decompress", run, as_set]) == 0
    assert sorted(map(bytes, np.load(as_set + ".npy"))) == sorted(map(bytes, y))

    np.save(tmp_path / "binary.npy", y > 8)
    words = [str(tmp_path / "binary.npy"), "--shape", "8,8"]
    assert main(["compress", "contexts", *words]) == 0
    assert (
        main(["decompress", "contexts", str(tmp_path / "binary.code"), "--out", str(tmp_path / "b.npy")]) == 0
    )
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), y > 8)
    capsys.readouterr()

    y[200, 3] = 17
    np.save(tmp_path / "wrong.npy", y)
    (tmp_path / "text.npy").write_text("text")
    x = ["--out", str(tmp_path / "x")]
    for words, message in (
        (["compress", run, file], "y.code exists"),
        (["compress", run, str(tmp_path / "wrong.npy")], "expected values of positive probability, got 17"),
        (["compress", run, str(tmp_path / "text.npy")], "text.npy is damaged"),
        (["compress", run, str(tmp_path / "none.npy")], "none.npy"),
        (["compress", "contexts", str(tmp_path / "wrong.npy")], "expected shape [N, H, W]"),
        (
            ["compress", "contexts", str(tmp_path / "wrong.npy"), "--shape", "8,8"],
            "expected pixels of 0 and 1",
        ),
        (["decompress", run, code], "y.npy exists"),
        (["decompress", "contexts", code, *x], "expected a code of kind"),
        (["decompress", run, again, *x], "expected a code of"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("pyroelbo: ") and message in error and error.count("\n") == 1
