"""Policy optimisers against closed forms, and that they learn."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from dlatlas.rl.kit.evaluate import evaluate
from dlatlas.rl.kit.nets import ActorCritic
from dlatlas.rl.kit.pg import Hooks, a2c, conjugate_gradient, ppo, ppo_loss, trpo_step


def test_clipped_surrogate_case_by_case():
    ratio = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5], requires_grad=True)
    adv = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0], requires_grad=True)
    loss = ppo_loss(ratio, adv, 0.2)
    assert loss.item() == pytest.approx(-(0.5 - 0.8 + 2.2 + 1.2 - 1.5) / 5)
    loss.backward()
    # No pull once the ratio has left the range in the direction of the advantage.
    torch.testing.assert_close(ratio.grad, -torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0]) / 5)
    assert adv.grad is None
    with pytest.raises(ValueError, match="clip"):
        ppo_loss(ratio, adv, 0.0)


def test_conjugate_gradients_solve():
    a = torch.randn(9, 9, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(9), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(lambda v: a @ v, b, 30, 1e-24), torch.linalg.solve(a, b), rtol=1e-7, atol=1e-8)
    # The stop is relative: a small right-hand side is solved as well as a large one.
    torch.testing.assert_close(conjugate_gradient(lambda v: a @ v, 1e-8 * b, 30), 1e-8 * conjugate_gradient(lambda v: a @ v, b, 30))


class Gauss(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def dist(self):
        return Independent(Normal(self.mean, self.std), 1)


def step(policy, surrogate, **kwargs):
    old = Independent(Normal(policy.mean.detach().clone(), policy.std), 1)
    return trpo_step(policy, surrogate, lambda: kl_divergence(old, policy.dist()), **kwargs)


def test_trust_region_step_in_closed_form():
    """A linear objective and a Gaussian mean: the Fisher matrix is 1/std^2, the step is the natural gradient at the border."""
    policy, g = Gauss(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    out = step(policy, lambda: policy.mean @ g, max_kl=0.02, damping=0.0)
    natural = policy.std**2 * g
    torch.testing.assert_close(policy.mean.detach(), natural * (0.04 / (natural @ g)).sqrt(), rtol=1e-6, atol=1e-9)
    assert out["accepted"] and out["halvings"] == 0 and out["kl"] == pytest.approx(0.02)
    assert out["improvement"] == pytest.approx((policy.mean.detach() @ g).item())


def test_trust_region_backtracks_and_refuses():
    policy = Gauss()
    # Improves only close by: the full step overshoots the narrow peak.
    out = step(policy, lambda: policy.mean[0] - 60 * policy.mean[0] ** 2, max_kl=0.1, damping=0.0)
    assert out["accepted"] and out["halvings"] > 0 and 0 < policy.mean[0] < 1 / 60
    policy = Gauss()
    out = step(policy, lambda: policy.mean[0] - 1e9 * policy.mean[0] ** 2, max_kl=0.1)
    assert not out["accepted"] and not policy.mean.any()
    out = step(policy, lambda: 0 * policy.mean.sum())
    assert not out["accepted"] and not policy.mean.any()
    # A divergence that is far larger than its curvature at the old parameters says.
    policy = Gauss()
    out = trpo_step(policy, lambda: policy.mean[0], lambda: 0.5 * policy.mean[0] ** 2 + 1e4 * policy.mean[0] ** 4, max_kl=0.1, damping=0.0)
    assert out["accepted"] and out["kl"] <= 0.15 and out["halvings"] > 0
    for kwargs in ({"max_kl": 0}, {"cg_iters": 0}, {"damping": -1}):
        with pytest.raises(ValueError, match="max_kl"):
            step(policy, lambda: policy.mean.sum(), **kwargs)


def test_ppo_learns_cartpole_and_a_seed_fixes_it():
    policy, history = ppo("CartPole-v1", 16_000, lr=1e-3, n_envs=8, seed=0)
    assert evaluate(policy, "CartPole-v1", 10, seed=100)["mean"] > 100  # a random policy reaches 20
    assert len(history["step"]) == len(history["return"]) and history["update"][-1] == 16_384
    assert 0 < np.mean(history["kl"]) < 0.1
    a, b = (ppo("CartPole-v1", 600, n_envs=4, horizon=50, seed=3) for _ in range(2))
    assert a[1] == b[1] and all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters()))


def test_a2c_learns_cartpole():
    policy, _ = a2c("CartPole-v1", 16_000, n_envs=16, lr=3e-3, seed=0, normalise=True)
    assert evaluate(policy, "CartPole-v1", 10, seed=100)["mean"] > 60
    with pytest.raises(ValueError, match="epochs"):
        a2c("CartPole-v1", 10, epochs=3)


def test_hooks_see_the_segment_and_change_the_loss():
    class Recorded(Hooks):
        def __init__(self):
            self.sizes, self.stopped = [], 0

        def after_rollout(self, policy, batch):
            self.sizes.append(len(batch["adv"]))
            # The value targets are advantage plus value, and the last observation of a step is its own successor.
            torch.testing.assert_close(batch["returns"], batch["adv"] + batch["values"])
            torch.testing.assert_close(batch["logp"], policy(batch["obs"])[0].log_prob(batch["actions"]).detach())
            return {**batch, "zero": torch.zeros_like(batch["adv"])}

        def policy_loss(self, policy, batch, dist, clip):
            return (batch["zero"] * dist.log_prob(batch["actions"])).mean()

    hooks, net = Recorded(), ActorCritic(3, act_dim=1)
    before = [p.clone() for p in net.actor.parameters()], [p.clone() for p in net.critic.parameters()]
    policy, _ = ppo(
        "Pendulum-v1", 120, policy=net, n_envs=3, horizon=20, hooks=hooks, reward_scale=0.1, callback=lambda p, h: len(h["kl"]) == 2
    )
    assert policy is net and hooks.sizes == [60, 60]
    assert all(torch.equal(p, q) for p, q in zip(net.actor.parameters(), before[0]))
    assert not all(torch.equal(p, q) for p, q in zip(net.critic.parameters(), before[1]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="horizon"):
        ppo("CartPole-v1", 10, horizon=0)
    with pytest.raises(ValueError, match="Box"):
        ppo("FrozenLake-v1", 10)
