"""Factorised baselines against loops, Gaussian moments and their own definition."""

import numpy as np
import pytest
import torch

from dlatlas.rl.envs.control import BatchedPendulum
from dlatlas.rl.factorized_baseline import FactorizedHooks, factorized_baseline, factorized_surrogate, optimal_baseline
from dlatlas.rl.kit.nets import ActorCritic
from dlatlas.rl.kit.pg import ppo

F64 = torch.float64
B, M = 6, 4


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, dtype=F64, generator=g) for n in (2, M, M))


def value(obs, a):
    """Coupled in all parts of the action and in the state."""
    return torch.sin(a @ torch.arange(1, M + 1, dtype=a.dtype)) + a.prod(1) + obs.sum(1) * a[:, 0]


def test_mean_mode_is_a_loop_over_the_parts():
    obs, a, mean = batch()
    b = factorized_baseline(value, obs, a, mean)
    assert b.shape == (B, M)
    for i in range(M):
        replaced = a.clone()
        replaced[:, i] = mean[:, i]
        torch.testing.assert_close(b[:, i], value(obs, replaced))


@pytest.mark.parametrize("mode", ["mean", "mc"])
def test_a_part_has_no_say_in_its_own_baseline(mode):
    obs, a, mean = batch()

    def baseline(x):
        return factorized_baseline(value, obs, x, mean, 0.3 * torch.ones(M, dtype=F64), mode, generator=torch.Generator().manual_seed(1))

    before = baseline(a)
    for i in range(M):
        changed = a.clone()
        changed[:, i] += 1.7
        after = baseline(changed)
        torch.testing.assert_close(after[:, i], before[:, i])
        others = [j for j in range(M) if j != i]
        assert ((after - before)[:, others].abs() > 1e-3).all()


def test_many_draws_are_an_expectation():
    obs, a, mean = batch()
    std = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)
    n = 20_000

    def square(obs, a):
        return (a**2).sum(1)

    b = factorized_baseline(square, obs, a, mean, std, "mc", n=n, generator=torch.Generator().manual_seed(0))
    expected = (a**2).sum(1, keepdim=True) - a**2 + mean**2 + std**2
    se = (4 * mean**2 * std**2 + 2 * std**4).sqrt() / n**0.5
    assert ((b - expected).abs() < 4.5 * se).all()
    # Linear in each part: the mean of the values is the value of the mean.
    linear = factorized_baseline(
        lambda o, x: x.prod(1), obs, a, mean, std.expand(B, M), "mc", n=n, generator=torch.Generator().manual_seed(0)
    )
    exact = factorized_baseline(lambda o, x: x.prod(1), obs, a, mean)
    rest = torch.stack([a[:, [j for j in range(M) if j != i]].prod(1) for i in range(M)], 1)
    assert ((linear - exact).abs() < 4.5 * rest.abs() * std / n**0.5).all()


def test_the_variance_on_target_matching_is_that_of_gaussian_moments():
    """r = -|a - c|^2, delta = mean - c: parts of size 12 delta^2 + 15 sigma^2 (second moment) with the mean mode."""
    n, m, sigma = 400_000, 3, 0.7
    g = torch.Generator().manual_seed(0)
    delta = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    a = delta + sigma * torch.randn(n, m, dtype=F64, generator=g)  # c = 0

    def reward(obs, x):
        return -(x**2).sum(1)

    b = factorized_baseline(reward, torch.zeros(n, 1, dtype=F64), a, delta.expand(n, m))
    score = (a - delta) / sigma**2
    ours = score * (reward(None, a).unsqueeze(1) - b)
    np.testing.assert_allclose(ours.mean(0), -2 * delta, atol=0.05)
    np.testing.assert_allclose(ours.var(0), 8 * delta**2 + 15 * sigma**2, rtol=0.03)
    state = -(delta**2).sum() - sigma**2 * (m + 2)  # the best constant
    plain = score * (reward(None, a) - state).unsqueeze(1)
    np.testing.assert_allclose(plain.var(0).sum(), 4 * (delta**2).sum() * (m + 1) + 2 * sigma**2 * m * (m + 2), rtol=0.03)


def test_optimal_baseline_in_numpy_and_for_a_gaussian():
    g = torch.Generator().manual_seed(0)
    grads, q = torch.randn(5, 3, 2, dtype=F64, generator=g), torch.randn(5, 3, dtype=F64, generator=g)
    w = (grads.numpy() ** 2).sum(2)
    np.testing.assert_allclose(optimal_baseline(grads, q), (w * q.numpy()).sum(0) / w.sum(0))
    # One part of target matching at its optimum: -E[x^4]/E[x^2] = -3 sigma^2.
    x = 0.5 * torch.randn(200_000, 1, dtype=F64, generator=g)
    assert float(optimal_baseline((x / 0.25).unsqueeze(2), -(x**2))) == pytest.approx(-0.75, rel=0.03)
    torch.testing.assert_close(optimal_baseline(torch.zeros(5, 3, 2, dtype=F64), q), q.mean(0))


