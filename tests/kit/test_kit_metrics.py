"""Scores by counting."""

import pytest
import torch
from torch import nn

from dlatlas.kit.metrics import accuracy, auroc, error_rate


def test_accuracy_counts_and_restores_the_mode():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.99))
    model.train()
    x = torch.eye(3).repeat(5, 1)
    y = torch.tensor([0, 1, 2] * 4 + [1, 1, 1])
    assert accuracy(model, x, y, batch=4) == pytest.approx(13 / 15)
    assert error_rate(model, x, y) == pytest.approx(2 / 15)
    assert model.training


def test_auroc_is_the_chance_of_the_right_order():
    negative, positive = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert auroc(negative, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positive, positive) == pytest.approx(0.5)


def test_bad_input():
    with pytest.raises(ValueError, match="got 2 inputs and 1 labels"):
        accuracy(nn.Identity(), torch.zeros(2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="at least one"):
        auroc(torch.tensor([]), torch.ones(1))
