"""Two ReLU units: closed forms against sampling and autograd, the landscape against what the theorem says."""

import math

import numpy as np
import pytest
import torch

from dlatlas.theory.two_relu import (
    classify_stationary,
    newton_stationary,
    population_grad,
    population_loss,
    sphere_descent,
    tangent_grad,
    tangent_hessian,
)

D = torch.float64
PI = math.pi


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def teacher(d=5, seed=0):
    return torch.linalg.qr(normal(d, 2, seed=seed))[0].T.contiguous()


def kernel(u, v):
    """Plain NumPy transcription."""
    nu, nv = np.linalg.norm(u), np.linalg.norm(v)
    t = np.arccos(np.clip(u @ v / (nu * nv), -1, 1))
    return nu * nv * (np.sin(t) + (np.pi - t) * np.cos(t)) / (2 * np.pi)


def test_loss_is_the_sum_of_kernels_and_the_mean_over_inputs():
    W, V = normal(2, 4), normal(2, 4, seed=1)
    w, v = W.numpy(), V.numpy()
    total = sum(kernel(w[i], w[j]) - 2 * kernel(w[i], v[j]) + kernel(v[i], v[j]) for i in range(2) for j in range(2)) / 2
    assert float(population_loss(W, V)) == pytest.approx(total)
    x = normal(500_000, 4, seed=2)
    e = ((x @ W.T).relu().sum(1) - (x @ V.T).relu().sum(1)) ** 2 / 2
    assert abs(float(e.mean()) - total) < 4 * float(e.std()) / math.sqrt(len(x))


def test_gradient_is_that_of_the_sampled_loss():
    W, V = normal(2, 4), normal(2, 4, seed=1)
    x = normal(500_000, 4, seed=2)
    e = (x @ W.T).relu().sum(1) - (x @ V.T).relu().sum(1)
    for i in range(2):
        samples = e[:, None] * (x @ W[i] > 0)[:, None] * x  # derivative of each sample's loss
        error = (samples.mean(0) - population_grad(W, V)[i]).abs() / (samples.std(0) / math.sqrt(len(x)))
        assert float(error.max()) < 4.5


def test_gradient_by_differences():
    W, V, h = normal(3, 2, 4), teacher(4), 1e-6
    for e in torch.eye(8, dtype=D):
        e = e.view(2, 4)
        slope = (population_loss(W + h * e, V) - population_loss(W - h * e, V)) / (2 * h)
        torch.testing.assert_close((population_grad(W, V) * e).sum((-1, -2)), slope, atol=1e-8, rtol=1e-6)


def test_closed_form_values():
    V = teacher()
    assert float(population_loss(V, V)) == 0
    assert float(population_loss(V.flip(0), V)) == pytest.approx(0, abs=1e-15)
    assert float(population_grad(V, V).norm()) == 0
    # Antipodal student: K(-v_i, v_i) = 0, orthogonal pairs have K = 1 / (2 pi), equal ones 1/2.
    same = 2 * (1 / 2) + 2 / (2 * PI)
    assert float(population_loss(-V, V)) == pytest.approx((2 * same - 2 * 2 / (2 * PI)) / 2)
    swapped = population_loss(unit(2, 5).flip(0), V)
    assert float(swapped) == pytest.approx(float(population_loss(unit(2, 5), V)))


def test_descent_from_everywhere_ends_at_the_teacher():
    V, W0 = teacher(), unit(60, 2, 5, seed=1)
    before = W0.clone()
    W = sphere_descent(W0, V, 1.0, 500)
    assert torch.equal(W0, before)
    torch.testing.assert_close(W.norm(dim=-1), torch.ones(60, 2, dtype=D))
    assert float(population_loss(W, V).max()) < 1e-12
    direct, crossed = (W - V).flatten(1).norm(dim=1), (W - V.flip(0)).flatten(1).norm(dim=1)
    assert float(torch.minimum(direct, crossed).max()) < 1e-6
    assert bool((direct < 1e-6).any()) and bool((crossed < 1e-6).any())  # both orders occur


