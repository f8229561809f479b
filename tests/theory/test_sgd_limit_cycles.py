"""The stationary cloud of SGD against SciPy, integrals of the matrix exponential, and simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm

from dlatlas.theory.sgd_limit_cycles import effective_rank, gradient_covariance, ou_potential, ou_stationary, probability_current


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def system(p=4, seed=0, symmetric=True):
    """A stable drift and a positive definite noise that do not commute."""
    M = torch.randn(p, p, dtype=torch.float64, generator=gen(seed))
    A = M @ M.T / p + 0.3 * torch.eye(p)
    if not symmetric:
        A = A + (M - M.T)
    N = torch.randn(p, p, dtype=torch.float64, generator=gen(seed + 1))
    return A, N @ N.T / p + 0.1 * torch.eye(p)


def test_covariance_is_the_textbook_one():
    g = torch.randn(30, 5, dtype=torch.float64, generator=gen(1)) + 3
    rows, mean = g.numpy(), g.numpy().mean(0)
    want = sum(np.outer(r, r) for r in rows) / 30 - np.outer(mean, mean)
    np.testing.assert_allclose(gradient_covariance(g), want, rtol=1e-10)
    np.testing.assert_allclose(gradient_covariance(g), np.cov(rows.T, bias=True), rtol=1e-10)
    assert float(gradient_covariance(g[:1]).abs().max()) == 0
    assert torch.linalg.matrix_rank(gradient_covariance(g[:4])) == 3  # N - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_stationary_covariance_is_the_integral_of_the_response(symmetric):
    # Sigma = int_0^inf e^{-As} 2 T D e^{-A^T s} ds, another route than the Lyapunov equation.
    A, D = system(3, 2, symmetric)
    want, _ = quad_vec(lambda s: expm(-A.numpy() * s) @ (0.6 * D.numpy()) @ expm(-A.numpy().T * s), 0, 120, epsrel=1e-9, limit=500)
    np.testing.assert_allclose(ou_stationary(A, D, 0.3), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_potential_splits_the_drift(symmetric):
    A, D = system(5, 3, symmetric)
    U, Q = ou_potential(A, D)
    torch.testing.assert_close((D + Q) @ U, A)
    torch.testing.assert_close(Q, -Q.T)
    torch.testing.assert_close(U, U.T)
    assert float(torch.linalg.eigvalsh(U)[0]) > 0
    for temp in (0.01, 4.0):  # independent of the temperature
        torch.testing.assert_close(temp * torch.linalg.inv(ou_stationary(A, D, temp)), U)
    assert float(Q.abs().max()) > 1e-2


def test_equilibrium_cases():
    A, _ = system(4, 4)
    eye = torch.eye(4, dtype=torch.float64)
    U, Q = ou_potential(A, eye)
    torch.testing.assert_close(U, A)
    torch.testing.assert_close(Q, 0 * Q)
    torch.testing.assert_close(ou_stationary(A, 2 * eye, 0.3), 0.6 * torch.linalg.inv(A))
    # Noise proportional to the curvature: no current, but a round cloud, so the potential is not the loss.
    U, Q = ou_potential(A, 3 * A)
    torch.testing.assert_close(U, eye / 3)
    torch.testing.assert_close(Q, 0 * Q)
    x = torch.randn(7, 4, dtype=torch.float64, generator=gen(5))
    assert float(probability_current(A, A, 0.2, x).abs().max()) < 1e-12


def test_rotation_in_closed_form():
    # A = diag(a, b): Sigma_12 = 2 T D_12 / (a + b), so Q_12 = D_12 (a - b) / (a + b).
    a, b, d = 2.0, 0.5, 0.8
    A, D = torch.diag(torch.tensor([a, b])).double(), torch.tensor([[1.0, d], [d, 1.0]]).double()
    _, Q = ou_potential(A, D)
    assert float(Q[0, 1]) == pytest.approx(d * (a - b) / (a + b))


def test_current_is_its_formula_and_divergence_free():
    A, D = system(3, 6, False)
    temp, x = 0.4, torch.randn(6, 3, dtype=torch.float64, generator=gen(7))
    S = ou_stationary(A, D, temp)
    velocity = probability_current(A, D, temp, x)
    for row, v in zip(x, velocity):
        torch.testing.assert_close(v, -A @ row + temp * D @ torch.linalg.solve(S, row))
        torch.testing.assert_close(probability_current(A, D, temp, row), v)

    def flux(p):  # j = rho v
        return torch.exp(-0.5 * p @ torch.linalg.solve(S, p)) * probability_current(A, D, temp, p)

    for row in 0.3 * x:
        jacobian = torch.autograd.functional.jacobian(flux, row)
        assert abs(float(jacobian.trace())) < 1e-9 * float(jacobian.abs().max())
        assert float(row @ torch.linalg.solve(S, probability_current(A, D, temp, row))) == pytest.approx(0, abs=1e-10)  # along level lines


def test_simulation_finds_the_cloud_and_its_angular_momentum():
    A = torch.diag(torch.tensor([2.0, 0.5])).double()
    D, temp, dt, g = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double(), 0.2, 0.01, gen(8)
    root, x, cloud, turn = torch.linalg.cholesky(D), torch.zeros(4000, 2).double(), torch.zeros(2, 2).double(), 0.0
    for t in range(2000):
        move = -dt * x @ A + math.sqrt(2 * temp * dt) * torch.randn(x.shape, generator=g, dtype=torch.float64) @ root.T
        if t >= 1000:
            cloud += x.T @ x / (4000 * 1000)
            turn += float((x[:, 0] * move[:, 1] - x[:, 1] * move[:, 0]).mean()) / (dt * 1000)
        x = x + move
    torch.testing.assert_close(cloud, ou_stationary(A, D, temp), rtol=0.05, atol=0)
    _, Q = ou_potential(A, D)
    assert turn == pytest.approx(2 * temp * float(Q[0, 1]), rel=0.05)


def test_effective_rank():
    D = torch.diag(torch.tensor([90.0, 9.0, 0.9, 0.1, 0.0], dtype=torch.float64))
    assert [effective_rank(D, s) for s in (0.5, 0.9, 0.91, 0.99, 0.999, 1.0)] == [1, 1, 2, 2, 3, 4]
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=gen(9)))
    assert effective_rank(q @ D @ q.T, 0.99) == 2
    assert effective_rank(torch.eye(10), 0.99) == 10
    assert effective_rank(torch.eye(200, dtype=torch.float64)) == 198
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_assumptions_are_checked():
    A, D = system()
    for bad in (-A, A - 10 * torch.eye(4), torch.zeros(4, 4).double()):
        with pytest.raises(ValueError, match="not stable"):
            ou_stationary(bad, D, 1.0)
        with pytest.raises(ValueError, match="not stable"):
            ou_potential(bad, D)
    for temp in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temp"):
            ou_stationary(A, D, temp)
        with pytest.raises(ValueError, match="temp"):
            probability_current(A, D, temp, torch.ones(4).double())
    with pytest.raises(ValueError, match="semi-definite"):
        ou_stationary(A, D - 5 * torch.eye(4), 1.0)
    with pytest.raises(ValueError, match="not symmetric"):
        ou_stationary(A, D + torch.triu(torch.ones(4, 4), 1), 1.0)
    with pytest.raises(ValueError, match="one size"):
        ou_stationary(A, D[:3, :3], 1.0)
    with pytest.raises(ValueError, match="expected x"):
        probability_current(A, D, 1.0, torch.ones(3).double())
    with pytest.raises(ValueError, match="not finite"):
        ou_stationary(A * math.nan, D, 1.0)
    with pytest.raises(ValueError, match="does not reach"):
        ou_potential(torch.eye(3).double(), torch.diag(torch.tensor([1.0, 1.0, 0.0])).double())
    # A singular D is fine where the drift mixes the directions.
    ou_potential(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double(), torch.diag(torch.tensor([1.0, 0.0])).double())
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share"):
            effective_rank(D, share)
    with pytest.raises(ValueError, match="expected finite gradients"):
        gradient_covariance(torch.ones(3))
