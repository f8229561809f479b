"""The objective against Hermite tensors written out, quadrature, Monte Carlo and the tensor series of the squared loss."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from dlatlas.theory.kit.gauss import relu_kernel
from dlatlas.theory.kit.students import relu_population_hessian
from dlatlas.theory.landscape_design import (
    check_teacher,
    empirical_G,
    phi_pair,
    phi_single,
    population_G,
    population_squared_loss,
    recovery_error,
    relu_hermite,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


@pytest.mark.parametrize("k", range(9))
def test_hermite_coefficients_against_quadrature(k):
    he = np.polynomial.hermite_e.HermiteE.basis(k)
    value = quad(lambda z: z * he(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0, 40)[0] / math.sqrt(math.factorial(k))
    assert relu_hermite(k) == pytest.approx(value, abs=1e-9)


def test_known_hermite_coefficients():
    assert relu_hermite(0) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert relu_hermite(1) == 0.5
    assert relu_hermite(2) == pytest.approx(1 / (2 * math.sqrt(math.pi)))
    assert relu_hermite(4) == pytest.approx(-1 / math.sqrt(48 * math.pi))
    assert sum(relu_hermite(k) ** 2 for k in range(150)) == pytest.approx(0.5, abs=1e-4)  # E relu^2


def hermite_tensor(x):
    """Fourth Hermite tensor of one sample: x^4 less the six pairings with x^2, plus the three full pairings."""
    eye, xx = np.eye(len(x)), np.outer(x, x)
    T = np.einsum("ij,kl->ijkl", xx, xx)
    for one, two in (("ij", "kl"), ("ik", "jl"), ("il", "jk")):
        T = T - np.einsum(f"{one},{two}->ijkl", eye, xx) - np.einsum(f"{one},{two}->ijkl", xx, eye)
        T = T + np.einsum(f"{one},{two}->ijkl", eye, eye)
    return T


def test_phi_is_a_contraction_of_the_hermite_tensor():
    X, v, w = randn(4, 3), randn(3, seed=1), randn(3, seed=2)
    for i, x in enumerate(X.numpy()):
        T = hermite_tensor(x)
        assert float(phi_pair(v, w, X)[i]) == pytest.approx(np.einsum("ijkl,i,j,k,l", T, v, v, w, w) / 2)
        assert float(phi_single(v, X)[i]) == pytest.approx(np.einsum("ijkl,i,j,k,l", T, v, v, v, v) / 24)
    torch.testing.assert_close(phi_pair(v, v, X), 12 * phi_single(v, X))
    torch.testing.assert_close(phi_pair(v, w, X), phi_pair(w, v, X))


def test_expectations_by_monte_carlo():
    n, d = 2_000_000, 3
    X = randn(n, d, seed=3)
    B_star, a = orthonormal(d, 4), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    v, w = B_star[2] + 0.2 * B_star[0], B_star[2] - 0.3 * B_star[1]
    y = torch.relu(X @ B_star.T) @ a
    along = (B_star @ v) ** 2, (B_star @ w) ** 2
    s4 = relu_hermite(4)
    for phi, expected in (
        (phi_pair(v, w, X), math.sqrt(6) * s4 * (a * along[0] * along[1]).sum()),
        (phi_single(v, X), s4 / math.sqrt(24) * (a * along[0] ** 2).sum()),
    ):
        z = float(((y * phi).mean() - expected) / ((y * phi).std() / math.sqrt(n)))
        assert abs(z) < 5
        assert abs(float(expected)) > 10 * float((y * phi).std()) / math.sqrt(n)  # the test can tell 0 from the formula


def test_population_objective_pair_by_pair():
    B, B_star, a = randn(3, 4), randn(3, 4, seed=1), torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    unit = B_star / B_star.norm(dim=1, keepdim=True)
    weight = a * B_star.norm(dim=1)
    s4, total = relu_hermite(4), 0.0
    for j in range(3):
        for k in range(3):
            if j != k:
                total -= math.sqrt(6) * s4 * float((weight * (unit @ B[j]) ** 2 * (unit @ B[k]) ** 2).sum())
        total += 0.2 * s4 / math.sqrt(24) * float((weight * (unit @ B[j]) ** 4).sum())
        total += 0.7 * (float(B[j] @ B[j]) - 1) ** 2
    assert float(population_G(B, B_star, a, 0.2, 0.7)) == pytest.approx(total)


def test_empirical_objective_pair_by_pair():
    B, X, y = randn(3, 4), randn(50, 4, seed=1), randn(50, seed=2)
    pairs = sum(phi_pair(B[j], B[k], X) for j in range(3) for k in range(3) if j != k)
    single = sum(phi_single(b, X) for b in B)
    expected = -(y * pairs).mean() + 0.2 * (y * single).mean() + 0.7 * ((B.square().sum(1) - 1) ** 2).sum()
    torch.testing.assert_close(empirical_G(B, X, y, 0.2, 0.7), expected)


def test_empirical_objective_approaches_the_population():
    B_star, a = 1.5 * orthonormal(3, 1), torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    B = B_star[2] / 1.5 + 0.2 * randn(3, 3)  # nearly parallel rows: the sum over pairs is large
    X = randn(400_000, 3, seed=2)
    parts = torch.stack([empirical_G(B, x, torch.relu(x @ B_star.T) @ a, 0.1, 0.0) for x in X.chunk(40)])
    assert abs(float(parts.mean() - population_G(B, B_star, a, 0.1, 0.0))) < 5 * float(parts.std()) / math.sqrt(40)
    assert float(parts.std()) / math.sqrt(40) < 0.2 * abs(float(parts.mean()))


def test_order_and_signs_do_not_matter():
    B, B_star, a = randn(4, 4), orthonormal(4), torch.ones(4, dtype=torch.float64)
    value = population_G(B, B_star, a, 0.1, 1.0)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(population_G((signs[:, None] * B)[[2, 0, 3, 1]], B_star, a, 0.1, 1.0), value)


def test_gradients():
    B, B_star, a = randn(3, 3).requires_grad_(), orthonormal(3), torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    X, y = randn(20, 3, seed=1), randn(20, seed=2)
    assert torch.autograd.gradcheck(lambda B: population_G(B, B_star, a, 0.1, 0.5), (B,))
    assert torch.autograd.gradcheck(lambda B: empirical_G(B, X, y, 0.1, 0.5), (B,))
    assert torch.autograd.gradcheck(lambda B: population_squared_loss(B, B_star, a), (B,))


def test_second_derivatives():
    B, B_star, a = randn(3, 4).requires_grad_(), randn(3, 4, seed=5), torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda B: population_G(B, B_star, a, 0.1, 0.5), (B,))
    assert torch.autograd.gradgradcheck(lambda B: population_squared_loss(B, B_star, a), (B,))


@pytest.mark.parametrize("where", ["anywhere", "at the teacher", "opposite"])
def test_the_hessian_of_the_squared_loss_is_the_closed_form(where):
    """Also where rows are parallel, as at the solution, although the curvature of the arc cosine is infinite there."""
    B_star, a = orthonormal(4)[:3], torch.ones(3, dtype=torch.float64)
    B = {"anywhere": randn(3, 4), "at the teacher": B_star.clone(), "opposite": torch.stack([B_star[0], -B_star[0], B_star[2]])}[where]
    H = torch.autograd.functional.hessian(lambda B: population_squared_loss(B, B_star, a), B).reshape(12, 12)
    torch.testing.assert_close(H, 2 * relu_population_hessian(B, B_star), atol=1e-6, rtol=1e-6)


def test_truth_is_a_minimum_up_to_its_scale():
    B_star, a = orthonormal(5), torch.ones(5, dtype=torch.float64)
    # On c B_star the objective is -mu |s4| / sqrt(24) m c^4 + lam m (c^2 - 1)^2, so c^2 = lam / (lam - t).
    t = 0.3 * abs(relu_hermite(4)) / math.sqrt(24)
    B = (math.sqrt(1 / (1 - t)) * B_star).requires_grad_()
    (gradient,) = torch.autograd.grad(population_G(B, B_star, a, 0.3, 1.0), B)
    assert float(gradient.abs().max()) < 1e-12
    H = torch.autograd.functional.hessian(lambda B: population_G(B, B_star, a, 0.3, 1.0), B.detach()).reshape(25, 25)
    assert float(torch.linalg.eigvalsh(H)[0]) > 0


def test_squared_loss_against_the_kernel():
    B, B_star, a = randn(3, 4), randn(3, 4, seed=1), torch.tensor([1.0, -0.3, 2.0], dtype=torch.float64)
    expected = sum(
        float(a[i] * a[j]) * (relu_kernel(B[i], B[j]) - 2 * relu_kernel(B[i], B_star[j]) + relu_kernel(B_star[i], B_star[j]))
        for i in range(3)
        for j in range(3)
    )
    assert float(population_squared_loss(B, B_star, a)) == pytest.approx(expected)


def test_squared_loss_is_a_sum_of_tensor_distances():
    unit = [M / M.norm(dim=1, keepdim=True) for M in (randn(3, 4), randn(3, 4, seed=1))]
    a, (B, B_star) = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64), unit
    # <u^(x)k, v^(x)k> = (u.v)^k
    series = sum(
        relu_hermite(k) ** 2 * float(a @ ((B @ B.T) ** k - 2 * (B @ B_star.T) ** k + (B_star @ B_star.T) ** k) @ a) for k in range(150)
    )
    assert float(population_squared_loss(B, B_star, a)) == pytest.approx(series, abs=1e-3)


def test_squared_loss_at_the_truth():
    B_star, a = orthonormal(4), torch.ones(4, dtype=torch.float64)
    B = B_star.clone().requires_grad_()
    loss = population_squared_loss(B, B_star, a)
    (gradient,) = torch.autograd.grad(loss, B)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-7
    assert float(population_squared_loss(0 * B_star, B_star, a)) == pytest.approx(
        float((torch.relu(randn(400_000, 4) @ B_star.T) @ a).square().mean()), rel=0.02
    )


def test_recovery_error():
    B_star = orthonormal(4)
    turned = 2.5 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None] * B_star[[3, 1, 0, 2]]
    assert recovery_error(turned, B_star) < 1e-12
    assert recovery_error(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(0.6)


def test_assumptions_are_named():
    B_star, a = orthonormal(3), torch.ones(3, dtype=torch.float64)
    check_teacher(B_star, a, 1 / 30, 1.0)
    with pytest.raises(ValueError, match="orthonormal rows"):
        check_teacher(2 * B_star, a, 0.1, 1.0)
    tilted = B_star.clone()
    tilted[0] += 1e-5 * B_star[1]  # of the right length, but not orthogonal
    with pytest.raises(ValueError, match="Gram matrix is off by 1e-05"):
        check_teacher(tilted, a, 0.1, 1.0)
    check_teacher(B_star + 1e-2 * (tilted - B_star), a, 0.1, 1.0)  # off by 1e-7, as single precision leaves it
    with pytest.raises(ValueError, match=r"off by 0\.5"):  # a negative entry counts as well
        check_teacher(torch.stack([B_star[0], -0.5 * B_star[0] + 0.75**0.5 * B_star[1]]), a[:2], 0.1, 1.0)
    with pytest.raises(ValueError, match="off by 2"):
        check_teacher(3**0.5 * B_star, a, 0.1, 1.0)
    with pytest.raises(ValueError, match="positive output weights"):
        check_teacher(B_star, a - 1, 0.1, 1.0)
    for weight in (0.0, -0.5):
        with pytest.raises(ValueError, match=f"positive output weights, got {weight}"):
            check_teacher(B_star, torch.tensor([1.0, weight, 2.0], dtype=torch.float64), 0.1, 1.0)
    bound = 0.3 * 4.0 * abs(relu_hermite(4)) / math.sqrt(24)  # the largest weight counts
    weights = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    check_teacher(B_star, weights, 0.3, 1.001 * bound)
    for lam in (0.999 * bound, bound, 0.0):
        with pytest.raises(ValueError, match="unbounded below"):
            check_teacher(B_star, weights, 0.3, lam)
    # Below the bound the objective falls along the truth itself; above it does not.
    least = abs(relu_hermite(4)) / math.sqrt(24)
    values = [float(population_G(c * B_star, B_star, a, 1.0, 0.99 * least)) for c in (100.0, 1000.0)]
    assert values[1] < values[0] < 0
    assert float(population_G(1000 * B_star, B_star, a, 1.0, 1.01 * least)) > 0


def test_refuses():
    B, a, X = torch.ones(2, 3), torch.ones(2), torch.ones(5, 3)
    for degree in (-1, 1.5, True):
        with pytest.raises(ValueError, match="degree"):
            relu_hermite(degree)
    with pytest.raises(ValueError, match="directions"):
        phi_pair(B[0], a, X)
    with pytest.raises(ValueError, match="directions"):
        phi_single(a, X)
    for objective in (lambda lam: population_G(B, B, a, 0.1, lam), lambda lam: empirical_G(B, X, X[:, 0], 0.1, lam)):
        with pytest.raises(ValueError, match="negative"):
            objective(-1.0)
    with pytest.raises(ValueError, match="B_star"):
        population_G(B, B[:1], a, 0.1, 1.0)
    with pytest.raises(ValueError, match="B_star"):
        population_squared_loss(B, B, a[:1])
    with pytest.raises(ValueError, match="no direction"):
        population_G(B, 0 * B, a, 0.1, 1.0)
    with pytest.raises(ValueError, match="X \\[n, d\\]"):
        empirical_G(B, X, torch.ones(4), 0.1, 1.0)
    with pytest.raises(ValueError, match="zero rows"):
        recovery_error(0 * B, B)
