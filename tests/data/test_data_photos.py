"""The photographs: decoded the right way round, with the right colours, in the size that was asked for."""

import hashlib
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from dlatlas import data

SHAPES = {  # as the documentations of scikit-image and scikit-learn give them
    "astronaut": (512, 512), "brick": (512, 512), "camera": (512, 512), "cell": (660, 550), "chelsea": (300, 451), "china": (427, 640),
    "clock": (300, 400), "coffee": (400, 600), "coins": (303, 384), "flower": (427, 640), "grass": (512, 512), "gravel": (512, 512),
    "horse": (328, 400), "hubble": (872, 1000), "ihc": (512, 512), "microaneurysms": (102, 102), "moon": (512, 512),
    "motorcycle_left": (500, 741), "motorcycle_right": (500, 741), "page": (191, 384), "retina": (1411, 1411), "rocket": (427, 640),
    "text": (172, 448),
}  # fmt: skip
GREY = {"brick", "camera", "cell", "clock", "coins", "grass", "gravel", "horse", "microaneurysms", "moon", "page", "text"}


@pytest.mark.parametrize("name", SHAPES)
def test_every_photograph_has_its_shape_and_range(name):
    photo, gray = data.photo(name), data.photo(name, gray=True)
    assert photo.shape == (3, *SHAPES[name])
    assert gray.shape == (1, *SHAPES[name])
    for x in (photo, gray):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert 0 <= x.min() < x.max() <= 1
        assert torch.equal((x * 255).round() / 255, x)
    assert (name in GREY) == bool((photo[0] == photo[1]).all() and (photo[0] == photo[2]).all())
    luma = (photo * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(0, keepdim=True)
    torch.testing.assert_close(gray, luma, atol=1 / 255 + 1e-6, rtol=0)


def test_the_names_are_complete():
    assert set(data.PHOTOS) == set(SHAPES)
    assert len(data.describe("photos").files) == len(SHAPES)


def pixels(name):
    return (data.photo(name) * 255).round().to(torch.uint8)


def test_known_pixels():
    """PNG is lossless, so these hold with every version of pillow. The first is printed in scikit-image's documentation."""
    assert pixels("astronaut")[:, 0, 0].tolist() == [154, 147, 151]
    digest = hashlib.sha256(pixels("astronaut").numpy().tobytes()).hexdigest()
    assert digest == "9d1263ba0e684c996ad8d59ebeeb479d2608e2d7bb09a217aafcb77f1c5f9533"
    assert pixels("coffee").long().sum() == 71003487
    assert pixels("camera")[0].long().sum() * 3 == 101497485


@pytest.mark.parametrize("name", ["china", "flower"])
def test_photographs_of_scikit_learn_are_as_it_loads_them(name):
    theirs = torch.from_numpy(np.array(load_sample_image(f"{name}.jpg"))).permute(2, 0, 1)
    assert torch.equal(pixels(name), theirs)


def test_dropping_the_transparency_is_laying_the_photograph_on_white():
    rgba = torch.from_numpy(matplotlib.image.imread(data.fetch("photos") / "horse.png")).permute(2, 0, 1)
    colours, alpha = rgba[:3], rgba[3:]
    assert (alpha < 1).any()
    torch.testing.assert_close(data.photo("horse"), colours * alpha + (1 - alpha), atol=1 / 255 + 1e-6, rtol=0)
    assert 0.1 < (data.photo("horse", gray=True) < 0.5).float().mean() < 0.5


@pytest.mark.parametrize("gray", [False, True])
def test_the_own_size_changes_nothing(gray):
    assert torch.equal(data.photo("coffee", gray, (400, 600)), data.photo("coffee", gray))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [(100, (0, 400), (100, 500)), ((100, 150), (0, 400), (0, 600)), ((50, 200), (125, 275), (0, 600))],
)
def test_another_size_is_the_centred_part_resampled(size, rows, columns):
    photo = data.photo("coffee", size=size)
    part = data.photo("coffee")[None, :, slice(*rows), slice(*columns)]
    assert photo.shape == (3, *(size if isinstance(size, tuple) else (size, size)))
    peer = F.interpolate(part, photo.shape[1:], mode="bicubic", antialias=True)[0]  # another smooth filter
    assert (photo - peer).abs().mean() < 0.01
    assert (photo - peer.flip(-1)).abs().mean() > 0.05


def test_sizes_may_be_larger_and_of_numpy():
    assert data.photo("microaneurysms", True, 200).shape == (1, 200, 200)
    assert data.photo("microaneurysms", True, (np.int64(20), np.int64(10))).shape == (1, 20, 10)


def test_photographs_may_be_changed_without_harm():
    data.photo("text").zero_()
    assert data.photo("text").max() > 0


@pytest.mark.parametrize("size", [0, -3, True, 2.5, "ab", (3,), (3, 4, 5), (3, 0), (3, 4.0), (True, 3)])
def test_wrong_sizes_are_explained(size):
    with pytest.raises(ValueError, match=r"size must be a positive integer or \(height, width\), got"):
        data.photo("moon", size=size)


def test_unknown_names_are_explained():
    with pytest.raises(ValueError, match="unknown photograph 'astronuat'; did you mean 'astronaut'"):
        data.photo("astronuat")


def test_without_pillow_the_remedy_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(data.DataError, match="pip install pillow"):
        data.photo("moon")
    assert data.fetch("photos").is_dir()


def test_photographs_are_marked_as_used():
    data.photo("moon")
    assert data.used()["photos"] == data.describe("photos").sha256
