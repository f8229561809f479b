"""Soft actor-critic: its density against quadrature and Stable-Baselines3, its targets by hand, its fixed point on a bandit."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from dlatlas.rl.envs.control import BatchedPendulum
from dlatlas.rl.sac import SAC, sac_actor_loss, soft_q_target, soft_value_target, tanh_normal_log_prob

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.2, -0.7), (-0.4, 0.6)])
def test_the_density_integrates_to_one(mean, log_std):
    def density(a):
        one = torch.ones(1, 1, dtype=F64)
        return tanh_normal_log_prob(mean * one, log_std * one, math.atanh(a) * one).exp().item()

    assert quad(density, -1, 1, limit=200)[0] == pytest.approx(1, abs=1e-6)


def test_the_density_is_that_of_stable_baselines_and_of_torch():
    mean, log_std, u = rand(50, 3), 0.5 * rand(50, 3, seed=1), rand(50, 3, seed=2)
    ours = tanh_normal_log_prob(mean, log_std, u)
    peer = SquashedDiagGaussianDistribution(3, epsilon=0.0).proba_distribution(mean, log_std)
    torch.testing.assert_close(ours, peer.log_prob(torch.tanh(u), u))
    torchs = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    torch.testing.assert_close(ours, torchs.log_prob(torch.tanh(u)))
    # With its own epsilon the peer is off by at most that much where the tanh is not saturated.
    usual = SquashedDiagGaussianDistribution(3).proba_distribution(mean, log_std)
    torch.testing.assert_close(ours, usual.log_prob(torch.tanh(u), u), atol=1e-2, rtol=0)


def test_the_density_is_finite_and_right_far_out():
    u = torch.tensor([[20.0], [-20.0], [8.0]])
    zero = torch.zeros_like(u)
    got = tanh_normal_log_prob(zero, zero, u.requires_grad_())
    assert torch.isfinite(torch.autograd.grad(got.sum(), u)[0]).all()
    # Far out log(1 - tanh^2 u) = log 4 - 2 |u|.
    torch.testing.assert_close(got.detach(), (-0.5 * u**2 - 0.5 * math.log(2 * math.pi) - math.log(4) + 2 * u.abs()).detach().squeeze(1))


def test_gradients_of_the_density():
    args = [x.requires_grad_() for x in (rand(4, 2), 0.3 * rand(4, 2, seed=1), rand(4, 2, seed=2))]
    assert torch.autograd.gradcheck(tanh_normal_log_prob, args)


def test_targets_by_hand_and_without_gradient():
    q1, q2, logp = torch.tensor([1.0, 5.0], requires_grad=True), torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.5], requires_grad=True)
    target = soft_value_target(q1, q2, logp, alpha=0.2)
    torch.testing.assert_close(target, torch.tensor([1.2, 2.9]))
    v = torch.tensor([10.0, 10.0], requires_grad=True)
    q_target = soft_q_target(torch.tensor([1.0, 1.0]), torch.tensor([0, 1]), v, gamma=0.9)
    torch.testing.assert_close(q_target, torch.tensor([10.0, 1.0]))
    torch.testing.assert_close(soft_q_target(torch.ones(2), torch.tensor([False, True]), v, gamma=0.9), q_target)
    assert not target.requires_grad and not q_target.requires_grad


def test_actor_loss_by_hand_with_gradient_to_both():
    logp, q = torch.tensor([-1.0, 3.0], requires_grad=True), torch.tensor([2.0, 4.0], requires_grad=True)
    loss = sac_actor_loss(logp, q, alpha=0.5)
    assert loss.item() == pytest.approx((-2.5 - 2.5) / 2)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.full((2,), 0.25))
    torch.testing.assert_close(q.grad, torch.full((2,), -0.5))


def test_the_fixed_point_on_a_bandit_is_the_softmax():
    """Descent on E_pi[alpha log pi - Q] over a finite policy ends at softmax(Q / alpha), where the soft value is the log-sum-exp."""
    q, alpha = torch.tensor([1.0, 0.2, -0.5], dtype=F64), 0.4
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    opt = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        logp = logits.log_softmax(0)
        loss = 3 * sac_actor_loss(logp.exp() * logp, logp.exp() * q, alpha)  # the sum over actions
        loss.backward()
        return loss

    opt.step(closure)
    logp = logits.detach().log_softmax(0)
    torch.testing.assert_close(logp.exp(), torch.softmax(q / alpha, 0), atol=1e-6, rtol=0)
    soft = soft_value_target(q, q, logp, alpha)  # the same for every action
    torch.testing.assert_close(soft, torch.full((3,), (alpha * torch.logsumexp(q / alpha, 0)).item(), dtype=F64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_the_agent_finds_the_boltzmann_law_of_a_bandit(bandit, alpha):
    """The best squashed Gaussian is near exp(r / alpha): its mean and mean reward are those of the quadrature over the unit interval."""
    torch.manual_seed(0)
    agent = SAC(2, 1, -2.0, 4.0, hidden=(32, 32), lr=3e-3, alpha=alpha, batch_size=128, warmup=200)
    agent.fit(bandit(16, lambda a: 0.5 * a), 16 * 420, seed=0)  # in unit actions: 0.5 (1 + 3 a)
    unit = np.linspace(-1, 1, 2001)[1:-1]
    w = np.exp(1.5 * unit / alpha)
    want = (w * unit).sum() / w.sum()
    got = (agent.act(np.random.default_rng(0).uniform(-1, 1, (4000, 2))) - 1) / 3
    assert got.mean() == pytest.approx(want, abs=0.08)
    assert np.abs(got).max() <= 1


def test_an_update_is_the_three_losses():
    torch.manual_seed(0)
    agent = SAC(3, 1, -2.0, 2.0, hidden=(8, 8), alpha=0.3, gamma=0.9, tau=0.1, reward_scale=0.5, warmup=32, batch_size=16)
    agent.fit(BatchedPendulum(4), 24, seed=0)  # fills the memory, no update yet
    assert agent.updates == 0
    batch, state = agent.sample(), agent.generator.get_state()
    mean, log_std = agent.policy(batch["obs"])
    u = mean + log_std.exp() * torch.randn(mean.shape, generator=agent.generator)
    logp = tanh_normal_log_prob(mean, log_std, u)
    pair = torch.cat((batch["obs"], torch.tanh(u)), 1)
    low = torch.minimum(agent.critic1(pair), agent.critic2(pair)).squeeze(1)
    goal = batch["returns"] + 0.9 * agent.target_value(batch["next_obs"]).squeeze(1)
    seen = torch.cat((batch["obs"], batch["actions"] / 2), 1)
    losses = [(agent.value(batch["obs"]).squeeze(1) - (low - 0.3 * logp)).square().mean() / 2]
    losses += [(c(seen).squeeze(1) - goal).square().mean() / 2 for c in (agent.critic1, agent.critic2)]
    wanted = torch.autograd.grad((0.3 * logp - low).mean(), list(agent.actor.parameters()))
    before = [p.detach().clone() for p in agent.target_value.parameters()]
    agent.generator.set_state(state)
    report = agent.update(batch)
    assert report["critic_loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    assert report["actor_loss"] == pytest.approx((0.3 * logp - low).mean().item(), rel=1e-5)
    for p, g in zip(agent.actor.parameters(), wanted):
        torch.testing.assert_close(p.grad, g)
    for old, new, p in zip(before, agent.target_value.parameters(), agent.value.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p.detach())


def test_rewards_and_temperature_trade_off():
    """Scaling rewards and temperature together scales the values and leaves the actor's gradient in direction: here, its targets."""
    q, logp = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -0.3])
    torch.testing.assert_close(soft_value_target(5 * q, 5 * q, logp, 1.0), 5 * soft_value_target(q, q, logp, 0.2))


