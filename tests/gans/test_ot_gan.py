"""Sinkhorn against linear programming, and the energy distance against its symmetries and its mean."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from dlatlas.gans.ot_gan import cosine_cost, minibatch_energy_distance, sinkhorn


def exact(cost):
    n, m = cost.shape
    rows, cols = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    return linprog(cost.ravel(), A_eq=np.vstack([rows, cols]), b_eq=np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]).fun


def batch(n=8, d=5, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m"), [(6, 6), (8, 5), (20, 20)])
def test_low_temperature_is_linear_programming(n, m):
    cost = 2 * torch.rand(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    value, plan = sinkhorn(cost, reg=1e-3, n_iter=1000)
    assert 0 <= float(value) - exact(cost.numpy()) + 1e-9 < 1e-2
    torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))


def test_plan_has_the_gibbs_form_and_high_temperature_gives_the_mean():
    cost = cosine_cost(batch(6), batch(6, seed=1))
    _, plan = sinkhorn(cost, reg=0.5, n_iter=400)
    z = (plan.log() + cost / 0.5).numpy()
    np.testing.assert_allclose(z - z[:1] - z[:, :1] + z[0, 0], 0, atol=1e-8)
    assert sinkhorn(cost, reg=1e6)[0].item() == pytest.approx(cost.mean().item(), abs=1e-5)


def test_against_pot():
    ot = pytest.importorskip("ot")
    cost = cosine_cost(batch(6), batch(7, seed=1)).numpy()
    theirs = ot.sinkhorn(np.full(6, 1 / 6), np.full(7, 1 / 7), cost, 0.2, method="sinkhorn_log", numItermax=5000)
    np.testing.assert_allclose(sinkhorn(torch.tensor(cost), 0.2, 2000)[1].numpy(), theirs, atol=1e-6)


def test_float32_at_a_low_temperature_stays_finite_and_gradients_are_the_plan():
    cost = (2 * torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    value, plan = sinkhorn(cost, reg=1e-3)
    assert torch.isfinite(plan).all() and not plan.requires_grad
    torch.testing.assert_close(torch.autograd.grad(value.sum(), cost)[0], plan)


def test_cosine_cost():
    a = batch(3)
    torch.testing.assert_close(cosine_cost(a, 7 * a).diagonal(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(cosine_cost(a, -a).diagonal(), torch.full((3,), 2.0, dtype=torch.float64))
    assert cosine_cost(torch.zeros(1, 5, dtype=torch.float64), a).tolist() == [[1.0] * 3]


def test_energy_is_its_six_terms_and_symmetric():
    x, x2, y, y2 = (batch(6, seed=s) for s in range(4))

    def w(a, b):
        return sinkhorn(cosine_cost(a, b))[0]

    energy = minibatch_energy_distance(x, x2, y, y2)
    torch.testing.assert_close(energy, w(x, y) + w(x, y2) + w(x2, y) + w(x2, y2) - 2 * w(x, x2) - 2 * w(y, y2))
    torch.testing.assert_close(energy, minibatch_energy_distance(y, y2, x, x2))
    uneven = minibatch_energy_distance(x, x2, y[:4], y2[:4])
    torch.testing.assert_close(uneven, minibatch_energy_distance(y[:4], y2[:4], x, x2))


def test_the_gradient_of_the_energy_follows_all_plans():
    x, x2, y, y2 = (batch(6, seed=s) for s in range(4))

    def plan(a, b):
        return sinkhorn(cosine_cost(a, b))[1].detach()

    y2.requires_grad_()
    (gradient,) = torch.autograd.grad(minibatch_energy_distance(x, x2, y, y2), y2)
    held = sum((k * plan(a, y2) * cosine_cost(a, y2)).sum() for a, k in ((x, 1), (x2, 1), (y, -2)))
    torch.testing.assert_close(gradient, torch.autograd.grad(held, y2)[0])


def test_energy_has_mean_zero_for_equal_distributions_and_transport_has_not():
    draws = [[batch(8, seed=4 * s + k) for k in range(4)] for s in range(150)]
    energy = torch.stack([minibatch_energy_distance(*d, n_iter=30) for d in draws])
    plain = torch.stack([sinkhorn(cosine_cost(d[0], d[2]), n_iter=30)[0] for d in draws])
    assert abs(energy.mean()) < 3 * energy.std() / 150**0.5
    assert plain.mean() > 10 * plain.std() / 150**0.5


def test_bad_input():
    cost = torch.ones(2, 2)
    for bad in (lambda: sinkhorn(cost, reg=0), lambda: sinkhorn(cost, n_iter=0), lambda: sinkhorn(torch.ones(0, 2)),
                lambda: cosine_cost(torch.ones(2, 3), torch.ones(2, 4)), lambda: cosine_cost(torch.ones(0, 3), torch.ones(2, 3)),
                lambda: minibatch_energy_distance(*[torch.ones(2, 3)] * 4, reg=-1)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()
