"""Files: what goes in comes out, and whatever is wrong is refused with the file's name."""

import errno
import json
import math
import random
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("constriction")
pytest.importorskip("numba")
from pyroelbo import data, evidence, fit, models
from pyroelbo.coding import (
    archive,
    compress,
    compress_contexts,
    container,
    decompress,
    decompress_contexts,
    quantized,
)
from pyroelbo.coding.multiset import Multiset
from pyroelbo.coding.stack import Stack
from pyroelbo.coding.weights import size
from tests.pairs import coloured, texts

from .round_trip import random_words


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return models.VAE((3, 4), 2, (8,))


def images(n, dtype="u1"):
    return (np.random.default_rng(1).random((n, 3, 4)) < 0.4).astype(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 29])
@pytest.mark.parametrize("as_set", [False, True])
def test_any_number_of_data(vae, n, as_set, tmp_path):
    y = images(n)
    found = compress(vae, y, tmp_path / "code", chunk=8, as_set=as_set)
    assert found.bytes == (tmp_path / "code").stat().st_size
    assert found.data == n == found.coded + found.starter_data
    again = decompress(vae, tmp_path / "code")
    if as_set:
        y, again = (sorted(row.tobytes() for row in x) for x in (y, again))
        assert again == y
    else:
        assert same(again, y)


@pytest.mark.parametrize("dtype", ["?", "i1", "<i8", ">f4", "<f8"])
def test_the_array_is_what_is_restored(vae, dtype, tmp_path):
    """Its dtype, byte order and shape, into memory and into a file."""
    y = images(20, dtype).reshape(20, 12)
    np.save(tmp_path / "y.npy", y)
    compress(vae, np.load(tmp_path / "y.npy", mmap_mode="r"), tmp_path / "code", chunk=8)
    assert same(decompress(vae, tmp_path / "code"), y)
    assert decompress(vae, tmp_path / "code", tmp_path / "again.npy") is None
    assert same(np.load(tmp_path / "again.npy"), y)
    with pytest.raises(FileExistsError, match="again.npy"):
        decompress(vae, tmp_path / "code", tmp_path / "again.npy")


