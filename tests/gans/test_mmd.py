"""Kernel statistics against double loops, closed forms and averages over many draws."""

import math

import pytest
import torch
from torch import nn

from dlatlas.gans.mmd import distance_kernel, kid, mmd2, mmd_critic_loss, poly_kernel, rbf_kernel, rq_kernel

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 3, dtype=torch.float64, generator=G), 1 + torch.randn(5, 3, dtype=torch.float64, generator=G)
SCALAR = {
    rq_kernel: lambda a, b: sum((1 + float((a - b).square().sum()) / (2 * s)) ** -s for s in (0.2, 0.5, 1, 2, 5)),
    rbf_kernel: lambda a, b: sum(math.exp(-float((a - b).square().sum()) / (2 * s * s)) for s in (2, 5, 10, 20, 40, 80)),
    poly_kernel: lambda a, b: (float(a @ b) / 3 + 1) ** 3,
    distance_kernel: lambda a, b: float(a.norm() + b.norm() - (a - b).norm()) / 2,
}


@pytest.mark.parametrize("kernel", SCALAR)
def test_double_loops(kernel):
    k = SCALAR[kernel]
    xx = sum(k(X[i], X[j]) for i in range(6) for j in range(6) if i != j) / 30
    yy = sum(k(Y[i], Y[j]) for i in range(5) for j in range(5) if i != j) / 20
    xy = sum(k(a, b) for a in X for b in Y) / 30
    assert mmd2(X, Y, kernel).item() == pytest.approx(xx + yy - 2 * xy, abs=1e-9)
    assert mmd2(X, X.clone(), kernel, unbiased=False).item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: mmd2(x, Y, kernel), X.clone().requires_grad_())


def test_energy_distance_is_twice_the_statistic_of_the_distance_kernel():
    energy = 2 * torch.cdist(X, Y).mean() - torch.pdist(X).mean() - torch.pdist(Y).mean()
    torch.testing.assert_close(2 * mmd2(X, Y, distance_kernel), energy)


def test_mean_over_draws_is_the_closed_form_of_two_gaussians():
    g, s, d, shift = torch.Generator().manual_seed(1), 1.5, 2, 1.0
    values = [
        mmd2(torch.randn(10, d, generator=g), torch.randn(10, d, generator=g) + shift, lambda a, b: rbf_kernel(a, b, (s,)))
        for _ in range(2000)
    ]
    factor = (s * s / (s * s + 2)) ** (d / 2)
    truth = 2 * factor * (1 - math.exp(-d * shift**2 / (2 * (s * s + 2))))
    values = torch.stack(values)
    assert abs(values.mean() - truth) < 4 * values.std() / 2000**0.5


def test_kid_of_everything_is_the_statistic_and_it_is_unbiased():
    _, std = kid(X, Y, n_subsets=3, subset_size=5, generator=torch.Generator().manual_seed(0))
    assert std > 0
    whole = kid(Y, Y + 1, n_subsets=3, subset_size=5)
    assert whole[0] == pytest.approx(mmd2(Y, Y + 1, poly_kernel).item()) and whole[1] == pytest.approx(0, abs=1e-9)
    g = torch.Generator().manual_seed(2)
    same = torch.tensor([kid(torch.randn(12, 3, generator=g), torch.randn(12, 3, generator=g), 1, 12)[0] for _ in range(600)])
    assert abs(same.mean()) < 4 * same.std() / 600**0.5 and (same < 0).any()


def test_critic_loss_penalises_the_witness():
    a = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
    t = X[:5].clone()  # interpolates of equal points are these points
    loss = mmd_critic_loss(lambda x: x @ a, t, t.clone(), gp_weight=3.0)
    plain = mmd_critic_loss(lambda x: x @ a, t, t.clone(), gp_weight=0.0)
    torch.testing.assert_close(plain, -mmd2(t @ a, t @ a, rq_kernel))
    assert (loss - plain).item() == pytest.approx(3, abs=1e-4)  # the witness of two equal sets is flat: (0 - 1)^2
    point, other = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    steep = mmd_critic_loss(lambda x: x, point, other, lambda p, q: 4 * p @ q.T, gp_weight=1.0)
    assert (steep + mmd2(point, other, lambda p, q: 4 * p @ q.T)).item() == pytest.approx(9)  # slope 4


def test_the_penalty_is_at_the_interpolates_and_differentiable():
    real, fake = X[:4], 3 * Y[:4]

    def loss(w, gp_weight=2.0):
        return mmd_critic_loss(lambda x: (x @ w).tanh(), real, fake, gp_weight=gp_weight, generator=torch.Generator().manual_seed(0))

    w = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(loss, w.clone().requires_grad_())
    t = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(4):
        at = (t[i] * real[i] + (1 - t[i]) * fake[i]).requires_grad_()
        f = sum(rq_kernel((at @ w).tanh()[None], (s @ w).tanh()).mean() * sign for s, sign in ((real, 1), (fake, -1)))
        total += float((torch.autograd.grad(f, at)[0].norm() - 1) ** 2) / 4
    assert (loss(w) - loss(w, 0.0)).item() == pytest.approx(2 * total)


def test_distance_kernel_has_finite_derivatives_at_zero():
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(distance_kernel(x, x).sum(), x)
    assert (g == 0).all()


def test_bad_input():
    for bad in (lambda: mmd2(X[:1], Y, rq_kernel), lambda: kid(X, Y), lambda: kid(X, Y, 0, 3), lambda: poly_kernel(X, Y[:, :2]),
                lambda: rq_kernel(X, Y, ()), lambda: rbf_kernel(X, Y, (0,)), lambda: mmd_critic_loss(lambda x: x, X, X, gp_weight=-1)):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            bad()


def test_the_critic_sees_real_and_generated_samples_apart():
    """With batch statistics, features of both together would be others."""
    critic = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double()
    real, fake = torch.randn(20, 3, dtype=torch.float64), 4 + torch.randn(20, 3, dtype=torch.float64)
    loss = mmd_critic_loss(critic, real, fake, gp_weight=0.0)
    torch.testing.assert_close(loss, -mmd2(critic(real), critic(fake), rq_kernel))