def test_the_agent_acts_in_the_box_and_repeats_itself():
    def run():
        torch.manual_seed(0)
        agent = SAC(3, 1, -2.0, 2.0, hidden=(8, 8), warmup=40, batch_size=16)
        history = agent.fit(BatchedPendulum(4, steps=10), 120, seed=3)
        return agent, history

    (one, h1), (two, h2) = run(), run()
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert h1["return"] == h2["return"] and np.array_equal(one.act(obs, True), two.act(obs, True))
    np.testing.assert_allclose(one.act(obs, True), 2 * np.tanh(one.policy(torch.tensor(obs))[0].detach().numpy()), rtol=1e-6)
    assert np.abs(one.act(obs)).max() <= 2 and not np.array_equal(one.act(obs), one.act(obs))


def test_bad_input():
    one, two = torch.ones(1), torch.ones(2)
    for call in (lambda: soft_value_target(one, two, one), lambda: soft_value_target(one, one, one, alpha=-1), lambda: soft_q_target(one, one, two, 0.9),
                 lambda: soft_q_target(one, one, one, 1.1), lambda: sac_actor_loss(two, one), lambda: sac_actor_loss(torch.ones(0), torch.ones(0)),
                 lambda: tanh_normal_log_prob(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2)),
                 lambda: tanh_normal_log_prob(torch.ones(2, 1), torch.ones(1), torch.ones(2, 1)),
                 lambda: SAC(2, 1, -1.0, 1.0, alpha=-0.1), lambda: SAC(2, 1, -1.0, 1.0, n_step=3)):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            call()