@pytest.mark.parametrize("as_set", [False, True])
def test_segments_of_a_long_code(vae, as_set, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_LARGE", 60)
    monkeypatch.setattr(archive, "_KEPT", 30)
    y = images(700)
    compress(vae, y, tmp_path / "code", chunk=8, as_set=as_set)
    assert len(container.Reader(tmp_path / "code")) > 2
    again = decompress(vae, tmp_path / "code")
    if as_set:
        y, again = (sorted(row.tobytes() for row in x) for x in (y, again))
        assert again == y
    else:
        assert same(again, y)


@pytest.mark.parametrize("n", [0, 3, 14])
def test_masked_diffusion_given_its_classes(n, tmp_path):
    """The file holds the order average of its labels, another one with other labels."""
    torch.manual_seed(0)
    pair, bits = models.MaskedDiffusion(6, classes=3, width=8, layers=1), []
    for p in pair.parameters():
        torch.nn.init.normal_(p, std=0.7)
    y, labels = np.random.default_rng(0).integers(0, 2, (n, 6)).astype("u1"), torch.arange(n) % 3
    for k, given in enumerate((labels, (labels + 1) % 3)):
        found = compress(pair, y, tmp_path / f"{k}", given=[given], chunk=4)
        assert same(decompress(pair, tmp_path / f"{k}", given=[given]), y)
        bits.append(found.net_bits)
        if n == 14:
            assert found.coded == 14
            every = evidence.elbo(pair.written_out(), (given, torch.tensor(y).float()), particles=200)
            ideal = -float(every.value.sum()) / math.log(2)
            assert bits[k] == pytest.approx(ideal, rel=0.15)  # one order a datum in the file
    assert n < 14 or abs(bits[0] - bits[1]) > 1


@pytest.mark.parametrize("n", [0, 3, 14])
def test_what_is_given_is_not_in_the_file(n, tmp_path):
    torch.manual_seed(0)
    pair = models.Superpixel(2, 3, width=4)
    *given, y = coloured(n or 1)
    given, y = [part[:n] for part in given], y[:n].numpy().astype("i2")
    found = compress(pair, y, tmp_path / "code", given=given, chunk=4)
    assert found.coded == n - n % 4
    assert same(decompress(pair, tmp_path / "code", given=given), y)
    if n < 14:
        return
    for other, message in (
        ((), "expected the `given` that it was written with, got nothing"),
        ((given[0].flip(0), *given[1:]), "expected the `given` that it was written with, got another"),
        ([part[:9] for part in given], "given: expected 14 rows, as y has, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress(pair, tmp_path / "code", given=other)
    with pytest.raises(ValueError, match="as_set: expected False with `given`"):
        compress(pair, y, tmp_path / "set", given=given, as_set=True)
    plain = models.VAE(5)
    compress(plain, np.zeros((3, 5), "u1"), tmp_path / "plain")
    for other, parts in ((models.VAE(6, 2, (4,)), y), (models.HMM(2, 2), np.zeros((n, 3), "u1"))):
        with pytest.raises(
            ValueError, match=rf"given: expected the parts that {other.name}.model takes .* got 1"
        ):
            compress(other, parts, tmp_path / "refused", given=given[:1])
    with pytest.raises(ValueError, match="given: expected the parts that Superpixel.model takes .* got 0"):
        compress(pair, y, tmp_path / "refused")
    with pytest.raises(ValueError, match="expected nothing `given`, as it was written, got 1 parts"):
        decompress(plain, tmp_path / "plain", given=[np.zeros(3)])


def test_exact_models_need_no_starter(tmp_path):
    torch.manual_seed(0)
    pair, y = models.Strings(5, 3, width=8, layers=1), texts(21, 5, 3)
    found = compress(pair, y, tmp_path / "code", chunk=8)
    assert found.starter_data == found.initial_bits == 0 and found.coded == 21
    with torch.no_grad():
        ideal = -float(pair.log_evidence(y).mean())
    assert found.net == pytest.approx(ideal, abs=2 / 21)
    assert np.array_equal(decompress(pair, tmp_path / "code"), y.numpy())
    compress(pair, y, tmp_path / "set", chunk=8, as_set=True)
    assert sorted(map(bytes, decompress(pair, tmp_path / "set"))) == sorted(map(bytes, y.numpy()))


def test_grey_levels_start_by_zlib(tmp_path):
    pair = models.VAE(6, 2, (8,), likelihood="discretized_logistic", levels=9)
    y = np.random.default_rng(0).integers(0, 9, (30, 6))
    found = compress(pair, y, tmp_path / "code", chunk=8)
    assert found.starter_data >= 6 and container.Reader(tmp_path / "code").description["starter"][0] == "zlib"
    assert same(decompress(pair, tmp_path / "code"), y)


def test_a_start_of_negative_zeros_keeps_them(vae, tmp_path):
    y = images(7, "f4")
    y[3] = -0.0
    compress(vae, y, tmp_path / "code")
    assert same(decompress(vae, tmp_path / "code"), y)


def test_a_set_saves_the_orders_bits():
    """log2 n! / Π m_i!, however the data are distributed."""
    members = [bytes([i]) * 3 for i in np.random.default_rng(0).integers(0, 40, 300)]
    stack = Stack(random_words(2000))
    before, content = stack.bits, stack.words()
    multiset = Multiset(members)
    drawn = multiset.draw(stack, 300)
    assert len(multiset) == 0 and sorted(drawn) == sorted(members) and drawn != sorted(members)
    copies = sum(math.lgamma(members.count(m) + 1) for m in set(members))
    assert before - stack.bits == pytest.approx((math.lgamma(301) - copies) / math.log(2), abs=2)
    multiset.insert(stack, drawn)
    assert multiset.members == sorted(members)
    np.testing.assert_array_equal(stack.words(), content)


# ------------------------------------------------------------------------------------------- bad input


def test_another_model_is_refused(vae, tmp_path):
    compress(vae, images(20), tmp_path / "code", chunk=8)
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="code: expected the pair that wrote it"):
        decompress(vae, tmp_path / "code")


def test_another_machine_is_refused(vae, tmp_path, monkeypatch):
    """Stands for one: networks whose outputs differ in the last bits."""
    compress(vae, images(20), tmp_path / "code", chunk=8)
    before = torch.get_num_threads()
    observation = models.VAE.observation

    def other(self, z):
        d = observation(self, z)
        return type(d.base_dist)(logits=d.base_dist.logits * (1 + 1e-6)).to_event(1)

    monkeypatch.setattr(models.VAE, "observation", other)
    with pytest.raises(ValueError, match="code: expected networks that compute the same numbers"):
        decompress(vae, tmp_path / "code")
    assert torch.get_num_threads() == before


def test_networks_that_differ_from_pass_to_pass_are_refused(vae, tmp_path, monkeypatch):
    observation = models.VAE.observation
    monkeypatch.setattr(
        models.VAE, "observation", lambda self, z: observation(self, z + 0.1 * torch.rand_like(z))
    )
    with pytest.raises(RuntimeError, match="same numbers in both directions"):
        compress(vae, images(20), tmp_path / "code", chunk=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda y: y[13].__setitem__((1, 2), 2),
            r"site 'y': expected values of positive .*, got 2 in datum 13",
        ),
        (
            lambda y: y[13].__setitem__((1, 2), math.nan),
            "y: expected finite numbers, got NaN or infinite ones in datum 13",
        ),
        (lambda y: y[13].__setitem__((1, 2), -0.0), "expected numbers that the pair's .* holds exactly"),
    ],
)
def test_values_outside_the_support_are_refused(change, message, tmp_path):
    pair = models.VAE((3, 4), 2, (8,)).float()
    y = images(32, "f8")
    change(y)
    if "exactly" in message:
        y[13, 1, 2] = 1e-60
    with pytest.raises(ValueError, match=message):
        compress(pair, y, tmp_path / "code", chunk=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae, path: compress(vae, np.array(["a"]), path), "y: expected numbers of shape"),
        (lambda vae, path: compress(vae, np.float64(3), path), "y: expected numbers of shape"),
        (
            lambda vae, path: compress(vae, images(20), path, method="swap"),
            "method: expected one of bits-back",
        ),
        (lambda vae, path: compress(vae, images(20), path, chunk=0), "chunk: expected a positive"),
        (lambda vae, path: compress(vae, images(20)[:, :2], path), "y: expected shape"),
        (lambda vae, path: compress(vae, images(20), path, precision="int4"), "precision: expected one of"),
    ],
)
def test_arguments(vae, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(vae, tmp_path / "code")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(vae, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container.Writer, "segment", full)
    with pytest.raises(OSError, match="cannot write .*code: No space left"):
        compress(vae, images(20), tmp_path / "code", chunk=8)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(vae, tmp_path):
    (tmp_path / "code").write_text("mine")
    with pytest.raises(FileExistsError, match="code exists"):
        compress(vae, images(20), tmp_path / "code", chunk=8)
    assert (tmp_path / "code").read_text() == "mine"


def test_kinds_and_formats(vae, tmp_path, monkeypatch):
    compress(vae, images(20), tmp_path / "pair", chunk=8)
    compress_contexts(images(20), tmp_path / "contexts")
    with pytest.raises(ValueError, match="kind 'contexts', got 'pair'"):
        decompress_contexts(tmp_path / "pair")
    with pytest.raises(ValueError, match="kind 'pair', got 'contexts'"):
        decompress(vae, tmp_path / "contexts")
    monkeypatch.setattr(container, "FORMAT", 2)
    with pytest.raises(ValueError, match="expected format 2, got 1"):
        decompress(vae, tmp_path / "pair")


@pytest.mark.parametrize("kind", ["pair", "contexts"])
def test_damaged_files_are_refused(vae, kind, tmp_path):
    path = tmp_path / "code"
    read = (lambda: decompress(vae, path)) if kind == "pair" else (lambda: decompress_contexts(path))
    (compress(vae, images(40), path, chunk=8) if kind == "pair" else compress_contexts(images(40), path))
    good = path.read_bytes()
    generator = random.Random(0)
    broken = [good[:n] for n in (0, 5, len(good) // 2, len(good) - 1)] + [good + b"x", good[9:], b"x" * 100]
    for _ in range(60):
        flipped = bytearray(good)
        flipped[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        broken.append(bytes(flipped))
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="code"):
            read()
    path.write_bytes(good)
    assert same(read(), images(40))


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [9]},
        {"parts": "x"},
        {"shape": [40]},
        {"starter": ["zlib", 8, 3, [3, 4]]},
        {"kept": None, "template": None},
        {"sha256": ""},
        {"codec": None},
    ],
)
def test_a_description_that_does_not_fit_is_damage(vae, change, tmp_path):
    path = tmp_path / "code"
    compress(vae, images(40), path, chunk=8)
    reader = container.Reader(path)
    whole = json.dumps({**reader.description, **change}).encode()
    segments = b"".join(reader.segment(i) for i in range(len(reader)))
    content = zlib.compress(whole)
    end = container._END.pack(len(content), zlib.crc32(content), container.MAGIC)
    path.write_bytes(container.MAGIC + segments + content + end)
    with pytest.raises(ValueError, match="code is damaged"):
        decompress(vae, path)


