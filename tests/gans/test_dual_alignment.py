"""The dual against scikit-learn's primal, duality at any pair, and an alignment that only falls."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dlatlas.gans.dual_alignment import DualAligner, dual_objective, primal_objective, solve_dual


def problem(n=60, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = torch.where(x[:, 0] + 0.5 * torch.randn(n, generator=g) > 0, 1.0, -1.0).double()
    return x, y


@pytest.mark.parametrize("lam", [0.01, 0.3, 10.0])
def test_the_dual_maximum_is_the_primal_minimum_of_scikit_learn(lam):
    x, y = problem()
    model = LogisticRegression(fit_intercept=False, C=1 / lam, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    w = torch.tensor(model.coef_[0])
    alpha = solve_dual(x, y, lam)
    assert dual_objective(x, y, alpha, lam).item() == pytest.approx(primal_objective(x, y, w, lam).item(), rel=1e-8)
    torch.testing.assert_close((alpha * y) @ x / lam, w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alpha, torch.sigmoid(-y * (x @ ((alpha * y) @ x / lam))), atol=1e-8, rtol=0)


def test_damped_steps_arrive_as_well():
    x, y = problem()
    torch.testing.assert_close(solve_dual(x, y, 0.3, steps=300, lr=0.3), solve_dual(x, y, 0.3), atol=1e-8, rtol=0)


def test_weak_duality_at_any_pair():
    x, y = problem()
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        w, alpha = 3 * torch.randn(3, generator=g, dtype=torch.float64), torch.rand(60, generator=g, dtype=torch.float64)
        assert dual_objective(x, y, alpha, 0.2) <= primal_objective(x, y, w, 0.2)


def test_objectives_by_loops():
    x, y = problem(5, 2)
    w, alpha, lam = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.1, 0.9, 0.5, 0.2, 0.7]).double(), 0.4
    primal = sum(math.log(1 + math.exp(-float(b) * sum(map(float, a * w)))) for a, b in zip(x, y)) + lam / 2 * 1.09
    assert primal_objective(x, y, w, lam).item() == pytest.approx(primal)
    entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in alpha.tolist())
    quadratic = sum(float(alpha[i] * alpha[j] * y[i] * y[j] * (x[i] @ x[j])) for i in range(5) for j in range(5))
    assert dual_objective(x, y, alpha, lam).item() == pytest.approx(entropy - quadratic / (2 * lam))
    with_kernel = dual_objective(x, y, alpha, lam, kernel=lambda a, b: (a @ b.T + 1) ** 2)
    quadratic = sum(float(alpha[i] * alpha[j] * y[i] * y[j] * (x[i] @ x[j] + 1) ** 2) for i in range(5) for j in range(5))
    assert with_kernel.item() == pytest.approx(entropy - quadratic / (2 * lam))


def test_nothing_to_tell_apart():
    x, y = torch.zeros(8, 2).double(), torch.tensor([-1.0, 1] * 4).double()
    alpha = solve_dual(x, y, 0.1)
    assert torch.equal(alpha, torch.full_like(alpha, 0.5))
    for value in (dual_objective(x, y, alpha, 0.1), primal_objective(x, y, torch.ones(2).double() * 0, 0.1)):
        assert value.item() == pytest.approx(8 * math.log(2))
    assert torch.isfinite(dual_objective(x, y, torch.tensor([0.0, 1] * 4).double(), 0.1))  # at the ends entropy is 0


def clouds():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(80, 2, generator=g) * torch.tensor([1.0, 0.3])
    return target @ torch.tensor([[0.7, 0.7], [-0.7, 0.7]]) + torch.tensor([2.0, 1.0]), target


def test_alignment_falls_and_brings_the_means_together():
    torch.manual_seed(0)
    source, target = clouds()
    aligner = DualAligner(nn.Linear(2, 2), lam=0.1)
    with torch.no_grad():
        aligner.transform.weight.copy_(torch.eye(2))
        aligner.transform.bias.zero_()
    distance = np.array([aligner.step(source, target) for _ in range(600)])
    assert (np.diff(distance) <= 1e-7).mean() >= 0.95
    assert distance[-1] < 0.01 * distance.max()
    moved = aligner.transform(source).mean(0)
    assert (moved - target.mean(0)).norm() < 0.05 * (source.mean(0) - target.mean(0)).norm()
    assert aligner.alpha.shape == (160,) and aligner.alpha.min() > 0 and aligner.alpha.max() < 1


def test_gradient_steps_within_the_curvature_never_raise_the_distance():
    source, target = (points.double() for points in clouds())
    n = 160
    # The distance is quadratic in an affine map; with alpha below 1 its curvature is at most this.
    curvature = float(torch.cat([source, torch.ones(80, 1)], 1).norm(dim=1).sum() ** 2) / (0.1 * n * n)
    aligner = DualAligner(nn.Linear(2, 2).double(), lam=0.1, optimizer=lambda p: torch.optim.SGD(p, 1 / curvature))
    distance = [aligner.step(source, target) for _ in range(300)]
    assert all(b <= a + 1e-14 for a, b in itertools.pairwise(distance))
    assert distance[-1] < 1e-6 * distance[0]


def test_one_step_by_hand_and_the_numbers_keep_their_distance_from_the_ends():
    source, target = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    layer = nn.Linear(1, 1).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.5)
    aligner = DualAligner(layer, lam=0.2, optimizer=lambda p: torch.optim.SGD(p, 0.01))
    aligner.step(source, target)
    lam = 0.2 * 3
    signed = np.array([[-2.5, -1.0], [-1.0, 1.0], [0.5, 1.0]])  # y (x, 1); the source is labelled -1
    size = 1 / (1 + np.linalg.norm(signed, 2) ** 2 / (4 * lam))
    logit = -size * (signed @ signed.sum(0) / 2) / lam
    alpha = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(aligner.alpha, alpha)
    slope = (alpha @ signed) * -alpha[0] / lam / 3  # of the distance in nats a point, in the moved source and the constant
    assert layer.weight.item() == pytest.approx(1 - 0.01 * slope[0] * 2)
    assert layer.bias.item() == pytest.approx(0.5 - 0.01 * slope[0])
    far = DualAligner(nn.Linear(1, 1).double(), lam=1e-3, lr=1e-9)
    far.alpha = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)
    far.step(torch.full((1, 1), 1e3).double(), torch.full((1, 1), -1e3).double())  # far points: the step is too short to leave the ends
    assert far.alpha.min() == 1e-6 and 0.5 < far.alpha.max() <= 1 - 1e-6


def test_with_the_map_held_still_alpha_finds_the_solution_and_never_rises():
    source, target = clouds()
    still = nn.Linear(2, 2).requires_grad_(False).double()
    still.weight.requires_grad_()
    aligner = DualAligner(still, lam=0.5, lr=1e-12)
    distance = [aligner.step(source.double(), target.double()) for _ in range(400)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(distance))
    x, y = aligner._points(source.double(), target.double())
    best = solve_dual(x.detach(), y, 0.5 * len(x))
    torch.testing.assert_close(aligner.alpha, best, atol=1e-4, rtol=0)
    assert distance[-1] == pytest.approx(math.log(2) - dual_objective(x, y, best, 0.5 * len(x)).item() / len(x), abs=1e-7)


def test_other_batches_start_alpha_anew():
    source, target = clouds()
    aligner = DualAligner(nn.Linear(2, 2))
    aligner.step(source, target)
    aligner.step(source[:10], target)
    assert len(aligner.alpha) == 90


def test_bad_input():
    x, y = problem(6, 2)
    for call in (
        lambda: primal_objective(x, y + 1, torch.ones(2), 0.1),
        lambda: dual_objective(x, y[:3], y[:3], 0.1),
        lambda: solve_dual(x, 0 * y, 0.1),
    ):
        with pytest.raises(ValueError, match="labels"):
            call()
    for call in (
        lambda: solve_dual(x, y, 0.0),
        lambda: DualAligner(nn.Linear(2, 2), lam=0.0),
        lambda: DualAligner(nn.Linear(2, 2), lr=-1.0),
    ):
        with pytest.raises(ValueError, match="positive"):
            call()
    with pytest.raises(ValueError, match="after the transformation"):
        DualAligner(nn.Linear(2, 3)).step(torch.ones(4, 2), torch.ones(4, 2))
