import itertools
import json
import time

import numpy as np
import pytest
import torch

from pyroelbo import data, files, fit, models
from pyroelbo.cli import commands, main


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


def small(kind, folder):
    """A file of twelve small data of this kind."""
    draw = np.random.default_rng(0)
    arrays = {
        "bytes": {"train": draw.integers(0, 4, (12, 4, 4))},
        "binary": {"train": draw.integers(0, 2, (12, 4, 4)).astype(np.uint8)},
        "grey": {"train": draw.random((12, 4, 4), np.float32), "test": draw.random((12, 4, 4), np.float32)},
        "colour": {"train": draw.integers(0, 256, (12, 4, 5, 3), np.uint8).repeat(8, 1).repeat(8, 2)},
        "vectors": {"train": 100 + 10 * draw.normal(size=(12, 3)), "labels": np.arange(12) % 3},
        "symbols": {"train": draw.integers(0, 3, (12, 5)), "lengths": draw.integers(1, 6, 12)},
        "series": {"train": 9 * draw.normal(size=(12, 5, 2)), "lengths": draw.integers(1, 6, 12)},
        "counts": {"train": draw.poisson(3, (12, 5, 2)), "lengths": draw.integers(1, 6, 12)},
        "labelled": {"train": draw.normal(size=(12, 5, 2)), "labels": draw.integers(1, 3, (12, 1))},
    }
    texts = {"strings": "to be\nor not\n" * 6, "sentences": "to be or not to be\nthat is\n" * 6}
    if kind == "formula":
        (folder / "mine.cnf").write_text("p cnf 4 3\n1 -2 0\n2 3 -4 0\n-1 4 0\n")
        return str(folder / "mine.cnf")
    if kind in texts:
        (folder / "mine.txt").write_text(texts[kind])
        return str(folder / "mine.txt")
    np.savez(folder / "mine.npz", **arrays[kind])
    return str(folder / "mine.npz")


# each model on one kind, and each kind once
SMALL = {
    "vae": "bytes --set latent=3 --set hidden=8",
    "hierarchy": "grey --set latent=3,2 --set hidden=8",
    "ladder": "vectors --set latent=3,2 --set hidden=8,8",
    "conv_ladder": "binary --set groups=1,1 --set channels=4",
    "style_vae": "bytes --set scales=1 --set channels=4",
    "autoregressive": "binary --set width=4 --set layers=1",
    "discrete_vae": "bytes --set latent=3 --set hidden=8",
    "rate_distortion": "vectors --set latent=2 --set hidden=8",
    "vq_vae": "bytes --set codes=4 --set positions=2 --set hidden=8",
    "fsq_vae": "vectors --set bins=3,2 --set positions=2 --set hidden=8",
    "sq_vae": "binary --set codes=4 --set positions=2 --set hidden=8",
    "sbn": "binary --set latent=3,2",
    "byte_vae": "bytes --set latent=3,2 --set hidden=8",
    "progressive_vae": "grey --set latent=3,2 --set hidden=8",
    "vq_chain": "bytes --set positions=2,2 --set codes=3 --set width=2 --set hidden=8",
    "vdm": "vectors --set steps=3 --set width=8 --set layers=1",
    "diffusion": "grey --set steps=3 --set width=8 --set layers=1",
    "discrete_diffusion": "bytes --set steps=3 --set width=8 --set layers=1",
    "masked_diffusion": "binary --set width=8 --set layers=1 --set likelihood=bernoulli",
    "flow": "bytes --set layers=2 --set hidden=8",
    "ppca": "vectors",
    "mixture": "vectors --set components=2",
    "bernoulli_mixture": "binary --set components=2 --set guide=encoder",
    "chow_liu": "binary --set states=3",
    "density_flow": "vectors --set layers=2 --set hidden=8",
    "hmm": "symbols --set states=2",
    "state_space": "series",
    "strings": "strings --set width=8 --set layers=1",
    "sentence_vae": "sentences --set latent=2 --set width=8",
    "lda": "sentences --set topics=2 --set hidden=8",
    "pcfg": "sentences --set preterminals=3",
    "neural_pcfg": "sentences --set preterminals=3 --set width=8",
    "sat": "formula --set hidden=8",
    "ctc": "labelled --set width=8",
    "superpixel": "colour --set segments=2 --set colours=3 --set width=4",
    "hmm --set emission=poisson": "counts --set states=2",
}


