"""Losses against cross-entropies and their slopes, penalties against linear discriminators, the divergence against sums by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from dlatlas.gans.many_paths import d_loss, g_loss, gradient_penalty, js_divergence_points


def test_the_discriminators_loss_is_a_cross_entropy():
    r, f = torch.randn(5, 1), torch.randn(9, 1)
    torch.testing.assert_close(d_loss(r, f), bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)))


@pytest.mark.parametrize(("kind", "slope"), [("minimax", lambda f: -f.sigmoid()), ("nonsaturating", lambda f: f.sigmoid() - 1)])
def test_slopes_of_the_generators_losses(kind, slope):
    f = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(g_loss(f, kind) * len(f), f)
    torch.testing.assert_close(g, slope(f.detach()))


def test_the_two_losses_agree_in_slope_on_the_border_only():
    f = torch.zeros(1, requires_grad=True)
    slopes = [torch.autograd.grad(g_loss(f, kind), f)[0].item() for kind in ("minimax", "nonsaturating")]
    assert slopes == [-0.5, -0.5]
    torch.testing.assert_close(g_loss(f.detach() + 1, "minimax"), torch.log(1 - torch.sigmoid(torch.tensor(1.0))))


def test_extreme_logits_stay_finite():
    for f in (torch.tensor([1000.0]), torch.tensor([-1000.0])):
        assert all(torch.isfinite(v) for v in (d_loss(f, -f), d_loss(-f, f), g_loss(f, "minimax"), g_loss(f)))
    assert g_loss(torch.tensor([-1000.0])) == 1000


@pytest.mark.parametrize("kind", ["gp", "dragan"])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 4.0])
def test_penalty_of_a_linear_discriminator(kind, slope):
    w = torch.ones(12, dtype=torch.float64) * slope / 12**0.5
    real, fake = torch.randn(2, 8, 3, 2, 2, dtype=torch.float64)
    assert gradient_penalty(lambda x: x.flatten(1) @ w, real, fake, kind).item() == pytest.approx((slope - 1) ** 2, abs=1e-5)


def test_where_the_penalties_look():
    seen = []

    def D(x):
        seen.append(x.detach())
        return x.sum(1)

    real, fake = torch.randn(400, 2), 50 + torch.randn(400, 2)
    gradient_penalty(D, real, fake, "gp")
    gradient_penalty(D, real, None, "dragan")
    t = (seen[0] - real) / (fake - real)
    assert t.min() >= 0 and t.max() <= 1 and t.mean() == pytest.approx(0.5, abs=0.1)
    away = (seen[1] - real) / (0.5 * real.std())
    # The product of two independent uniform numbers, one of them common to the features of an example.
    assert away.min() >= 0 and away.max() <= 1 and away.mean() == pytest.approx(0.25, abs=0.03)
    assert torch.corrcoef(away.T)[0, 1] == pytest.approx((1 / 12 * 1 / 4) / (1 / 9 - 1 / 16), abs=0.12)


def test_dragan_has_one_scale_for_all_features():
    seen, real = [], torch.tensor([[0.0, 0.0], [1.0, 100.0], [2.0, -100.0]])

    def D(x):
        seen.append(x.detach())
        return x.sum(1)

    gradient_penalty(D, real, None, "dragan", torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    t, u = torch.rand(3, generator=g), torch.rand(3, 2, generator=g)
    mean = sum(real.flatten().tolist()) / 6
    std = math.sqrt(sum((v - mean) ** 2 for v in real.flatten().tolist()) / 5)
    torch.testing.assert_close(seen[0], real + 0.5 * std * t[:, None] * u)


def test_the_penalty_is_trainable_and_follows_its_generator():
    D = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    real, fake = torch.randn(2, 8, 2)
    values = [gradient_penalty(D, real, fake, k, torch.Generator().manual_seed(1)) for k in ("gp", "gp", "dragan", "dragan")]
    assert values[0] == values[1] and values[2] == values[3]
    values[0].backward()
    assert D[0].weight.grad.abs().sum() > 0


def test_divergence_by_hand():
    a = torch.tensor([[0.0], [1], [2], [3]])
    assert js_divergence_points(a, a) == 0
    assert js_divergence_points(a, a + 0.5) == math.log(2)
    # p = (1/2, 1/2, 0), q = (0, 1/2, 1/2): three quarters of the mass of m on its own.
    assert js_divergence_points(a[:2], a[1:3]) == pytest.approx(0.5 * math.log(2))
    repeated = torch.tensor([[0.0], [0], [0], [1]])  # p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8)
    expected = 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3))
    assert js_divergence_points(repeated, a[:2]) == pytest.approx(expected)


def test_bad_input():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="'minimax' or 'nonsaturating'"):
        g_loss(x, "other")
    with pytest.raises(ValueError, match="'gp' or 'dragan'"):
        gradient_penalty(nn.Linear(2, 1), x, x, "r1")
    with pytest.raises(ValueError, match="fake is missing"):
        gradient_penalty(nn.Linear(2, 1), x)
    with pytest.raises(ValueError, match="equal shapes"):
        gradient_penalty(nn.Linear(2, 1), x, x[:2])
    with pytest.raises(ValueError, match="expected points"):
        js_divergence_points(x, x[:, :1])
