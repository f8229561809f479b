"""Windows of rewards against loops, and Q_MC of a fixed policy against backward induction."""

import numpy as np
import pytest
import torch

from dlatlas.rl.envs.toy import BatchedChain, BatchedTabular
from dlatlas.rl.kit.rollout import as_vector
from dlatlas.rl.monte_carlo import QMC, NStepQ, finite_horizon_returns, nstep_q_targets


def segment(T=23, B=5, seed=0, p=0.15):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(T, B, dtype=torch.float64, generator=g)
    return rewards, torch.rand(T, B, generator=g) < p, torch.randn(T, B, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("horizon", [1, 2, 5, 22, 23, 24, 60])
def test_sums_and_their_validity_in_a_loop(horizon):
    rewards, dones, _ = segment()
    got, valid = finite_horizon_returns(rewards, dones, horizon)
    T, B = rewards.shape
    for t in range(T):
        for b in range(B):
            total, complete = 0.0, False
            for i in range(horizon):
                if t + i == T:
                    break
                total += float(rewards[t + i, b])
                complete = i == horizon - 1 or bool(dones[t + i, b])
                if dones[t + i, b]:
                    break
            assert got[t, b] == pytest.approx(total, abs=1e-12)
            assert bool(valid[t, b]) == complete
    assert valid.dtype == torch.bool


def test_limits_of_the_horizon():
    rewards, dones, _ = segment()
    one, valid = finite_horizon_returns(rewards, dones, 1)
    torch.testing.assert_close(one, rewards)
    assert valid.all()
    never = torch.zeros_like(dones)
    long, valid = finite_horizon_returns(rewards, never, 1000)
    torch.testing.assert_close(long, rewards.flip(0).cumsum(0).flip(0))
    assert not valid.any()


def test_float32_does_not_lose_the_digits_of_a_long_sum():
    rewards = torch.rand(20_000, 1) + 100
    got, _ = finite_horizon_returns(rewards, torch.zeros(20_000, 1), 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[-3], rewards[-3:].sum(0))


@pytest.mark.parametrize("n", [1, 3, 20, 40])
def test_nstep_targets_in_a_loop(n):
    rewards, dones, ahead = segment(seed=1)
    got, gamma = nstep_q_targets(rewards, dones, ahead, 0.9, n), 0.9
    T, B = rewards.shape
    for t in range(T):
        for b in range(B):
            total, k = 0.0, 0
            while True:
                total += gamma**k * float(rewards[t + k, b])
                k += 1
                if dones[t + k - 1, b]:
                    break
                if k == n or t + k == T:
                    total += gamma**k * float(ahead[t + k - 1, b])
                    break
            assert got[t, b] == pytest.approx(total, abs=1e-10)


def test_averages_of_windows_are_the_values_of_backward_induction():
    """A random chain under a fixed policy: the mean window that starts in s is (sum of h powers of P) r."""
    rng, h = np.random.default_rng(0), 6
    P, r = rng.dirichlet(np.ones(4) * 0.5, size=4), 1 + rng.normal(size=4)
    value = np.zeros(4)
    for _ in range(h):
        value = r + P @ value
    T, B = 60, 4000
    states = np.zeros((T, B), dtype=int)
    states[0] = rng.integers(4, size=B)
    for t in range(1, T):
        states[t] = (P.cumsum(1)[states[t - 1]] < rng.random(B)[:, None]).sum(1)
    returns, valid = finite_horizon_returns(torch.as_tensor(r[states]), torch.zeros(T, B), h)
    assert valid.sum() == (T - h + 1) * B
    tabular = [returns[valid & torch.as_tensor(states == s)].mean().item() for s in range(4)]
    np.testing.assert_allclose(tabular, value, atol=0.05)
    padded = [returns[torch.as_tensor(states == s)].mean().item() for s in range(4)]  # what a missing mask would learn
    assert np.abs(np.array(padded) - value).max() > 0.05


def test_bad_input():
    with pytest.raises(ValueError, match=r"must both be \[T, B\]"):
        finite_horizon_returns(torch.zeros(3, 2), torch.zeros(3, 1), 2)
    with pytest.raises(ValueError, match=r"must both be \[T, B\]"):
        finite_horizon_returns(torch.zeros(3), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="horizon"):
        finite_horizon_returns(torch.zeros(3, 2), torch.zeros(3, 2), 0)
    for gamma, n in ((1.5, 2), (0.9, 0)):
        with pytest.raises(ValueError):
            nstep_q_targets(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), gamma, n)


