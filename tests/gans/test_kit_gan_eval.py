"""Scores against closed forms, and a classifier that knows digits."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dlatlas import data
from dlatlas.gans.kit.eval import digit_features, digit_probs, frechet, nn_memorisation, small_digits


def test_frechet_against_scipy():
    x, y = torch.randn(60, 5) @ torch.randn(5, 5), 1 + torch.randn(80, 5)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet(y, x) == pytest.approx(expected, rel=1e-4)


def test_frechet_of_a_shift_and_of_a_scale():
    x = torch.randn(500, 3, dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25)
    assert frechet(x, 2 * x) == pytest.approx(float(x.mean(0).square().sum() + torch.cov(x.T).trace()))
    assert frechet(x, torch.zeros(9, 3)) == pytest.approx(float(x.mean(0).square().sum() + torch.cov(x.T).trace()))  # singular
    assert frechet(x[:, :1], x[:, :1] + 1) == pytest.approx(1)


def test_memorisation():
    train = torch.randn(300, 1, 4, 4)
    assert nn_memorisation(train[:50] + 1e-3, train) == 1
    assert nn_memorisation(torch.randn(50, 1, 4, 4), train) < 0.1
    assert nn_memorisation(torch.cat([train[:1], torch.randn(1, 1, 4, 4) + 9]), train) == 0.5


def test_small_digits_are_means_of_pixels():
    small, whole = small_digits(5, 3), data.images("mnist", 5, 3)
    assert small.x.shape == (5, 1, 8, 8) and torch.equal(small.y_test, whole.y_test)
    assert small.x[2, 0, 4, 3] == pytest.approx(2 * whole.x[2, 0, 14:17, 11:14].mean().item() - 1, abs=1e-6)


def test_the_classifier_knows_digits_and_is_kept():
    split = small_digits(1, 1000)
    probs = digit_probs(split.x_test)
    assert probs.shape == (1000, 10) and torch.allclose(probs.sum(1), torch.ones(1000))
    assert (probs.argmax(1) == split.y_test).double().mean() > 0.9
    features = digit_features(split.x_test)
    assert features.shape == (1000, 64) and not features.requires_grad
    torch.manual_seed(1)
    assert torch.equal(features, digit_features(split.x_test)) and not torch.equal(features, digit_features(split.x_test, seed=1))
    halves = frechet(features[:500], features[500:])
    assert frechet(digit_features(torch.rand(500, 1, 8, 8) * 2 - 1), features) > 10 * halves


def test_training_the_classifier_leaves_the_readers_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    digit_features(torch.zeros(1, 1, 8, 8), seed=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: digit_features(torch.zeros(2, 1, 9, 9)),
        lambda: digit_probs(torch.zeros(2, 64)),
        lambda: frechet(torch.zeros(1, 3), torch.zeros(4, 3)),
        lambda: frechet(torch.zeros(4, 3), torch.zeros(4, 2)),
        lambda: nn_memorisation(torch.zeros(2, 3), torch.zeros(1, 3)),
        lambda: nn_memorisation(torch.zeros(2, 3), torch.zeros(4, 2)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()
