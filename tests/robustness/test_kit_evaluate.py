"""Accuracy under several attacks, on a model that can be worked out by hand."""

import pytest
import torch
from torch import nn

from dlatlas.robustness.kit.evaluate import accuracy, right, robust_accuracy


class Threshold(nn.Module):
    """Class 1 where the only pixel is above a half."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


X = torch.tensor([[0.2], [0.45], [0.55], [0.9]])
Y = torch.tensor([0, 0, 1, 1])


def up(model, x, y, eps):
    return (x + eps).clamp(0, 1)


def down(model, x, y, eps):
    return (x - eps).clamp(0, 1)


def test_worst_is_taken_for_each_sample():
    found = robust_accuracy(Threshold(), X, Y, {"up": up, "down": down}, 0.1)
    assert found == {"up": 0.75, "down": 0.75, "worst": 0.5}
    assert (
        robust_accuracy(Threshold(), X, Y, {"up": up}, 0.0)
        == {"up": 1.0, "worst": 1.0}
        == dict.fromkeys(("up", "worst"), accuracy(Threshold(), X, Y))
    )


def test_random_models_count_by_their_share():
    class Coin(nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 2)

    torch.manual_seed(0)
    x, y = torch.rand(50, 1), torch.zeros(50, dtype=torch.long)
    share = right(Coin(), x, y, draws=200)
    assert share.shape == (50,) and share.min() > 0.3 and share.max() < 0.7
    found = robust_accuracy(Coin(), x, y, {"up": up, "down": down}, 0.1, draws=200)
    assert 0.44 < found["worst"] < min(found["up"], found["down"]) < 0.56
    assert right(Threshold(), X, Y, batch=3).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "attack",
    [lambda m, x, y, eps: x + 0.11, lambda m, x, y, eps: x - 0.25, lambda m, x, y, eps: (x + 0.1).clamp(0, 1) + (x > 0.85) * 0.05],
)
def test_an_attack_that_leaves_the_ball_or_the_box_is_refused(attack):
    with pytest.raises(ValueError, match="left the ball or the box"):
        robust_accuracy(Threshold(), X, Y, {"bad": attack}, 0.1)


@pytest.mark.parametrize("kwargs", [{"attacks": {}}, {"attacks": {"worst": up}}, {"attacks": {"up": up}, "draws": 0}])
def test_bad_input_is_refused(kwargs):
    with pytest.raises(ValueError, match="got"):
        robust_accuracy(Threshold(), X, Y, eps=0.1, **kwargs)
