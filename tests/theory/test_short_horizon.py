"""The noisy quadratic against simulated chains, SciPy's minimiser and cases that one can solve by hand."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from dlatlas.theory.short_horizon import NoisyQuadratic, optimal_schedule

H = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
SIGMA = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
MU = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
VAR = torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
PROBLEM = NoisyQuadratic(H, SIGMA)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.8])
def test_moments_against_simulated_chains(momentum):
    n, lrs = 200_000, [0.5, 0.1, 0.9, 0.3, 0.7]
    g = torch.Generator().manual_seed(0)
    theta = MU + VAR.sqrt() * torch.randn(n, 3, dtype=torch.float64, generator=g)
    v, mu, var = torch.zeros_like(theta), MU, VAR
    for lr in lrs:
        c = SIGMA * torch.randn(n, 3, dtype=torch.float64, generator=g)
        v = (momentum or 0.0) * v - lr * H * (theta - c)
        theta = theta + v
        mu, var = PROBLEM.step(mu, var, lr, momentum)
    if momentum:
        torch.testing.assert_close(mu, torch.stack([theta.mean(0), v.mean(0)], -1), rtol=0.02, atol=0.02)
        for i in range(3):
            torch.testing.assert_close(var[i], torch.cov(torch.stack([theta[:, i], v[:, i]])), rtol=0.02, atol=0.02)
    else:
        torch.testing.assert_close(mu, theta.mean(0), rtol=0.02, atol=0.02)
        torch.testing.assert_close(var, theta.var(0), rtol=0.02, atol=0.02)
    c = SIGMA * torch.randn(n, 3, dtype=torch.float64, generator=g)
    assert float(PROBLEM.loss(mu, var)) == pytest.approx(float(0.5 * (H * (theta - c) ** 2).sum(1).mean()), rel=0.02)


def test_pairs_without_momentum_are_plain_sgd():
    mu, var = PROBLEM.step(MU, VAR, 0.3, 0.5)
    mu, var = PROBLEM.step(mu, var, 0.4, None)
    plain = PROBLEM.step(*PROBLEM.step(MU, VAR, 0.3), 0.4)
    torch.testing.assert_close(mu[:, 0], plain[0])
    torch.testing.assert_close(var[:, 0, 0], plain[1])
    torch.testing.assert_close(var, var.mT)


def test_the_greedy_rate_is_the_minimum_over_one_step():
    found = minimize_scalar(
        lambda a: float(PROBLEM.loss(*PROBLEM.step(MU, VAR, a))), bounds=(0, 3), method="bounded", options={"xatol": 1e-10}
    )
    assert PROBLEM.greedy_lr(MU, VAR) == pytest.approx(found.x, rel=1e-6)


def test_equal_curvatures_without_noise_are_solved_in_one_step():
    problem = NoisyQuadratic(torch.full((4,), 0.25, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    mu, var = torch.arange(4.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    lr = problem.greedy_lr(mu, var)
    assert lr == pytest.approx(4.0)
    assert float(problem.loss(*problem.step(mu, var, lr))) == pytest.approx(0, abs=1e-20)
    assert problem.greedy_lr(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)) == 0.0


def test_a_horizon_of_one_is_greedy():
    assert optimal_schedule(PROBLEM, MU, VAR, 1).tolist() == pytest.approx([PROBLEM.greedy_lr(MU, VAR)], rel=1e-4)


def test_with_equal_curvatures_greedy_is_optimal_and_with_unequal_ones_it_is_not():
    def final(problem, schedule):
        return float(problem.rollout(MU, VAR, schedule)[-1])

    def greedy(problem, steps):
        mu, var, rates = MU, VAR, []
        for _ in range(steps):
            rates.append(problem.greedy_lr(mu, var))
            mu, var = problem.step(mu, var, rates[-1])
        return torch.tensor(rates, dtype=torch.float64)

    flat = NoisyQuadratic(torch.full((3,), 0.5, dtype=torch.float64), SIGMA)
    assert final(flat, optimal_schedule(flat, MU, VAR, 20)) == pytest.approx(final(flat, greedy(flat, 20)), rel=1e-4)
    steep = NoisyQuadratic(torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    floor = float(0.5 * (steep.h * steep.sigma**2).sum())
    assert final(steep, optimal_schedule(steep, MU, VAR, 20)) - floor < 0.9 * (final(steep, greedy(steep, 20)) - floor)


def test_the_schedule_beats_every_constant_rate_and_its_random_neighbours():
    schedule = optimal_schedule(PROBLEM, MU, VAR, 12, iters=600)
    assert schedule.shape == (12,)
    assert float(schedule.max()) <= 1.95 / 1.5 + 1e-12
    best = float(PROBLEM.rollout(MU, VAR, schedule)[-1])
    for lr in torch.linspace(0.01, 1.3, 40, dtype=torch.float64):
        assert best < float(PROBLEM.rollout(MU, VAR, lr.expand(12))[-1])
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = schedule * torch.exp(0.1 * torch.randn(12, dtype=torch.float64, generator=g))
        assert best <= float(PROBLEM.rollout(MU, VAR, other)[-1]) + 1e-6


def test_the_rollout_is_differentiable():
    lrs = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    assert PROBLEM.rollout(MU, VAR, lrs).shape == (4,)
    assert torch.autograd.gradcheck(lambda a: PROBLEM.rollout(MU, VAR, a), lrs)


def test_bad_input():
    one = torch.ones(2, dtype=torch.float64)
    for h, sigma in ((0 * one, one), (one, -one), (one, torch.ones(3)), (one[None], one[None]), (one * float("nan"), one)):
        with pytest.raises(ValueError):
            NoisyQuadratic(h, sigma)
    problem = NoisyQuadratic(one, one)
    for call in (
        lambda: problem.step(one, one, -0.1),
        lambda: problem.step(one, one, 0.1, -0.5),
        lambda: problem.step(torch.ones(3), torch.ones(3), 0.1),
        lambda: problem.loss(one, torch.ones(3)),
        lambda: problem.rollout(one, one, torch.ones(2, 2)),
        lambda: problem.rollout(one, one, torch.tensor([-0.1])),
        lambda: problem.greedy_lr(torch.ones(2, 2), torch.ones(2, 2, 2)),
        lambda: optimal_schedule(problem, one, one, 0),
        lambda: optimal_schedule(problem, one, one, 3, iters=0),
    ):
        with pytest.raises(ValueError):
            call()
