"""Shared data: margins, label noise and the balanced rule are what they say."""

import math

import pytest
import torch

from dlatlas import data
from dlatlas.theory.kit.tasks import corrupt_labels, digits_binary, fmnist_subset, separable_blobs, tishby_task
from dlatlas.theory.max_margin_bias import hard_margin_svm


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "d", "margin"), [(40, 2, 0.3), (31, 10, 1.0), (20, 1, 0.1)])
def test_separable_blobs_have_the_margin(n, d, margin):
    X, y = separable_blobs(n, d, margin, gen(n))
    assert X.shape == (n, d)
    assert X.dtype == y.dtype == torch.float64
    assert int((y == -1).sum()) == n // 2
    assert set(y.tolist()) == {-1.0, 1.0}
    assert 1 / float(hard_margin_svm(X, y).norm()) >= margin - 1e-9
    again, _ = separable_blobs(n, d, margin, gen(n))
    assert torch.equal(X, again)


def test_separable_blobs_are_standard_normal_across():
    X, _ = separable_blobs(20_000, 3, 0.5, gen(1))
    values = torch.linalg.eigvalsh(X.T @ X / len(X))
    torch.testing.assert_close(values[:2], torch.ones(2).double(), rtol=0.05, atol=0)
    # Along u: E (m + |z|)^2 = m^2 + 2 m sqrt(2/pi) + 1.
    assert float(values[2]) == pytest.approx(0.25 + math.sqrt(2 / math.pi) + 1, rel=0.03)


def test_digits_binary():
    raw = data.images("digits", flat=True)
    split = digits_binary()
    assert split.x.shape == raw.x.shape
    assert torch.equal(split.y, torch.where(raw.y < 2, 1.0, -1.0).double())
    assert split.x.dtype == torch.float64
    pair = digits_binary((3,), (8,))
    assert len(pair.y) == int(((raw.y == 3) | (raw.y == 8)).sum())
    assert int((pair.y_test == 1).sum()) == int((raw.y_test == 3).sum())
    for bad in (((), None), ((1,), (1, 2)), (range(10), None)):
        with pytest.raises(ValueError, match="different"):
            digits_binary(*bad)


def test_fmnist_subset():
    x, y = fmnist_subset(300, (9, 1), gen(2))
    assert x.shape == (300, 784)
    assert set(y.tolist()) == {0, 1}
    assert fmnist_subset(10, (0, 1), gen(3), flat=False)[0].shape == (10, 1, 28, 28)
    # Label 1 is the second of `classes`: trousers are tall, so the middle rows of their corners are dark.
    whole = data.images("fashion-mnist", flat=True, classes=(1,))
    trousers = {tuple(row[:400].tolist()) for row in whole.x[:6000]}
    for image, label in zip(x[:20], y[:20]):
        assert (tuple(image[:400].tolist()) in trousers) == (label == 1)
    assert len({tuple(row.tolist()) for row in x}) > 290  # without replacement
    with pytest.raises(ValueError, match="asked for"):
        fmnist_subset(12_001, (0, 1))


def test_corrupt_labels():
    y = torch.arange(10_000) % 10
    kept = y.clone()
    noisy = corrupt_labels(y, 0.5, 10, gen(4))
    assert torch.equal(y, kept)
    assert noisy.dtype == y.dtype
    # Half are redrawn, a tenth of those keep their label.
    assert float((noisy != y).float().mean()) == pytest.approx(0.45, abs=0.015)
    random = corrupt_labels(y, 1.0, 10, gen(5))
    counts = torch.bincount(10 * y + random, minlength=100).float()
    assert float(((counts - 100) ** 2 / 100).sum()) < 150  # chi squared with 99 degrees of freedom: no trace of y
    assert torch.equal(corrupt_labels(y, 0.0, 10), y)
    assert len(corrupt_labels(y[:0], 0.5, 10)) == 0
    for bad in ((y, 1.5, 10), (y, -0.1, 10), (y, 0.5, 9), (y.float(), 0.5, 10), (y, 0.5, 1)):
        with pytest.raises(ValueError, match="expected"):
            corrupt_labels(*bad)


def test_tishby_task_is_a_balanced_quadratic_rule_on_all_patterns():
    x, y = tishby_task(gen(6))
    assert x.shape == (4096, 12)
    assert len({tuple(row.tolist()) for row in x}) == 4096
    assert int(y.sum()) == 2048
    again = tishby_task(gen(6))
    assert torch.equal(y, again[1])
    assert not torch.equal(y, tishby_task(gen(7))[1])
    # A threshold on a quadratic form of the bits: separable in the 78 products x_i x_j, which a random labelling is not.
    i, j = torch.triu_indices(12, 12)
    features = torch.cat([x[:, i] * x[:, j], torch.ones(4096, 1)], 1).double()
    for labels, low, high in ((y, 0.9, 1.0), (y[torch.randperm(4096, generator=gen(8))], 0.4, 0.7)):
        fitted = features @ torch.linalg.lstsq(features, 2.0 * labels.double()[:, None] - 1, driver="gelsd").solution
        assert low <= float(((fitted[:, 0] > 0) == (labels == 1)).double().mean()) <= high