def needs_solvers(model):
    if model == "sat":
        pytest.importorskip("py_d4")
        pytest.importorskip("pysat")


def test_rows_that_changed_since_the_training_are_refused(tmp_path, capsys):
    """With fewer rows the split is another: the test split would hold what was trained on."""
    file, out, y = tmp_path / "y.npy", str(tmp_path / "run"), np.random.default_rng(0).normal(size=(60, 3))
    np.save(file, y)
    assert main(["train", "ppca", "--data", str(file), "--num-epochs", "3", "--out", out, "--quiet"]) == 0
    assert main(["audit", out, "--particles", "2"]) == 0
    np.save(file, y[:50])
    capsys.readouterr()
    assert main(["audit", out, "--particles", "2"]) == 1
    error = capsys.readouterr().err
    assert "expected the rows that the run was trained on, got others" in error and error.count("\n") == 1


@pytest.mark.parametrize("model", SMALL)
def test_every_model_trains_on_a_file_of_ones_own(model, tmp_path, capsys):
    needs_solvers(model)
    kind, *settings = SMALL[model].split()
    check(model.split() + settings + ["--data", small(kind, tmp_path)], tmp_path, capsys)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    closed = model.split()[0] in ("ppca", "mixture", "chow_liu", "hmm", "state_space", "pcfg")
    seen = {"colour": "superpixels"}.get(kind, kind)
    assert found["data"]["kind"] == seen and found["method"] == ("em" if closed else "gradient")
    assert bool(found["data"]["scale"]) == data.KINDS[kind].units
    assert printed == ""


def test_every_model_has_a_row():
    assert {model.split()[0] for model in SMALL} == set(models.REGISTRY)
    assert {row.split()[0] for row in SMALL.values()} == set(data.KINDS) - {"superpixels"}


@pytest.mark.filterwarnings("ignore:component .* held at floor")  # pixels that never vary
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *models.REGISTRY,
        *(f"{name} --set prior=vamp" for name in ("vae", "hierarchy", "ladder", "conv_ladder", "style_vae")),
        "ppca --data wine",
        "hmm --data digit_strings",
    ],
)
def test_every_model_trains_on_data_that_ship_with_the_package(words, tmp_path, capsys):
    needs_solvers(words)
    check(words.split(), tmp_path, capsys)


def check(words, folder, capsys):
    """Train, audit, sample and show a run, and look at what is printed and written."""
    torch.set_default_dtype(torch.float32)
    out = str(folder / "run")
    assert main(["train", *words, "--out", out, "-n", "1", "--quiet"]) == 0
    assert main(["audit", out, "--num-data", "3", "--particles", "4"]) == 0
    assert main(["sample", out, "-n", "5"]) == 0
    printed = capsys.readouterr().out
    assert "nats per datum" in printed and "(5," in printed
    several = {
        "hierarchy": True,
        "ladder": True,
        "conv_ladder": True,
        "style_vae": True,
        "strings": True,
        "diffusion": True,
        "vdm": True,
        "discrete_diffusion": True,
        "masked_diffusion": False,
        "vae": False,
        "hmm": False,
    }
    assert several.get(words[0]) in (None, "The ELBO by layer" in printed)
    written = ("config.json", "metrics.jsonl", "weights.safetensors", "audit.json", "audit.png", "curve.png")
    for file in written:
        assert (folder / "run" / file).stat().st_size > 0
    assert list((folder / "run").glob("samples.[ptc]*"))
    found = json.loads((folder / "run" / "audit.json").read_text())
    assert found["unit"] == "nats"
    rows = {row["method"]: row for row in found["bounds"]}
    ordered = [rows[method] for method in ("exact", "quadrature", "iwae-4", "elbo") if method in rows]
    for above, below in itertools.pairwise(ordered):
        error = above["mean_error"] + below["mean_error"]  # of four draws a datum
        assert above["mean"] > below["mean"] - 8 * error - 1e-3
    assert main(["show", out]) == 0
    shown = capsys.readouterr().out
    assert words[0] in shown and "last audit:" in shown and "audit.json" in shown and "epoch" in shown


