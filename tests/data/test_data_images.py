"""The image sets themselves: they are fetched if they are not in the cache, as on a reader's first run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dlatlas import data
from dlatlas.data.image_sets import _read_idx, _write_idx

SHAPES = {"mnist": (60_000, 10_000, 28), "fashion-mnist": (60_000, 10_000, 28), "usps": (4649, 4649, 16), "digits": (1438, 359, 8)}
HISTOGRAMS = {  # of training and test labels, as the authors publish them
    "mnist": ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    "fashion-mnist": ([6000] * 10, [1000] * 10),
}
FIRST = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3], "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2]}
MOMENTS = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}  # everybody's normalisation constants


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_types_and_range(name):
    train, test, side = SHAPES[name]
    split = data.images(name)
    assert split.x.shape == (train, 1, side, side)
    assert split.x_test.shape == (test, 1, side, side)
    assert split.y.shape == (train,)
    assert split.y_test.shape == (test,)
    for x in (split.x, split.x_test):
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.min() < 1e-6
        assert x.max() <= 1
        assert x.max() > 1 - 1e-6
    for y in (split.y, split.y_test):
        assert y.dtype == torch.int64
        assert y.unique().tolist() == list(range(10))
    assert data.used()[name] == data.describe(name).sha256


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_mnist_and_fashion_mnist_are_the_published_ones(name):
    split = data.images(name)
    assert (split.y.bincount().tolist(), split.y_test.bincount().tolist()) == HISTOGRAMS[name]
    assert split.y[:8].tolist() == FIRST[name]
    mean, deviation = MOMENTS[name]
    assert split.x.mean().item() == pytest.approx(mean, abs=6e-5)
    assert split.x.std().item() == pytest.approx(deviation, abs=6e-5)


def test_digits_are_those_of_scikit_learn():
    split, bunch = data.images("digits"), load_digits()
    np.testing.assert_allclose(torch.cat([split.x, split.x_test]).squeeze(1).numpy() * 16, bunch.images)
    np.testing.assert_array_equal(torch.cat([split.y, split.y_test]).numpy(), bunch.target)


def test_usps_is_learnable_to_what_is_known():
    split = data.images("usps", flat=True)
    accuracy = LogisticRegression(C=0.1, max_iter=500).fit(split.x, split.y).score(split.x_test, split.y_test)
    assert 0.90 < accuracy < 0.99
    assert split.y.bincount().argmax() == 0
    assert len(split.y) + len(split.y_test) == 9298


def test_usps_stands_upright_and_is_white_on_black():
    """Mean images of MNIST recognise it as it is, and hardly in any other orientation."""
    mnist, usps = data.images("mnist"), data.images("usps")
    small = F.adaptive_avg_pool2d(mnist.x_test[..., 2:-2, 2:-2], 16)
    means = torch.stack([small[mnist.y_test == c].mean(0).flatten() for c in range(10)])
    means = F.normalize(means - means.mean(0), dim=1)

    def accuracy(images):
        flat = images.flatten(1)
        return ((F.normalize(flat - flat.mean(0), dim=1) @ means.T).argmax(1) == usps.y_test).float().mean().item()

    x = usps.x_test
    others = [x.mT, x.flip(-1), x.flip(-2), x.flip((-1, -2)), x.rot90(1, (-2, -1)), x.rot90(-1, (-2, -1)), 1 - x]
    assert accuracy(x) > 0.55
    assert max(map(accuracy, others)) < accuracy(x) - 0.1


def test_flat_images_are_the_same_images():
    square, flat = data.images("digits"), data.images("digits", flat=True)
    assert flat.x.shape == (1438, 64)
    assert torch.equal(flat.x, square.x.reshape(1438, 64))
    assert torch.equal(flat.y_test, square.y_test)


def test_a_draw_is_without_replacement_and_the_start_of_a_larger_one():
    small, large = data.images("digits", 100, 40), data.images("digits", 500, 300)
    for a, b in zip(small, large):
        assert torch.equal(a, b[: len(a)])
    everything = data.images("digits", 1438, 359)
    whole = data.images("digits")
    assert not torch.equal(everything.x, whole.x)
    for drawn, published in ((everything.x, whole.x), (everything.x_test, whole.x_test)):
        assert torch.equal(drawn.flatten(1).double().sum(1).sort()[0], published.flatten(1).double().sum(1).sort()[0])
    assert torch.equal(everything.y.bincount(), whole.y.bincount())


def test_the_training_and_the_test_draw_are_independent():
    whole, drawn = data.images("usps", flat=True), data.images("usps", 50, 50, flat=True)
    train, test = (
        torch.cdist(few, everything).argmin(1).tolist() for few, everything in ((drawn.x, whole.x), (drawn.x_test, whole.x_test))
    )
    assert sum(a == b for a, b in zip(train, test)) < 5


def test_images_and_labels_stay_together():
    whole, drawn = data.images("digits"), data.images("digits", 200)
    position = {image.numpy().tobytes(): k for k, image in enumerate(whole.x)}
    assert [whole.y[position[image.numpy().tobytes()]].item() for image in drawn.x] == drawn.y.tolist()


def test_the_seed_chooses_the_draw():
    default, zero, one = data.images("digits", 100, 100), data.images("digits", 100, 100, seed=0), data.images("digits", 100, 100, seed=1)
    assert torch.equal(default.x, zero.x)
    assert not torch.equal(zero.x, one.x)
    assert not torch.equal(zero.x_test, one.x_test)
    assert not torch.equal(zero.y, zero.y_test)
    assert torch.equal(data.images("digits", 100, seed=1).x, one.x), "the training draw depends on the test draw"
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(data.images("digits", 100).x, zero.x), "the draw depends on global seeds"


def test_classes_are_kept_with_their_labels():
    whole, some = data.images("digits"), data.images("digits", classes=[3, 8])
    for y, kept in ((whole.y, some.y), (whole.y_test, some.y_test)):
        assert kept.unique().tolist() == [3, 8]
        assert len(kept) == (y == 3).sum() + (y == 8).sum()
    assert torch.equal(some.x, whole.x[(whole.y == 3) | (whole.y == 8)])
    assert torch.equal(data.images("digits", classes=(8, 3)).x, some.x)
    assert data.images("digits", 50, 20, classes=[3]).y.tolist() == [3] * 50


def test_none_and_numpy_numbers_are_allowed():
    split = data.images("digits", 0, np.int64(5), classes=np.array([1, 2]), seed=np.int64(3))
    assert split.x.shape == (0, 1, 8, 8)
    assert len(split.y_test) == 5


def test_a_loaded_image_may_be_changed_without_harm():
    first = data.images("digits")
    first.x.fill_(7)
    first.y.fill_(7)
    assert data.images("digits").x.max() == 1
    assert data.images("digits").y.max() == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnits"}, "unknown image set 'mnits'; did you mean 'mnist'"),
        ({"name": "photos"}, "unknown image set 'photos'"),
        ({"train": 1439}, "digits has 1438 such training images; asked for 1439"),
        ({"test": 360}, "digits has 359 such test images; asked for 360"),
        ({"train": -1}, "asked for -1"),
        ({"train": 0.5}, "asked for 0.5"),
        ({"train": True}, "asked for True"),
        ({"train": 152, "classes": [0]}, "digits has 143 such training images; asked for 152"),
        ({"classes": []}, "at least one"),
        ({"classes": [10]}, "between 0 and 9"),
        ({"classes": [-1]}, "between 0 and 9"),
        ({"classes": [1, 1]}, "different labels"),
        ({"classes": [1.5]}, "between 0 and 9"),
        ({"seed": -1}, "seed must be a non-negative integer, got -1"),
        ({"seed": None}, "seed must be a non-negative integer, got None"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.images(**({"name": "digits"} | arguments))


@pytest.mark.parametrize(("shape", "kind"), [((2, 3, 4), "u1"), ((5,), "u1"), ((2, 3), "f4")])
def test_idx_files_are_read_and_written(shape, kind):
    array = (np.random.default_rng(0).random(shape) * 256).astype(kind)
    content = _write_idx(array)
    assert content[:4] == bytes([0, 0, 8 if array.dtype == np.uint8 else 13, array.ndim])
    np.testing.assert_array_equal(_read_idx(content), array)
