"""Set discriminators: invariances, the losses in NumPy, and gradients that depend on the others."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.gans.distributional import (
    DeepMeanEncoder,
    SampleDiscriminator,
    TwoSampleDiscriminator,
    dan_2s_loss,
    dan_g_loss,
    dan_s_loss,
)
from dlatlas.gans.kit.nets import mlp

SETS = torch.randn(4, 3, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # four times three sets of six


@pytest.fixture
def nets():
    torch.manual_seed(0)
    encoder = DeepMeanEncoder(mlp([2, 8, 5])).double()
    return encoder, SampleDiscriminator(encoder, 5, 7).double(), TwoSampleDiscriminator(encoder, 5, 7).double()


def test_mean_of_features_and_its_invariances(nets):
    eta, x = nets[0], SETS[0]
    by_hand = torch.stack([torch.stack([eta.phi(p[None])[0] for p in s]).mean(0) for s in x])
    torch.testing.assert_close(eta(x), by_hand)
    torch.testing.assert_close(eta(x[1]), by_hand[1])
    torch.testing.assert_close(eta(x.flip(1)), by_hand)
    torch.testing.assert_close(eta(x.repeat(1, 2, 1)), by_hand)
    linear = DeepMeanEncoder(nn.Linear(2, 3).double())
    torch.testing.assert_close(linear(x[0]), linear.phi(x[0].mean(0)))


def test_discriminators(nets):
    eta, one, two = nets
    x, y = SETS[:2]
    assert one(x).shape == two(x, y).shape == (3,) and one(x[0]).shape == two(x[0], y[0]).shape == ()
    torch.testing.assert_close(one(x)[1], one.psi(eta(x[1]))[0])
    torch.testing.assert_close(two(x, y), two.psi((eta(x) - eta(y)).abs())[:, 0])
    torch.testing.assert_close(two(x, y), two(y, x))
    torch.testing.assert_close(two(x, x.flip(1)), two.psi(torch.zeros(3, 5, dtype=torch.float64))[:, 0])


def test_losses_in_numpy(nets):
    _, one, two = nets
    x, x2, y, y2 = SETS

    def p(logits):
        return 1 / (1 + np.exp(-logits.detach().numpy()))

    single = -np.log(p(one(x))) - np.log(1 - p(one(y)))
    assert dan_s_loss(one, x, y).item() == pytest.approx(single.mean())
    same = np.log(p(two(x, x2))) + np.log(p(two(y, y2)))
    different = np.log(1 - p(two(x, y))) + np.log(1 - p(two(x2, y2)))
    assert dan_2s_loss(two, x, x2, y, y2).item() == pytest.approx(-(same + different).mean() / 2)
    assert dan_g_loss(one, y).item() == pytest.approx(-np.log(p(one(y))).mean())
    assert dan_g_loss(two, y, x).item() == pytest.approx(-np.log(p(two(x, y))).mean())


def test_the_gradient_at_a_point_depends_on_the_other_points():
    """Real points at -1 and 1: too many fakes at one of them turn the force around, which no judge of single points can do."""
    disc = TwoSampleDiscriminator(DeepMeanEncoder(nn.Identity()), 1)
    disc.psi = nn.Linear(1, 1)
    nn.init.constant_(disc.psi.weight, -1.0)
    nn.init.zeros_(disc.psi.bias)
    real, forces = torch.tensor([[-1.0], [1.0]]), []
    for others in (-1.0, 1.0):
        fake = torch.tensor([[0.5], [others], [others]], requires_grad=True)
        forces.append(-torch.autograd.grad(dan_g_loss(disc, fake, real), fake)[0][0].item())
    assert forces[0] > 0 > forces[1]


def test_bad_input(nets):
    eta, _, two = nets
    for bad in (lambda: eta(torch.zeros(2)), lambda: eta(torch.zeros(0, 2)), lambda: eta(SETS), lambda: two(SETS[0], SETS[1, 0])):
        with pytest.raises(ValueError, match="expected"):
            bad()