def test_no_other_baseline_has_less_variance_than_the_optimal_one():
    g = torch.Generator().manual_seed(0)
    grads, q = torch.randn(50, 1, 2, dtype=F64, generator=g), torch.randn(50, 1, dtype=F64, generator=g)
    best = float(optimal_baseline(grads, q))

    def size(b):
        return float((grads.square().sum(2) * (q - b) ** 2).mean())

    assert size(best) < min(size(best + 0.01), size(best - 0.01))


def test_surrogate_gradient_in_numpy():
    obs, a, mean = batch()
    mean.requires_grad_()
    std = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)
    returns = value(obs, a).requires_grad_()
    b = factorized_baseline(value, obs, a, mean).requires_grad_()
    logp = torch.distributions.Normal(mean, std).log_prob(a)
    factorized_surrogate(logp, returns, b).backward()
    r, A, mu = returns.detach().numpy(), a.numpy(), mean.detach().numpy()
    np.testing.assert_allclose(mean.grad, (A - mu) / std.numpy() ** 2 * (r[:, None] - b.detach().numpy()) / B)
    assert returns.grad is None and b.grad is None


def test_bad_input():
    obs, a, mean = batch()
    std = torch.ones(M, dtype=F64)
    for call in (
        lambda: factorized_baseline(value, obs, a, mean, torch.eye(M, dtype=F64)),
        lambda: factorized_baseline(value, obs, a, mean, torch.eye(M, dtype=F64).expand(B, M, M), "mc"),
        lambda: factorized_baseline(value, obs, a, mean, -std),
        lambda: factorized_baseline(value, obs, a, mean, None, "mc"),
        lambda: factorized_baseline(value, obs, a, mean, std, "median"),
        lambda: factorized_baseline(value, obs, a, mean, std, "mc", 0),
        lambda: factorized_baseline(value, obs[:3], a, mean),
        lambda: factorized_baseline(value, obs, a, mean[:, :2]),
        lambda: factorized_baseline(value, obs[:0], a[:0], mean[:0]),
        lambda: factorized_baseline(lambda s, x: x, obs, a, mean),
        lambda: optimal_baseline(a, a),
        lambda: optimal_baseline(torch.zeros(0, 3, 2), torch.zeros(0, 3)),
        lambda: factorized_surrogate(a, a[:, 0], a[:, :2]),
        lambda: factorized_surrogate(a, a[:, 0].sum(), a),
    ):
        with pytest.raises(ValueError, match=r"must|expected|needs"):
            call()


def test_a_square_covariance_is_refused_even_when_the_batch_is_as_large():
    a = torch.zeros(M, M, dtype=F64)
    obs, eye = torch.zeros(M, 2, dtype=F64), torch.eye(M, dtype=F64)
    with pytest.raises(ValueError, match="positive"):
        factorized_baseline(value, obs, a, a, eye, "mc")
    with pytest.raises(ValueError, match="does not factorise"):
        factorized_baseline(value, obs, a, a, eye + 0.5, "mc")  # all entries positive
    # Standard deviations of a state-independent policy, repeated for each sample, have the same shape.
    for std in (torch.ones(M, dtype=F64), torch.arange(1.0, M + 1, dtype=F64)):
        assert factorized_baseline(value, obs, a, a, std.expand(M, M), "mc").shape == (M, M)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_hooks_loss_has_the_factorised_gradient_at_the_old_policy(clip):
    torch.manual_seed(0)
    policy, hooks = ActorCritic(3, act_dim=2, log_std=-0.5), FactorizedHooks(3, 2, steps=30)

    def segment():
        obs = torch.randn(64, 3)
        with torch.no_grad():
            dist = policy.distribution(obs)
            actions = dist.sample()
        return {"obs": obs, "actions": actions, "logp": dist.log_prob(actions), "adv": -(actions - obs[:, :2]).square().sum(1)}

    plain = segment()
    assert torch.equal(hooks.after_rollout(policy, plain)["adv"], plain["adv"].unsqueeze(1).expand(64, 2))  # nothing learned yet
    raw = segment()
    b = factorized_baseline(hooks.value, raw["obs"], raw["actions"], policy.distribution(raw["obs"]).mean.detach())  # before the second fit
    batch = hooks.after_rollout(policy, raw)
    torch.testing.assert_close(batch["adv"], raw["adv"].unsqueeze(1) - b)
    assert b.std() > 0.05
    ours = torch.autograd.grad(hooks.policy_loss(policy, batch, policy.distribution(raw["obs"]), clip), list(policy.actor.parameters()))
    dist = policy.distribution(raw["obs"])
    logp_i = torch.distributions.Normal(dist.mean, dist.stddev).log_prob(raw["actions"])
    for g, e in zip(ours, torch.autograd.grad(-factorized_surrogate(logp_i, raw["adv"], b), list(policy.actor.parameters()))):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5)


def test_ppo_takes_the_hooks():
    torch.manual_seed(0)
    _, history = ppo(BatchedPendulum(4), 1600, horizon=200, seed=1, hooks=FactorizedHooks(3, 1, hidden=(8,), steps=5))
    assert np.isfinite(history["policy_loss"]).all() and len(history["return"]) == 8
