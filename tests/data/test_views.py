"""Data of one kind seen as another keep their content; what cannot be seen so is said."""

import pytest
import torch

from pyroelbo import batch as batches
from pyroelbo import data
from pyroelbo.data import KINDS, VIEWS, Dataset, view

LENGTHS = torch.tensor([3, 2])
WORDS = Dataset(
    "w", "strings", (), {"train": data.strings(["a b", "bb"], alphabet=" ab")[0]}, 3, 3, (" ", "a", "b")
)
SETS = {
    "bytes": Dataset("d", "bytes", (2, 3), {"train": torch.tensor([[0.0, 1, 2, 2, 1, 0]])}, 3),
    "colour": Dataset("d", "colour", (2, 2, 3), {"train": torch.arange(24).view(2, 12).byte()}, 256),
    "vectors": Dataset("d", "vectors", (2,), {"train": torch.tensor([[0.0, 1.0]])}),
    "symbols": Dataset("d", "symbols", (), {"train": torch.tensor([[0, 1, 1], [1, 0, 0]])}, 2, 3),
    "counts": Dataset("d", "counts", (2,), {"train": torch.tensor([[[0, 1], [1, 1]]])}, 2, 2),
    "series": Dataset("d", "series", (2,), {"train": torch.tensor([[[0.0, 0.5], [1.0, 1.0]]])}, 0, 2),
    "strings": Dataset("d", "strings", (), {"train": torch.tensor([[0, 1, 1], [1, 0, -1]])}, 2, 3),
    "sentences": Dataset("d", "sentences", (), {"train": torch.tensor([[0, 1, 1], [1, 0, -1]])}, 2, 3),
    "labelled": Dataset(
        "d", "labelled", (1,), {"train": (torch.zeros(2, 3, 1), torch.tensor([[1], [2]]), LENGTHS)}, 2, 3
    ),
}


@pytest.mark.parametrize(("here", "there"), VIEWS)
def test_a_view_is_a_whole_data_set_of_its_kind(here, there):
    own, seen = SETS[here], view(SETS[here], (there,))
    assert seen.kind == there and seen.name == own.name
    steps = batches.call(seen.about.steps, seen["train"])
    assert len(steps) == batches.size(own["train"])
    levels = {"binary": 2, "superpixels": 511}.get(there, own.levels)
    assert seen.levels == levels if seen.about.discrete else seen.levels == 0
    if here not in ("labelled", "colour"):  # as many numbers as there were; labels or the luma are left out
        before = batches.call(own.about.steps, own["train"]) * own.dims
        assert torch.equal(steps * seen.dims, before)


def test_levels_of_own_pictures_are_light_and_bits_are_ink():
    assert view(SETS["counts"], ("bytes",)).light and view(SETS["series"], ("grey",)).light
    assert not view(SETS["counts"], ("binary",)).light and not view(SETS["bytes"], ("grey",)).light


def test_contents_of_views():
    assert view(SETS["bytes"], ("grey",))["train"].tolist() == [[0, 0.5, 1, 1, 0.5, 0]]
    assert view(SETS["bytes"], ("binary",))["train"].tolist() == [[0, 0, 1, 1, 0, 0]]
    assert view(SETS["bytes"], ("counts",))["train"].tolist() == [[[0, 1, 2], [2, 1, 0]]]
    y, lengths = view(SETS["strings"], ("symbols",))["train"]
    assert y.tolist() == [[0, 1, 1], [1, 0, 0]] and lengths.tolist() == [3, 2]
    again = view(Dataset("d", "symbols", (), {"train": (y, lengths)}, 2, 4), ("strings",))["train"]
    assert again.tolist() == [[0, 1, 1, -1], [1, 0, -1, -1]]
    x, lengths = view(SETS["labelled"], ("series",))["train"]
    assert x.shape == (2, 3, 1) and lengths is LENGTHS
    words = view(
        Dataset(
            "w", "strings", (), {"train": torch.tensor([[1, 0, 2, 2], [2, 2, 0, 1]])}, 3, 4, (" ", "a", "b")
        ),
        ("sentences",),
    )
    assert words.names == ("a", "bb") and words["train"].tolist() == [[0, 1], [1, 0]] and words.steps == 2


@pytest.mark.parametrize(
    ("own", "kinds", "message"),
    [
        (SETS["vectors"], ("series",), r"data: expected series, got d, vectors$"),
        (SETS["series"], ("vectors", "counts"), "data: expected vectors or counts, got d, series"),
        (
            WORDS,
            ("sentences",),
            "not as sentences: expected sentences of two words or more, got fewer in row 1",
        ),
        (
            Dataset("d", "vectors", (2,), {"train": torch.tensor([[0.0, 0.3]])}),
            ("binary",),
            "not as binary: expected 0 and 1, got 0.3",
        ),
        (
            Dataset("d", "counts", (1,), {"train": torch.tensor([[[3]]])}, 4, 1),
            ("binary",),
            "not as binary: expected 0 and 1, got values up to 3",
        ),
        (
            Dataset("d", "series", (1,), {"train": torch.tensor([[[3.0]]])}, 0, 1),
            ("grey",),
            r"not as grey: expected grey levels in \[0, 1\], got 3 to 3",
        ),
        (
            Dataset("d", "symbols", (), {"train": (torch.zeros(2, 3).long(), LENGTHS)}, 2, 3),
            ("bytes",),
            "not as bytes: expected sequences of one length",
        ),
        (
            Dataset("d", "strings", (), {"train": torch.tensor([[-1, -1]])}, 2, 2),
            ("symbols",),
            "not as symbols: expected sequences of one symbol or more, got none in row 0 of train",
        ),
    ],
)
def test_what_cannot_be_seen_is_said(own, kinds, message):
    with pytest.raises(ValueError, match=message):
        view(own, kinds)


def test_standardized_data_are_centred_within_their_lengths_and_come_back():
    y = torch.randn(6, 4, 2) * torch.tensor([3.0, 0.5]) + 7
    lengths = torch.tensor([4, 2, 1, 3, 4, 4])
    y[1, 2:] = 1e6  # padding
    raw = Dataset("d", "series", (2,), {"train": (y, lengths), "test": (y[:2], lengths[:2])}, 0, 4)
    found = raw.standardized()
    inside = torch.arange(4) < lengths[:, None]
    x = found["train"][0]
    torch.testing.assert_close(x[inside].mean(0), torch.zeros(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(x[inside].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(found.raw(x)[inside], y[inside])
    torch.testing.assert_close(
        found.log_scale(found["train"]), lengths * y[inside].std(0, correction=0).log().sum()
    )
    assert found.standardized(raw) is found
    torch.testing.assert_close(raw.standardized(found)["test"][0], found["test"][0])
    assert all(SETS[k].standardized() is SETS[k] for k in SETS if not KINDS[k].units)


def test_a_constant_coordinate_keeps_its_unit():
    found = Dataset("d", "vectors", (2,), {"train": torch.tensor([[5.0, 1.0], [5.0, 3.0]])}).standardized()
    assert found.scale == (1.0, 1.0) and found["train"].tolist() == [[0, -1], [0, 1]]
