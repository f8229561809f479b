"""Empirical against population landscapes: closed forms, sampling, exact designs and brute-force matching."""

import itertools
import math

import pytest
import torch

from dlatlas.theory.empirical_landscape import gradient_rate, linear_gradient, match_stationary, population_risk_linear, sup_gradient_gap

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def problem(seed=0):
    M = normal(4, 4, seed=seed)
    return M @ M.T / 4 + 0.2 * torch.eye(4, dtype=D), normal(3, 4, seed=seed + 1)


def weights(seed=0):
    return [normal(5, 4, seed=seed), normal(2, 5, seed=seed + 1), normal(3, 2, seed=seed + 2)]


def test_rate_by_hand():
    assert gradient_rate(2.0, 2, 9, 30, 30, 50) == pytest.approx(16 * math.sqrt(2 * 3 * 30 * math.log(15) / 50))
    assert gradient_rate(1.5, 3, 9, 30, 30, 400) / gradient_rate(1.5, 3, 9, 30, 30, 100) == pytest.approx(0.5)
    assert gradient_rate(3.0, 2, 9, 30, 30, 50) / gradient_rate(1.0, 2, 9, 30, 30, 50) == pytest.approx(81)
    assert gradient_rate(1.0, 2, 9, 10, 40, 50) / gradient_rate(1.0, 2, 9, 40, 40, 50) == pytest.approx(0.5)


def test_population_risk_by_sampling():
    Sigma, B = problem()
    Ws = weights()
    noise = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    x = normal(400_000, 4, seed=5) @ torch.linalg.cholesky(Sigma).T
    y = x @ B.T + normal(400_000, 3, seed=6) * noise.sqrt()
    e = (x @ Ws[0].T @ Ws[1].T @ Ws[2].T - y).square().sum(1) / 2
    exact = float(population_risk_linear(Ws, Sigma, B, noise))
    assert abs(float(e.mean()) - exact) < 4 * float(e.std()) / math.sqrt(len(x))
    assert float(population_risk_linear(Ws, Sigma, B, torch.diag(noise))) == pytest.approx(exact)
    assert float(population_risk_linear([B], Sigma, B, 0.4)) == pytest.approx(0.6)  # only the noise is left


def test_gradient_by_autograd():
    Sigma, B = problem()
    Ws = [W.requires_grad_() for W in weights()]
    risk = population_risk_linear(Ws, Sigma, B, 1.0)
    theirs = torch.cat([g.reshape(-1) for g in torch.autograd.grad(risk, Ws)])
    torch.testing.assert_close(linear_gradient([W.detach() for W in Ws], Sigma, B @ Sigma), theirs)


def test_gap_by_autograd_on_samples():
    Sigma, B = problem()
    X = normal(30, 4, seed=7)
    Y = X @ B.T + normal(30, 3, seed=8)
    nets = [weights(0), weights(10), weights(20)]
    gaps = []
    for net in nets:
        Ws = [W.clone().requires_grad_() for W in net]
        empirical = (X @ Ws[0].T @ Ws[1].T @ Ws[2].T - Y).square().sum() / (2 * 30)
        pairs = zip(torch.autograd.grad(empirical, Ws), torch.autograd.grad(population_risk_linear(Ws, Sigma, B, 0.0), Ws))
        gaps.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)))
    assert sup_gradient_gap(nets, X, Y, Sigma, B) == pytest.approx(max(gaps))
    assert sup_gradient_gap(nets[:1], X, Y, Sigma, B) == pytest.approx(gaps[0])


def test_no_gap_where_the_samples_have_the_populations_moments():
    Sigma, B = problem()
    Q = torch.linalg.qr(normal(20, 8, seed=3))[0] * math.sqrt(20)  # orthogonal design: inputs and noise are uncorrelated
    X = Q[:, :4] @ torch.linalg.cholesky(Sigma).T
    assert sup_gradient_gap([weights()], X, X @ B.T + Q[:, 4:7], Sigma, B) < 1e-11


def test_the_gap_falls_with_the_root_of_the_sample_size():
    Sigma, B = problem()
    L = torch.linalg.cholesky(Sigma)
    nets = [weights(s) for s in range(0, 30, 3)]

    def mean_gap(n):
        total = 0.0
        for seed in range(30):
            X = normal(n, 4, seed=1000 + seed) @ L.T
            total += sup_gradient_gap(nets, X, X @ B.T + normal(n, 3, seed=2000 + seed), Sigma, B)
        return total / 30

    slope = math.log(mean_gap(3000) / mean_gap(300)) / math.log(10)
    assert -0.6 < slope < -0.4


def test_matching_is_the_best_of_all_permutations():
    emp, pop = normal(5, 3), normal(5, 3, seed=1)
    ours = match_stationary(emp, pop)
    costs = {p: [float((emp[i] - pop[j]).norm()) for i, j in enumerate(p)] for p in itertools.permutations(range(5))}
    best = min(costs.values(), key=sum)
    assert ours.tolist() == pytest.approx(best)
    order = torch.tensor([3, 0, 4, 1, 2])
    shifted = pop[order] + 1e-3
    torch.testing.assert_close(match_stationary(shifted, pop), torch.full((5,), 1e-3 * math.sqrt(3), dtype=D))


def test_bad_input():
    for bad in (dict(n=0), dict(r=0.0), dict(depth=0), dict(dim=2), dict(nonzeros=31), dict(max_width=0)):
        with pytest.raises(ValueError):
            gradient_rate(**(dict(r=1.0, depth=2, max_width=5, nonzeros=30, dim=30, n=10) | bad))
    Sigma, B = problem()
    with pytest.raises(ValueError, match="fit together"):
        population_risk_linear(weights()[1:], Sigma, B, 1.0)
    with pytest.raises(ValueError, match="at least one weight"):
        population_risk_linear([], Sigma, B, 1.0)
    with pytest.raises(ValueError, match="noise_var"):
        population_risk_linear(weights(), Sigma, B, torch.ones(4, dtype=D))
    with pytest.raises(ValueError, match="empty"):
        sup_gradient_gap([], normal(5, 4), normal(5, 3), Sigma, B)
    with pytest.raises(ValueError, match=r"X \(n, d_0\)"):
        sup_gradient_gap([weights()], normal(5, 4), normal(4, 3), Sigma, B)
    with pytest.raises(ValueError, match="two sets"):
        match_stationary(normal(3, 2), normal(4, 2))
