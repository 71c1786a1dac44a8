"""Colour pictures: a transform without loss, files that are refused, and superpixels that see luma alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyroelbo import data
from pyroelbo.data import from_ycocg, superpixels, to_ycocg

pytest.importorskip("skimage")


def plain(r, g, b):
    """The transform in integers of Python."""
    co = r - b
    t = b + co // 2
    cg = g - t
    return t + cg // 2, co, cg


def corners():
    """Every combination of 16 values a channel, the ends among them."""
    return torch.cartesian_prod(*[torch.arange(0, 256, 17)] * 3).to(torch.uint8)


def test_the_transform_is_reversible_and_as_defined():
    rgb = corners()
    luma, chroma = to_ycocg(rgb)
    assert luma.dtype == chroma.dtype == torch.int32  # bytes would wrap around
    wanted = [plain(*row) for row in rgb.tolist()]
    assert torch.cat([luma[:, None], chroma], 1).tolist() == [list(row) for row in wanted]
    assert torch.equal(from_ycocg(luma, chroma).to(torch.uint8), rgb)
    assert all(map(torch.equal, to_ycocg(rgb.numpy()), (luma, chroma)))
    assert int(luma.min()) == 0 and int(luma.max()) == 255
    assert int(chroma.min()) == -255 and int(chroma.max()) == 255


@pytest.mark.parametrize(
    ("rgb", "message"),
    [
        (torch.rand(2, 3), r"rgb: expected integers \[\*, 3\], got torch.float"),
        (torch.zeros(2, 4).long(), r"rgb: expected integers \[\*, 3\], got torch.int64 of shape \(2, 4\)"),
        (torch.full((2, 3), 256), r"rgb: expected 0 … 255, got 256 … 256"),
        (torch.tensor(3), r"rgb: expected integers \[\*, 3\]"),
    ],
)
def test_what_is_no_picture_is_refused(rgb, message):
    with pytest.raises(ValueError, match=message):
        to_ycocg(rgb)


def test_scenes_are_eight_photographs_of_which_one_is_held_out():
    found = data.load("scenes")
    assert (found.kind, found.shape, found.levels) == ("colour", (128, 128, 3), 256)
    assert {k: len(v) for k, v in found.splits.items()} == {"train": 7, "test": 1}
    assert found["train"].dtype == torch.uint8
    from skimage.data import astronaut

    each = torch.from_numpy(astronaut()).double().unflatten(0, (128, 4)).unflatten(2, (128, 4)).mean((1, 3))
    assert (found["test"][0].view(128, 128, 3) - each).abs().max() <= 0.5


def pictures(n=2, height=24, width=30, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8))


def blocks(rgb, size=8):
    """Pictures of squares of one colour."""
    return rgb.repeat_interleave(size, 1).repeat_interleave(size, 2)


def test_superpixels_cover_the_picture_and_hang_together_in_a_tree():
    rgb = blocks(pictures(3, 3, 4), 8)
    x, labels, parents, y = superpixels(rgb, 12)
    assert torch.equal(from_ycocg(x, y).to(torch.uint8), rgb)
    assert labels.shape == x.shape == (3, 24, 32) and parents.shape[0] == 3
    for own, tree in zip(labels, parents.tolist(), strict=True):
        count = int(own.max()) + 1
        assert sorted(set(own.flatten().tolist())) == list(range(count)) and count <= len(tree)
        assert tree[count:] == [-1] * (len(tree) - count) and tree[:count].count(-1) == 1
        beside = {frozenset(p) for p in zip(own[1:].flatten().tolist(), own[:-1].flatten().tolist())}  # noqa: B905
        beside |= {frozenset(p) for p in zip(own[:, 1:].flatten().tolist(), own[:, :-1].flatten().tolist())}  # noqa: B905
        for child, parent in enumerate(tree[:count]):
            assert parent < 0 or frozenset((child, parent)) in beside
            steps, above = 0, child
            while tree[above] >= 0:
                above, steps = tree[above], steps + 1
                assert steps < count


def test_the_tree_has_the_least_differences_of_luma():
    columns = torch.tensor([10, 10, 200, 90]).byte()  # two alike: a weight of zero is an edge, not none
    rows = torch.stack([columns, torch.tensor([250, 60, 140, 30]).byte()])
    rgb = blocks(rows[None, ..., None].expand(1, 2, 4, 3), 8)
    x, labels, parents, _ = superpixels(rgb, 8, compactness=1.0)
    count = int(labels.max()) + 1
    assert count == 8
    mean = torch.tensor([x[0][labels[0] == n].double().mean() for n in range(count)])
    beside = set()
    for a, b in ((labels[0][1:], labels[0][:-1]), (labels[0][:, 1:], labels[0][:, :-1])):
        beside |= {(min(p), max(p)) for p in zip(a.flatten().tolist(), b.flatten().tolist()) if p[0] != p[1]}  # noqa: B905
    group, total = list(range(count)), 0.0  # Kruskal's algorithm
    for a, b in sorted(beside, key=lambda p: float((mean[p[0]] - mean[p[1]]).abs())):
        if group[a] != group[b]:
            total += float((mean[a] - mean[b]).abs())
            group = [group[b] if g == group[a] else g for g in group]
    found = sum(float((mean[n] - mean[p]).abs()) for n, p in enumerate(parents[0].tolist()) if p >= 0)
    assert found == pytest.approx(total)


def test_superpixels_do_not_see_the_colours():
    rgb = blocks(pictures(1, 3, 4), 8)
    x, _, _, y = superpixels(rgb)
    other = from_ycocg(x, y // 2)
    assert int(other.min()) >= 0 and int(other.max()) <= 255 and not torch.equal(other, rgb)
    for a, b in zip(superpixels(rgb)[:3], superpixels(other)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: superpixels(pictures()[0]), r"rgb: expected pictures \[B, H, W, 3\], got shape"),
        (lambda: superpixels(pictures() / 255), "rgb: expected integers"),
        (lambda: superpixels(pictures(), 0), "count: expected a positive number of superpixels, got 0"),
        (lambda: superpixels(pictures(), compactness=0), "compactness: expected a positive number, got 0"),
    ],
)
def test_bad_superpixels_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pictures_of_one_colour_are_one_superpixel_or_more():
    x, labels, parents, _ = superpixels(torch.full((1, 4, 4, 3), 7))
    assert int(labels.max()) + 1 == parents.shape[1] and bool((x == 7).all())


def save(rgb, path, mode="RGB"):
    Image.fromarray(rgb.numpy(), "RGB").convert(mode).save(path)


def test_a_folder_of_pictures_is_cut_to_the_middle_that_all_have(tmp_path):
    wide, high = pictures(1, 4, 8)[0], pictures(1, 6, 5, 1)[0]
    save(wide, tmp_path / "b.png")
    save(high, tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    found = data.load(tmp_path)
    assert (found.kind, found.shape, set(found.splits)) == ("colour", (4, 5, 3), {"train"})
    assert torch.equal(found["train"], torch.stack([high[1:5], wide[:, 1:6]]).flatten(1))
    assert data.load(tmp_path, "superpixels")["train"][0].shape == (2, 4, 5)


def write(name, content):
    def make(folder):
        (folder / name).write_bytes(content)

    return make


GREY = np.repeat(np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8), 3, axis=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"expected pictures named \*.png, .*, got none"),
        (write("a.png", b"no picture"), "a.png is damaged"),
        (
            lambda folder: save(pictures()[0], folder / "a.png", "L"),
            r"a.png: expected a colour picture, got a grey one \(mode L\)",
        ),
        (
            lambda folder: save(torch.from_numpy(GREY[0]), folder / "a.png"),
            "expected colours, got grey pictures: red, green and blue agree everywhere",
        ),
    ],
)
def test_bad_folders_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": GREY}, "expected colours, got grey pictures"),
        ({"train": GREY / 255}, "train: expected pictures of uint8, 0 … 255, got float64"),
        (
            {"train": GREY[..., :2]},
            r"train: expected pictures \[N, H, W, 3\], all of one size, got \(3, 4, 4, 2",
        ),
        ({"train": GREY, "test": GREY[:, 1:]}, r"test: expected pictures .* one size, got \(3, 3, 4, 3\)"),
        ({"train": GREY, "labels": np.arange(3)}, r"train_labels: expected pictures \[N, H, W, 3\]"),
    ],
)
def test_bad_arrays_of_pictures_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "mine.npz")


def test_grey_and_colour_are_not_taken_for_one_another(tmp_path):
    np.save(tmp_path / "grey.npy", GREY[..., 0])
    with pytest.raises(ValueError, match="data: expected superpixels, got grey.npy, counts"):
        data.load(tmp_path / "grey.npy", "superpixels")
    np.save(tmp_path / "colour.npy", pictures().numpy())
    with pytest.raises(ValueError, match="data: expected grey or bytes, got colour.npy, colour"):
        data.view(data.load(tmp_path / "colour.npy"), ("grey", "bytes"))
