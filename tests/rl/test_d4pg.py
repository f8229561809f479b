"""The critic's loss against a projection by hand, the actor's against finite differences, and the agent on one-step problems."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.rl.d4pg import D4PG, d4pg_actor_loss, d4pg_critic_loss
from dlatlas.rl.envs.control import BatchedPendulum


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(logits, target_probs, returns, discounts, support, weights=None):
    """Loops over transitions and atoms."""
    step, total = support[1] - support[0], []
    for i in range(len(logits)):
        target = np.zeros(len(support))
        for k, z in enumerate(support):
            y = min(max(returns[i] + discounts[i] * z, support[0]), support[-1])
            for j, at in enumerate(support):
                target[j] += target_probs[i, k] * max(0.0, 1 - abs(y - at) / step)
        log_p = logits[i] - np.log(np.exp(logits[i]).sum())
        total.append(-(target * log_p).sum() * (1 if weights is None else weights[i]))
    return np.mean(total)


def random_batch(n=6, k=7):
    logits = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(n, k, dtype=torch.float64)
    returns, discounts = 3 * torch.randn(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    discounts[0] = 0
    return logits, probs / probs.sum(1, keepdim=True), returns, discounts, torch.linspace(-4, 5, k, dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_critic_loss_by_hand(weighted):
    batch = random_batch()
    weights = torch.rand(6, dtype=torch.float64) if weighted else None
    loss = d4pg_critic_loss(*batch, weights)
    arrays = [x.detach().numpy() for x in batch]
    np.testing.assert_allclose(loss.item(), by_hand(*arrays, None if weights is None else weights.numpy()), rtol=1e-10)


def test_the_gradient_is_prediction_minus_target_and_the_target_has_none():
    logits, probs, returns, discounts, support = random_batch()
    probs.requires_grad_()
    d4pg_critic_loss(logits, probs, returns, discounts, support).backward()
    assert probs.grad is None
    np.testing.assert_allclose(logits.grad.sum(1), np.zeros(6), atol=1e-12)  # both are probabilities
    # a gradient step on the logits moves the mean towards that of the target: E[gradient * z] = mean(prediction) - mean(clipped target)
    y = (returns[:, None] + discounts[:, None] * support).clamp(-4, 5)
    gap = logits.softmax(1) @ support - (probs * y).sum(1)
    torch.testing.assert_close(6 * logits.grad @ support, gap.detach())


def test_two_atoms_are_logistic_regression_of_the_mean():
    support = torch.tensor([0.0, 10.0], dtype=torch.float64)
    logits, probs = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64).softmax(1)
    returns, discounts = torch.rand(5, dtype=torch.float64), torch.full((5,), 0.8, dtype=torch.float64)
    mean = (returns + discounts * probs[:, 1] * 10) / 10
    oracle = nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], mean)
    torch.testing.assert_close(d4pg_critic_loss(logits, probs, returns, discounts, support), oracle)


def test_a_point_target_has_the_mean_of_ddpg():
    support = torch.linspace(-4, 5, 7, dtype=torch.float64)
    probs = torch.eye(7, dtype=torch.float64)[[3]]  # all mass on one atom
    logits = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([logits], lr=0.1)
    for _ in range(800):
        opt.zero_grad()
        d4pg_critic_loss(logits, probs, torch.tensor([0.7]).double(), torch.tensor([0.9]).double(), support).backward()
        opt.step()
    torch.testing.assert_close((logits.softmax(1) @ support).item(), 0.7 + 0.9 * support[3].item(), rtol=0, atol=1e-2)


def test_actor_gradient_by_finite_differences():
    support = torch.linspace(-1, 1, 5, dtype=torch.float64)
    actor = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh()).double()
    critic = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    obs = torch.randn(6, 3, dtype=torch.float64)

    def loss():
        return d4pg_actor_loss(actor, lambda s, a: critic(torch.cat([s, a], 1)), obs, support)

    means = critic(torch.cat([obs, actor(obs)], 1)).softmax(1) @ support
    torch.testing.assert_close(loss(), -means.mean())
    loss().backward()
    p = actor[0].weight
    for at in ((0, 0), (3, 2)):
        with torch.no_grad():
            p[at] += 1e-6
            up = loss()
            p[at] -= 2e-6
            down = loss()
            p[at] += 1e-6
        np.testing.assert_allclose(p.grad[at].item(), ((up - down) / 2e-6).item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(6, 5)}, "logits"),
        ({0: torch.zeros(0, 7), 1: torch.zeros(0, 7)}, "logits"),
        ({2: torch.zeros(5)}, "returns"),
        ({3: torch.zeros(6, 1)}, "discounts"),
        ({4: torch.tensor([0.0, 1, 2, 3, 4, 5, 9])}, "uniform"),
        ({5: torch.ones(5)}, "weights"),
    ],
)
def test_bad_arguments(change, message):
    arguments = [*random_batch(), None]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        d4pg_critic_loss(*arguments)


def test_bad_actor_arguments():
    with pytest.raises(ValueError, match="empty"):
        d4pg_actor_loss(nn.Identity(), lambda s, a: s, torch.zeros(0, 3), torch.linspace(0, 1, 3))
    with pytest.raises(ValueError, match="critic_logits_fn"):
        d4pg_actor_loss(nn.Identity(), lambda s, a: s[:, :2], torch.zeros(4, 3), torch.linspace(0, 1, 3))
    with pytest.raises(ValueError, match="grid"):
        D4PG(3, 1, -1, 1, torch.tensor([0.0, 1.0, 3.0]))


class Target(gymnasium.Env):
    """One step: the reward is -(a - 0.5 s)^2 with a sign that is thrown in, so that returns have two peaks."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.s, {}

    def step(self, action):
        reward = -((float(action[0]) - 0.5 * float(self.s[0])) ** 2) + (1.0 if self.np_random.random() < 0.5 else -1.0)
        return self.s, reward, True, False, {}


