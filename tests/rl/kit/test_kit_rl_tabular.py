"""Exact MDPs against linear programming, simulation and closed forms."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from dlatlas.rl.kit.tabular import hitting_times, maze_mdp, occupancy, policy_evaluation, soft_value_iteration, value_iteration


def random_mdp(states=7, actions=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    P = torch.rand(states, actions, states, generator=g, dtype=torch.float64) ** 4
    return P / P.sum(-1, keepdim=True), torch.randn(states, actions, generator=g, dtype=torch.float64)


def random_policy(states=7, actions=3, seed=1):
    return torch.rand(states, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_optimal_values_against_the_linear_program(gamma):
    P, R = random_mdp()
    S, A = R.shape
    # min sum V subject to V(s) >= R(s,a) + gamma P V
    rows = (gamma * P - torch.eye(S)[:, None]).reshape(S * A, S)
    truth = linprog(np.ones(S), A_ub=rows.numpy(), b_ub=-R.reshape(-1).numpy(), bounds=(None, None)).x
    V, Q = value_iteration(P, R, gamma)
    np.testing.assert_allclose(V, truth, atol=1e-8)
    torch.testing.assert_close(Q.max(-1).values, V, rtol=0, atol=1e-9)
    torch.testing.assert_close(Q, R + gamma * P @ V)


def test_values_of_a_policy_against_simulation():
    P, R = random_mdp()
    pi, gamma = random_policy(), 0.8
    V, Q = policy_evaluation(P, R, pi, gamma)
    expected, state = np.zeros(7), np.eye(7)
    p_pi, r_pi = torch.einsum("sa,sat->st", pi, P).numpy(), (pi * R).sum(-1).numpy()
    for t in range(300):
        expected += gamma**t * state @ r_pi
        state = state @ p_pi
    np.testing.assert_allclose(V, expected, rtol=1e-10)
    torch.testing.assert_close((pi * Q).sum(-1), V)


def test_occupancy_is_the_discounted_sum_and_prices_the_rewards():
    P, R = random_mdp()
    pi, gamma = random_policy(), 0.8
    mu = torch.rand(7, dtype=torch.float64).softmax(-1)
    rho = occupancy(P, pi, mu, gamma)
    state, total = mu.clone(), torch.zeros(7, 3, dtype=torch.float64)
    for t in range(300):
        total += (1 - gamma) * gamma**t * state[:, None] * pi
        state = state @ torch.einsum("sa,sat->st", pi, P)
    torch.testing.assert_close(rho, total)
    assert rho.sum().item() == pytest.approx(1)
    assert (rho * R).sum().item() == pytest.approx((1 - gamma) * (mu @ policy_evaluation(P, R, pi, gamma)[0]).item())


def test_soft_values_are_optimal_for_the_regularised_objective():
    P, R = random_mdp()
    gamma, tau, lam, prior = 0.9, 0.3, 0.7, random_policy(seed=4)
    for kwargs in ({}, {"prior": prior, "lam": lam}):
        V, Q, pi = soft_value_iteration(P, R, gamma, tau, **kwargs)
        torch.testing.assert_close(pi.sum(-1), torch.ones(7, dtype=torch.float64))
        torch.testing.assert_close(Q, R + gamma * P @ V, rtol=0, atol=1e-8)

        def objective(policy, kwargs=kwargs):
            bonus = -tau * policy.log() - kwargs.get("lam", 0.0) * (policy.log() - prior.log())
            return policy_evaluation(P, (R + bonus), policy, gamma)[0]

        torch.testing.assert_close(objective(pi), V, rtol=0, atol=1e-8)
        for seed in range(5):
            other = (pi.log() + 0.05 * torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)
            assert (objective(other) < V).all()


def test_soft_values_at_no_temperature():
    P, R = random_mdp()
    V, Q = value_iteration(P, R, 0.9)
    soft, _, pi = soft_value_iteration(P, R, 0.9, 1e-4)
    torch.testing.assert_close(soft, V, rtol=0, atol=2e-3)
    assert torch.equal(pi.argmax(-1), Q.argmax(-1))


def test_kinds_and_precision():
    P, R = random_mdp()
    V, Q = value_iteration(P.numpy(), R.numpy(), 0.9)
    assert isinstance(V, np.ndarray) and isinstance(Q, np.ndarray)
    low, _ = value_iteration(P.float(), R.float(), 0.9)
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low, V, rtol=1e-4)
    assert isinstance(occupancy(P.numpy(), random_policy().numpy(), np.full(7, 1 / 7), 0.9), np.ndarray)


def test_a_maze_by_hand():
    P, R, maps = maze_mdp(["S.G", ".#X"])
    assert maps["state"].tolist() == [[0, 1, 2], [3, -1, 4]]
    assert maps["cell"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 2]]
    assert P.argmax(-1).tolist() == [[0, 3, 0, 1], [1, 1, 0, 2], [2] * 4, [0, 3, 3, 3], [4] * 4]
    assert torch.equal(P.max(-1).values, torch.ones(5, 4, dtype=torch.float64))
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[1, 3] = 1.0
    assert torch.equal(R, expected)
    V, _ = value_iteration(P, R, 0.9)
    torch.testing.assert_close(V, torch.tensor([0.9, 1.0, 0.0, 0.81, 0.0], dtype=torch.float64))
    # Undiscounted values exist as well, since the goal is terminal.
    torch.testing.assert_close(value_iteration(P, R, 1.0)[0], torch.tensor([1.0, 1, 0, 1, 0], dtype=torch.float64))


def test_slip_mixes_the_moves():
    P, R, _ = maze_mdp(["S.G", "X.."], slip=0.4)
    clean, reward, _ = maze_mdp(["S.G", "X.."])
    inner = [0, 1, 4, 5]
    torch.testing.assert_close(P[inner], 0.6 * clean[inner] + 0.4 * clean[inner].mean(1, keepdim=True))
    torch.testing.assert_close(R[inner], 0.6 * reward[inner] + 0.4 * reward[inner].mean(1, keepdim=True))
    assert R[0, 1] == pytest.approx(-0.7) and not R[[2, 3]].any()


def test_hitting_times_of_a_random_walk_and_of_a_trap():
    n = 6  # reflecting random walk on 0..n-1: from 0 to j takes j^2 steps
    p = torch.zeros(n, n, dtype=torch.float64)
    for i in range(1, n - 1):
        p[i, i - 1] = p[i, i + 1] = 0.5
    p[0, 1] = p[n - 1, n - 2] = 1.0
    h = hitting_times(p)
    torch.testing.assert_close(h[0], torch.arange(n, dtype=torch.float64) ** 2)
    torch.testing.assert_close(h, h.flip(0, 1))
    trap = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    inf = float("inf")
    assert hitting_times(trap).tolist() == [[0.0, inf, inf], [inf, 0.0, inf], [inf, inf, 0.0]]
    assert hitting_times(np.array([[0.75, 0.25], [0.0, 1.0]])).tolist() == [[0.0, 4.0], [inf, 0.0]]


def test_bad_mdps():
    P, R = random_mdp()
    pi = random_policy()
    for gamma in (-0.1, 1.5):
        with pytest.raises(ValueError, match="gamma"):
            value_iteration(P, R, gamma)
    with pytest.raises(ValueError, match="gamma"):
        policy_evaluation(P, R, pi, 1.0)
    with pytest.raises(ValueError, match="P must"):
        value_iteration(P[:, :, :-1], R, 0.9)
    with pytest.raises(ValueError, match="P must"):
        value_iteration(-P, R, 0.9)
    with pytest.raises(ValueError, match="R must"):
        value_iteration(P, R[:-1], 0.9)
    with pytest.raises(ValueError, match="pi must"):
        policy_evaluation(P, R, 2 * pi, 0.9)
    with pytest.raises(ValueError, match="mu must"):
        occupancy(P, pi, torch.ones(7), 0.9)
    with pytest.raises(ValueError, match="tau"):
        soft_value_iteration(P, R, 0.9, 0.0)
    with pytest.raises(ValueError, match="prior"):
        soft_value_iteration(P, R, 0.9, 0.1, lam=1.0)
    with pytest.raises(RuntimeError, match="converge"):
        value_iteration(P, R.abs() + 1, 1.0, max_iter=50)
    for grid in ([], ["ab", "a"], ["##"]):
        with pytest.raises(ValueError, match="grid"):
            maze_mdp(grid)
    with pytest.raises(ValueError, match="slip"):
        maze_mdp(["S"], slip=2)