@pytest.mark.parametrize(
    ("model", "kind"), [("diffusion", "vectors"), ("vdm", "vectors"), ("masked_diffusion", "bytes")]
)
def test_a_run_given_classes(model, kind, tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    file, out = small(kind, tmp_path), str(tmp_path / "run")
    if kind == "bytes":
        arrays = dict(np.load(file)) | {"labels": np.arange(12) % 3}
        np.savez(file, **arrays)
    sizes = ["--set", "width=8", "--set", "layers=1"]
    words = ["train", model, "--conditional", "--data", file, "--out", out, "-n", "1", "--quiet", *sizes]
    assert main([*words, *(["--set", "steps=3"] if model != "masked_diffusion" else [])]) == 0
    assert "given one of 3 classes" in capsys.readouterr().out
    assert main(["audit", out, "--particles", "2", "--num-data", "3"]) == 0
    assert main(["show", out]) == 0
    assert "given one of 3 classes" in capsys.readouterr().out
    for words, wanted in (([], [0, 1, 2, 0]), (["--class", "1"], [1] * 4)):
        assert main(["sample", out, "-n", "4", *words]) == 0
        drawn, _ = files.read_tensors(tmp_path / "run" / "samples.safetensors")
        assert drawn["class"].tolist() == wanted and drawn["y"].shape[0] == 4
        if kind == "vectors":
            head, *rows = (tmp_path / "run" / "samples.csv").read_text().splitlines()
            assert head == "class,y0,y1,y2"
            assert [row.split(",")[0] for row in rows] == [str(c) for c in wanted]
    capsys.readouterr()
    assert main(["sample", out, "--class", "3"]) == 1
    assert "--class: expected one of 0 to 2, got 3" in capsys.readouterr().err
    rows, classes, code = (str(tmp_path / name) for name in ("rows.npy", "classes.npy", "rows.code"))
    np.save(rows, np.zeros((20, drawn["y"].shape[1]), np.int64))
    np.save(classes, np.arange(20) % 3)
    assert main(["compress", out, rows]) == 1
    assert "--given: expected the classes of the data of a conditional run" in capsys.readouterr().err
    status = main(["compress", out, rows, "--given", classes])
    if model != "masked_diffusion":
        assert status == 1 and "expected terms of whole data" in capsys.readouterr().err
        return
    assert status == 0
    assert main(["decompress", out, code]) == 1
    assert main(["decompress", out, code, "--given", classes, "--out", str(tmp_path / "back.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "back.npy"), np.load(rows))


def test_errors_are_one_line_and_status_one(run, tmp_path, capsys):
    rows = tmp_path / "y.npy"
    np.save(rows, np.random.default_rng(0).normal(size=(12, 3)))
    cases = [
        (["train", "gan", "--out", str(tmp_path / "x")], "MODEL: expected one of vae"),
        (["train", "vae", "--out", str(run)], "not empty"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--set", "depth=3"],
            "--set: expected some of latent, hidden",
        ),
        (["train", "vae", "--out", str(tmp_path / "x"), "--set", "latent"], "--set: expected NAME=VALUE"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--data", "mnist", "--data-dir", str(tmp_path)],
            "mnist.npz: no such file",
        ),
        (["train", "vae", "--out", str(tmp_path / "x"), "-n", "0"], "--num-epochs: expected a positive"),
        (["train", "vae", "--out", str(tmp_path / "x"), "--kl-warmup", "-3"], "--kl-warmup: expected"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--kl-period", "3"],
            "--kl-period: expected at least",
        ),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--set", "likelihood=foo"],
            "--set likelihood: expected one of",
        ),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--set", "latent=abc"],
            "--set latent: expected a value like",
        ),
        (["audit", str(run), "--num-data", "-1"], "--num-data: expected"),
        (["audit", str(tmp_path / "none")], "holds no run"),
        (["sample", str(tmp_path / "none")], "holds no run"),
        (["audit", str(run), "--reference", "exact"], "no finite set"),
        (["audit", str(run), "--reference", "smc"], "--reference: expected some of"),
        (["sample", str(run), "-n", "0"], "--num-samples: expected a positive"),
        (["show", str(tmp_path / "none")], "holds no run"),
        (["train", "vae", "--out", str(tmp_path / "x"), "--data", "cifar"], "--data: expected one of digits"),
        (
            ["train", "vae", "--out", str(tmp_path / "x"), "--conditional"],
            "--conditional: expected a model of classes, diffusion, vdm, discrete_diffusion, masked",
        ),
        (
            [
                "train",
                "vdm",
                "--out",
                str(tmp_path / "x"),
                "--conditional",
                "--data",
                str(tmp_path / "y.npy"),
            ],
            "--conditional: expected data with a class for each datum, got y.npy, vectors without classes",
        ),
        (["sample", str(run), "--class", "1"], "--class: expected none of a run that is not conditional"),
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
    assert float(commands.left("20s", time.monotonic() - 5)[:-1]) == pytest.approx(13, abs=0.5)
    with pytest.raises(ValueError, match="expected more than the 5.* s that loading took, got '5s'"):
        commands.left("5s", time.monotonic() - 5)
    assert main(["audit", str(run), "--num-data", "2", "--budget", "soon"]) == 1
    assert "--budget: expected a time" in capsys.readouterr().err


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

    monkeypatch.setattr("pyroelbo.cli.commands.models_", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "pyroelbo: interrupted\n"


def test_colours_are_compressed_given_their_luma(tmp_path, capsys, monkeypatch):
    pytest.importorskip("constriction")
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    rgb = np.random.default_rng(0).integers(0, 256, (9, 8, 12, 3), dtype=np.uint8)
    luma = data.to_ycocg(torch.from_numpy(rgb))[0].to(torch.uint8).numpy()
    np.save("rgb.npy", rgb)
    np.save("luma.npy", luma)
    np.save("other.npy", luma[::-1])
    settings = "--set segments=1 --set colours=3 --set width=4 --epochs 1 --out run"
    assert main(["train", "superpixel", "--data", "rgb.npy", *settings.split()]) == 0
    assert main(["compress", "run", "rgb.npy", "--chunk", "2"]) == 0
    assert "9 data" in capsys.readouterr().out
    assert main(["decompress", "run", "rgb.code", "--given", "luma.npy", "--out", "again.npy"]) == 0
    np.testing.assert_array_equal(np.load("again.npy"), rgb)
    assert np.load("again.npy").dtype == np.uint8
    capsys.readouterr()
    for words, message in (
        (["compress", "run", "luma.npy"], "FILE: expected colour pictures [N, H, W, 3] of uint8, got uint8"),
        (["decompress", "run", "rgb.code", "--out", "x"], "given: expected the lumas of pictures"),
        (["decompress", "run", "rgb.code", "--out", "x", "--given", "rgb.npy"], "given: expected lumas"),
        (["decompress", "run", "rgb.code", "--out", "x", "--given", "other.npy"], "got another `given`"),
        (["decompress", "run", "rgb.code", "--given", "luma.npy", "--out", "again.npy"], "again.npy exists"),
    ):
        assert main(words) == 1, words
        assert message in capsys.readouterr().err


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
        (["compress", "contexts", file, "--given", code], "given: expected none for 'contexts'"),
        (["compress", "contexts", file, "--as-set"], "--as-set: expected none for 'contexts'"),
        (["compress", "contexts", file, "--chunk", "0"], "--chunk: expected none for 'contexts'"),
        (["decompress", "contexts", code, *x], "expected a code of kind"),
        (["decompress", run, again, *x], "expected a code of"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("pyroelbo: ") and message in error and error.count("\n") == 1


PAIR = '''
import pyro, pyro.distributions as dist, torch
from pyroelbo import Pair


class Mine(Pair):
    """The mean of each row, seen with unit noise."""

    def __init__(self, dims, scale=2.0):
        super().__init__()
        self.dims, self.scale = dims, scale
        self.generator, self.encoder = torch.nn.Linear(1, dims), torch.nn.Linear(dims, 1)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), self.scale).to_event(1))
            pyro.sample("y", dist.Normal(self.generator(z), 1.0).to_event(1), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(self.encoder(y), 1.0).to_event(1))

    def placeholder(self, n):
        return torch.zeros(n, self.dims)


class Words(Mine):
    kinds = ("symbols",)
'''


def test_a_pair_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PAIR)
    torch.set_default_dtype(torch.float32)
    (tmp_path / "my.csv").write_text("a,b\n" + "".join(f"{i},{100 - i * i}\n" for i in range(12)))
    train = ["train", "mine:Mine", "--data", "my.csv", "-n", "1", "--quiet"]
    assert main([*train, "--out", "r", "--set", "scale=1.5"]) == 0
    assert main(["audit", "r", "--particles", "4"]) == 0
    assert main(["sample", "r", "-n", "3"]) == 0
    printed = capsys.readouterr().out
    assert "Mine: 2 data, nats per datum" in printed and "own units" in printed and "(y (3, 2))" in printed
    assert (tmp_path / "r" / "samples.csv").read_text().startswith("a,b\n")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["about"] == f"from {tmp_path / 'mine.py'}"
    for words, message in (
        ([*train, "--out", "x", "--set", "width=3"], "--set: expected some of scale for model 'mine:Mine'"),
        (["train", "mine:Other", "--out", "x"], "MODEL: expected a subclass of Pair in"),
        (
            ["train", "os:system", "--out", "x"],
            "MODEL: expected module:Class in the working folder, got ",
        ),
        (
            ["train", "mine:Words", "--out", "x", "--data", "my.csv"],
            "--data: expected symbols for mine:Words, got my.csv, vectors; vectors are for vae, hierarchy",
        ),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_run_sticks_to_its_data(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    path, out = tmp_path / "my.csv", str(tmp_path / "r")
    path.write_text("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(12)))
    train = ["train", "mixture", "--data", str(path), "--out", out, "--quiet", "--set", "components=2"]
    assert main([*train, "-n", "1"]) == 0
    assert main([*train, "-n", "2", "--resume"]) == 0
    path.write_text("a,b,c\n" + "".join(f"{i},{i * i},1\n" for i in range(12)))
    capsys.readouterr()
    assert main([*train, "-n", "3", "--resume"]) == 1
    error = capsys.readouterr().err
    assert "--data: expected those of the run" in error and "with shape [2], got [3]" in error
    path.write_text("a,c\n" + "".join(f"{i},1\n" for i in range(12)))
    assert main(["audit", out]) == 1
    assert "columns: expected some of a, c, got 'b'" in capsys.readouterr().err
    path.unlink()
    assert main(["audit", out]) == 1
    assert "my.csv" in capsys.readouterr().err


def test_a_run_of_a_python_program_is_shown(tmp_path, capsys):
    fit(models.PPCA(3, 1), torch.randn(8, 3), epochs=2, out=tmp_path / "r", progress=False)
    assert main(["show", str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out
    assert "a pair of a Python program" in shown and "epochs=2" in shown and "seed=0" in shown
    assert "weights.safetensors" in shown and "audit" not in shown


def test_em_takes_what_concerns_it(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    train = ["train", "mixture", "--data", "iris", "--out", str(tmp_path / "x"), "--quiet"]
    for words, message in (
        (["-lr", "0.1"], "--learning-rate: expected none with --method em, got 0.1"),
        (["--kl-warmup", "2"], "--kl-warmup: expected none with --method em, got 2.0"),
        (["--objective", "iwae"], "--objective: expected none with --method em, got 'iwae'"),
        (["--method", "em", "--set", "guide=encoder"], "--method: expected gradient for a guide with an enc"),
    ):
        assert main([*train, *words]) == 1
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert main([*train, "--method", "gradient", "-lr", "0.1", "-n", "1"]) == 0
    assert "validation elbo" in capsys.readouterr().out


def test_codes_alone_of_real_data_are_compressed_with_loss(tmp_path, capsys):
    torch.manual_seed(0)
    y = (torch.randn(300, 4) * torch.tensor([1.0, 20.0, 0.1, 3.0]) + 7).numpy()
    np.save(tmp_path / "y.npy", y)
    run, code, back = (str(tmp_path / name) for name in ("run", "y.code", "back.npy"))
    words = ["rate_distortion", "--data", str(tmp_path / "y.npy"), "--out", run, "-n", "40", "--quiet"]
    settings = ["--set", "latent=4", "--set", "hidden=8", "--set", "weight=50", "-lr", "0.01"]
    assert main(["train", *words, *settings]) == 0
    assert main(["compress", run, str(tmp_path / "y.npy"), "--out", code]) == 0
    assert "not bit for bit" in capsys.readouterr().out
    assert main(["decompress", run, code, "--out", back]) == 0
    restored = np.load(back)
    assert restored.shape == y.shape  # in the data's own units, every column
    assert (np.square(restored - y).mean(0) < 0.8 * y.var(0)).all()
    assert main(["decompress", run, code, "--out", back]) == 1
    assert "exists" in capsys.readouterr().err
    np.save(tmp_path / "wide.npy", y[:, :3])
    assert main(["compress", run, str(tmp_path / "wide.npy"), "--out", str(tmp_path / "x")]) == 1
    assert "expected an array of 4 numbers a datum" in capsys.readouterr().err
