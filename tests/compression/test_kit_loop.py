"""Batches and epochs: what is seen, how often and in which order."""

import pytest
import torch
from torch import nn

from dlatlas.compression.kit.loop import Batches, fit_classifier, fit_epochs


def test_an_epoch_shows_each_example_at_most_once_and_the_next_one_in_another_order():
    batches = Batches(torch.arange(10), 10 * torch.arange(10), size=3, seed=1)
    first, second = [torch.cat([x for x, _ in batches]).tolist() for _ in range(2)]
    assert len(batches) == 3 and len(set(first)) == 9 and len(set(second)) == 9 and first != second
    assert all(torch.equal(y, 10 * x) for x, y in batches)


def test_the_seed_fixes_the_order_whatever_travels_along():
    x = torch.arange(8)
    a, b = Batches(x, size=4, seed=3), Batches(x, -x, size=4, seed=3)
    assert [p[0].tolist() for p in a] == [p[0].tolist() for p in b]
    assert [p[0].tolist() for p in Batches(x, size=4, seed=4)] != [p[0].tolist() for p in Batches(x, size=4, seed=3)]


@pytest.mark.parametrize("make", [list, iter], ids=["list", "iterator"])
def test_epochs_count_batches(make):
    seen = []

    def step(x, y):
        seen.append((x, y))
        return torch.tensor(float(x))

    history = fit_epochs(step, make([(1, 2), (3, 4)]), epochs=3)
    assert seen == [(1, 2), (3, 4)] * 3
    assert history["loss"].tolist() == [1, 3] * 3


def test_a_classifier_learns_a_separable_task():
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    y = (x[:, 0] + x[:, 1] > 0).long()
    net = nn.Linear(5, 2)
    history = fit_classifier(net, Batches(x, y, size=32), epochs=20, lr=0.1)
    assert history["loss"][0] > 0.5 and history["loss"][-1] < 0.25
    assert (net(x).argmax(1) == y).float().mean() > 0.97


@pytest.mark.parametrize("bad", [dict(size=0), dict(size=5)])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="size"):
        Batches(torch.zeros(4), **bad)
    with pytest.raises(ValueError, match="length"):
        Batches(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        fit_epochs(lambda x: x, [], 1)
