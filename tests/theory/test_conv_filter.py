"""Gradients against autograd, Monte Carlo and exact cases; descent against a plain loop."""

import math

import numpy as np
import pytest
import torch

from dlatlas.theory.conv_filter import filter_net, gaussian_grad, learn_filter, region_matrices


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def autograd(w, w_star, Z):
    w = w.clone().requires_grad_()
    loss = 0.5 * (filter_net(w, Z) - filter_net(w_star, Z)).square().mean()
    return torch.autograd.grad(loss, w)[0]


def test_output_against_numpy():
    w, Z = randn(4), randn(5, 3, 4, seed=1)
    expected = np.maximum(np.einsum("nkp,p->nk", Z.numpy(), w.numpy()), 0).mean(1)
    np.testing.assert_allclose(filter_net(w, Z).numpy(), expected)


def test_gaussian_gradient_against_monte_carlo():
    w, w_star = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    sampled = autograd(w, w_star, randn(2_000_000, 1, 3))
    assert float((gaussian_grad(w, w_star) - sampled).norm() / sampled.norm()) < 0.01


def test_gaussian_gradient_is_the_derivative_of_the_kernel_formula():
    def loss(w, w_star):
        a, b = w.norm(), w_star.norm()
        t = torch.acos(w @ w_star / (a * b))
        return a**2 / 4 + b**2 / 4 - a * b * (torch.sin(t) + (math.pi - t) * torch.cos(t)) / (2 * math.pi)

    for seed in range(5):
        w, w_star = randn(4, seed=seed).requires_grad_(), randn(4, seed=seed + 10)
        torch.testing.assert_close(gaussian_grad(w.detach(), w_star), torch.autograd.grad(loss(w, w_star), w)[0])


@pytest.mark.parametrize("c", [0.01, 0.5, 1.0, 3.0])
def test_gaussian_gradient_on_the_line(c):
    w_star = randn(5)
    torch.testing.assert_close(gaussian_grad(c * w_star, w_star), (c - 1) / 2 * w_star, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(gaussian_grad(-c * w_star, w_star), -c / 2 * w_star, atol=1e-14, rtol=1e-12)


def test_gaussian_gradient_near_the_teacher_keeps_its_digits():
    w_star, v = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1e-9], dtype=torch.float64)
    # To first order in the angle the wedge cancels: grad = (w - w*) / 2.
    torch.testing.assert_close(gaussian_grad(v, w_star)[1], v[1] / 2, atol=0, rtol=1e-6)


def test_a_silent_teacher_pulls_to_zero():
    w = randn(3)
    torch.testing.assert_close(gaussian_grad(w, torch.zeros(3, dtype=torch.float64)), w / 2)


def test_regions_give_the_gradient():
    w, w_star, Z = randn(4), randn(4, seed=1), randn(300, 4, seed=2) + 0.3
    A_pp, A_pm = region_matrices(w, w_star, Z)
    torch.testing.assert_close(A_pp @ (w - w_star) + A_pm @ w, autograd(w, w_star, Z[:, None]))


def test_regions_against_a_loop():
    w, w_star, Z = randn(3), randn(3, seed=1), randn(50, 3, seed=2)
    pp, pm = np.zeros((3, 3)), np.zeros((3, 3))
    for z in Z.numpy():
        if z @ w.numpy() >= 0:
            if z @ w_star.numpy() >= 0:
                pp += np.outer(z, z) / 50
            else:
                pm += np.outer(z, z) / 50
    A_pp, A_pm = region_matrices(w, w_star, Z)
    np.testing.assert_allclose(A_pp.numpy(), pp)
    np.testing.assert_allclose(A_pm.numpy(), pm)


def test_regions_of_equal_and_opposite_filters():
    w, Z = randn(3), randn(50, 3, seed=2)
    on = Z[Z @ w >= 0]
    A_pp, A_pm = region_matrices(w, w, Z)
    torch.testing.assert_close(A_pp, on.T @ on / 50)
    assert (A_pm == 0).all()
    A_pp, A_pm = region_matrices(w, -w, Z)
    torch.testing.assert_close(A_pm, on.T @ on / 50)
    assert (A_pp == 0).all()


