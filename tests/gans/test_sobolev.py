"""The Sobolev distance by quadrature and optimisation, the constraint of known critics, and the multiplier's sign."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from dlatlas.gans.sobolev import SobolevLoss, sobolev_constraint, sobolev_ipm_1d

GRID = torch.linspace(-9, 10, 4001, dtype=torch.float64)
DX = float(GRID[1] - GRID[0])
CDF = [torch.special.ndtr(GRID - m) for m in (0.0, 1.0)]
MU = sum(torch.exp(-((GRID - m) ** 2) / 2) for m in (0.0, 1.0)) / (2 * (2 * torch.pi) ** 0.5)


def test_gaussian_shift_by_quadrature():
    expected, _ = quad(lambda x: (norm.cdf(x) - norm.cdf(x - 1)) ** 2 / (0.5 * norm.pdf(x) + 0.5 * norm.pdf(x - 1)), -9, 10, limit=200)
    assert sobolev_ipm_1d(*CDF, MU, DX) == pytest.approx(expected**0.5, rel=1e-5)


def test_uniform_measure_is_the_cramer_von_mises_distance():
    expected, _ = quad(lambda x: (norm.cdf(x) - norm.cdf(x - 1)) ** 2, -9, 10)
    assert sobolev_ipm_1d(*CDF, torch.ones_like(GRID), DX) == pytest.approx(expected**0.5, rel=1e-5)


def test_symmetric_zero_at_home_and_scaling():
    assert sobolev_ipm_1d(*CDF, MU, DX) == sobolev_ipm_1d(*CDF[::-1], MU, DX)
    assert sobolev_ipm_1d(CDF[0], CDF[0], MU, DX) == 0
    assert sobolev_ipm_1d(*CDF, 4 * MU, DX) == pytest.approx(sobolev_ipm_1d(*CDF, MU, DX) / 2)


def test_the_value_is_the_supremum():
    """The maximum over all piecewise linear f of the difference of means at unit mean squared slope, as a quadratic problem."""
    mid = (CDF[1] - CDF[0])[:-1]  # gain of slope s on a cell: s * (F_Q - F_P) * dx
    A, weight = (mid * DX).numpy(), (MU[:-1] * DX).numpy()
    slopes = A / weight
    slopes /= np.sqrt((weight * slopes**2).sum())
    assert sobolev_ipm_1d(*CDF, MU, DX) == pytest.approx((A * slopes).sum(), rel=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = slopes + 0.3 * rng.normal(size=slopes.shape)
        assert (A * other).sum() / np.sqrt((weight * other**2).sum()) < (A * slopes).sum()


def test_no_density_is_needed_where_the_functions_agree_but_elsewhere_it_is():
    p, q = torch.tensor([0.0, 0.5, 1, 1]), torch.tensor([0.0, 0.25, 1, 1])
    mu = torch.tensor([0.0, 0.25, 0, 0])
    assert sobolev_ipm_1d(p, q, mu, 0.5) == pytest.approx((0.25**2 / 0.25 * 0.5) ** 0.5)
    with pytest.raises(ValueError, match="mu must be positive"):
        sobolev_ipm_1d(p, q, torch.zeros(4), 0.5)


def test_constraint_of_known_critics():
    real, fake = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    a = torch.tensor([1.0, -2, 2], dtype=torch.float64)
    assert sobolev_constraint(lambda x: x @ a, real, fake).item() == pytest.approx(9)
    square = sobolev_constraint(lambda x: x.square().sum(1, keepdim=True) / 2, real, fake)  # gradient x
    assert square.item() == pytest.approx((real.square().sum(1).mean() + fake.square().sum(1).mean()).item() / 2)
    assert sobolev_constraint(lambda x: torch.zeros(len(x)), real, fake).item() == 0


def test_constraint_and_loss_are_differentiable():
    real, fake = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def critic(w):
        return lambda x: (x @ w).sin()

    assert torch.autograd.gradcheck(lambda w: sobolev_constraint(critic(w), real, fake), w)
    assert torch.autograd.gradcheck(lambda w: SobolevLoss(0.3, 0.7).critic_loss(critic(w), real, fake)[0], w)


def test_loss_and_multiplier_by_hand():
    real, fake = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)
    method = SobolevLoss(rho=0.5, lam=0.25)
    loss, omega = method.critic_loss(lambda x: 2 * x, real, fake)  # slope 2: omega = 4, gain = 4
    assert omega.item() == 4 and not omega.requires_grad
    assert loss.item() == pytest.approx(-(4 + 0.25 * (1 - 4) - 0.25 * (1 - 4) ** 2))
    assert method.lam == 0.25
    method.update(omega)
    assert method.lam == pytest.approx(0.25 + 0.5 * 3)
    method.update(0.0)
    assert method.lam == pytest.approx(1.25)
    assert SobolevLoss().rho == 1e-4 and SobolevLoss().lam == 0


def test_the_saddle_of_a_linear_critic():
    """f = s x between 0 and d: the constraint s^2 = 1 makes s = 1, and the multiplier that balances it is d / 2."""
    s = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    real, fake = torch.full((1, 1), 3.0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    method, optimizer = SobolevLoss(rho=0.5), torch.optim.SGD([s], 0.02)
    for _ in range(2000):
        loss, omega = method.critic_loss(lambda x: s * x, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update(omega)
    assert s.item() == pytest.approx(1, abs=1e-3) and method.lam == pytest.approx(1.5, abs=1e-2)


def test_bad_input():
    for bad in ((CDF[0], CDF[1][:-1], MU), (CDF[0], CDF[1], MU[:-1]), (CDF[0][None], CDF[1][None], MU[None])):
        with pytest.raises(ValueError, match="three tensors"):
            sobolev_ipm_1d(*bad, DX)
    for bad in (torch.zeros_like(MU), -MU, torch.full_like(MU, torch.nan)):
        with pytest.raises(ValueError, match="mu must be positive"):
            sobolev_ipm_1d(*CDF, bad, DX)
    with pytest.raises(ValueError, match="dx"):
        sobolev_ipm_1d(*CDF, MU, 0.0)
    for rho in (0.0, -1.0):
        with pytest.raises(ValueError, match="rho"):
            SobolevLoss(rho)
