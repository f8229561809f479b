"""The dual step on a finite space against its fixed point and NumPy; the kernel term against finite sums and gradients by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from dlatlas.gans.primal_dual import primal_dual_discrete, primal_dual_g_loss, target_density


def density(n, seed=0):
    p = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return p / p.sum()


def test_the_model_becomes_the_data_and_the_discriminator_undecided():
    p_data = density(7)
    p, d = primal_dual_discrete(p_data, 2000)
    torch.testing.assert_close(p, p_data, atol=1e-6, rtol=0)
    torch.testing.assert_close(d, torch.full_like(d, 0.5), atol=1e-5, rtol=0)
    fixed, _ = primal_dual_discrete(p_data, 5, p_init=p_data)
    torch.testing.assert_close(fixed, p_data)


def test_the_distance_never_grows_for_small_steps_and_mass_crosses_gaps():
    p_data, p = density(6), torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    distance = []
    for _ in range(400):
        distance.append(float((p - p_data).abs().sum() / 2))
        p, _ = primal_dual_discrete(p_data, 1, lr=0.01, p_init=p)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(distance))
    assert distance[-1] < 0.05 * distance[0]


def test_one_step_in_numpy():
    p_data, p = density(5).numpy(), density(5, 1).numpy()
    d = p_data / (p_data + p)
    moved = np.maximum(p - 0.1 * np.log(2 * (1 - d)), 0)
    got, _ = primal_dual_discrete(torch.tensor(p_data), 1, 0.1, torch.tensor(p))
    np.testing.assert_allclose(got, moved / moved.sum())


def test_mass_rises_exactly_where_the_discriminator_says_real():
    p, d = density(4), torch.tensor([0.9, 0.6, 0.4, 0.1], dtype=torch.float64)
    before_scaling = p - 0.01 * torch.log(2 * (1 - d))
    torch.testing.assert_close(target_density(p, d, 0.01), before_scaling / before_scaling.sum())
    assert ((before_scaling > p) == (d > 0.5)).all()
    assert torch.isfinite(target_density(p, torch.tensor([1.0, 0, 1, 0], dtype=torch.float64), 0.01)).all()


def test_names_of_the_points_do_not_matter_and_one_point_is_trivial():
    p_data, order = density(6), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(primal_dual_discrete(p_data, 50)[0][order], primal_dual_discrete(p_data[order], 50)[0])
    assert primal_dual_discrete(torch.ones(1), 10)[0].item() == 1
    assert primal_dual_discrete(torch.tensor([0.5, 0.5, 0.0]), 200)[0][2].item() < 0.01
    no_mass = primal_dual_discrete(torch.tensor([1.0, 0.0]), 0, p_init=torch.tensor([1.0, 0.0]))[1]
    assert no_mass.tolist() == [0.5, 0.5]


def test_the_kernel_term_by_loops():
    g = torch.Generator().manual_seed(2)
    fake, points, d = torch.randn(4, 2, generator=g), torch.randn(3, 2, generator=g), torch.tensor([0.9, 0.5, 0.2])
    alpha, sigma = 0.3, 0.7
    expected = 0.0
    for i in range(3):
        expected += (alpha * math.log(2 * (1 - float(d[i])))) ** 2 / 3
    assert primal_dual_g_loss(fake, points, d, alpha, sigma).item() == pytest.approx(expected, rel=1e-5)
    assert primal_dual_g_loss(fake, points, d[:, None], alpha, sigma, weight=5.0).item() == pytest.approx(5 * expected, rel=1e-5)


def test_its_gradient_moves_the_density_towards_the_target():
    g = torch.Generator().manual_seed(2)
    fake, points = torch.randn(4, 2, generator=g, dtype=torch.float64).requires_grad_(), torch.randn(3, 2, generator=g, dtype=torch.float64)
    d, alpha, sigma = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64), 0.3, 0.7

    def estimate(samples):
        values = [
            sum(math.exp(-sum((a - b) ** 2 for a, b in zip(x, y)) / (2 * sigma**2)) for y in samples.tolist()) / len(samples)
            for x in points.tolist()
        ]
        return [v / (2 * math.pi * sigma**2) for v in values]

    (got,) = torch.autograd.grad(primal_dual_g_loss(fake, points, d, alpha, sigma), fake)
    push = [2 * alpha * math.log(2 * (1 - v)) / 3 for v in d.tolist()]
    for j in range(4):
        for k in range(2):
            up, down = fake.detach().clone(), fake.detach().clone()
            up[j, k] += 1e-5
            down[j, k] -= 1e-5
            slope = sum(w * (a - b) / 2e-5 for w, a, b in zip(push, estimate(up), estimate(down)))
            assert got[j, k].item() == pytest.approx(slope, abs=1e-7)


def test_on_a_line_the_kernel_has_the_height_of_a_density():
    fake, points = torch.tensor([[0.4], [-1.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[0.0]], dtype=torch.float64)
    d, alpha, sigma = torch.tensor([0.8], dtype=torch.float64), 0.3, 0.7
    (got,) = torch.autograd.grad(primal_dual_g_loss(fake, points, d, alpha, sigma), fake)
    for at, slope in zip(fake.detach()[:, 0].tolist(), got[:, 0].tolist()):
        height = math.exp(-(at**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        assert slope == pytest.approx(2 * alpha * math.log(2 * (1 - 0.8)) * height * (-at / sigma**2) / 2)


def test_nothing_flows_into_the_discriminator():
    fake, d = torch.randn(4, 2, requires_grad=True), torch.full((3,), 0.7, requires_grad=True)
    primal_dual_g_loss(fake, torch.randn(3, 2), d, 0.3, 0.7).backward()
    assert d.grad is None and fake.grad.abs().sum() > 0


def test_bad_input():
    half = torch.tensor([0.5, 0.5])
    for p in (torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.4]), half[None]):
        with pytest.raises(ValueError, match="p_data must be"):
            primal_dual_discrete(p, 1)
    with pytest.raises(ValueError, match="p_init must be"):
        primal_dual_discrete(half, 1, p_init=torch.ones(2))
    with pytest.raises(ValueError, match="one length"):
        primal_dual_discrete(half, 1, p_init=torch.ones(1))
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match="alpha > 0"):
            target_density(half, half, alpha)
        with pytest.raises(ValueError, match="must be positive"):
            primal_dual_g_loss(torch.ones(2, 1), torch.ones(2, 1), half, alpha, 1.0)
    with pytest.raises(ValueError, match="takes all mass away"):
        target_density(half, torch.tensor([0.1, 0.1]), 10.0)
    with pytest.raises(ValueError, match="expected fake"):
        primal_dual_g_loss(torch.ones(2, 1), torch.ones(3, 1), half, 0.1, 1.0)
