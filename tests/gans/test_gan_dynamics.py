"""Payoff and best discriminator against numerical integration, dynamics against autograd."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from dlatlas.gans.gan_dynamics import optimal_intervals, payoff, simulate

MU, STAR = torch.tensor([-0.3, 1.7], dtype=torch.float64), torch.tensor([-2.0, 2.0], dtype=torch.float64)


def density(x, mu):
    return sum(norm.pdf(x, float(m)) for m in mu) / 2


def test_payoff_is_the_two_expectations():
    left, right = torch.tensor([-3.0, 0.5]).double(), torch.tensor([-1.0, 2.5]).double()
    inside = [
        quad(density, float(a), float(b), args=(STAR,))[0] - quad(density, float(a), float(b), args=(MU,))[0] for a, b in zip(left, right)
    ]
    assert payoff(MU, STAR, left, right).item() == pytest.approx(1 + sum(inside))
    assert payoff(STAR, STAR, left, right).item() == 1
    batch = payoff(MU.expand(3, 4, 2), STAR, left, right)
    assert batch.shape == (3, 4) and torch.allclose(batch, payoff(MU, STAR, left, right))


def test_slopes_of_the_payoff_are_densities():
    left, right = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([-3.0, 0.5], [-1.0, 2.5]))
    dl, dr = torch.autograd.grad(payoff(MU, STAR, left, right), (left, right))
    for end, slope, sign in ((left, dl, -1), (right, dr, 1)):
        for x, s in zip(end.tolist(), slope.tolist()):
            assert s == pytest.approx(sign * (density(x, STAR) - density(x, MU)))


STARTS = [[-0.3, 1.7], [3.0, 3.5], [0.0, 0.1], [-2.0, 2.2], [-3.0, 3.0], [-2.5, 0.0], [1.9, -2.1]]


@pytest.mark.parametrize("mu", STARTS)
def test_the_best_discriminator_reaches_the_total_variation(mu):
    mu = torch.tensor(mu, dtype=torch.float64)
    left, right = optimal_intervals(mu, STAR)
    x = np.linspace(-10, 10, 200_001)
    excess = density(x, STAR) - density(x, mu)
    assert payoff(mu, STAR, left, right).item() == pytest.approx(1 + np.trapezoid(np.maximum(excess, 0), x), abs=1e-7)
    inside = ((x[:, None] >= left.numpy()) & (x[:, None] <= right.numpy())).any(1)
    clear = np.abs(excess) > 1e-9
    assert (inside == (excess > 0))[clear].all()
    assert (left <= right).all() and right[0] <= left[1]
    for end in (*left, *right):
        root = density(float(end), STAR) - density(float(end), mu)
        assert abs(float(end)) == 10 or abs(root) < 1e-9


def test_many_generators_at_once_and_in_either_order():
    mu = torch.tensor(STARTS, dtype=torch.float64)
    left, right = optimal_intervals(mu.view(7, 1, 2), STAR)
    for k in range(7):
        one_left, one_right = optimal_intervals(mu[k], STAR)
        assert torch.equal(left[k, 0], one_left) and torch.equal(right[k, 0], one_right)
        # Far out, where all densities vanish, the order of the sum decides; the payoff does not depend on it.
        flipped = optimal_intervals(mu[k].flip(0), STAR)
        torch.testing.assert_close(payoff(mu[k], STAR, *flipped), payoff(mu[k], STAR, one_left, one_right))
    nothing_left, nothing_right = optimal_intervals(STAR, STAR)
    assert payoff(STAR, STAR, nothing_left, nothing_right).item() == 1


@pytest.mark.parametrize("dynamics", ["optimal", "first_order"])
@pytest.mark.parametrize("d_steps", [1, 3])
def test_steps_are_those_of_autograd(dynamics, d_steps):
    d0 = torch.tensor([-3.0, 0.5]).double(), torch.tensor([-1.0, 2.5]).double()
    path = simulate(MU, STAR, steps=4, lr=0.3, dynamics=dynamics, d_steps=d_steps, d0=d0)
    mu, (left, right) = MU.clone(), d0
    for t in range(4):
        torch.testing.assert_close(path[t], mu)
        if dynamics == "optimal":
            left, right = optimal_intervals(mu, STAR)
        else:
            for _ in range(d_steps):
                a, b = left.clone().requires_grad_(), right.clone().requires_grad_()
                ga, gb = torch.autograd.grad(payoff(mu, STAR, a, b), (a, b))
                left, right = left + 0.3 * ga, right + 0.3 * gb
        m = mu.clone().requires_grad_()
        mu = mu - 0.3 * torch.autograd.grad(payoff(m, STAR, left, right), m)[0]
    torch.testing.assert_close(path[4], mu)


def test_the_best_discriminator_leads_to_the_data_where_a_slow_one_may_not():
    starts = 8 * torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).double() - 4
    end = simulate(starts, STAR, steps=1500)[-1]
    assert ((end.sort(-1).values - STAR).abs().amax(-1) < 0.1).double().mean() >= 0.95
    slow = simulate(starts, STAR, steps=1500, dynamics="first_order", generator=torch.Generator().manual_seed(1))
    assert ((slow[-1].sort(-1).values - STAR).abs().amax(-1) < 0.1).double().mean() <= 0.7
    assert torch.equal(slow, simulate(starts, STAR, steps=1500, dynamics="first_order", generator=torch.Generator().manual_seed(1)))


def test_intervals_that_are_drawn_are_two_apart_within_four_and_paths_are_double():
    far = torch.tensor([200.0, 300.0])  # no density of the model anywhere near
    drawn = 8 * torch.rand(1000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 4
    a, b, c, d = drawn.sort(-1).values.T
    starts = torch.tensor([-2.5, 2.2]).expand(1000, 2)
    path = simulate(starts, STAR, steps=1, dynamics="first_order", generator=torch.Generator().manual_seed(3))
    again = simulate(starts, STAR, steps=1, dynamics="first_order", d0=(torch.stack([a, c], 1), torch.stack([b, d], 1)))
    assert path.dtype == torch.float64 and torch.equal(path, again) and torch.isfinite(path).all()
    assert torch.equal(path[0], starts.double())
    assert simulate(far.float(), STAR, steps=1).dtype == torch.float64
    assert torch.equal(simulate(starts[0].float(), STAR.float(), steps=20), simulate(starts[0].double(), STAR, steps=20))


@pytest.mark.parametrize("mu", [[2.829, 0.441], [2.362, -0.234], [3.352, 0.989], [-3.089, -0.730], [-0.517, 2.226]])
def test_an_interval_of_a_tenth_is_found(mu):
    mu = torch.tensor(mu, dtype=torch.float64)
    left, right = optimal_intervals(mu, STAR)
    narrow = int((right - left).argmin())
    a, b = float(left[narrow]), float(right[narrow])
    assert 0.05 < b - a < 0.12 and density((a + b) / 2, STAR) > density((a + b) / 2, mu)
    assert all(density(x, STAR) < density(x, mu) for x in (a - 0.02, b + 0.02))


def test_equal_means_stay_equal():
    path = simulate(torch.tensor([0.7, 0.7]), STAR, steps=50)
    assert path.shape == (51, 2) and torch.equal(path[:, 0], path[:, 1])


def test_bad_input():
    with pytest.raises(ValueError, match="'optimal' or 'first_order'"):
        simulate(MU, STAR, dynamics="best")
    for kwargs in ({"lr": 0}, {"steps": 0}, {"d_steps": 0}):
        with pytest.raises(ValueError, match="expected lr > 0"):
            simulate(MU, STAR, **kwargs)
    with pytest.raises(ValueError, match=r"mu must be \[..., 2\]"):
        payoff(torch.ones(3), STAR, MU, MU)
    with pytest.raises(ValueError, match="lo < hi"):
        optimal_intervals(MU, STAR, 3.0, -3.0)