# --------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("precision", "error"), [("float16", 2**-11), ("int8", 1 / 254 + 2**-11)])
def test_quantized_weights(vae, precision, error, tmp_path):
    rounded = quantized(vae, precision)
    for (name, a), b in zip(vae.state_dict().items(), rounded.state_dict().values(), strict=True):
        top = a.abs().amax(-1, keepdim=True) if a.dim() > 1 else a.abs()
        assert bool(((a - b).abs() <= error * top + 1e-7).all()), name
        assert a.dtype == b.dtype
    assert size(vae, precision) < size(vae) / {"float16": 3.9, "int8": 4}[precision]
    found = compress(vae, images(20), tmp_path / "code", chunk=8, precision=precision)
    assert found.model_bytes == size(vae, precision)
    assert same(decompress(vae, tmp_path / "code"), images(20))
    assert same(decompress(rounded, tmp_path / "code"), images(20))  # rounding again changes nothing
    with pytest.raises(ValueError, match="expected the pair that wrote it"):
        decompress(models.VAE((3, 4), 2, (8,)), tmp_path / "code")


def test_the_break_even_point(vae, tmp_path):
    found = compress(vae, images(400), tmp_path / "code", chunk=8)
    per_datum = found.bytes / 400
    assert found.break_even(per_datum + 0.5) == pytest.approx(2 * size(vae))
    assert found.break_even(per_datum - 0.1) == math.inf
    assert json.loads(found.to_json())["model_bytes"] == size(vae) and "nats per datum" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "hierarchy"])
