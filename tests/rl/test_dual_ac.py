"""The Lagrangian against linear programming, NumPy and finite differences."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from dlatlas.rl.dual_ac import DualAC, lagrangian, path_lagrangian, recover_policy, solve_tabular
from dlatlas.rl.envs.control import BatchedPendulum

F64, GAMMA = torch.float64, 0.9


def mdp(S=6, A=3, seed=0):
    r = np.random.default_rng(seed)
    P, R, mu = r.dirichlet(np.ones(S), size=(S, A)), r.random((S, A)), r.dirichlet(np.ones(S))
    return tuple(torch.tensor(x, dtype=F64) for x in (P, R, mu))


def linear_programme(P, R, mu):
    """Minimise (1-gamma) mu.V subject to V >= R + gamma P V; the duals of the constraints are rho."""
    P, R, mu = (x.numpy() for x in (P, R, mu))
    S, A = R.shape
    rows = (GAMMA * P - np.eye(S)[:, None, :]).reshape(S * A, S)
    out = linprog((1 - GAMMA) * mu, A_ub=rows, b_ub=-R.reshape(-1), bounds=(None, None), method="highs")
    return torch.tensor(out.x), torch.tensor(-out.ineqlin.marginals.reshape(S, A))


def test_strong_duality_and_the_meaning_of_rho():
    P, R, mu = mdp()
    V, rho = linear_programme(P, R, mu)
    assert float(lagrangian(P, R, mu, GAMMA, V, rho)) == pytest.approx((1 - GAMMA) * float(mu @ V), abs=1e-9)
    assert float(rho.sum()) == pytest.approx(1)
    pi, alpha = recover_policy(rho)
    greedy = (R + GAMMA * P @ V).argmax(1)
    assert (pi.argmax(1) == greedy)[alpha > 1e-9].all()
    P_pi = P[torch.arange(6), greedy]
    occupancy = (1 - GAMMA) * torch.linalg.solve((torch.eye(6, dtype=F64) - GAMMA * P_pi).T, mu)
    torch.testing.assert_close(alpha, occupancy)


def test_saddle_point():
    P, R, mu = mdp(seed=1)
    V, rho = (x.requires_grad_() for x in linear_programme(P, R, mu))
    L = lagrangian(P, R, mu, GAMMA, V, rho)
    slope_v, slope_rho = torch.autograd.grad(L, (V, rho))
    assert slope_v.abs().max() < 1e-9  # no better V
    assert slope_rho.max() < 1e-9  # no better rho >= 0
    assert (slope_rho * rho).abs().max() < 1e-9


def test_in_numpy_with_loops():
    P, R, mu = mdp(4, 2)
    V, rho = torch.randn(4, dtype=F64), torch.rand(4, 2, dtype=F64)
    expected = (1 - GAMMA) * sum(mu[s] * V[s] for s in range(4))
    for s in range(4):
        for a in range(2):
            after = sum(P[s, a, t] * V[t] for t in range(4))
            expected = expected + rho[s, a] * (R[s, a] + GAMMA * after - V[s])
    torch.testing.assert_close(lagrangian(P, R, mu, GAMMA, V, rho), expected)


def test_linear_in_rho():
    P, R, mu = mdp()
    V, rho = torch.randn(6, dtype=F64), torch.rand(6, 3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(lagrangian(P, R, mu, GAMMA, V, rho), rho)
    with torch.no_grad():
        for s, a in ((0, 0), (3, 2)):
            other = rho.clone()
            other[s, a] += 5.0  # any step: the function is linear
            change = lagrangian(P, R, mu, GAMMA, V, other) - lagrangian(P, R, mu, GAMMA, V, rho)
            torch.testing.assert_close(change / 5, slope[s, a])


@pytest.mark.parametrize("weighted", [False, True])
def test_path_lagrangian_with_loops(weighted):
    g = torch.Generator().manual_seed(0)
    init, v0, vl, b0 = (torch.randn(n, dtype=F64, generator=g) for n in (7, 5, 5, 4))
    r, br = torch.randn(5, 3, dtype=F64, generator=g), torch.randn(4, 8, dtype=F64, generator=g)
    w = torch.rand(5, dtype=F64, generator=g) if weighted else None
    delta = [sum(GAMMA**i * float(r[b, i]) for i in range(3)) + GAMMA**3 * float(vl[b]) - float(v0[b]) for b in range(5)]
    miss = [sum(GAMMA**i * float(br[c, i]) for i in range(8)) - float(b0[c]) for c in range(4)]
    expected = (1 - GAMMA**3) * float(init.mean()) + np.average(delta, weights=w) + 0.7 * np.mean(np.square(miss))
    assert float(path_lagrangian(init, v0, r, vl, br, b0, GAMMA, 0.7, w)) == pytest.approx(expected)
    if weighted:
        torch.testing.assert_close(
            path_lagrangian(init, v0, r, vl, br, b0, GAMMA, 0.7, 9 * w), path_lagrangian(init, v0, r, vl, br, b0, GAMMA, 0.7, w)
        )


def test_one_step_samples_estimate_the_exact_lagrangian():
    P, R, mu = mdp()
    g = torch.Generator().manual_seed(0)
    V, rho = torch.randn(6, dtype=F64, generator=g), torch.rand(6, 3, dtype=F64, generator=g)
    rho = rho / rho.sum()
    n = 200_000
    pair = torch.multinomial(rho.flatten(), n, replacement=True, generator=g)
    s, a = pair // 3, pair % 3
    after = torch.multinomial(P[s, a], 1, generator=g).squeeze(1)
    start = torch.multinomial(mu, n, replacement=True, generator=g)
    estimate = path_lagrangian(
        V[start], V[s], R[s, a].unsqueeze(1), V[after], torch.zeros(1, 1, dtype=F64), torch.zeros(1, dtype=F64), GAMMA, 0.0
    )
    assert float(estimate) == pytest.approx(float(lagrangian(P, R, mu, GAMMA, V, rho)), abs=0.02)


def test_recover_policy():
    rho = torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.6, 0.0]], dtype=F64)
    pi, alpha = recover_policy(rho)
    np.testing.assert_allclose(pi, [[0.25, 0.75], [0.5, 0.5], [1, 0]])
    np.testing.assert_allclose(alpha, [0.4, 0, 0.6])


@pytest.mark.parametrize("with_other_behaviour", [False, True])
def test_the_regularised_game_ends_at_the_optimum(with_other_behaviour):
    P, R, _ = mdp()
    mu = torch.full((6,), 1 / 6, dtype=F64)
    expected, _ = linear_programme(P, R, mu)
    behaviour = torch.full((6, 3), 1 / 3, dtype=F64) if with_other_behaviour else None
    # The other behaviour makes the weights grow, so the steps must be smaller.
    settings = {"eta_v": 0.2, "step": 0.06} if with_other_behaviour else {}
    path, V, rho = solve_tabular(P, R, mu, GAMMA, behaviour=behaviour, iterations=2500, **settings)
    assert path.shape == (2500, 6) and torch.equal(path[-1], V)
    assert (V - expected).abs().max() < 0.02
    pi, alpha = recover_policy(rho)
    assert (pi.argmax(1) == (R + GAMMA * P @ expected).argmax(1))[alpha > 1e-3].all()
    # Total weight: one in the plain programme; another behaviour's returns pull V down, and the weights pull it back.
    assert (float(rho.sum()) > 1.5) == with_other_behaviour
    path, *_ = solve_tabular(P, R, mu, GAMMA, eta_v=0.0, iterations=2500, step=0.03)
    assert (path[-1] - expected).abs().max() > 0.2


def test_bad_input():
    P, R, mu = mdp()
    V, rho, v, r = mu, R, torch.zeros(4), torch.zeros(4, 2)
    for call in (
        lambda: lagrangian(P, R, mu, 1.0, V, rho),
        lambda: lagrangian(P, R, mu, GAMMA, V[:3], rho),
        lambda: lagrangian(P, R, mu, GAMMA, V, -rho),
        lambda: lagrangian(2 * P, R, mu, GAMMA, V, rho),
        lambda: lagrangian(P[:, :2], R, mu, GAMMA, V, rho),
        lambda: path_lagrangian(v, v, r, v[:2], r, v, 0.9, 1.0),
        lambda: path_lagrangian(v, v, r, v, r, v[:1], 0.9, 1.0),
        lambda: path_lagrangian(v[:0], v, r, v, r, v, 0.9, 1.0),
        lambda: path_lagrangian(v, v, r, v, r, v, 0.9, -1.0),
        lambda: path_lagrangian(v, v, r, v, r, v, 1.1, 1.0),
        lambda: path_lagrangian(v, v, r, v, r, v, 0.9, 1.0, torch.zeros(4)),
        lambda: path_lagrangian(v, v, r, v, r, v, 0.9, 1.0, torch.ones(3)),
        lambda: recover_policy(-rho),
        lambda: recover_policy(mu),
        lambda: solve_tabular(P, R, mu, GAMMA, eta_v=-1.0),
        lambda: solve_tabular(P, R, mu, GAMMA, iterations=0),
    ):
        with pytest.raises(ValueError, match=r"must|expected"):
            call()


def hand_segment(T=7, B=2):
    g = torch.Generator().manual_seed(0)
    dones, cuts = torch.zeros(T, B), torch.zeros(T, B)
    dones[3, 0] = 1  # the first copy terminates, the second one is cut by a time limit
    cuts[4, 1] = 1
    return {
        "obs": torch.randn(T, B, 2, generator=g),
        "next_obs": torch.randn(T, B, 2, generator=g),
        "actions": torch.randn(T, B, 1, generator=g),
        "rewards": torch.randn(T, B, generator=g),
        "dones": dones,
        "truncations": cuts,
        "valid": torch.ones(T, B, dtype=torch.bool),
    }


def test_paths_stop_at_terminations_and_leave_out_what_a_limit_cuts():
    torch.manual_seed(0)
    agent = DualAC(2, 1, k=2, horizon=7, gamma=0.5, reward_scale=2.0)
    batch = hand_segment()
    paths = agent.paths(batch)
    rows, first, last, goes_on = [], [], [], []
    for t in range(5):
        for b in range(2):
            r, alive, cut = [], 1.0, False
            for i in range(3):
                r.append(2 * alive * float(batch["rewards"][t + i, b]))
                cut |= i < 2 and alive > 0 and bool(batch["truncations"][t + i, b])
                alive *= 1 - float(batch["dones"][t + i, b])
            if not cut:
                rows.append(r)
                first.append(batch["obs"][t, b])
                last.append(batch["next_obs"][t + 2, b])
                goes_on.append(alive)
    assert len(rows) == 8  # two paths of the second copy are cut
    np.testing.assert_allclose(paths["rewards"], rows, rtol=1e-6)
    torch.testing.assert_close(paths["first"], torch.stack(first))
    torch.testing.assert_close(paths["last"], torch.stack(last))
    assert paths["goes_on"].tolist() == goes_on
    with torch.no_grad():
        v_first, v_last = agent.net.value(paths["first"]), agent.net.value(paths["last"])
    wanted = [r[0] + 0.5 * r[1] + 0.25 * r[2] + 0.125 * float(after) - float(before) for r, after, before in zip(rows, v_last, v_first)]
    np.testing.assert_allclose(agent.delta(paths, v_first, v_last), wanted, rtol=1e-4, atol=1e-5)
    expected = torch.cat((batch["obs"][0], batch["obs"][4, :1], batch["obs"][5, 1:]))
    torch.testing.assert_close(agent.starts, expected)
    with torch.no_grad():
        tail = float(agent.net.value(batch["next_obs"][4, 1:2]))
    r = 2 * batch["rewards"][:, 1]
    returns = paths["returns"].view(7, 2)
    assert float(returns[3, 1]) == pytest.approx(float(r[3] + 0.5 * (r[4] + 0.5 * tail)), rel=1e-5)
    assert float(returns[2, 0]) == pytest.approx(float(2 * (batch["rewards"][2, 0] + 0.5 * batch["rewards"][3, 0])), rel=1e-5)


def test_an_episode_may_begin_with_a_segment():
    torch.manual_seed(0)
    agent = DualAC(2, 1, k=2, horizon=7, gamma=0.5)
    first, second, third = hand_segment(), hand_segment(), hand_segment()
    first["dones"][6, 1] = 1  # the second copy ends with the last row of the first segment
    for name in ("dones", "truncations"):
        second[name] = torch.zeros(7, 2)
    second["truncations"][6, 0] = 1
    agent.paths(first)
    begun = [first["obs"][0], first["obs"][4, :1], first["obs"][5, 1:]]
    torch.testing.assert_close(agent.starts, torch.cat(begun))
    agent.paths(second)
    begun += [second["obs"][0, 1:]]
    torch.testing.assert_close(agent.starts, torch.cat(begun))
    agent.paths(third)
    torch.testing.assert_close(agent.starts, torch.cat([*begun, third["obs"][0, :1], third["obs"][4, :1], third["obs"][5, 1:]]))


def test_the_starts_of_all_episodes_are_remembered():
    for horizon in (50, 70):  # episodes of 200 steps end with a segment, or inside of one
        torch.manual_seed(0)
        agent = DualAC(3, 1, horizon=horizon, hidden=(8,), value_steps=1)
        history = agent.fit(BatchedPendulum(4), 4 * 630, seed=2)
        assert len(history["return"]) == 12 and len(agent.starts) == 16  # twelve episodes are over, four more have begun
        assert agent.starts[:, 2].abs().max() <= 1  # the pendulum starts slowly
        agent.fit(BatchedPendulum(4), 200, seed=3)
        assert len(agent.starts) == 20  # the environment was reset


def hand_critic(agent, batch):
    """Loss of the critic and surprise of the paths of three steps, by loops, before the step is taken."""
    with torch.no_grad():
        v, after = agent.net.value(batch["obs"]).tolist(), agent.net.value(batch["next_obs"]).tolist()
    r, dones, cuts = (batch[name].tolist() for name in ("rewards", "dones", "truncations"))
    starts = [v[0][0], v[0][1], v[4][0], v[5][1]]
    deltas, misses = [], []
    for t in range(5):
        for b in range(2):
            total, alive, cut = 0.0, 1, False
            for i in range(3):
                total += 0.9**i * alive * r[t + i][b]
                cut |= i < 2 and alive > 0 and cuts[t + i][b] > 0
                alive *= 1 - dones[t + i][b]
            if not cut:
                deltas.append(total + 0.9**3 * alive * after[t + 2][b] - v[t][b])
    for b in range(2):
        tail = after[6][b]
        for t in range(6, -1, -1):
            tail = after[t][b] if cuts[t][b] else tail
            tail = r[t][b] + 0.9 * (1 - dones[t][b]) * tail
            misses.append(tail - v[t][b])
    return (1 - 0.9**3) * np.mean(starts), np.array(deltas), np.mean(np.square(misses))


def test_an_update_is_the_lagrangian_and_an_ascent_in_the_weights():
    torch.manual_seed(0)
    agent = DualAC(2, 1, k=2, horizon=7, gamma=0.9, eta_v=0.7, value_steps=1, alpha_step=0.8)
    with torch.no_grad():
        agent.net.critic[-1].bias += 2.0  # values that count
    batch = hand_segment()
    batch["rewards"] = batch["rewards"].exp()  # skewed: the largest surprise is not minus the smallest one
    init, delta, miss = hand_critic(agent, batch)
    report = agent.update(batch)
    assert report["lagrangian"] == pytest.approx(init + delta.mean() + 0.7 * miss, rel=1e-4)
    z = np.clip((delta - delta.mean()) / delta.std(ddof=1), -3, 3)
    weights = np.exp(0.8 * z) / np.exp(0.8 * z).sum()
    falling = np.exp(-0.8 * z) / np.exp(-0.8 * z).sum()
    assert report["largest_weight"] == pytest.approx(len(z) * weights.max(), rel=1e-4)
    assert abs(weights.max() / falling.max() - 1) > 0.1


def test_a_game_that_diverges_says_so():
    P = torch.eye(2, dtype=F64).repeat_interleave(2, 0).view(2, 2, 2)
    with pytest.raises(FloatingPointError, match="diverged in round"):
        solve_tabular(P, torch.ones(2, 2, dtype=F64), torch.full((2,), 0.5, dtype=F64), 0.9, eta_v=0.0, lr=1e307)


def test_the_agent_climbs_towards_the_better_action():
    torch.manual_seed(0)
    agent = DualAC(2, 1, k=0, horizon=4, gamma=0.0, max_kl=0.05)
    g = torch.Generator().manual_seed(5)  # not the agent's own stream
    for _ in range(40):
        obs = torch.ones(4, 64, 2)
        actions = torch.as_tensor(agent.act(obs.flatten(0, 1))).view(4, 64, 1)
        rewards = -(actions[..., 0] - 1).square() + 0.1 * torch.randn(4, 64, generator=g)
        zero = torch.zeros(4, 64)
        report = agent.update(
            {"obs": obs, "next_obs": obs, "actions": actions, "rewards": rewards, "dones": zero, "truncations": zero, "valid": zero == 0}
        )
    assert float(agent.act(torch.ones(1, 2), deterministic=True)[0, 0]) == pytest.approx(1, abs=0.2)
    assert report.keys() == {"lagrangian", "kl", "largest_weight"} and 1 < report["largest_weight"] < 1.4


def test_the_critic_without_a_future_predicts_the_reward():
    """gamma = 0 and a fixed policy: V minimises mean V(start) - mean_alpha V(s) + eta (r - V)^2, and alpha is the visited distribution."""
    torch.manual_seed(0)
    agent = DualAC(2, 1, k=0, horizon=4, gamma=0.0, alpha_step=0.0, value_steps=300, lr=1e-2)
    obs, zero = torch.ones(4, 64, 2), torch.zeros(4, 64)
    agent.update(
        {
            "obs": obs,
            "next_obs": obs,
            "actions": torch.zeros(4, 64, 1),
            "rewards": zero + 3,
            "dones": zero,
            "truncations": zero,
            "valid": zero == 0,
        }
    )
    assert float(agent.net.value(torch.ones(1, 2)).detach()) == pytest.approx(3, abs=0.05)


def test_fit_repeats_itself():
    def run():
        torch.manual_seed(0)
        return DualAC(3, 1, horizon=50, hidden=(8,)).fit(BatchedPendulum(4), 1000, seed=2)

    first, second = run(), run()
    assert first["return"] == second["return"] and len(first["return"]) == 4 and first["update"] == [200, 400, 600, 800, 1000]
    assert all(0 <= k <= 0.015 for k in first["kl"])


@pytest.mark.parametrize("bad", [{"k": 128}, {"k": -1}, {"gamma": 1.0}, {"eta_v": -1.0}, {"alpha_step": -1.0}, {"value_steps": 0}])
def test_bad_agents(bad):
    with pytest.raises(ValueError, match=r"must|expected"):
        DualAC(3, 1, **bad)