@pytest.mark.parametrize("prioritised", [False, True])
def test_one_step_problem_policy_and_both_peaks(prioritised):
    agent = D4PG(
        1, 1, -2.0, 2.0, torch.linspace(-8, 2, 41), prioritised=prioritised, hidden=(32,), batch_size=64, warmup=200, lr=3e-3, updates_per_step=2
    )  # fmt: skip
    history = agent.fit(Target, 2400, n_envs=8)
    assert np.isfinite(history["critic_loss"]).all()
    s = np.array([[-0.8], [0.0], [0.8]], dtype=np.float32)
    assert np.abs(agent.act(s, deterministic=True) - 0.5 * s).max() < 0.4
    mean, spread = agent.return_moments(torch.zeros(1, 1), torch.zeros(1, 1))
    assert abs(mean.item()) < 0.5 and 0.7 < spread.item() < 1.4
    p = agent._logits(agent.critic, torch.zeros(1, 1), torch.zeros(1, 1)).softmax(1)[0]
    near = [p[(agent.support - z).abs() < 0.6].sum() for z in (-1, 0, 1)]
    assert near[0] > 0.2 and near[2] > 0.2 and near[1] < 0.2 and len(p) == 41


def test_update_is_that_of_the_two_losses():
    agent = D4PG(3, 1, -2.0, 2.0, torch.linspace(-1700, 0, 11), hidden=(8,), batch_size=16, lr=1e-2, warmup=0)
    agent.fit(BatchedPendulum(4), 40)
    batch = agent.sample()
    with torch.no_grad():
        after = agent.target_critic(torch.cat([batch["next_obs"], torch.tanh(agent.target_actor(batch["next_obs"]))], 1)).softmax(1)
        logits = agent.critic(torch.cat([batch["obs"], batch["actions"] / 2], 1))
        expected = d4pg_critic_loss(logits, after, batch["returns"], batch["discounts"], agent.support)
    before = [p.clone() for p in (*agent.actor.parameters(), *agent.critic.parameters())]
    report = agent.update(batch)
    assert report["critic_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert all(not torch.equal(p, q) for p, q in zip(before, (*agent.actor.parameters(), *agent.critic.parameters())))


def test_a_narrow_support_is_warned_of_once_and_a_wide_one_is_not():
    make = {"hidden": (8,), "batch_size": 16, "warmup": 16}
    narrow = D4PG(3, 1, -2.0, 2.0, torch.linspace(-3, 0, 11), **make)
    with pytest.warns(UserWarning, match="widen the support") as caught:
        narrow.fit(BatchedPendulum(4), 160)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        D4PG(3, 1, -2.0, 2.0, torch.linspace(-1700, 0, 11), **make).fit(BatchedPendulum(4), 160)


def test_noise_and_bounds():
    agent = D4PG(3, 1, -2.0, 2.0, torch.linspace(-10, 0, 11))
    assert agent.noise == 0.3 and agent.n_step == 5 and agent.target_period == 100
    obs = np.zeros((500, 3), dtype=np.float32)
    noisy, still = agent.act(obs), agent.act(obs, deterministic=True)
    assert np.ptp(still) == 0 and 0.5 < (noisy - still).std() < 0.7  # 0.3 of half the box
    assert np.abs(agent.act(np.full((500, 3), 1e3, dtype=np.float32))).max() <= 2


def test_an_update_weights_the_losses_of_replayed_transitions():
    """Transitions of weight zero leave the critic as if they were not there; the priorities are all cross-entropies."""
    atoms = torch.linspace(-1700, 0, 11)
    agent = D4PG(3, 1, -2.0, 2.0, atoms, prioritised=True, hidden=(8,), batch_size=16, lr=1e-2, warmup=10**9)
    agent.fit(BatchedPendulum(4), 80)
    batch = agent.sample()
    batch["weights"] = torch.linspace(0.0, 1.0, 16)
    with torch.no_grad():
        after = agent.target_critic(torch.cat([batch["next_obs"], torch.tanh(agent.target_actor(batch["next_obs"]))], 1)).softmax(1)
        logits = agent.critic(torch.cat([batch["obs"], batch["actions"] / 2], 1))
        each = [d4pg_critic_loss(logits[[i]], after[[i]], batch["returns"][[i]], batch["discounts"][[i]], agent.support) for i in range(16)]
    report = agent.update(batch)
    each = torch.stack(each)
    assert report["critic_loss"] == pytest.approx(float((batch["weights"] * each).mean()), rel=1e-5)
    assert report["critic_loss"] != pytest.approx(float(each.mean()), rel=1e-2)
    torch.testing.assert_close(report["priorities"], each)


def test_returns_of_another_precision():
    logits, probs, returns, discounts, support = (x.detach() for x in random_batch())
    mixed = d4pg_critic_loss(logits.float(), probs.float(), returns, discounts, support.float())
    torch.testing.assert_close(mixed.double(), d4pg_critic_loss(logits, probs, returns, discounts, support), rtol=1e-4, atol=1e-5)