def test_windows_do_not_go_on_beyond_a_cut():
    rewards, cuts = torch.ones(10, 1, dtype=torch.float64), torch.zeros(10, 1)
    cuts[4] = 1
    got, valid = finite_horizon_returns(rewards, torch.zeros(10, 1), 3, truncations=cuts)
    assert got[:, 0].tolist() == [3, 3, 3, 2, 1, 3, 3, 3, 2, 1]
    assert valid[:, 0].tolist() == [True] * 3 + [False] * 2 + [True] * 3 + [False] * 2
    both, valid = finite_horizon_returns(rewards, cuts, 3, truncations=cuts)  # an end in the same step closes the window
    assert valid[:, 0].tolist() == [True] * 8 + [False] * 2 and both[3] == 2
    ahead = 10 * torch.arange(1.0, 11, dtype=torch.float64)[:, None]
    goal = nstep_q_targets(rewards, torch.zeros(10, 1), ahead, 0.5, 2, truncations=cuts)
    assert goal[4] == 1 + 0.5 * 50 and goal[3] == 1.5 + 0.25 * 50 and goal[2] == 1.5 + 0.25 * 40


class Clock(BatchedTabular):
    """Seven states in a ring, the reward is the number of the state; cut after `steps` steps or ended in state 6."""

    def __init__(self, n, steps=None, end=False):
        P = np.zeros((7, 2, 7))
        P[np.arange(7), :, (np.arange(7) + 1) % 7] = 1
        super().__init__(n, P, np.repeat(np.arange(7.0)[:, None], 2, 1), steps=steps, terminal=[6] if end else ())


def learned(agent, env, steps):
    rows, targets = [], agent.targets
    agent.targets = lambda segment: rows.append(targets(segment)) or rows[-1]
    history = agent.fit(env, steps, seed=0)
    out = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    return out["obs"].argmax(1), out["targets"], history


@pytest.mark.parametrize("segment", [3, 5, 40])
def test_windows_cross_the_borders_of_segments_and_every_one_is_learned_once(segment):
    states, targets, _ = learned(QMC(7, 2, horizon=4, segment=segment), Clock(3), 3 * 120)
    total = -(-120 // segment) * segment
    assert len(states) == 3 * (total - 3)
    wanted = torch.tensor([sum((s + i) % 7 for i in range(4)) for s in range(7)], dtype=torch.float32)
    torch.testing.assert_close(targets, wanted[states])


def test_ends_and_limits_of_episodes():
    states, targets, history = learned(QMC(7, 2, horizon=4, segment=8), Clock(2, end=True), 2 * 48)
    torch.testing.assert_close(targets, torch.tensor([6.0, 10, 14, 12, 9, 5])[states])  # state 6 ends the episode on arrival
    assert set(states.tolist()) == set(range(6)) and set(history["return"]) == {15.0}
    states, targets, _ = learned(QMC(7, 2, horizon=4, segment=8), Clock(2, steps=6), 2 * 48)
    assert set(states.tolist()) == {0, 1, 2}  # the windows of 3, 4 and 5 would go beyond the limit
    states, targets, _ = learned(QMC(7, 2, horizon=4, segment=8, limit_is_end=True), Clock(2, steps=6), 2 * 48)
    torch.testing.assert_close(targets, torch.tensor([6.0, 10, 14, 12, 9, 5])[states])
    states, targets, _ = learned(QMC(7, 2, horizon=1, segment=8), Clock(2, steps=6), 2 * 48)
    torch.testing.assert_close(targets, states.float())


def test_targets_of_the_temporal_difference_twin():
    agent = NStepQ(7, 2, n=2, gamma=0.5, segment=6, lr=0.0)
    with torch.no_grad():
        best = agent.online(torch.eye(7)).amax(1)
    states, targets, _ = learned(agent, Clock(2, steps=5), 2 * 60)
    wanted = torch.stack([s + 0.5 * (s + 1) + 0.25 * best[s + 2] if s < 4 else s + 0.5 * best[s + 1] for s in range(5)])
    close = torch.isclose(targets, wanted[states], atol=1e-5)
    cut_short = torch.isclose(targets, (states + 0.5 * best[(states + 1) % 7]), atol=1e-5)  # last step of a segment
    assert (close | cut_short).all() and close.float().mean() > 0.8


def test_learning_a_small_task_and_repeating_it():
    def run(agent):
        torch.manual_seed(0)
        return agent().fit(BatchedChain(16, n=4), 16 * 13 * 60, seed=1)

    for agent in (lambda: QMC(4, 2, 8, epsilon=(1.0, 0.1, 5000), lr=5e-3), lambda: NStepQ(4, 2, 5, epsilon=(1.0, 0.1, 5000), lr=5e-3)):
        history = run(agent)
        assert np.mean(history["return"][-100:]) > 2 * np.mean(history["return"][:50]) > 0
        assert run(agent) == history


def test_bad_agents():
    for make in (lambda: QMC(2, 2, 0), lambda: NStepQ(2, 2, 0), lambda: NStepQ(2, 2, gamma=1.5), lambda: QMC(2, 2, segment=0),
                 lambda: QMC(2, 2, epsilon=(2.0, 0.1, 10))):  # fmt: skip
        with pytest.raises(ValueError):
            make()


def test_a_second_fit_starts_its_returns_anew():
    env, agent = as_vector(Clock(2, steps=6)), QMC(7, 2, horizon=4, segment=4)
    assert agent.fit(env, 8)["return"] == []  # four steps of an episode of six
    assert agent.fit(env, 2 * 12)["return"] == [15.0] * 4  # 0 + 1 + ... + 5