def test_a_trained_pair_codes_at_its_bound(name, tmp_path):
    """Within .3 % of the ELBO, and a z-test's error at 1e-6."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    digits = data.load("digits")
    pair = models.build(name, digits, {"likelihood": "discretized_logistic"})
    fit(pair, digits["train"], epochs=60, learning_rate=2e-3, progress=False)
    y = digits["test"].to(torch.uint8)
    found = compress(pair, y, tmp_path / "code")
    assert same(decompress(pair, tmp_path / "code"), y.numpy())
    with torch.no_grad():
        log_w = evidence.terms(pair, digits["test"][: found.coded], 64).log_weight
    error = math.sqrt(float(log_w.var(0).sum()) * (1 + 1 / 64)) / found.coded
    bound = -float(log_w.mean())
    assert abs(found.net - bound) < 4.9 * error + 0.003 * bound


@pytest.mark.parametrize("n", [8, 9, 29])
def test_a_deterministic_encoder_needs_no_start(n, tmp_path):
    """All data are coded by the pair, the last chunk in part, at the hard ELBO, to .1 % and 12 bits."""
    torch.manual_seed(0)
    pair = models.ByteVAE((3, 4), (3, 2), (8,))
    y = images(n)
    found = compress(pair, y, tmp_path / "code", chunk=8)
    assert found.coded == n and found.starter_data == found.starter_bytes == found.initial_bits == 0
    assert same(decompress(pair, tmp_path / "code"), y)
    elbo = evidence.elbo(pair, torch.from_numpy(y).reshape(n, -1).float(), particles=1)
    assert found.net_bits == pytest.approx(-float(elbo.value.sum()) / math.log(2), rel=1e-3, abs=12)
    assert sum(found.site_bits.values()) == found.net_bits and set(found.site_bits) == {"y", "z_1", "z_2"}
    assert "    z_2  " in str(found)
    assert found.to_dict()["site_bits"] == found.site_bits


def test_the_bits_of_sites_and_order_are_those_of_the_code(vae, tmp_path):
    found = compress(vae, images(40), tmp_path / "code", chunk=8, as_set=True)
    assert set(found.site_bits) == {"y", "z", "order"} and found.site_bits["order"] < 0
    assert sum(found.site_bits.values()) == pytest.approx(found.net_bits)
