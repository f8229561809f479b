"""MPO's E-step and M-step against scipy, torch.distributions and closed forms, and the agent on a problem with a known answer."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch.distributions import Independent, Normal, kl_divergence

from dlatlas.rl.envs.control import BatchedPendulum
from dlatlas.rl.mpo import MPO, decoupled_kl, gaussian_m_step, mpo_weights, solve_temperature, temperature_dual

F64 = torch.float64


def values(S=4, N=9, seed=0):
    return torch.randn(S, N, dtype=F64, generator=torch.Generator().manual_seed(seed))


def divergence(q, eta):
    """Mean KL(weights || uniform), in NumPy."""
    w = np.exp((q - q.max(1, keepdims=True)) / eta)
    w /= w.sum(1, keepdims=True)
    return float((w * np.log(np.maximum(w * q.shape[1], 1e-300))).sum(1).mean())


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 300.0])
def test_the_temperature_makes_the_divergence_epsilon(epsilon, scale):
    q = values() * scale
    eta = brentq(lambda x: divergence(q.numpy(), x) - epsilon, 1e-3 * scale, 1e3 * scale, xtol=1e-12)
    assert float(solve_temperature(q, epsilon, lowest=1e-8)) == pytest.approx(eta, rel=1e-5)
    dual = minimize_scalar(
        lambda x: float(temperature_dual(q, torch.tensor(x, dtype=F64), epsilon)),
        bounds=(1e-3 * scale, 1e3 * scale),
        method="bounded",
        options={"xatol": 1e-9 * scale},
    )
    assert dual.x == pytest.approx(eta, rel=1e-3)
    w = mpo_weights(q, torch.tensor(eta))
    assert float((w * (w * q.shape[1]).log()).sum(1).mean()) == pytest.approx(epsilon, rel=1e-6)


def test_the_slope_of_the_dual_is_epsilon_minus_the_divergence():
    q, eta = values(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(temperature_dual(q, eta, 0.1), eta)
    assert float(slope) == pytest.approx(0.1 - divergence(q.numpy(), 0.7))


def test_dual_in_numpy_convex_and_a_soft_maximum():
    q = values()
    etas = np.geomspace(0.05, 50, 60)
    g = np.array([float(temperature_dual(q, torch.tensor(e, dtype=F64), 0.2)) for e in etas])
    plain = [0.2 * e + e * np.mean(np.log(np.mean(np.exp(q.numpy() / e), 1))) for e in etas]
    np.testing.assert_allclose(g, plain, rtol=1e-10)
    inner = (g[:-2] * (etas[2:] - etas[1:-1]) + g[2:] * (etas[1:-1] - etas[:-2])) / (etas[2:] - etas[:-2])
    assert (g[1:-1] <= inner + 1e-12).all()
    soft = g - 0.2 * etas
    assert (soft >= float(q.mean()) - 1e-12).all() and (soft <= float(q.amax(1).mean())).all()


def test_limits_of_epsilon():
    q = values()
    assert float(solve_temperature(q, 2 * math.log(9))) == pytest.approx(1e-4, rel=1e-3)  # the bound is idle
    best = mpo_weights(q, solve_temperature(q, 3.0))
    torch.testing.assert_close(best.amax(1), torch.ones(4, dtype=F64))
    nearly = mpo_weights(q, solve_temperature(q, 1e-8))
    torch.testing.assert_close(nearly, torch.full_like(q, 1 / 9), atol=1e-3, rtol=0)
    assert float(solve_temperature(torch.ones(2, 5), 0.1)) < 0.01  # equal values: any temperature will do
    assert math.isfinite(float(temperature_dual(1e6 * q, torch.tensor(1e-3, dtype=F64), 0.1)))


def test_the_parts_of_the_divergence():
    g = torch.Generator().manual_seed(0)
    m0, m1 = torch.randn(5, 3, dtype=F64, generator=g), torch.randn(5, 3, dtype=F64, generator=g)
    s0, s1 = torch.rand(5, 3, dtype=F64, generator=g) + 0.2, torch.rand(5, 3, dtype=F64, generator=g) + 0.2

    def kl(m, s):
        return kl_divergence(Independent(Normal(m0, s0), 1), Independent(Normal(m, s), 1))

    only_mean, only_std = decoupled_kl(m0, s0, m1, s0), decoupled_kl(m0, s0, m0, s1)
    torch.testing.assert_close(only_mean[0], kl(m1, s0))
    torch.testing.assert_close(only_std[1], kl(m0, s1))
    assert only_mean[1].abs().max() < 1e-12 and only_std[0].abs().max() < 1e-12
    both = decoupled_kl(m0, s0, m1, s1)
    torch.testing.assert_close(both, (only_mean[0], only_std[1]))


def test_the_closed_m_step_is_the_constrained_optimum():
    """Against a projected search: no feasible step along the path of multipliers or at random has more likelihood."""
    g = torch.Generator().manual_seed(0)
    m0, s0 = torch.zeros(1, 2, dtype=F64), torch.tensor([[0.5, 1.0]], dtype=F64)
    a = m0 + s0 * torch.randn(1, 30, 2, dtype=F64, generator=g)
    w = torch.softmax(4 * a.sum(2) - a.square().sum(2), 1)
    mean, std = gaussian_m_step(a, w, m0, s0, 0.02, 0.005)
    kl_mean, kl_std = decoupled_kl(m0, s0, mean, std)
    assert float(kl_mean) == pytest.approx(0.02) and float(kl_std) == pytest.approx(0.005)

    def likelihood(m, s):
        return float((w * (Normal(m, s0).log_prob(a) + Normal(m0, s).log_prob(a)).sum(2)).sum())

    best = likelihood(mean, std)
    for _ in range(300):
        d_mean, d_std = (0.1 * torch.randn(1, 2, dtype=F64, generator=g) for _ in range(2))
        m, s = mean + d_mean, std * d_std.exp()
        k_mean, k_std = decoupled_kl(m0, s0, m, s)
        if float(k_mean) <= 0.02 and float(k_std) <= 0.005:
            assert likelihood(m, s) <= best + 1e-9
    free_mean, free_std = gaussian_m_step(a, w, m0, s0, math.inf, math.inf)
    torch.testing.assert_close(free_mean, (w.unsqueeze(2) * a).sum(1))
    torch.testing.assert_close(free_std.square(), (w.unsqueeze(2) * a.square()).sum(1))


def agent(**kw):
    torch.manual_seed(0)
    return MPO(3, 2, **{"low": -2, "high": 2, "batch_size": 64, "lr": 5e-3, **kw})


def batch(B=64):
    """One state, rewards without future: Q(a) = -4 |a - (0.4, -0.3)|^2 in unit actions."""
    a = 4 * torch.rand(B, 2) - 2
    r = -4 * (a / 2 - torch.tensor([0.4, -0.3])).square().sum(1)
    return {"obs": torch.ones(B, 3), "next_obs": torch.ones(B, 3), "actions": a, "returns": r, "discounts": torch.zeros(B)}


def test_the_agent_finds_the_best_action_of_a_bandit_within_its_bounds():
    mpo = agent(target_period=10, epsilon_mean=0.05, epsilon_std=0.01)
    start = mpo.policy(mpo.actor, torch.ones(1, 3))[1].mean()
    for _ in range(300):
        report = mpo.update(batch())
    np.testing.assert_allclose(mpo.act(np.ones((1, 3)), deterministic=True)[0], [0.8, -0.6], atol=0.2)
    width = mpo.policy(mpo.actor, torch.ones(1, 3))[1].mean()
    assert 0.05 < width < 0.8 * start
    assert report.keys() == {"critic_loss", "eta", "kl_mean", "kl_std", "std"}


def test_the_actors_gradient_is_minus_the_weighted_likelihood():
    """Right after a copy the divergences have no gradient, so only the likelihood is left."""
    mpo, b = agent(), batch(8)
    with torch.no_grad():
        mean, std = mpo.policy(mpo.target_actor, b["next_obs"])
    state = mpo.generator.get_state()
    a = mean.unsqueeze(1) + std.unsqueeze(1) * torch.randn(8, 20, 2, generator=mpo.generator)
    with torch.no_grad():
        q = mpo.target_critic(torch.cat((torch.ones(8, 20, 3), a.clamp(-1, 1)), 2)).squeeze(2)
    w = mpo_weights(q, solve_temperature(q, 0.1))
    m, s = mpo.policy(mpo.actor, b["next_obs"])
    loss = -(w * (Normal(m.unsqueeze(1), s.unsqueeze(1)).log_prob(a)).sum(2)).sum(1).mean()
    expected = torch.autograd.grad(loss, list(mpo.actor.parameters()))
    mpo.generator.set_state(state)
    mpo.update(b)
    for p, g in zip(mpo.actor.parameters(), expected):
        torch.testing.assert_close(p.grad, g, atol=2e-5, rtol=1e-3)


def test_the_critics_goal_is_the_reward_plus_the_mean_value_of_the_drawn_actions():
    mpo, b = agent(), batch(8) | {"next_obs": torch.randn(8, 3), "discounts": torch.tensor([0.9] * 6 + [0.0] * 2)}
    with torch.no_grad():
        for p in mpo.target_critic.parameters():
            p.add_(0.1)  # values that matter, and other ones than the critic's
    state = mpo.generator.get_state()
    noise = torch.randn(8, 20, 2, generator=mpo.generator)
    errors = []
    with torch.no_grad():
        mean, std = mpo.policy(mpo.target_actor, b["next_obs"])
        for i in range(8):
            pairs = [torch.cat((b["next_obs"][i], (mean[i] + std[i] * noise[i, j]).clamp(-1, 1))) for j in range(20)]
            after = sum(float(mpo.target_critic(x)) for x in pairs) / 20
            goal = float(b["returns"][i]) + (0.9 * after if i < 6 else 0.0)
            errors.append(float(mpo.critic(torch.cat((b["obs"][i], b["actions"][i] / 2)))) - goal)
            assert abs(after) > 0.1
    mpo.generator.set_state(state)
    torch.manual_seed(99)  # nothing is drawn from the global generator
    assert mpo.update(b)["critic_loss"] == pytest.approx(np.mean(np.square(errors)) / 2, rel=1e-4)


def test_a_multiplier_grows_while_its_constraint_is_violated():
    mpo = agent(tau=0.0)
    with torch.no_grad():
        mpo.actor[-1].bias[:2] += 3.0  # the means are far from those of the target
    mpo.update(batch())
    assert mpo.multipliers[0] > 0 > mpo.multipliers[1]


def test_a_strong_multiplier_holds_its_part_of_the_policy():
    def parts(strength):
        mpo = agent(tau=0.0, dual_lr=0.0)
        with torch.no_grad():
            mpo.multipliers.copy_(torch.tensor(strength))
        for _ in range(60):
            report = mpo.update(batch())
        return np.array([report["kl_mean"], report["kl_std"]])

    free = parts([-20.0, -20.0])
    assert (free > 1e-3).all()
    assert parts([50.0, -20.0])[0] < 0.1 * free[0] and parts([-20.0, 50.0])[1] < 0.1 * free[1]


def test_fit_takes_the_bounds_of_the_environment_and_repeats_itself():
    def run():
        torch.manual_seed(0)
        mpo = MPO(3, 1, warmup=200, batch_size=16, hidden=(16,))
        return mpo, mpo.fit(BatchedPendulum(4), 900, seed=3)

    (mpo, first), (_, second) = run(), run()
    assert mpo.low == -2 and mpo.high == 2 and first["return"] == second["return"] and len(first["return"]) == 4
    a = mpo.act(np.zeros((500, 3)))
    assert a.shape == (500, 1) and a.dtype == np.float32 and np.abs(a).max() > 1 and np.abs(a).max() <= 2


def test_bad_input():
    q, one = values(), torch.ones(4, 2, dtype=F64)
    for call in (
        lambda: temperature_dual(q, torch.tensor(0.0), 0.1),
        lambda: temperature_dual(q, torch.ones(2), 0.1),
        lambda: temperature_dual(q, torch.tensor(1.0), -0.1),
        lambda: temperature_dual(q[0], torch.tensor(1.0), 0.1),
        lambda: mpo_weights(q, torch.tensor(-1.0)),
        lambda: mpo_weights(q[:, :0], torch.tensor(1.0)),
        lambda: solve_temperature(q, 0.0),
        lambda: decoupled_kl(one, one, one, one[:2]),
        lambda: decoupled_kl(one, one, one, 0 * one),
        lambda: gaussian_m_step(torch.zeros(4, 9, 2), q, one, one[:1], 0.1, 0.1),
        lambda: gaussian_m_step(torch.zeros(4, 9, 2), q, one, one, 0.0, 0.1),
        lambda: MPO(3, 1, epsilon=0.0),
        lambda: MPO(3, 1, n_actions=1),
        lambda: MPO(3, 1, low=-1.0),
    ):
        with pytest.raises(ValueError, match=r"must|expected|give"):
            call()