def test_one_step_of_descent_by_hand():
    V, W = teacher(), unit(2, 5, seed=3)
    grad = population_grad(W, V)
    rows = []
    for w, g in zip(W, grad):
        moved = w - 0.3 * (g - (g @ w) * w)
        rows.append(moved / moved.norm())
    torch.testing.assert_close(sphere_descent(W, V, 0.3, 1), torch.stack(rows))
    assert torch.equal(sphere_descent(W, V, 0.3, 0), W)


def test_tangent_hessian_is_the_second_derivative_along_great_circles():
    V, W = teacher(), unit(2, 5, seed=3)
    H = tangent_hessian(W, V)
    assert H.shape == (8, 8)
    basis = torch.linalg.svd(W.unsqueeze(-2)).Vh[..., 1:, :]  # the basis that the function documents: rows orthogonal to each w_i
    c = normal(8, seed=4)
    move = (c.view(2, 1, 4) @ basis).squeeze(-2)  # (2, 5)
    speed = move.norm(dim=1, keepdim=True)

    def along(s):
        return float(population_loss(torch.cos(s * speed) * W + torch.sin(s * speed) * move / speed, V))

    h = 1e-4
    second = (along(h) - 2 * along(0.0) + along(-h)) / h**2
    assert float(c @ H @ c) == pytest.approx(second, rel=1e-5)


def test_kinds_of_points():
    V = teacher(3)
    assert classify_stationary(V, V, 1e-8) == classify_stationary(V.flip(0), V, 1e-8) == "global"
    assert classify_stationary(unit(2, 3, seed=1), V, 1e-8) == "not stationary"
    bisector = (V[0] + V[1]) / math.sqrt(2)
    assert classify_stationary(torch.stack([bisector, bisector]), V, 1e-8) == "saddle"
    assert classify_stationary(torch.stack([-bisector, -bisector]), V, 1e-8) == "saddle"
    # A teacher with two equal units of norm 1 cannot be matched by units of norm 0.4, but these are where they should be.
    double = torch.stack([bisector, bisector])
    assert classify_stationary(0.4 * double, double, 1e-8) == "spurious"


def test_newton_finds_stationary_points_of_every_kind_and_none_is_spurious():
    V = teacher()
    W = newton_stationary(normal(120, 2, 5, seed=2), V)
    found = tangent_grad(W, V).flatten(1).norm(dim=1) < 1e-8
    assert float(found.double().mean()) > 0.9
    kinds = {classify_stationary(w, V, 1e-8) for w in W[found]}
    assert kinds <= {"global", "saddle"} and "saddle" in kinds
    levels = population_loss(W[found], V).round(decimals=5).unique()
    assert len(levels) >= 3


def test_bad_input():
    V = teacher()
    for bad in (normal(3, 5), normal(2, 4), normal(5), normal(2, 1)):
        with pytest.raises(ValueError, match=r"\(2, d\)"):
            population_loss(bad, V)
    with pytest.raises(ValueError, match="a row is zero"):
        population_grad(torch.zeros(2, 5, dtype=D), V)
    with pytest.raises(ValueError, match="a row is zero"):
        population_loss(V, torch.zeros(2, 5, dtype=D))
    with pytest.raises(ValueError, match="finite"):
        population_loss(V * math.nan, V)
    with pytest.raises(ValueError, match="unit rows"):
        sphere_descent(2 * V, V, 0.1, 1)
    with pytest.raises(ValueError, match="lr > 0"):
        sphere_descent(V, V, 0.0, 1)
    with pytest.raises(ValueError, match="one student"):
        classify_stationary(V[None], V, 1e-8)
    with pytest.raises(ValueError, match="negative"):
        newton_stationary(V, V, -1)
