"""The tables against the rules walked by hand, and the environments against the tables."""

import itertools

import numpy as np
import pytest

from dlatlas.rl.envs.toy import (
    BatchedSlipperyGrid,
    BatchedTabular,
    BlindCliffwalk,
    Bridge,
    Chain,
    SlipperyGrid,
    blind_cliffwalk_mdp,
    bridge_mdp,
    chain_mdp,
    slippery_grid,
)


def optimal_values(P, R, gamma):
    V = np.zeros(len(P))
    for _ in range(2000):
        V = (R + gamma * P @ V).max(axis=1)
    return V


@pytest.mark.parametrize("tables", [chain_mdp(7), blind_cliffwalk_mdp(6, 3), bridge_mdp(4), slippery_grid(4, 0.3)])
def test_tables_are_markov_decision_processes(tables):
    P, R = tables
    assert P.shape == (*R.shape, len(P)) and (P >= 0).all()
    np.testing.assert_allclose(P.sum(axis=2), 1.0)


@pytest.mark.parametrize("n", [3, 8, 20])
def test_chain_follows_its_rules(n):
    env = Chain(n=n)
    rng = np.random.default_rng(n)
    for _ in range(20):
        obs, _ = env.reset(seed=0)
        s, drift = 1, rng.random()
        np.testing.assert_array_equal(obs, [1.0] * 2 + [0.0] * (n - 2))
        for t in range(1, n + 10):
            a = int(rng.random() < drift)
            s = min(s + 1, n - 1) if a else max(s - 1, 0)
            obs, reward, terminated, truncated, _ = env.step(a)
            np.testing.assert_array_equal(obs, [1.0] * (s + 1) + [0.0] * (n - 1 - s))
            assert reward == (0.001 if s == 0 else 1.0 if s == n - 1 else 0.0)
            assert not terminated and truncated == (t == n + 9)


def test_chain_returns_of_the_two_ends():
    for action, expected in ((1, 12.0), (0, 0.029)):
        env = Chain(n=20)
        env.reset(seed=0)
        assert sum(env.step(action)[1] for _ in range(29)) == pytest.approx(expected)
    gamma = 0.9
    assert optimal_values(*chain_mdp(10), gamma)[1] == pytest.approx(gamma**7 / (1 - gamma))


@pytest.mark.parametrize("n", [1, 4, 7])
def test_blind_cliffwalk_over_all_action_sequences(n):
    """Of 2^n sequences one earns the reward, and together they take 2^(n+1) - 2 transitions."""
    env, steps, wins = BlindCliffwalk(n=n, flips=5), 0, 0
    for actions in itertools.product(range(2), repeat=n):
        obs, _ = env.reset(seed=0)
        for s, a in enumerate(actions):
            np.testing.assert_array_equal(obs, np.eye(n)[s])
            obs, reward, terminated, truncated, _ = env.step(a)
            steps, wins = steps + 1, wins + reward
            assert not truncated and not (reward and not terminated)
            if terminated:
                assert not obs.any()
                break
        assert terminated or s == n - 1
    assert (steps, wins) == (2 ** (n + 1) - 2, 1.0)


def test_blind_cliffwalk_values_and_coins():
    n, gamma = 6, 0.9
    P, R = blind_cliffwalk_mdp(n, seed=2)
    np.testing.assert_allclose(optimal_values(P, R, gamma), [*(gamma ** (n - 1 - s) for s in range(n)), 0.0])
    coins = {tuple((P[s, :, s + 1] > 0).argmax() for s in range(n - 1)) for P, _ in (blind_cliffwalk_mdp(n, seed) for seed in range(20))}
    assert len(coins) > 5
    assert all(np.array_equal(a, b) for a, b in zip(blind_cliffwalk_mdp(n, 4), blind_cliffwalk_mdp(n, 4)))


def test_bridge_follows_its_rules():
    k = 4
    env, rng, goals, falls, late = Bridge(k=k), np.random.default_rng(0), 0, 0, 0
    for _ in range(400):
        s, _ = env.reset()
        x, y = 0, 1
        assert s == 1
        for t in range(1, 4 * k + 1):
            a = rng.choice(4, p=[0.4, 0.1, 0.1, 0.4])
            s, reward, terminated, truncated, _ = env.step(a)
            x, y = (x + 1, y) if a == 0 else (x, y - 1) if a == 1 else (x, y + 1) if a == 2 else (max(x - 1, 0), y)
            fell = y not in (0, 1, 2)
            assert s == (3 * (k + 1) if fell else 3 * x + y)
            assert (reward, terminated) == (float(x == k), fell or x == k)
            assert truncated == (t == 4 * k and not terminated)
            if terminated or truncated:
                goals, falls, late = goals + reward, falls + fell, late + truncated
                break
        else:
            pytest.fail("an episode did not end")
    assert min(goals, falls, late) > 0
    assert optimal_values(*bridge_mdp(15), 0.95)[1] == pytest.approx(0.95**14)