def test_an_input_on_the_edge_of_the_teacher_belongs_to_both_groups():
    w, w_star, z = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0], [0.0, 1.0], [2.0, 0.0]))
    for group in region_matrices(w, w_star, z[None]):
        torch.testing.assert_close(group, torch.outer(z, z))


def test_path_is_gradient_descent():
    Z, w_star, w = randn(40, 3, 4), randn(4, seed=1), randn(4, seed=2)
    path = learn_filter(Z, filter_net(w_star, Z), w, 0.3, 10)
    assert path.shape == (11, 4)
    for k in range(10):
        torch.testing.assert_close(path[k], w)
        w = w - 0.3 * autograd(w, w_star, Z)
    torch.testing.assert_close(path[10], w)


def test_second_stage_takes_over_at_its_step():
    Z, y, w = randn(40, 3, 4), randn(40, seed=1).abs(), randn(4, seed=2)
    path = learn_filter(Z, y, w, 0.3, 10, two_stage=(6, 0.9))
    torch.testing.assert_close(path[:7], learn_filter(Z, y, w, 0.3, 6))
    torch.testing.assert_close(path[6:], learn_filter(Z, y, path[6], 0.9, 4))


def test_starts_side_by_side():
    Z, y, starts = randn(40, 3, 4), randn(40, seed=1).abs(), randn(5, 4, seed=2)
    path = learn_filter(Z, y, starts, 0.3, 7)
    assert path.shape == (8, 5, 4)
    for k in range(5):
        torch.testing.assert_close(path[:, k], learn_filter(Z, y, starts[k], 0.3, 7))


def test_descent_finds_the_filter():
    Z, w_star = randn(3000, 1, 4), randn(4, seed=1)
    path = learn_filter(Z, filter_net(w_star, Z), 0.1 * w_star + 0.05 * randn(4, seed=2), 1.0, 200)
    distance = (path - w_star).norm(dim=1)
    assert float(distance[-1]) < 1e-6
    assert (distance[1:] <= distance[:-1] + 1e-12).all()


def test_zero_is_a_trap():
    Z, w_star, zero = randn(40, 3, 4), randn(4, seed=1), torch.zeros(4, dtype=torch.float64)
    assert (learn_filter(Z, filter_net(w_star, Z), zero, 0.3, 5) == 0).all()
    with pytest.raises(ValueError, match="not differentiable at w = 0"):
        gaussian_grad(zero, w_star)


def test_start_is_not_modified():
    Z, y, w = randn(10, 2, 3), randn(10, seed=1), randn(3, seed=2)
    before = w.clone()
    learn_filter(Z, y, w, 0.1, 3)
    assert torch.equal(w, before)


def test_refuses():
    Z, y, w = randn(5, 2, 3), randn(5), randn(3)
    with pytest.raises(ValueError, match="filter"):
        filter_net(randn(4), Z)
    with pytest.raises(ValueError, match="filter"):
        filter_net(w, Z[0])
    with pytest.raises(ValueError, match="two filters"):
        gaussian_grad(w, randn(4))
    with pytest.raises(ValueError, match="finite"):
        gaussian_grad(w * float("nan"), w)
    with pytest.raises(ValueError, match="expected inputs"):
        region_matrices(w, w, randn(5, 4))
    with pytest.raises(ValueError, match="expected inputs"):
        region_matrices(w, w, randn(0, 3))
    for bad in ((Z, y[:4], w), (Z[0], y, w), (Z, y, randn(4)), (Z, y, randn(1, 1, 3))):
        with pytest.raises(ValueError, match="expected patches"):
            learn_filter(*bad, 0.1, 3)
    for lr, steps, two in ((0.0, 3, None), (0.1, -1, None), (0.1, 3, (4, 0.1)), (0.1, 3, (1, 0.0)), (0.1, 3, (-1, 0.1))):
        with pytest.raises(ValueError, match="second stage"):
            learn_filter(Z, y, w, lr, steps, two)