def test_slippery_grid_rows_by_hand():
    P, R = slippery_grid(5, 0.2, goal=(4, 4), pits=((2, 2),))
    cell = lambda row, column: 5 * row + column  # noqa: E731
    row = np.zeros(26)
    row[[cell(2, 1), cell(1, 0), cell(1, 2)]] = 0.8, 0.1, 0.1
    np.testing.assert_allclose(P[cell(1, 1), 0], row)  # down, astray to the left or right
    row = np.zeros(26)
    row[[cell(1, 0), cell(0, 1), cell(2, 1)]] = 0.8, 0.1, 0.1
    np.testing.assert_allclose(P[cell(1, 1), 1], row)  # left, astray up or down
    row = np.zeros(26)
    row[[cell(0, 0), cell(0, 1)]] = 0.9, 0.1
    np.testing.assert_allclose(P[cell(0, 0), 2], row)  # up from the corner: the border holds, also against a slip to the left
    for where, reward in ((cell(4, 4), 1.0), (cell(2, 2), -1.0)):
        np.testing.assert_array_equal(P[where, :, 25], 1.0)
        np.testing.assert_array_equal(R[where], reward)
    assert np.count_nonzero(R) == 8 and (P[25, :, 25] == 1).all()


def test_slippery_grid_without_slip_is_the_shortest_path():
    V = optimal_values(*slippery_grid(5, 0.0), 0.9)
    assert V[0] == pytest.approx(0.9**8)  # eight moves around the pits, paid on leaving the goal
    assert optimal_values(*slippery_grid(5, 0.4), 0.9)[0] < V[0]


def test_slippery_grid_episodes_have_the_mean_and_the_spread_of_the_tables():
    gamma, size, n = 0.9, 3, 6000
    P, R = slippery_grid(size, 0.3)
    pi = np.full(4, 0.25)
    P_pi, r = np.einsum("a,sat->st", pi, P), R @ pi
    mean = np.linalg.solve(np.eye(len(P)) - gamma * P_pi, r)
    # Second moment of the return: E[G^2] = r^2 + 2 gamma r E[V'] + gamma^2 E[G'^2]; r depends on the state alone here.
    second = np.linalg.solve(np.eye(len(P)) - gamma**2 * P_pi, r**2 + 2 * gamma * r * (P_pi @ mean))
    vec = BatchedSlipperyGrid(n, size=size, slip=0.3, steps=None)
    vec.reset(seed=0)
    rng, returns, running = np.random.default_rng(1), np.zeros(n), np.ones(n, dtype=bool)
    for t in range(300):
        _, rewards, terminated, truncated, _ = vec.step(rng.integers(4, size=n))
        returns += running * gamma**t * rewards
        running &= ~terminated
        assert not truncated.any()
    assert not running.any()
    deviation = np.sqrt(second[0] - mean[0] ** 2)
    assert abs(returns.mean() - mean[0]) < 4 * deviation / np.sqrt(n)
    assert returns.std() == pytest.approx(deviation, rel=0.05)


def test_tabular_samples_with_the_probabilities_of_its_tables():
    rng = np.random.default_rng(0)
    P, R = rng.dirichlet(np.ones(5), size=(5, 2)), rng.normal(size=(5, 2))
    P[:, :, 2] = 0.0  # a state that must never be visited, and one more at the end of the ladder
    P[:, :, 4] = 0.0
    P /= P.sum(axis=2, keepdims=True)
    n = 40_000
    vec = BatchedTabular(n, P, R, start=[0.25, 0.75, 0, 0, 0], obs="index")
    start, _ = vec.reset(seed=0)
    assert np.bincount(start, minlength=5)[:2] / n == pytest.approx([0.25, 0.75], abs=0.012)
    actions = rng.integers(2, size=n)
    after, rewards, *_ = vec.step(actions)
    np.testing.assert_array_equal(rewards, R[start, actions])
    for s, a in itertools.product((0, 1), (0, 1)):
        chosen = (start == s) & (actions == a)
        counts = np.bincount(after[chosen], minlength=5)
        assert counts[2] == counts[4] == 0
        np.testing.assert_allclose(counts / chosen.sum(), P[s, a], atol=0.03)


def test_observations_by_index_one_hot_and_features():
    features = np.random.default_rng(0).normal(size=(26, 3)).astype(np.float32)
    assert SlipperyGrid(obs="index").reset(seed=0)[0] == 0
    np.testing.assert_array_equal(SlipperyGrid(obs="one-hot").reset(seed=0)[0], np.eye(26)[0])
    np.testing.assert_array_equal(SlipperyGrid(obs=features).reset(seed=0)[0], features[0])
    assert SlipperyGrid().observation_space.shape == (25,)
    assert Bridge(k=5).observation_space.n == 19


def test_bad_input():
    for make, name in (
        (lambda: chain_mdp(2), "n must"),
        (lambda: blind_cliffwalk_mdp(0), "n must"),
        (lambda: bridge_mdp(0), "k must"),
        (lambda: slippery_grid(1), "size"),
        (lambda: slippery_grid(slip=1.5), "slip"),
        (lambda: slippery_grid(goal=(5, 5)), "goal and pits"),
        (lambda: slippery_grid(pits=((4, 4),)), "goal and pits"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
